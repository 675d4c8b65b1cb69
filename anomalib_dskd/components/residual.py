"""Residual blocks of ResNet18 that keep, halve or up-sample the size, for the embedding and the decoder student."""

import math

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import Self

from anomalib_dskd.components.convolution import WideConv2d

__all__ = ["ResidualBlock", "conv_block", "halvings", "match_size"]


def match_size(features: Tensor, height: int, width: int) -> Tensor:
    """Crop, or pad by replication, the last rows and columns, so that levels of odd sizes match.

    Backbones round odd sizes up (ResNet) or down (ConvNeXt) when they halve them; the blocks of this module round up.

    Args:
        features: ``(B, C, H, W)``.
        height: H' in pixels.
        width: W' in pixels.

    Returns:
        Features ``(B, C, H', W')``.
    """
    missing_rows, missing_columns = height - features.shape[-2], width - features.shape[-1]
    if missing_rows > 0 or missing_columns > 0:
        features = F.pad(features, (0, max(missing_columns, 0), 0, max(missing_rows, 0)), mode="replicate")
    return features[..., :height, :width]


def halvings(stride: float) -> list[int]:
    """Return the strides of the convolutions, at least one, that together have the given stride.

    >>> halvings(4), halvings(1)
    ([2, 2], [1])
    """
    return [2] * round(math.log2(stride)) or [1]


def conv_block(in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU; the output size is ``ceil(input / stride)``."""
    return nn.Sequential(
        WideConv2d(in_channels, out_channels, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ResidualBlock(nn.Module):
    """Sum of two convolutions and a shortcut, followed by an activation.

    Args:
        entry: first convolution of the main path; it determines the output size.
        shortcut: module that brings the input to the shape of the output.
        channels: channels of the output.
        signed: omit the last activation, so that the output can take negative values.
    """

    def __init__(self, entry: nn.Module, shortcut: nn.Module, channels: int, *, signed: bool = False) -> None:
        super().__init__()
        self.main = nn.Sequential(
            entry,
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WideConv2d(channels, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = shortcut
        self.activation = nn.Identity() if signed else nn.ReLU(inplace=True)

    @classmethod
    def same(cls, channels: int, *, signed: bool = False) -> Self:
        """Build a block that keeps size and width; the shortcut is the identity."""
        entry = WideConv2d(channels, channels, kernel_size=3, padding=1)
        return cls(entry, nn.Identity(), channels, signed=signed)

    @classmethod
    def down(cls, in_channels: int, channels: int, *, stride: int = 2) -> Self:
        """Build a block that divides the size by ``stride``; the shortcut is a 1x1 convolution."""
        entry = WideConv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1)
        shortcut = WideConv2d(in_channels, channels, kernel_size=1, stride=stride)
        return cls(entry, nn.Sequential(shortcut, nn.BatchNorm2d(channels)), channels)

    @classmethod
    def up(cls, in_channels: int, channels: int, *, factor: int) -> Self:
        """Build a block that up-samples with transposed convolutions in the main path and the shortcut."""

        def transposed() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(in_channels, channels, kernel_size=factor, stride=factor, bias=False)

        return cls(transposed(), nn.Sequential(transposed(), nn.BatchNorm2d(channels)), channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H', W')``."""
        activated: Tensor = self.activation(self.main(features) + self.shortcut(features))
        return activated
