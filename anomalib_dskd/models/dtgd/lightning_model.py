"""DTGD as an anomalib model."""

from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_dskd.argument_checks import check_not_negative
from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.dtgd.loss import DtgdLoss
from anomalib_dskd.models.dtgd.torch_model import DtgdModel
from anomalib_dskd.pre_processing import get_normalization

__all__ = ["Dtgd"]


class Dtgd(DistillationModule, AnomalibModule):
    """Dual-teacher guided denoising distillation: a student learns to remove defects from features, as noise.

    Reimplemented from the abstract of "Dual-teacher guided denoising distillation for anomaly detection"; the
    authors' code and text were not seen; their results are not claimed.

    In training, normal images get pseudo-defects. The teacher sees the clean image (the normal teacher) and the damaged
    one (the anomaly teacher); an encoder-decoder student sees the damaged one and learns the clean one's features,
    with gates by which the anomaly teacher decides which features pass. Where the decoder and the teacher differ, the
    image is anomalous.

    Args:
        gate: let the anomaly teacher's features gate the encoder's (the abstract), or not (an ablation).
        margin: cosine up to which features of damage count as unlike the anomaly teacher's. Default, our choice:
            0.5, half-way between orthogonal and equal directions.
        dissimilarity_weight: of being unlike the anomaly teacher where there is damage, each consistency with the
            normal teacher having 1; 0 leaves it out. Default, our choice: 0.1, as the clean image's features, which
            are the target there too, may be similar to the damaged one's.
        defect_probability: of a training image to be damaged. Default: 0.5, anomalib's, so that half of the images
            are seen as normal ones are at inference.
        embedding_blocks: residual blocks in the embedding. Default, our choice: two, as in DSKD.
        **kwargs: shared arguments, which
            :class:`~anomalib_dskd.models.distillation.lightning_model.DistillationModule` documents.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Dtgd(image_size=128, gate=False)
        >>> model.model.smallest_image
        64
    """

    model: DtgdModel
    training_only: ClassVar[frozenset[str]] = DistillationModule.training_only | {
        "defect_probability",
        "dissimilarity_weight",
        "margin",
    }
    training_components: ClassVar[tuple[str, ...]] = ("loss", "pseudo_defects")

    def __init__(
        self,
        gate: bool = True,
        margin: float = 0.5,
        dissimilarity_weight: float = 0.1,
        defect_probability: float = 0.5,
        embedding_blocks: int = 2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        check_not_negative(dissimilarity_weight=dissimilarity_weight)
        if not -1 <= margin < 1:
            msg = f"margin {margin!r} must be a cosine from -1 up to, not including, 1."
            raise ArgumentError(msg)
        super().__init__(**kwargs)
        seed, teacher = self.options.seed, self.network_arguments["teacher"]
        with seeded(seed):
            self.model = DtgdModel(**self.network_arguments, gate=gate, embedding_blocks=embedding_blocks)
        self.loss = DtgdLoss(margin=margin, dissimilarity_weight=dissimilarity_weight)
        self.pseudo_defects = PseudoDefects(*get_normalization(teacher), seed=seed, probability=defect_probability)
        self.check_image_size()

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return the consistency of encoder and decoder with the clean image, and the dissimilarity to the damage."""
        damaged, masks = self._damage(batch)
        anomaly_teacher = self.model.teacher(damaged)  # other damage in each epoch: not cached
        students = self.model.student_features(damaged, anomaly_teacher)
        normal_teacher = self.model.teacher_features(torch.as_tensor(batch.image))
        losses: dict[str, Tensor] = self.loss(
            normal_teacher, students, anomaly_teacher, masks, hard_mining=self.mined_share
        )
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through the student, damaged as in training, and not through the normal teacher."""
        damaged, _ = self._damage(batch)
        self.model.student_features(damaged, self.model.teacher(damaged))

    def _damage(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        return self.pseudo_defects(torch.as_tensor(batch.image), batch.image_path, epoch=self.current_epoch)
