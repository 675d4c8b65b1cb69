"""Asymptotic fusion of feature levels: neighboring ones first, then one deeper level at a time.

The steps follow the asymptotic feature pyramid of Yang et al. (https://arxiv.org/abs/2306.15988), which is how we
read "asymptotic"; the authors of AFKD may mean another one.
"""

import functools
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.argument_checks import check_choice
from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.embedding import reduction
from anomalib_dskd.components.residual import conv_block, match_size

__all__ = ["AsymptoticFusion", "FusedLevel", "FusionWeights", "mix"]

FusionWeights = Literal["learned", "equal"]


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    r"""Sum sources, each with its own weight at each pixel.

    .. math:: y_{ij} = \sum_n w^n_{ij} x^n_{ij}

    Args:
        sources: ``N`` feature tensors ``(B, C, H, W)``.
        weights: ``(B, N, H, W)``, or sizes of 1 where they are the same.

    Returns:
        Features ``(B, C, H, W)``.

    Example:
        >>> weights = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
        >>> mix([torch.full((1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1), 8.0)], weights).item()
        7.0
    """
    parts = [source * weight for source, weight in zip(sources, torch.split(weights, 1, dim=1), strict=True)]
    return functools.reduce(torch.add, parts)


class FusedLevel(nn.Module):
    """One level of a fusion step: all levels of the step, resized to its grid and channels, and mixed.

    A shallower level comes down by 3x3 convolutions with stride 2, as in the deep feature embedding; the level itself
    and deeper ones pass a 1x1 convolution, and deeper ones are then resized bilinearly. A 3x3 convolution follows the
    mix.

    Args:
        levels: those of the step, shallow to deep.
        target: position of the level that is computed.
        weights: ``learned``: a softmax over sources of a 1x1 convolution of all of them, at each pixel; it starts from
            equal weights. ``equal``: the sources' mean.
    """

    def __init__(self, levels: Sequence[FeatureLevel], target: int, *, weights: FusionWeights) -> None:
        super().__init__()
        self.target = target
        channels = levels[target].channels
        self.paths = nn.ModuleList(
            reduction(levels[source : target + 1])
            if source < target
            else conv_block(levels[source].channels, channels, kernel_size=1)
            for source in range(len(levels))
        )
        self.scores: nn.Conv2d | None = None
        if weights == "learned":
            self.scores = nn.Conv2d(len(levels) * channels, len(levels), kernel_size=1)
            for parameter in self.scores.parameters():
                nn.init.zeros_(parameter)
        self.block = conv_block(channels, channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the levels of the step, each ``(B, C_n, H_n, W_n)``, to the target's ``(B, C, H, W)``."""
        sources = self.sources(features)
        fused: Tensor = self.block(mix(sources, self.weights(sources)))
        return fused

    def sources(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Resize each level of the step to the target's ``(B, C, H, W)``."""
        height, width = features[self.target].shape[-2:]
        sources = []
        for index, (path, level) in enumerate(zip(self.paths, features, strict=True)):
            source = path(level)
            if index < self.target:
                source = match_size(source, height, width)
            elif index > self.target:
                source = F.interpolate(source, size=(height, width), mode="bilinear")
            sources.append(source)
        return sources

    def weights(self, sources: Sequence[Tensor]) -> Tensor:
        """Return the ``N`` sources' weights ``(B, N, H, W)``, or ``(1, N, 1, 1)`` if they are fixed; they sum to 1."""
        if self.scores is None:
            return sources[0].new_full((1, len(sources), 1, 1), 1 / len(sources))
        scores: Tensor = self.scores(torch.cat(list(sources), dim=1))  # (B, N, H, W)
        return scores.softmax(dim=1)


class AsymptoticFusion(nn.Module):
    """Fuse a pyramid step by step: the two shallowest levels first, then the first three, and so on to all.

    Args:
        levels: feature levels, shallow to deep. A single one is returned unchanged.
        weights: see :class:`FusedLevel`.

    Raises:
        ArgumentError: unknown kind of weights.
    """

    def __init__(self, levels: Sequence[FeatureLevel], weights: FusionWeights = "learned") -> None:
        super().__init__()
        check_choice(FusionWeights, fusion=weights)
        self.meetings = nn.ModuleList(
            nn.ModuleList(FusedLevel(levels[:count], target, weights=weights) for target in range(count))
            for count in range(2, len(levels) + 1)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map the levels, each ``(B, C_k, H_k, W_k)``, to fused ones of the same shapes."""
        fused = list(features)
        for count, step in enumerate(self.meetings, start=2):
            fused[:count] = [level(fused[:count]) for level in cast("nn.ModuleList", step)]
        return fused
