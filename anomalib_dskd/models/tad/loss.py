"""The losses of TAD++: guidance by teacher and assistant, and the entropy of their weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anomalib_dskd.components.discrepancy import discrepancy, mine_hard_pixels

__all__ = ["entropy_loss", "guidance_losses"]


def guidance_losses(
    student: Sequence[Tensor], guides: Sequence[Sequence[Tensor]], weights: Tensor, *, hard_mining: float = 0.0
) -> Tensor:
    r"""Return what each guide contributes to the student's loss, averaged over images and levels.

    .. math:: \ell_g = \frac{1}{B K} \sum_{b,k} w_{bkg} \frac{1}{h_k w_k} \sum_{ij} (1 - \cos(s^{bk}_{ij}, g^{bk}_{ij}))

    Args:
        student: the student's features, one ``(B, C_k, H_k, W_k)`` tensor per level.
        guides: ``G`` pyramids of the same shapes.
        weights: ``(B, K, G)``.
        hard_mining: share of the pixels whose gradient is reduced.

    Returns:
        Losses ``(G,)``.
    """
    distances = [
        torch.stack(  # (B, K)
            [_distance(level, target, hard_mining=hard_mining) for level, target in zip(student, guide, strict=True)],
            dim=1,
        )
        for guide in guides
    ]
    return (weights * torch.stack(distances, dim=2)).mean(dim=(0, 1))  # (B, K, G) to (G,)


def entropy_loss(weights: Tensor) -> Tensor:
    r"""Return how far weights are from equal ones: the largest possible entropy minus theirs.

    .. math:: \ell = \log G + \sum_g w_g \log w_g

    With distances :math:`d_g` of the guides and a factor :math:`\lambda` before this loss, the sum of all is least
    where :math:`w_g \propto e^{-d_g / \lambda}`.

    Args:
        weights: ``(B, K, G)``, each ``G`` of them summing to 1.

    Returns:
        Scalar from 0 (equal) to ``log(G)`` (only one guide), averaged over images and levels.

    Example:
        >>> round(entropy_loss(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])).item(), 6)  # 0 and log 2
        0.346574
    """
    return math.log(weights.shape[-1]) + torch.xlogy(weights, weights).sum(dim=-1).mean()


def _distance(first: Tensor, second: Tensor, *, hard_mining: float) -> Tensor:
    """Average the discrepancy over pixels: two ``(B, C, H, W)`` to ``(B,)``."""
    return mine_hard_pixels(discrepancy(first, second, l2_weight=0.0), hard_mining).mean(dim=(1, 2, 3))
