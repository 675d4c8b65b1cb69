import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalib_dskd.components.anomaly_map import AnomalyMapGenerator, anomaly_score, sum_of_levels
from anomalib_dskd.components.discrepancy import discrepancy, pooled_discrepancy
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.dskd.loss import DskdLoss


def pyramid(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, s, s, generator=generator) for c, s in ((4, 16), (6, 8))]


def test_levels_are_up_sampled_bilinearly_and_summed():
    ramp = torch.tensor([[0.0, 4.0]]).view(1, 1, 1, 2)
    constant = torch.full((1, 1, 1, 1), 10.0)
    # bilinear, half-pixel centers: 4 pixels up-sampled from a 2-pixel ramp are at 0, 1/4, 3/4 and 1 of it
    assert sum_of_levels([ramp, constant], (1, 4)).flatten().tolist() == [10.0, 11.0, 13.0, 14.0]


def test_score_is_the_largest_value_of_each_map():
    maps = torch.zeros(2, 1, 3, 3)
    maps[0, 0, 1, 2], maps[1, 0, 0, 0] = 5, -1
    assert anomaly_score(maps).tolist() == [[5.0], [0.0]]


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_map_is_the_smoothed_sum_of_discrepancies(sigma):
    first, second = pyramid(0), pyramid(1)
    summed = sum_of_levels([discrepancy(a, b, l2_weight=0.3) for a, b in zip(first, second, strict=True)], (48, 40))
    expected = [gaussian_filter(image[0].numpy(), sigma, mode="mirror", truncate=4) for image in summed]
    actual = AnomalyMapGenerator(l2_weight=0.3, sigma=sigma)(first, second, (48, 40))
    np.testing.assert_allclose(actual[:, 0].numpy(), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5, 35])  # the last is larger than the map
def test_errors_are_averaged_over_a_window_before_their_length_is_taken(size):
    first, second = pyramid(0)[0], pyramid(1)[0]
    a, b = (features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True) for features in (first, second))
    error = a - b  # (B, C, 16, 16)
    expected = np.empty((2, 16, 16))
    for row in range(16):
        for column in range(16):
            top, left = max(row - size // 2, 0), max(column - size // 2, 0)
            window = error[:, :, top : row + size // 2 + 1, left : column + size // 2 + 1]
            expected[:, row, column] = 1.3 / 2 * (window.mean(axis=(2, 3)) ** 2).sum(axis=1)
    actual = pooled_discrepancy(first, second, l2_weight=0.3, size=size)
    np.testing.assert_allclose(actual[:, 0].numpy(), expected, atol=1e-6)


def test_context_adds_the_deepest_levels_averaged_errors():
    first, second = pyramid(0), pyramid(1)
    plain = AnomalyMapGenerator(sigma=0)(first, second, (16, 16))
    deepest = pooled_discrepancy(first[-1], second[-1], l2_weight=0.1, size=3)
    generator = AnomalyMapGenerator(sigma=0, context_weight=4.0)
    expected = plain + 4 * sum_of_levels([deepest], (16, 16))
    torch.testing.assert_close(generator(first, second, (16, 16)), expected)
    assert generator.bound(2) == pytest.approx(2 * 1.1 * (2 + 4))


def test_negative_context_is_refused():
    with pytest.raises(ArgumentError, match=r"context_weight -1.0 must be a finite number, 0 or larger"):
        AnomalyMapGenerator(context_weight=-1.0)


def test_sigma_zero_disables_the_blur():
    first, second = pyramid(0), pyramid(1)
    generator = AnomalyMapGenerator(l2_weight=0.1, sigma=0)
    summed = sum_of_levels([discrepancy(a, b, l2_weight=0.1) for a, b in zip(first, second, strict=True)], (16, 16))
    assert torch.equal(generator(first, second, (16, 16)), summed)
    assert generator.margin == 0


def test_bound_is_reached_by_opposite_features():
    first = pyramid(0)
    generator = AnomalyMapGenerator(l2_weight=0.1, sigma=2)
    opposite = generator(first, [-level for level in first], (16, 16))
    assert opposite.max().item() == pytest.approx(generator.bound(2), rel=1e-5)
    assert generator.bound(2) == pytest.approx(4.4)


def test_mixed_precision_does_not_change_the_map():
    first, second = pyramid(0), pyramid(1)
    generator = AnomalyMapGenerator(sigma=4)
    expected = generator(first, second, (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = generator(first, second, (64, 64))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


def test_kernels_of_the_blur_are_not_part_of_checkpoints():
    generator = AnomalyMapGenerator(sigma=2.0)
    assert not generator.state_dict()
    assert len(list(generator.buffers())) == 2
    assert generator.blur[0].kernel.sum() == pytest.approx(1)


def test_defaults_are_the_papers():
    generator = AnomalyMapGenerator()  # lambda: section 4.1.2, sigma: Eq. (9)
    assert (generator.l2_weight, generator.kernel_size) == (0.1, AnomalyMapGenerator(sigma=4.0).kernel_size)
    assert DskdLoss().l2_weight == 0.1


@pytest.mark.parametrize(("sigma", "margin"), [(0.0, 0), (1.0, 4), (4.0, 16)])
def test_margin_is_the_radius_of_the_blur_which_ends_at_four_standard_deviations(sigma, margin):
    generator, size = AnomalyMapGenerator(l2_weight=0.0, sigma=sigma), 48
    assert generator.margin == margin
    impulse = torch.zeros(1, 1, size, size)
    impulse[..., size // 2, size // 2] = 1
    rows = generator.blur(impulse)[0, 0].amax(dim=1).nonzero().flatten()
    assert (rows.min(), rows.max()) == (size // 2 - margin, size // 2 + margin)


def test_pyramids_with_different_numbers_of_levels_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        AnomalyMapGenerator(sigma=1.0)(pyramid(0), pyramid(1)[:1], (16, 16))
