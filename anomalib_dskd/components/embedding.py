"""Deep feature embedding: the bottleneck between the two students (DSKD, section 3.2, Fig. 4)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.initialization import initialize_convolutions
from anomalib_dskd.components.residual import ResidualBlock, conv_block, halvings, match_size
from anomalib_dskd.errors import ArgumentError

__all__ = ["DeepFeatureEmbedding", "DirectEmbedding", "embedding_channels", "reduction"]


def embedding_channels(levels: Sequence[FeatureLevel]) -> int:
    """Return the width of the embedding: twice the channels of the deepest level (512 for ResNet18)."""
    return 2 * levels[-1].channels


class DeepFeatureEmbedding(nn.Module):
    """Reduce all levels to the size of the deepest, concatenate them, and embed them at half that size.

    A level passes one 3x3 convolution for each deeper level, with stride 2 where that level halves the size: F1 of
    a ResNet18 passes two (64 to 128 to 256 channels) and F2 one (128 to 256).

    Args:
        levels: feature levels of the encoder student, shallow to deep.
        blocks: residual blocks after the concatenation; the first has stride 2 and a 1x1 convolution in its
            shortcut. Two match the parameter count of the paper's Table 6 (39.3 M).

    Raises:
        ArgumentError: fewer than one block, or not an integer.
    """

    def __init__(self, levels: Sequence[FeatureLevel], blocks: int = 2) -> None:
        super().__init__()
        if not isinstance(blocks, int) or blocks < 1:
            msg = f"embedding_blocks {blocks!r} must be 1 or larger."
            raise ArgumentError(msg)
        self.reductions = nn.ModuleList(reduction(levels[index:]) for index in range(len(levels)))
        width = embedding_channels(levels)
        self.residual = nn.Sequential(
            ResidualBlock.down(len(levels) * levels[-1].channels, width),
            *(ResidualBlock.same(width) for _ in range(blocks - 1)),
        )
        initialize_convolutions(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the levels, each ``(B, C_k, H_k, W_k)``, to ``(B, 2 C_K, ceil(H_K / 2), ceil(W_K / 2))``."""
        height, width = features[-1].shape[-2:]
        reduced = [
            match_size(reduce(level), height, width) for reduce, level in zip(self.reductions, features, strict=True)
        ]
        embedded: Tensor = self.residual(torch.cat(reduced, dim=1))  # (B, K * C_K, H_K, W_K)
        return embedded


class DirectEmbedding(nn.Module):
    """The ablation of Table 8: no fusion; one 3x3 convolution down-samples the deepest level only."""

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.reduction = conv_block(levels[-1].channels, embedding_channels(levels), stride=2)
        initialize_convolutions(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the deepest level ``(B, C_K, H_K, W_K)`` to ``(B, 2 C_K, ceil(H_K / 2), ceil(W_K / 2))``."""
        embedded: Tensor = self.reduction(features[-1])
        return embedded


def reduction(levels: Sequence[FeatureLevel]) -> nn.Sequential:
    """Return convolutions from the first of ``levels`` to the size and width of the last; empty for a single level."""
    stages: list[nn.Module] = []
    for level, deeper in itertools.pairwise(levels):
        strides = halvings(deeper.stride / level.stride)
        channels = [level.channels, *[deeper.channels] * len(strides)]
        stages += [
            conv_block(before, after, stride=stride)
            for (before, after), stride in zip(itertools.pairwise(channels), strides, strict=True)
        ]
    return nn.Sequential(*stages)
