"""Base of all models: the shared constructor arguments, training, evaluation and checkpoints."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from anomalib_dskd.components.backbone import check_teacher
from anomalib_dskd.components.discrepancy import increase_mined_share
from anomalib_dskd.components.find_weights import find_teacher_weights
from anomalib_dskd.evaluation import RawScoreEvaluator, check_labels
from anomalib_dskd.models.distillation.callbacks import (
    CacheTrainingData,
    CheckImageFiles,
    EvaluationWeights,
    ReleaseMemory,
    ReportPredictions,
    SeedTraining,
)
from anomalib_dskd.models.distillation.checkpoint_io import install_checkpoint_io, warn_of_better_checkpoint
from anomalib_dskd.models.distillation.checkpoints import CheckpointMixin
from anomalib_dskd.models.distillation.command import filter_messages, prepare_saved_config
from anomalib_dskd.models.distillation.divergence import check_loss, check_weights
from anomalib_dskd.models.distillation.export import ExportMixin
from anomalib_dskd.models.distillation.image_size import DEFAULT_IMAGE_SIZE, resolve_pre_processor
from anomalib_dskd.models.distillation.images import check_batch
from anomalib_dskd.models.distillation.optimization import create_optimizer
from anomalib_dskd.models.distillation.tiling import prepare_callback
from anomalib_dskd.models.distillation.trainer_checks import (
    check_callbacks,
    check_last_step,
    check_planned_steps,
    check_trainer,
    number_of_steps,
)
from anomalib_dskd.models.distillation.training_loader import prepare_batch
from anomalib_dskd.models.distillation.training_options import Schedule, TrainingOptions
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from anomalib_dskd.pre_processing import create_pre_processor
from anomalib_dskd.visualization import ResultVisualizer

__all__ = ["DEFAULT_TEACHER", "DistillationModule"]

DEFAULT_TEACHER = "resnet18.tv_in1k"  # section 4.1.2; timm's own default tag has newer weights


class DistillationModule(ExportMixin, CheckpointMixin):
    """Trains students on a frozen teacher's features, and finds defects where they differ.

    A model is ``class Name(DistillationModule, AnomalibModule)``. Its constructor takes its own arguments and passes
    the others on to this one; it sets :attr:`model`, and what :meth:`compute_losses` needs. Section numbers are those
    of the DSKD paper, whose values are the defaults of all models.

    Args:
        teacher: timm backbone that supports ``features_only``. Default: ImageNet ResNet18 (section 4.1.2) with
            torchvision's weights.
        layers: indices into the backbone's feature levels. Default: conv2_x, conv3_x, conv4_x (section 3.1).
        teacher_weights: file of pretrained weights, safetensors or a PyTorch state dict. Default: the folder in
            the environment variable ``ANOMALIB_DSKD_WEIGHTS``, else the package of the ``lite`` extra, else what
            timm has cached or can download. Read when training starts; a checkpoint contains the teacher.
        image_size: height and width that images are resized to, without a crop. Default: 256 (section 4.1.2).
            Excludes ``pre_processor``.
        sigma: standard deviation of the anomaly map's Gaussian blur in pixels, Eq. (9); 0 for none. Default: 4.
        context_weight: weight of one more summand of the anomaly map: the deepest level's discrepancy after its errors'
            vectors have been averaged over 3x3 neighbors. It finds large defects better, see ``docs/recommended.md``.
            Default: 0, as in the paper, Eq. (8).
        learning_rate: of Adam; with ``one_cycle`` its peak. Default: 0.001 (section 4.1.2).
        schedule: ``constant``, or ``one_cycle``: up to ``learning_rate`` over the first 30 % of the steps, then down to
            nearly 0. Default: constant (section 4.1.2).
        betas: of Adam. Default: (0.5, 0.999) (section 4.1.2).
        weight_decay: of Adam. Default: 0; the paper gives none.
        hard_mining: share of each level's pixels, those that a student reconstructs best in a batch, that train it with
            a tenth of their gradient, such as 0.7; it increases from 0 over the first tenth of the planned steps.
            Students then generalize less to defects, see ``docs/recommended.md``. Default: 0, as in the paper, Eq. (7).
        batch_norm_images: training images from which batch-norm statistics are re-estimated before each
            evaluation within training; 0 keeps the running averages. Default, our choice: 256, see
            ``docs/deviations.md``.
        ema_decay: decay of an exponential moving average of the trained weights over the steps of training, such as
            0.99. Evaluations, checkpoints and exports then use the average instead of the last step's weights. Needs
            ``batch_norm_images`` above 0. Default: 0, no average, as in the paper.
        teacher_cache: GiB of memory for the teacher's features of the training images, which are the same in each
            epoch; a temporary file holds what exceeds it. 0 computes them in each epoch, as happens with
            augmentations that may be random and on a GPU. Default, our choice: 1.
        image_cache: GiB of memory for decoded, resized training images; those that exceed it, and all of them with
            random augmentations, are decoded in each epoch. Default, our choice: 1.
        seed: initializes the students, and determines, with the epoch's number, all random numbers of an epoch, such
            as the order of its batches and pseudo-defects. A resumed training run then ends with the same weights as
            one that was never interrupted. Default, anomalib's: unseeded.
        pre_processor: as in every anomalib model.
        post_processor: as in every anomalib model. Default:
            :class:`~anomalib_dskd.post_processing.NormalQuantilePostProcessor`, which says what a score of 0.5 means.
        evaluator: as in every anomalib model. Default: :class:`~anomalib_dskd.evaluation.RawScoreEvaluator`.
        visualizer: as in every anomalib model. Default: :class:`~anomalib_dskd.visualization.ResultVisualizer`.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.
    """

    map_only: ClassVar[frozenset[str]] = frozenset({"context_weight", "sigma"})
    """Arguments that training does not depend on: a benchmark trains once for models that differ only in these."""

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        layers: Sequence[int] = (1, 2, 3),
        teacher_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        sigma: float = 4.0,
        context_weight: float = 0.0,
        learning_rate: float = 1e-3,
        schedule: Schedule = "constant",
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        hard_mining: float = 0.0,
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
        filter_messages()
        options = TrainingOptions.from_arguments(locals())
        check_teacher(teacher)
        super().__init__(
            pre_processor=resolve_pre_processor(pre_processor, teacher, image_size),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.options = options
        self.network_arguments: dict[str, Any] = {
            "teacher": teacher,
            "layers": layers,
            "sigma": sigma,
            "context_weight": context_weight,
        }

    @property
    def network_size(self) -> tuple[int, int] | None:
        """Height and width of what the networks see, tiles or images, if they are known."""
        tiler = self.model.tiler
        return self.input_size if tiler is None else (tiler.tile_size_h, tiler.tile_size_w)

    def check_image_size(self) -> None:
        """Check the size of images, if it is known, or of their tiles, against the networks.

        The last step of a model's constructor, and the first of training.

        Raises:
            ArgumentError: the networks do not support it.
        """
        if self.input_size is not None:
            self.model.check_size(*self.input_size)

    # --- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return each part of the loss by name; training minimizes their sum.

        Args:
            batch: normalized images ``(B, 3, H, W)``, channels last, and their paths.
        """

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through all networks that are trained, to estimate batch-norm statistics."""
        self.compute_losses(batch)

    @property
    def students_learn(self) -> bool:
        """Whether the next optimizer step trains the networks that score images."""
        return True

    @property
    def phase(self) -> range:
        """Steps of the training run in which the same networks are trained as in the next one; empty if unknown."""
        return range(self.planned_steps)

    @property
    def mined_share(self) -> float:
        """Share of the pixels whose gradient is reduced in the next optimizer step."""
        step = self.global_step - self.phase.start
        return increase_mined_share(self.options.hard_mining, step=step, steps=len(self.phase))

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and those of this package.

        Raises:
            ArgumentError: the Trainer has a callback that is not supported; here, before that callback is set up.
        """
        if self._trainer is not None:
            check_callbacks(self.trainer)
            prepare_callback(self.trainer)
            prepare_saved_config(self.trainer)  # here, because the command's own callbacks come first
        options = self.options
        return [
            CheckImageFiles(),
            *([SeedTraining(options.seed)] if options.seed is not None else []),
            CacheTrainingData(images=options.image_cache, features=options.teacher_cache),
            EvaluationWeights(ema_decay=options.ema_decay),
            *cast("Sequence[Callback]", super().configure_callbacks()),
            ReportPredictions(),
            ReleaseMemory(),
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam (DSKD, section 4.1.2) over all but the teacher, and its schedule."""
        return create_optimizer(self.parameters(), self.options, self._trainer)

    def setup(self, stage: str) -> None:
        """Replace checkpoints atomically; store the weights of a training run channels last.

        Raises:
            ArgumentError: a metric needs labels that the post-processor does not predict.
        """
        super().setup(stage)
        check_labels(self.evaluator, self.post_processor)
        install_checkpoint_io(self.trainer)
        if stage == TrainerFn.FITTING:
            # faster on CPUs with BF16 units; before several processes exchange gradients in this memory format
            for network in self._trained_networks():
                network.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Check the Trainer's settings, and load the teacher's weights unless a checkpoint has provided them."""
        check_trainer(self.trainer)
        self.check_image_size()  # again, for the tiles of a callback
        self.trainer.num_sanity_val_steps = 0  # before training there are no results to validate
        self.train()  # an earlier export or prediction has left the students in evaluation mode
        if self.model.teacher.weights_origin is None:
            self.load_teacher_weights()

    def load_teacher_weights(self) -> None:
        """Find and load the teacher's pretrained weights; training does this by itself.

        Raises:
            TeacherWeightsError: weights missing, unreadable, or of another architecture.
        """
        name = self.model.teacher.backbone.name
        self.model.teacher.load_weights(find_teacher_weights(name, self.options.teacher_weights))

    def on_train_start(self) -> None:
        """Check the length of training, now that the number of batches is known."""
        check_last_step(self.trainer)
        if self.schedule_arguments:
            steps = number_of_steps(self.trainer)
            if self.trainer.ckpt_path:
                check_planned_steps(self.planned_steps, steps)
            self.planned_steps = steps

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the losses.

        Raises:
            DivergedError: the loss is not finite.
        """
        check_batch(batch)
        losses = self.compute_losses(prepare_batch(batch, self.model.tiler))
        total = torch.stack(list(losses.values())).sum()
        check_loss(self._trainer, total, batch, batch_idx)
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=batch.batch_size, sync_dist=True)
        log("train_loss", total.detach(), prog_bar=True)
        for name, loss in losses.items():
            log(f"train_loss_{name}", loss.detach())
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Record that the students are trained, so that results may be computed."""
        if self.students_learn:
            self.model.is_trained = True

    def on_fit_end(self) -> None:
        """Warn where a monitored metric was better in an earlier checkpoint."""
        if self.trainer.is_global_zero:
            warn_of_better_checkpoint(self.trainer)

    def check_weights(self) -> None:
        """Raise unless all trained weights are finite.

        Raises:
            DivergedError: a weight is not.
        """
        for network in self._trained_networks():
            check_weights(network, epoch=self.current_epoch)

    def _trained_networks(self) -> Iterator[nn.Module]:
        for name in ("model", *self.training_components):
            if isinstance(network := getattr(self, name), nn.Module):
                yield network

    # --- anomalib's contract ----------------------------------------------------------------------------------------

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that this model imposes on Lightning's Trainer: none."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None, teacher: str = DEFAULT_TEACHER
    ) -> PreProcessor:
        """Return the default pre-processing for a teacher."""
        return create_pre_processor(teacher, image_size or DEFAULT_IMAGE_SIZE)

    def configure_post_processor(self) -> PostProcessor:
        """Return the default post-processing, whose thresholds need no defects."""
        return NormalQuantilePostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return the default visualizer, which adds score and verdict and overwrites no file."""
        return ResultVisualizer()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the paper's metrics, on unclamped scores."""
        return RawScoreEvaluator()
