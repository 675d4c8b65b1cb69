"""The networks of DTGD: one frozen network as both teachers, and a student that takes the damage out."""

from collections.abc import Sequence

from torch import Tensor

from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Features
from anomalib_dskd.models.dtgd.encoder import DenoisingEncoder

__all__ = ["DtgdModel"]


class DtgdModel(DistillationModel):
    """Frozen teacher, gated denoising encoder, deep feature embedding and decoder student.

    Reimplemented from the abstract; the authors' code and text were not seen; their figures are not claimed.

    The normal and the anomaly teacher are the same frozen network on two images: the clean one, and its damaged
    copy, which the student sees too. Outside training the two are one image, so that one pass serves both.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        gate: let the anomaly teacher's features gate the encoder's.
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
        gate: bool = True,
        embedding_blocks: int = 2,
        sigma: float = 4.0,
    ) -> None:
        super().__init__(teacher, layers, l2_weight=0.0, sigma=sigma)
        levels = self.teacher.levels
        self.encoder_student = DenoisingEncoder(levels, gate=gate)
        self.embedding = DeepFeatureEmbedding(levels, embedding_blocks)
        self.decoder_student = DecoderStudent(levels)

    def training_features(self, images: Tensor) -> Features:
        """Map normalised images ``(B, 3, H, W)``, taken as clean and as damaged ones, to all pyramids."""
        return Features(teacher=self.teacher_features(images), students=self.denoise(images, self.teacher(images)))

    def compared_pyramids(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Run the teacher once, for the gates and for the map."""
        teacher: list[Tensor] = self.teacher(images)
        return teacher, self.denoise(images, teacher)["decoder"]

    def denoise(self, images: Tensor, anomaly_teacher: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Map images ``(B, 3, H, W)``, and the teacher's features of them, to the student's pyramids.

        Returns:
            ``encoder``: behind each gate; ``decoder``: what the decoder student makes of these.
        """
        encoded: list[Tensor] = self.encoder_student(images, anomaly_teacher)
        decoded: list[Tensor] = self.decoder_student(self.embedding(encoded), [level.shape[-2:] for level in encoded])
        return {"encoder": encoded, "decoder": decoded}
