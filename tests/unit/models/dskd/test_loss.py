import numpy as np
import pytest
import torch

from anomalib_dskd.components.discrepancy import discrepancy, distillation_loss, mine_hard_pixels
from anomalib_dskd.models.dskd.loss import DskdLoss


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def literal_map(a: np.ndarray, b: np.ndarray, l2_weight: float) -> np.ndarray:
    """Eq. (3) to (6) as printed, with the norm in Eq. (3): a loop over images, rows and columns."""
    batch, _, height, width = a.shape
    result = np.zeros((batch, 1, height, width))
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                f, g = a[n, :, i, j], b[n, :, i, j]
                f_hat, g_hat = f / np.linalg.norm(f), g / np.linalg.norm(g)
                l2 = 0.5 * np.linalg.norm(f_hat - g_hat) ** 2
                cosine = 1 - f_hat @ g_hat / (np.linalg.norm(f_hat) * np.linalg.norm(g_hat))
                result[n, 0, i, j] = l2_weight * l2 + cosine
    return result


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.0, 0.0), (5.0, 0.0), 0.0),  # the norm does not count, Eq. (3)
        ((1.0, 0.0), (0.0, 1.0), 0.1 * 0.5 * 2 + 1),  # at right angles: squared distance 2, cosine 0
        ((1.0, 0.0), (-1.0, 0.0), 0.1 * 0.5 * 4 + 2),  # opposite: squared distance 4, cosine -1
        ((3.0, 4.0), (4.0, 3.0), 0.1 * 0.5 * (0.2**2 + 0.2**2) + 1 - 24 / 25),
    ],
)
def test_discrepancy_of_two_vectors_by_hand(a, b, expected):
    assert discrepancy(vector(*a), vector(*b), l2_weight=0.1).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("l2_weight", [0.0, 0.1, 2.0])
def test_discrepancy_equals_the_literal_loop(l2_weight):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, 7, 4, 5)).astype(np.float32)
    ours = discrepancy(torch.from_numpy(a), torch.from_numpy(b), l2_weight=l2_weight)
    np.testing.assert_allclose(ours.numpy(), literal_map(a, b, l2_weight), atol=1e-6)


def test_discrepancy_is_computed_in_32_bits():
    a, b = torch.randn(2, 1, 64, 3, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours = discrepancy(a, b, l2_weight=0.1)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), literal_map(a.float().numpy(), b.float().numpy(), 0.1), atol=1e-6)


def test_loss_averages_over_pixels_then_levels_then_images():
    same, right_angle = (vector(1.0, 0.0), vector(1.0, 0.0)), (vector(1.0, 0.0), vector(0.0, 1.0))
    large = torch.zeros(2, 2, 4, 4)
    large[:, 0] = 1
    teacher = [torch.cat([right_angle[0]] * 2), large]
    student = [torch.cat([right_angle[1], same[1]]), large]
    # level 1: (1.5 + 0) / 2 images; level 2: 0; mean of the two levels, whatever their numbers of pixels
    assert distillation_loss(teacher, student, l2_weight=0.5).item() == pytest.approx(1.5 / 2 / 2)


def test_loss_of_a_duplicated_batch_is_the_same():
    pyramids = [[torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4))] for _ in range(2)]
    once = distillation_loss(*pyramids, l2_weight=0.1)
    twice = distillation_loss(
        *[[torch.cat([level, level]) for level in pyramid] for pyramid in pyramids], l2_weight=0.1
    )
    assert twice.item() == pytest.approx(once.item(), abs=1e-6)


def test_each_student_gets_its_own_loss():
    teacher = [vector(1.0, 0.0)]
    losses = DskdLoss(l2_weight=0.1)(teacher, {"encoder": [vector(2.0, 0.0)], "decoder": [vector(0.0, 2.0)]})
    assert losses["encoder"].item() == pytest.approx(0.0)
    assert losses["decoder"].item() == pytest.approx(1.1)


def test_pyramids_of_different_depth_are_refused():
    with pytest.raises(ValueError, match="zip"):
        distillation_loss([vector(1.0)], [], l2_weight=0.1)


# --- hard mining -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "easy"), [(0.0, 0), (0.04, 0), (0.5, 12), (0.7, 16), (0.99, 23)])
def test_the_share_of_smallest_values_passes_on_a_tenth_of_the_gradient(share, easy):
    values = torch.randperm(24, generator=torch.Generator().manual_seed(0)).float().view(2, 1, 3, 4).requires_grad_()
    mined = mine_hard_pixels(values, share)
    assert mined.tolist() == values.tolist()
    (mined * 2).sum().backward()
    expected = torch.where(values.detach() < easy, 0.2, 2.0)
    torch.testing.assert_close(values.grad, expected)


def test_mining_keeps_the_loss_and_ranks_the_pixels_of_each_level_over_the_batch():
    teacher = [torch.tensor([[1.0, 0.0]]).view(1, 2, 1, 1).expand(2, 2, 1, 2)] * 2
    angles = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.8, 0.7], [0.6, 0.5]])  # images, columns
    levels = [torch.stack([angle.cos(), angle.sin()], dim=1)[:, :, None].requires_grad_() for angle in angles]
    plain = distillation_loss(teacher, levels, l2_weight=0.1)
    full = torch.autograd.grad(plain, levels)
    mined = distillation_loss(teacher, levels, l2_weight=0.1, hard_mining=0.5)
    assert mined.item() == plain.item()
    shares = [part / whole for part, whole in zip(torch.autograd.grad(mined, levels), full, strict=True)]
    torch.testing.assert_close(shares[0][:, 1, 0], torch.tensor([[0.1, 0.1], [1.0, 1.0]]))
    torch.testing.assert_close(shares[1][:, 1, 0], torch.tensor([[1.0, 1.0], [0.1, 0.1]]))
