"""DSKD as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_dskd.argument_checks import check_not_negative
from anomalib_dskd.components.backbone import check_teacher
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.models.distillation.lightning_model import DistillationMixin
from anomalib_dskd.models.distillation.training_options import (
    DEFAULT_TEACHER,
    Schedule,
    TrainingOptions,
    resolve_pre_processor,
)
from anomalib_dskd.models.dskd.loss import DskdLoss
from anomalib_dskd.models.dskd.torch_model import DskdModel, Embedding, Losses, MapPair

__all__ = ["Dskd"]


class Dskd(DistillationMixin, AnomalibModule):
    """Dual-student knowledge distillation: train on good parts, find and outline defects.

    An encoder student learns a pretrained teacher's features of good images; a decoder student learns to
    reproduce them from the encoder's embedding. Where the decoder fails to, the image is anomalous.

    Args:
        teacher: timm backbone that supports ``features_only``. Default: the paper's ImageNet ResNet18
            (section 4.1.2) with torchvision's weights.
        layers: indices into the backbone's feature levels. Default: conv2_x, conv3_x, conv4_x (section 3.1).
        teacher_weights: file of pretrained weights, safetensors or a PyTorch state dict. Default: the folder in
            the environment variable ``ANOMALIB_DSKD_WEIGHTS``, else the package of the ``lite`` extra, else what
            timm has cached or can download. Read when training starts; a checkpoint brings the teacher with it.
        image_size: height and width that images are resized to, with no crop. Default: 256 (section 4.1.2).
            Not together with a ``pre_processor`` of your own.
        map_pair: networks whose discrepancy is the anomaly map. Default: teacher and decoder student (Table 7).
        losses: students distilled from the teacher. Default: both (Eq. 7).
        map_layers: the ones of ``layers`` that the map adds up. Default: all (Table 9).
        embedding: fuse the encoder's levels (true, section 3.2), or down-sample the deepest alone (Table 8).
        embedding_blocks: residual blocks in the embedding. Default: two, which the paper's parameter count
            fits (Table 6).
        embedding_input: the encoder's features ``raw`` or ``normalized``. Default, our choice: raw; the paper
            can be read either way (Fig. 4 and Algorithm 2, line 7).
        embedding_gradient: let the decoder's loss train the encoder student too. Default, our choice: true; the
            paper can be read either way (section 3.1).
        l2_weight: lambda of Eq. (6). Default: 0.1 (section 4.1.2).
        sigma: standard deviation of the map's blur in pixels, Eq. (9); 0 for none. Default: 4.
        learning_rate: of Adam; with ``one_cycle`` its peak. Default: 0.001 (section 4.1.2).
        schedule: ``constant``, or ``one_cycle``: up to ``learning_rate`` over the first 30 % of the steps, then down to
            nearly nothing. Default: constant (section 4.1.2).
        betas: of Adam. Default: (0.5, 0.999) (section 4.1.2).
        weight_decay: of Adam. Default: 0; the paper gives none.
        batch_norm_images: training images from which the students' batch-norm statistics are estimated anew before
            each evaluation within training; 0 keeps the running averages. Default, our choice: 256, see the
            README's table of deviations.
        ema_decay: decay of an exponential average of the students' weights over the steps of the training, such as
            0.99. Evaluations, checkpoints and exports then have the average instead of the last step's weights. Needs
            ``batch_norm_images`` above 0. Default: 0, no average, as in the paper.
        teacher_cache: GiB of memory for the teacher's features of the training images, which are the same in each
            epoch; what needs more is kept in a temporary file. 0 computes them in each epoch, as happens with
            augmentations that may be random and on a GPU. Default, our choice: 1.
        image_cache: GiB of memory for decoded, resized training images; those beyond, and all of them with random
            augmentations, are decoded in each epoch. Default, our choice: 1.
        seed: initialise the students, and draw all random numbers of an epoch, such as the order of its batches,
            from this number and the epoch's. A training that is resumed then ends as if it had never been stopped.
            Default, anomalib's: unseeded; each training, and each that is resumed, has an order of its own.
        pre_processor: as in every anomalib model.
        post_processor: as in every anomalib model. Default:
            :class:`~anomalib_dskd.post_processing.NormalQuantilePostProcessor`, which says what a score of 0.5 means.
        evaluator: as in every anomalib model. Default: :class:`~anomalib_dskd.evaluation.RawScoreEvaluator`.
        visualizer: as in every anomalib model.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Dskd(image_size=128, map_pair="T-D")
        >>> model.model.smallest_image
        64
    """

    model: DskdModel
    training_only: ClassVar[frozenset[str]] = DistillationMixin.training_only | {"embedding_gradient"}
    map_only: ClassVar[frozenset[str]] = DistillationMixin.map_only | {"map_layers", "map_pair"}
    like_layers: ClassVar[frozenset[str]] = frozenset({"map_layers"})

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        layers: Sequence[int] = (1, 2, 3),
        teacher_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        map_pair: MapPair = "T-D",
        losses: Losses = "both",
        map_layers: Sequence[int] | None = None,
        embedding: bool = True,
        embedding_blocks: int = 2,
        embedding_input: Embedding = "raw",
        embedding_gradient: bool = True,
        l2_weight: float = 0.1,
        sigma: float = 4.0,
        learning_rate: float = 1e-3,
        schedule: Schedule = "constant",
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        batch_norm_images: int = 256,
        ema_decay: float = 0.0,
        teacher_cache: float = 1.0,
        image_cache: float = 1.0,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        options = TrainingOptions.from_arguments(locals())
        check_not_negative(l2_weight=l2_weight, sigma=sigma)
        check_teacher(teacher)
        super().__init__(
            pre_processor=resolve_pre_processor(pre_processor, teacher, image_size),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.options = options
        with seeded(seed):
            self.model = DskdModel(
                teacher,
                layers,
                map_pair=map_pair,
                losses=losses,
                map_layers=map_layers,
                embedding=embedding,
                embedding_blocks=embedding_blocks,
                embedding_input=embedding_input,
                embedding_gradient=embedding_gradient,
                l2_weight=l2_weight,
                sigma=sigma,
            )
        self.loss = DskdLoss(l2_weight=l2_weight)
        if self.input_size is not None:
            self.model.check_size(*self.input_size)

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return the loss of each student that is distilled, Eq. (7)."""
        features = self.model.training_features(torch.as_tensor(batch.image))
        losses: dict[str, Tensor] = self.loss(features.teacher, features.students)
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through both students, without the teacher."""
        self.model.student_features(torch.as_tensor(batch.image))
