import math

import pytest
import torch
from torch import Tensor

from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.models.tad.loss import entropy_loss, guidance_losses


def pixels(*vectors: tuple[float, ...]) -> Tensor:
    """A row of pixels ``(1, C, 1, W)``."""
    return torch.tensor(vectors).t()[None, :, None, :]


RIGHT, UP, BETWEEN = (1.0, 0.0), (0.0, 1.0), (4.0, 3.0)  # cosine of BETWEEN: 0.8 to RIGHT, 0.6 to UP


def test_guidance_by_hand():
    student = [torch.cat([pixels(RIGHT, RIGHT), pixels(RIGHT, UP)]), torch.cat([pixels(BETWEEN)] * 2)]
    teacher = [torch.cat([pixels(RIGHT, UP)] * 2), torch.cat([pixels(RIGHT)] * 2)]
    assistant = [torch.cat([pixels(UP, UP)] * 2), torch.cat([pixels(UP)] * 2)]
    # distances, image by level: teacher 0.5, 0.2 and 0, 0.2; assistant 1, 0.4 and 0.5, 0.4
    weights = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.2, 0.8], [1.0, 0.0]]])
    losses = guidance_losses(student, [teacher, assistant], weights)
    assert losses[0].item() == pytest.approx((0.75 * 0.5 + 0.5 * 0.2 + 0.2 * 0.0 + 1.0 * 0.2) / 4)
    assert losses[1].item() == pytest.approx((0.25 * 1.0 + 0.5 * 0.4 + 0.8 * 0.5 + 0.0 * 0.4) / 4)


def test_a_guide_of_all_the_weight_gives_the_plain_distillation_loss():
    pyramids = [[torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)] for _ in range(3)]
    weights = torch.tensor([1.0, 0.0]).expand(3, 2, 2)
    from_teacher, from_assistant = guidance_losses(pyramids[0], pyramids[1:], weights)
    expected = distillation_loss(pyramids[1], pyramids[0], l2_weight=0.0)
    assert from_teacher.item() == pytest.approx(expected.item(), abs=1e-6)
    assert from_assistant.item() == 0


def test_a_guide_without_weight_has_no_influence():
    student = [torch.randn(2, 4, 5, 5, requires_grad=True)]
    weights = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    teacher, gradients = [torch.randn(2, 4, 5, 5)], []
    for seed in (1, 2):
        assistant = [torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))]
        guidance_losses(student, [teacher, assistant], weights).sum().backward()
        gradients.append(student[0].grad.clone())
        student[0].grad = None
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[[0.5, 0.5]]], 0.0),
        ([[[1.0, 0.0]]], math.log(2)),
        ([[[0.25, 0.75]]], math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
        ([[[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]], math.log(2) / 4),
        ([[[1 / 3, 1 / 3, 1 / 3]]], 0.0),
    ],
)
def test_entropy_by_hand(weights, expected):
    assert entropy_loss(torch.tensor(weights)).item() == pytest.approx(expected, abs=1e-6)


def test_best_weights_are_the_softmax_of_the_distances():
    """What the docstring says: with factor 0.1, the least sum is where weights are softmax(-d / 0.1)."""
    distances = torch.tensor([0.10, 0.15])
    scores = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(300):
        weights = scores.softmax(0)
        optimizer.zero_grad()
        ((weights * distances).sum() + 0.1 * entropy_loss(weights.view(1, 1, 2))).backward()
        optimizer.step()
    torch.testing.assert_close(scores.softmax(0).detach(), (-distances / 0.1).softmax(0), atol=1e-3, rtol=0)
