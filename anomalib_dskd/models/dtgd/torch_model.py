"""The networks of DTGD: one frozen network as both teachers, and a denoising encoder-decoder student."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Pyramid
from anomalib_dskd.models.dtgd.encoder import DenoisingEncoder

__all__ = ["DtgdModel"]


class DtgdModel(DistillationModel):
    """Frozen teacher, gated denoising encoder, deep feature embedding and decoder student.

    Reimplemented from the abstract; the authors' code and text were not seen; their results are not claimed.

    The normal and the anomaly teacher are the same frozen network on two images: the clean one, and its damaged
    copy, which the student sees too. At inference both are the same image, so that one pass serves both.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        gate: let the anomaly teacher's features gate the encoder's.
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
        gate: bool = True,
        embedding_blocks: int = 2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(teacher, layers, **kwargs)
        levels = self.teacher.levels
        self.encoder_student = DenoisingEncoder(levels, gate=gate)
        self.embedding = DeepFeatureEmbedding(levels, embedding_blocks)
        self.decoder_student = DecoderStudent(levels)

    def student_features(self, images: Tensor, teacher: Pyramid) -> dict[str, list[Tensor]]:
        """Map images ``(B, 3, H, W)``, and the teacher's features of these same images, to the student's pyramids.

        Returns:
            ``encoder``: the output of each gate; ``decoder``: the decoder student's reconstruction from these.
        """
        encoded: list[Tensor] = self.encoder_student(images, teacher)
        decoded: list[Tensor] = self.decoder_student(self.embedding(encoded), [level.shape[-2:] for level in encoded])
        return {"encoder": encoded, "decoder": decoded}
