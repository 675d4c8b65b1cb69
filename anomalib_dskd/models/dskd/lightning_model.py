"""DSKD as an anomalib model."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_dskd.argument_checks import check_not_negative
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.dskd.loss import DskdLoss
from anomalib_dskd.models.dskd.torch_model import DskdModel, Embedding, Encoder, Losses, MapPair

__all__ = ["Dskd"]


class Dskd(DistillationModule, AnomalibModule):
    """Dual-student knowledge distillation: train on normal images only, detect and localize defects.

    An encoder student learns a pretrained teacher's features of normal images; a decoder student learns to
    reconstruct them from the encoder's embedding. Where the decoder fails to, the image is anomalous. The defaults are
    the paper's; ``configs/recommended.yaml`` detects better after fewer steps, see ``docs/recommended.md``.

    Args:
        map_pair: networks whose discrepancy is the anomaly map. Default: teacher and decoder student (Table 7).
        losses: students distilled from the teacher. Default: both (Eq. 7).
        map_layers: the ones of ``layers`` that the map sums. Default: all (Table 9).
        encoder: network whose features are embedded. Default: the encoder student. ``teacher``: the teacher's own
            features are, and there is no encoder student, see ``docs/recommended.md``.
        embedding: fuse the encoder's levels (true, section 3.2), or downsample only the deepest (Table 8).
        embedding_blocks: residual blocks in the embedding. Default: two, which the paper's parameter count
            fits (Table 6).
        embedding_input: the encoder's features ``raw`` or ``normalized``. Default, our choice: raw; the paper
            can be read either way (Fig. 4 and Algorithm 2, line 7).
        embedding_gradient: let the decoder's loss train the encoder student too. Default, our choice: true; the
            paper can be read either way (section 3.1).
        l2_weight: lambda of Eq. (6). Default: 0.1 (section 4.1.2).
        **kwargs: shared arguments, which
            :class:`~anomalib_dskd.models.distillation.lightning_model.DistillationModule` documents.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Dskd(image_size=128, map_pair="T-D")
        >>> model.model.smallest_image
        64
    """

    model: DskdModel
    training_only: ClassVar[frozenset[str]] = DistillationModule.training_only | {"embedding_gradient"}
    map_only: ClassVar[frozenset[str]] = DistillationModule.map_only | {"map_layers", "map_pair"}
    layers_by_default: ClassVar[frozenset[str]] = frozenset({"map_layers"})

    def __init__(
        self,
        map_pair: MapPair = "T-D",
        losses: Losses = "both",
        map_layers: Sequence[int] | None = None,
        encoder: Encoder = "student",
        embedding: bool = True,
        embedding_blocks: int = 2,
        embedding_input: Embedding = "raw",
        embedding_gradient: bool = True,
        l2_weight: float = 0.1,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        check_not_negative(l2_weight=l2_weight)
        super().__init__(**kwargs)
        with seeded(self.options.seed):
            self.model = DskdModel(
                **self.network_arguments,
                map_pair=map_pair,
                losses=losses,
                map_layers=map_layers,
                encoder=encoder,
                embedding=embedding,
                embedding_blocks=embedding_blocks,
                embedding_input=embedding_input,
                embedding_gradient=embedding_gradient,
                l2_weight=l2_weight,
            )
        self.loss = DskdLoss(l2_weight=l2_weight)
        self.check_image_size()

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return the loss of each student that is distilled, Eq. (7)."""
        teacher, students = self.model(torch.as_tensor(batch.image))
        losses: dict[str, Tensor] = self.loss(teacher, students, hard_mining=self.mined_share)
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through the students, and through the teacher only if it is their encoder."""
        images = torch.as_tensor(batch.image)
        reads_teacher = self.model.encoder_student is None
        self.model.student_features(images, self.model.teacher_features(images) if reads_teacher else [])
