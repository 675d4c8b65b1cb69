"""The networks of AFKD: the teacher's levels, fused step by step, embedded and decoded again."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding
from anomalib_dskd.models.afkd.fusion import AsymptoticFusion, FusionWeights
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Features

__all__ = ["AfkdModel"]


class AfkdModel(DistillationModel):
    """Frozen teacher, asymptotic fusion, deep feature embedding and decoder student.

    Reimplemented from the abstract; the authors' code and text were not seen; their figures are not claimed.

    There is no encoder student: the teacher's own features go through the bottleneck, as in reverse distillation.
    They enter it with unit norm, as a cosine sees them, so that it gets the same whether they come from the teacher
    or from the cache.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        fusion: weights of the levels that meet: ``learned``, or ``equal``.
        embedding_blocks: residual blocks of the embedding.
        sigma: standard deviation of the map's blur in pixels.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        teacher: str,
        layers: Sequence[int] = (1, 2, 3),
        *,
        fusion: FusionWeights = "learned",
        embedding_blocks: int = 2,
        sigma: float = 4.0,
    ) -> None:
        super().__init__(teacher, layers, l2_weight=0.0, sigma=sigma)
        levels = self.teacher.levels
        self.fusion = AsymptoticFusion(levels, fusion)
        self.embedding = DeepFeatureEmbedding(levels, embedding_blocks)
        self.decoder_student = DecoderStudent(levels)

    def training_features(self, images: Tensor) -> Features:
        """Map normalised images ``(B, 3, H, W)`` to the teacher's features and the decoder student's."""
        teacher = self.teacher_features(images)
        return Features(teacher=teacher, students={"decoder": self.reconstruct(teacher)})

    def compared_pyramids(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Run the teacher, and the rest on its features."""
        teacher: list[Tensor] = self.teacher(images)
        return teacher, self.reconstruct(teacher)

    def reconstruct(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """Map the teacher's features, of any norm, to those that the decoder student makes of them."""
        fused = self.fusion([F.normalize(level, dim=1) for level in teacher])
        decoded: list[Tensor] = self.decoder_student(self.embedding(fused), [level.shape[-2:] for level in teacher])
        return decoded
