import pytest
import torch
from torch import Tensor

from anomalib_dskd.models.dtgd.loss import DtgdLoss, dissimilarity_loss


def pixels(*vectors: tuple[float, ...]) -> Tensor:
    """A row of pixels ``(1, C, 1, W)``."""
    return torch.tensor(vectors).t()[None, :, None, :]


RIGHT, UP, BETWEEN = (1.0, 0.0), (0.0, 1.0), (4.0, 3.0)  # cosine of BETWEEN: 0.8 to RIGHT, 0.6 to UP


def test_only_damaged_pixels_count():
    decoder, anomaly = [pixels(RIGHT, RIGHT)], [pixels(BETWEEN, RIGHT)]
    left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert dissimilarity_loss(decoder, anomaly, left, margin=0.5).item() == pytest.approx(0.8 - 0.5)
    assert dissimilarity_loss(decoder, anomaly, right, margin=0.5).item() == pytest.approx(1.0 - 0.5)
    both = dissimilarity_loss(decoder, anomaly, left + right, margin=0.5).item()
    assert both == pytest.approx((0.3 + 0.5) / 2)


def test_what_is_unlike_enough_costs_nothing():
    decoder, anomaly = [pixels(RIGHT, UP)], [pixels(UP, BETWEEN)]
    everywhere = torch.ones(1, 1, 1, 2)
    assert dissimilarity_loss(decoder, anomaly, everywhere, margin=0.6).item() == pytest.approx(0.0, abs=1e-7)
    assert dissimilarity_loss(decoder, anomaly, everywhere, margin=0.2).item() == pytest.approx(0.4 / 2)


def test_a_pixel_counts_by_the_share_of_it_that_is_damaged():
    mask = torch.tensor([[[[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]]])  # all of the left pixel, 1/4 of the right
    loss = dissimilarity_loss([pixels(RIGHT, RIGHT)], [pixels(BETWEEN, RIGHT)], mask, margin=0.0)
    assert loss.item() == pytest.approx((1.0 * 0.8 + 0.25 * 1.0) / 1.25)


def test_levels_are_averaged_and_images_pooled():
    mask = torch.zeros(2, 1, 1, 2)
    mask[0] = 1.0  # the second image is not damaged
    first = [torch.cat([pixels(RIGHT, RIGHT)] * 2), torch.cat([pixels(RIGHT)] * 2)]
    second = [torch.cat([pixels(BETWEEN, BETWEEN), pixels(RIGHT, RIGHT)]), torch.cat([pixels(RIGHT)] * 2)]
    loss = dissimilarity_loss(first, second, mask, margin=0.5)
    assert loss.item() == pytest.approx((0.3 + 0.5) / 2)


def test_without_damage_the_loss_is_0_and_has_a_gradient_of_0():
    decoder = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = dissimilarity_loss([decoder], [torch.randn(2, 4, 3, 3)], torch.zeros(2, 1, 12, 12), margin=0.0)
    loss.backward()
    assert loss.item() == 0
    assert decoder.grad.abs().sum() == 0


def test_a_step_makes_damaged_features_less_alike_and_leaves_the_others():
    decoder = pixels(BETWEEN, BETWEEN).requires_grad_()
    mask = torch.tensor([[[[1.0, 0.0]]]])
    dissimilarity_loss([decoder], [pixels(RIGHT, RIGHT)], mask, margin=0.5).backward()
    assert decoder.grad[0, :, 0, 1].tolist() == [0.0, 0.0]
    right, up = decoder.grad[0, :, 0, 0].tolist()
    assert right > 0 > up  # descent turns it away from RIGHT


def test_losses_by_name_and_weight():
    normal, anomaly = [pixels(RIGHT)], [pixels(UP)]
    students = {"encoder": [pixels(UP)], "decoder": [pixels(BETWEEN)]}
    loss = DtgdLoss(margin=0.5, dissimilarity_weight=0.25)
    losses = loss(normal, students, anomaly, torch.ones(1, 1, 4, 4))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {"encoder": 1.0, "decoder": 0.2, "dissimilarity": 0.25 * 0.1}
    )
