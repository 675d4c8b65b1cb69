"""DTGD as an anomalib model."""

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
from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.lightning_model import DistillationMixin
from anomalib_dskd.models.distillation.training_options import (
    DEFAULT_TEACHER,
    Schedule,
    TrainingOptions,
    resolve_pre_processor,
)
from anomalib_dskd.models.dtgd.loss import DtgdLoss
from anomalib_dskd.models.dtgd.torch_model import DtgdModel
from anomalib_dskd.pre_processing import normalisation

__all__ = ["Dtgd"]


class Dtgd(DistillationMixin, AnomalibModule):
    """Dual-teacher guided denoising distillation: defects are noise, which a student learns to take out.

    Reimplemented from the abstract of "Dual-teacher guided denoising distillation for anomaly detection"; the
    authors' code and text were not seen; their figures are not claimed.

    In training, good images get pseudo-defects. The teacher sees the clean image (the normal teacher) and the damaged
    one (the anomaly teacher); an encoder-decoder student sees the damaged one and learns the clean one's features,
    with gates in which the anomaly teacher tells it what to keep. Where the decoder and the teacher differ, the image
    is anomalous.

    Args:
        teacher: timm backbone that supports ``features_only``. Default, our choice: DSKD's ImageNet ResNet18 with
            torchvision's weights.
        layers: indices into the backbone's feature levels. Default, our choice: DSKD's.
        teacher_weights: file of pretrained weights, safetensors or a PyTorch state dict. Default: the folder in
            the environment variable ``ANOMALIB_DSKD_WEIGHTS``, else the package of the ``lite`` extra, else what
            timm has cached or can download. Read when training starts; a checkpoint brings the teacher with it.
        image_size: height and width that images are resized to, with no crop. Default, our choice: 256, DSKD's.
            Not together with a ``pre_processor`` of your own.
        gate: let the anomaly teacher's features gate the encoder's (the abstract), or (the ablation) not.
        margin: cosine up to which features of damage count as unlike the anomaly teacher's. Default, our choice:
            0.5, half-way between directions that have nothing in common and the same one.
        dissimilarity_weight: of being unlike the anomaly teacher where there is damage, each consistency with the
            normal teacher having 1; 0 leaves it out. Default, our choice: 0.1, as the clean image's features, which
            are to be met there too, may be similar to the damaged one's.
        defect_probability: of a training image to be damaged. Default: 0.5, anomalib's, so that half of the images
            are seen as good parts will be.
        embedding_blocks: residual blocks in the embedding. Default, our choice: two, as in DSKD.
        sigma: standard deviation of the map's blur in pixels; 0 for none. Default, our choice: 4, DSKD's.
        learning_rate: of Adam; with ``one_cycle`` its peak. Default, our choice: 0.001, DSKD's.
        schedule: ``constant``, or ``one_cycle``: up to ``learning_rate`` over the first 30 % of the steps, then down to
            nearly nothing. Default, our choice: constant, as in DSKD.
        betas: of Adam. Default, our choice: (0.5, 0.999), DSKD's.
        weight_decay: of Adam. Default: 0; the abstract gives none.
        batch_norm_images: training images from which the batch-norm statistics are estimated anew before each
            evaluation within training; 0 keeps the running averages. Default, our choice: 256, as in DSKD.
        ema_decay: decay of an exponential average of the students' weights over the steps of the training, such as
            0.99. Evaluations, checkpoints and exports then have the average instead of the last step's weights. Needs
            ``batch_norm_images`` above 0. Default: 0, no average, as in DSKD.
        teacher_cache: GiB of memory for the teacher's features of the training images, which are the same in each
            epoch; what needs more is kept in a temporary file. 0 computes them in each epoch, as happens with
            augmentations that may be random and on a GPU. Default, our choice: 1.
        image_cache: GiB of memory for decoded, resized training images; those beyond, and all of them with random
            augmentations, are decoded in each epoch. Default, our choice: 1.
        seed: initialise what is trained, and draw all random numbers of an epoch, such as the damage and the order of
            its batches, from this number and the epoch's. A training that is resumed then ends as if it had never been
            stopped. Default, anomalib's: unseeded; each training, and each that is resumed, has an order of its own.
        pre_processor: as in every anomalib model.
        post_processor: as in every anomalib model. Default:
            :class:`~anomalib_dskd.post_processing.NormalQuantilePostProcessor`, which says what a score of 0.5 means.
        evaluator: as in every anomalib model. Default: :class:`~anomalib_dskd.evaluation.RawScoreEvaluator`.
        visualizer: as in every anomalib model.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Dtgd(image_size=128, gate=False)
        >>> model.model.smallest_image
        64
    """

    model: DtgdModel
    training_only: ClassVar[frozenset[str]] = DistillationMixin.training_only | {
        "defect_probability",
        "dissimilarity_weight",
        "margin",
    }
    training_parts: ClassVar[tuple[str, ...]] = ("loss", "pseudo_defects")

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        layers: Sequence[int] = (1, 2, 3),
        teacher_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        gate: bool = True,
        margin: float = 0.5,
        dissimilarity_weight: float = 0.1,
        defect_probability: float = 0.5,
        embedding_blocks: int = 2,
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
        check_not_negative(sigma=sigma, dissimilarity_weight=dissimilarity_weight)
        if not -1 <= margin < 1:
            msg = f"margin {margin!r} must be a cosine from -1 up to, not including, 1."
            raise ArgumentError(msg)
        check_teacher(teacher)
        super().__init__(
            pre_processor=resolve_pre_processor(pre_processor, teacher, image_size),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.options = options
        with seeded(seed):
            self.model = DtgdModel(teacher, layers, gate=gate, embedding_blocks=embedding_blocks, sigma=sigma)
        self.loss = DtgdLoss(margin=margin, dissimilarity_weight=dissimilarity_weight)
        self.pseudo_defects = PseudoDefects(*normalisation(teacher), seed=seed, probability=defect_probability)
        if self.input_size is not None:
            self.model.check_size(*self.input_size)

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return the consistency of encoder and decoder with the clean image, and the dissimilarity from the damage."""
        damaged, masks = self._damage(batch)
        anomaly_teacher = self.model.teacher(damaged)  # other damage in each epoch: not for the cache
        students = self.model.denoise(damaged, anomaly_teacher)
        losses: dict[str, Tensor] = self.loss(
            self.model.teacher_features(torch.as_tensor(batch.image)), students, anomaly_teacher, masks
        )
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through the student, damaged as in training, and not through the normal teacher."""
        damaged, _ = self._damage(batch)
        self.model.denoise(damaged, self.model.teacher(damaged))

    def _damage(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        return self.pseudo_defects(torch.as_tensor(batch.image), batch.image_path, epoch=self.current_epoch)
