"""Decoder student: reconstructs the teacher's feature pyramid from the embedding (DSKD, section 3.1, Fig. 3)."""

from collections.abc import Sequence

from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.embedding import embedding_channels
from anomalib_dskd.components.initialization import initialize_convolutions
from anomalib_dskd.components.residual import ResidualBlock, match_size

__all__ = ["DecoderStudent"]


class DecoderStudent(nn.Module):
    """Inverted ResNet18: one stage per level, of two residual blocks, the first of which up-samples.

    Args:
        levels: feature levels to reconstruct, shallow to deep. The embedding has half the size of the deepest one.
    """

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        widths = [embedding_channels(levels), *(level.channels for level in reversed(levels))]
        strides = [2 * levels[-1].stride, *(level.stride for level in reversed(levels))]
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock.up(widths[index], widths[index + 1], factor=strides[index] // strides[index + 1]),
                ResidualBlock.same(widths[index + 1], signed=level.signed),
            )
            for index, level in enumerate(reversed(levels))
        )
        initialize_convolutions(self)

    def forward(self, embedding: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Map the embedding ``(B, 2 C_K, h, w)`` to one ``(B, C_k, H_k, W_k)`` tensor per level, shallow to deep.

        Args:
            embedding: output of the deep feature embedding.
            sizes: ``(H_k, W_k)`` of each level, shallow to deep.
        """
        features: list[Tensor] = []
        decoded = embedding
        for stage, (height, width) in zip(self.stages, reversed(sizes), strict=True):
            decoded = match_size(stage(decoded), height, width)
            features.insert(0, decoded)
        return features
