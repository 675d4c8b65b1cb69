"""The networks of AFKD: the teacher's feature levels are fused step by step, embedded and decoded."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding
from anomalib_dskd.models.afkd.fusion import AsymptoticFusion, FusionWeights
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Pyramid

__all__ = ["AfkdModel"]


class AfkdModel(DistillationModel):
    """Frozen teacher, asymptotic fusion, deep feature embedding and decoder student.

    Reimplemented from the abstract; the authors' code and text were not seen; their results are not claimed.

    There is no encoder student: the teacher's own features go through the bottleneck, as in reverse distillation.
    They are normalized to unit norm first, so that the teacher and the feature cache give the same input.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        fusion: weights of the levels that meet: ``learned``, or ``equal``.
        embedding_blocks: residual blocks of the embedding.
        **kwargs: of the anomaly map, which :class:`DistillationModel` documents.

    Raises:
        ArgumentError: a value is out of range.
    """

    scored_student = "decoder"

    def __init__(
        self,
        teacher: str,
        layers: Sequence[int] = (1, 2, 3),
        *,
        fusion: FusionWeights = "learned",
        embedding_blocks: int = 2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(teacher, layers, **kwargs)
        levels = self.teacher.levels
        self.fusion = AsymptoticFusion(levels, fusion)
        self.embedding = DeepFeatureEmbedding(levels, embedding_blocks)
        self.decoder_student = DecoderStudent(levels)

    def student_features(self, images: Tensor, teacher: Pyramid) -> dict[str, list[Tensor]]:  # noqa: ARG002
        """Map the teacher's pyramid, of any norm, to its reconstruction by the decoder student."""
        fused = self.fusion([F.normalize(level, dim=1) for level in teacher])
        return {"decoder": self.decoder_student(self.embedding(fused), [level.shape[-2:] for level in teacher])}
