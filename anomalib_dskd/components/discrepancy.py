"""Discrepancy between the features of two networks, and the distillation loss (DSKD, section 3.1, Eq. 3 to 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["discrepancy", "distillation_loss"]


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


def distillation_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], *, l2_weight: float) -> Tensor:
    r"""Average the discrepancy over pixels, levels and images: the loss of one student, Eq. (7).

    .. math::
        \ell = \frac{1}{K} \sum_{k=1}^{K} \frac{1}{h_k w_k} \sum_{i,j} M^k_{ij}

    Args:
        teacher: features of the teacher, one ``(B, C_k, H_k, W_k)`` per level.
        student: features of the student, of the same shapes.
        l2_weight: lambda of Eq. (6).

    Returns:
        Scalar, averaged over the batch.
    """
    levels = [discrepancy(t, s, l2_weight=l2_weight).mean() for t, s in zip(teacher, student, strict=True)]
    return torch.stack(levels).mean()
