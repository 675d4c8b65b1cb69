"""The denoising encoder: blocks of a student, each followed by a gate that the anomaly teacher guides."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.residual import ResidualBlock, conv_block, halvings, match_size

__all__ = ["DenoisingEncoder", "NoiseRemoval"]


class NoiseRemoval(nn.Module):
    r"""Teacher-guided noise removal: a gate that suppresses what the anomaly teacher marks as damage.

    .. math:: s' = s \cdot \sigma(g([s, a]))

    with the student's features :math:`s`, the anomaly teacher's :math:`a`, and 1x1 convolutions :math:`g` with batch
    norm and ReLU in between, so that a teacher's scale does not matter.

    Args:
        channels: of the student's features, and of the teacher's.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(
            nn.Conv2d(2 * channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=1),
        )

    def forward(self, student: Tensor, anomaly_teacher: Tensor) -> Tensor:
        """Map two features ``(B, C, H, W)`` to the part of the student's that is kept, ``(B, C, H, W)``."""
        gate: Tensor = self.scores(torch.cat([student, anomaly_teacher], dim=1)).sigmoid()  # (B, C, H, W)
        return student * gate


class DenoisingEncoder(nn.Module):
    """A stem, and one stage of two residual blocks per level, each followed by a gate.

    It is built from the teacher's levels and not from the teacher's own architecture, because the gates act between
    stages, which a timm network does not expose.

    Args:
        levels: the teacher's feature levels, shallow to deep.
        gate: with gates, or (the ablation) without.
    """

    def __init__(self, levels: Sequence[FeatureLevel], *, gate: bool) -> None:
        super().__init__()
        self.stem = _stem(levels[0])
        before = [levels[0], *levels]  # the stem has the first level's shape
        self.stages = nn.ModuleList(_stage(previous, level) for previous, level in zip(before, levels, strict=False))
        self.gates = nn.ModuleList(NoiseRemoval(level.channels) for level in levels) if gate else None

    def forward(self, images: Tensor, anomaly_teacher: Sequence[Tensor]) -> list[Tensor]:
        """Map images ``(B, 3, H, W)`` to one ``(B, C_k, H_k, W_k)`` tensor per level, gated by the teacher's features.

        Args:
            images: normalized, damaged in training.
            anomaly_teacher: the teacher's features of the same images, one ``(B, C_k, H_k, W_k)`` tensor per level.
        """
        features: list[Tensor] = []
        encoded = self.stem(images)
        for index, (stage, guide) in enumerate(zip(self.stages, anomaly_teacher, strict=True)):
            encoded = match_size(stage(encoded), *guide.shape[-2:])
            if self.gates is not None:
                encoded = self.gates[index](encoded, guide)
            features.append(encoded)
        return features


def _stem(level: FeatureLevel) -> nn.Sequential:
    """Return 3x3 convolutions from the image to a level, whose channels double towards those of the level."""
    strides = halvings(level.stride)
    widths = [3, *(math.ceil(level.channels / 2**left) for left in reversed(range(len(strides))))]
    return nn.Sequential(*(conv_block(widths[i], widths[i + 1], stride=stride) for i, stride in enumerate(strides)))


def _stage(previous: FeatureLevel, level: FeatureLevel) -> nn.Sequential:
    """Return two residual blocks from a level to the next, behind a convolution for each further halving."""
    *further, last = halvings(level.stride / previous.stride)
    return nn.Sequential(
        *(conv_block(previous.channels, previous.channels, stride=stride) for stride in further),
        ResidualBlock.down(previous.channels, level.channels, stride=last),
        ResidualBlock.same(level.channels, signed=level.signed),
    )
