"""Training-only components of TAD++: the assistant, and the weights of the two guides."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.components.backbone import Backbone, FeatureLevel
from anomalib_dskd.errors import ArgumentError

__all__ = ["Assistant", "GuidanceAttention"]


class Assistant(nn.Module):
    """A compact network of another family that learns the teacher's features, from random weights.

    Args:
        name: timm backbone that supports ``features_only``.
        layers: indices into its feature levels, as many as the teacher has.
        levels: the teacher's levels, whose channels 1x1 convolutions adapt to.

    Raises:
        ArgumentError: unknown backbone, or levels that do not fit.
    """

    def __init__(self, name: str, layers: Sequence[int], levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        if len(layers) != len(levels):
            msg = (
                f"assistant_layers {list(layers)} must be as many as the teacher's layers, {len(levels)}: each one "
                "learns the teacher's features of the level at the same position."
            )
            raise ArgumentError(msg)
        self.backbone = Backbone(name, layers, role="assistant")
        self.adapters = nn.ModuleList(
            nn.Conv2d(own.channels, level.channels, kernel_size=1)
            for own, level in zip(self.backbone.levels, levels, strict=True)
        )

    def forward(self, images: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Map images ``(B, 3, H, W)`` to one tensor per level, ``(B, C_k, H_k, W_k)`` with the teacher's channels.

        Args:
            images: normalized for the teacher.
            sizes: the teacher's ``(H_k, W_k)`` of each level.
        """
        features = []
        for adapter, level, size in zip(self.adapters, self.backbone(images), sizes, strict=True):
            adapted = adapter(level)
            if adapted.shape[-2:] != torch.Size(size):
                adapted = F.interpolate(adapted, size=tuple(size), mode="bilinear")
            features.append(adapted)
        return features


class GuidanceAttention(nn.Module):
    r"""Weights of teacher and assistant for each image and level, by attention of the student to both.

    .. math::
        w = \mathrm{softmax}_g \left( \frac{(Q \bar s) \cdot (K \bar g)}{\sqrt{C}} \right)

    with the mean over pixels, :math:`\bar s` of the student's features and :math:`\bar g` of the guides', each pixel
    of unit norm as a cosine sees it, and a square :math:`Q` and :math:`K` per level. :math:`Q` starts from zeros, so
    that the weights start equal. Their gradient reaches only :math:`Q` and :math:`K`: the student learns from the
    guides and does not choose between them.

    Args:
        levels: feature levels of teacher and student.
    """

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.queries = nn.ModuleList(nn.Linear(level.channels, level.channels, bias=False) for level in levels)
        self.keys = nn.ModuleList(nn.Linear(level.channels, level.channels, bias=False) for level in levels)
        for parameter in self.queries.parameters():
            nn.init.zeros_(parameter)

    def forward(self, student: Sequence[Tensor], guides: Sequence[Sequence[Tensor]]) -> Tensor:
        """Map the student's ``K`` levels and those of ``G`` guides, each ``(B, C_k, H_k, W_k)``, to ``(B, K, G)``."""
        weights = []
        for index, (query, key) in enumerate(zip(self.queries, self.keys, strict=True)):
            asked = query(_pooled(student[index]))[:, None]  # (B, 1, C)
            offered = key(torch.stack([_pooled(guide[index]) for guide in guides], dim=1))  # (B, G, C)
            scores = (asked * offered).sum(dim=-1) / math.sqrt(offered.shape[-1])  # (B, G)
            weights.append(scores.float().softmax(dim=-1))
        return torch.stack(weights, dim=1)  # (B, K, G)


def _pooled(level: Tensor) -> Tensor:
    """Average unit vectors over pixels: ``(B, C, H, W)`` to ``(B, C)``, without gradient."""
    return F.normalize(level.detach().float(), dim=1).mean(dim=(-2, -1))
