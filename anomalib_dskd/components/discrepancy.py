"""Discrepancy between the features of two networks, distillation loss (DSKD, section 3.1, Eq. 3 to 7), hard mining."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["discrepancy", "distillation_loss", "increase_mined_share", "mine_hard_pixels", "pooled_discrepancy"]

EASY_GRADIENT = 0.1  # of the gradient of pixels that are not mined, as in Dinomaly
MINING_RAMP = 0.1  # of a training run; until then most pixels are hard. In Dinomaly 1,000 of 10,000 steps


def discrepancy(first: Tensor, second: Tensor, *, l2_weight: float) -> Tensor:
    r"""Compare two feature maps pixel by pixel, Eq. (3) to (6).

    .. math::
        M_{ij} = \lambda \tfrac{1}{2} \lVert \hat a_{ij} - \hat b_{ij} \rVert^2 + (1 - \cos(a_{ij}, b_{ij}))
               = (1 + \lambda) (1 - \hat a_{ij} \cdot \hat b_{ij})

    where the hat divides a feature vector by its norm, Eq. (3). (The paper prints the squared norm; the
    documentation lists this among the deviations from the paper.) For unit vectors half the squared distance,
    Eq. (4), equals one minus the cosine, Eq. (5), so it is computed only once. The computation is in FP32 for
    features of any type, because the cosine of a close match differs from one by less than BF16 resolves.

    Args:
        first: features ``(B, C, H, W)``.
        second: features ``(B, C, H, W)``.
        l2_weight: lambda of Eq. (6).

    Returns:
        Map ``(B, 1, H, W)`` from 0 (same direction) to ``2 * (1 + l2_weight)`` (opposite).

    Example:
        >>> a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])  # cosine 24/25
        >>> round(discrepancy(a.view(1, 2, 1, 1), b.view(1, 2, 1, 1), l2_weight=0.25).item(), 6)  # 1.25 * 1/25
        0.05
    """
    cosine = (F.normalize(first.float(), dim=1) * F.normalize(second.float(), dim=1)).sum(dim=1, keepdim=True)
    return (1 + l2_weight) * (1 - cosine)


def pooled_discrepancy(first: Tensor, second: Tensor, *, l2_weight: float, size: int) -> Tensor:
    r"""Compare two feature maps as Eq. (6) does, after averaging the difference of their unit vectors over a window.

    .. math::
        M_{ij} = \frac{1 + \lambda}{2} \Big\lVert \frac{1}{|W_{ij}|} \sum_{(p,q) \in W_{ij}} (\hat a_{pq} - \hat b_{pq})
        \Big\rVert^2

    where the window W is cut off at the edges of the map. Errors of a student that reconstructs a normal image point
    in different directions at neighboring pixels, so that their average is short; a defect that covers several pixels
    shifts them in a common direction. With a window of one pixel this is :func:`discrepancy`. PatchCore averages
    features over 3x3 neighbors before it compares them (https://arxiv.org/abs/2106.08265, section 3.1).

    Args:
        first: features ``(B, C, H, W)``.
        second: features ``(B, C, H, W)``.
        l2_weight: lambda of Eq. (6).
        size: height and width of the window in pixels of the feature map, odd.

    Returns:
        Map ``(B, 1, H, W)`` from 0 to ``2 * (1 + l2_weight)``.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)  # (1, 0) at both pixels
        >>> b = torch.tensor([[0.6, 0.8], [0.6, -0.8]]).T.reshape(1, 2, 1, 2)  # errors of opposite directions
        >>> discrepancy(a, b, l2_weight=0.0).flatten()  # 1 - 0.6
        tensor([0.4000, 0.4000])
        >>> pooled_discrepancy(a, b, l2_weight=0.0, size=3).flatten()  # 0.4 ** 2 / 2
        tensor([0.0800, 0.0800])
    """
    error = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)  # (B, C, H, W)
    mean = F.avg_pool2d(error, size, stride=1, padding=size // 2, count_include_pad=False)
    return (1 + l2_weight) / 2 * mean.square().sum(dim=1, keepdim=True)


def mine_hard_pixels(values: Tensor, share: float) -> Tensor:
    """Return the same values, the smallest of which pass on only a tenth of the gradient: hard mining.

    Most pixels of normal images are soon reconstructed well. Without mining, they dominate the gradient, and the
    student generalizes to defects. From ReContrast (https://arxiv.org/abs/2306.02602); a fixed share and the factor of
    0.1 are Dinomaly's (https://arxiv.org/abs/2405.14325), with a share of 0.9. Each process, and each of several
    accumulated batches, ranks its own pixels.

    Args:
        values: discrepancies of all pixels of a batch, of any shape.
        share: of the values, the smallest, whose gradient is reduced; from 0 up to, not including, 1.

    Example:
        >>> values = torch.tensor([4.0, 1.0, 2.0, 3.0], requires_grad=True)
        >>> mined = mine_hard_pixels(values, 0.5)
        >>> mined.sum().backward()
        >>> mined.detach(), values.grad
        (tensor([4., 1., 2., 3.]), tensor([1.0000, 0.1000, 0.1000, 1.0000]))
    """
    number = int(share * values.numel())
    if number == 0:
        return values
    fixed = values.detach()
    limit = fixed.flatten().sort().values[number - 1]
    return torch.where(values > limit, values, fixed + EASY_GRADIENT * (values - fixed))


def increase_mined_share(share: float, *, step: int, steps: int) -> float:
    """Return the share of a step: it increases from 0 over the first tenth of the steps.

    Args:
        share: from that tenth on.
        step: number of steps before.
        steps: planned number of steps; 0 if it is not known, as without a Trainer.

    Example:
        >>> [round(increase_mined_share(0.8, step=step, steps=50), 6) for step in (0, 1, 5, 49)]
        [0.0, 0.16, 0.8, 0.8]
    """
    return share * min(1.0, step / (MINING_RAMP * steps)) if steps else share


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], *, l2_weight: float, hard_mining: float = 0.0
) -> Tensor:
    r"""Average the discrepancy over pixels, levels and images: the loss of one student, Eq. (7).

    .. math::
        \ell = \frac{1}{K} \sum_{k=1}^{K} \frac{1}{h_k w_k} \sum_{i,j} M^k_{ij}

    Args:
        teacher: features of the teacher, one ``(B, C_k, H_k, W_k)`` per level.
        student: features of the student, of the same shapes.
        l2_weight: lambda of Eq. (6).
        hard_mining: share of each level's pixels for :func:`mine_hard_pixels`; the value of the loss stays Eq. (7).

    Returns:
        Scalar, averaged over the batch.
    """
    maps = [discrepancy(t, s, l2_weight=l2_weight) for t, s in zip(teacher, student, strict=True)]
    return torch.stack([mine_hard_pixels(level, hard_mining).mean() for level in maps]).mean()
