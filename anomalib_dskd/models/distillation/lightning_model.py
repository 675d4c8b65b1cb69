"""What the detectors have in common as anomalib models: training, evaluation and export."""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning import Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import Self

from anomalib_dskd.components.backbone import full_name
from anomalib_dskd.components.find_weights import find_teacher_weights
from anomalib_dskd.data.data_module_checks import check_names
from anomalib_dskd.data.image_cache import cache_training_images, is_deterministic
from anomalib_dskd.data.image_files import check_data_files, check_headers, dataset_paths
from anomalib_dskd.errors import ArgumentError, DataError, NotTrainedError
from anomalib_dskd.evaluation import RawScoreEvaluator, keep_raw_scores
from anomalib_dskd.models.distillation.checkpoint import handle_checkpoints, name_best_checkpoint, named_errors
from anomalib_dskd.models.distillation.divergence import check_loss, check_weights
from anomalib_dskd.models.distillation.images import check_images, warn_of_flat_images
from anomalib_dskd.models.distillation.quantization import calibration_images, quantize_file
from anomalib_dskd.models.distillation.seeding import seed_epoch, seed_pseudo_defects, start_loader_anew
from anomalib_dskd.models.distillation.torch_model import DistillationModel
from anomalib_dskd.models.distillation.training_options import (
    DEFAULT_IMAGE_SIZE,
    DEFAULT_TEACHER,
    TRAINING_ONLY,
    TrainingOptions,
    check_last_step,
    check_planned_steps,
    check_trainer,
    may_be_fused,
    meaning,
    number_of_steps,
)
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from anomalib_dskd.pre_processing import create_pre_processor
from anomalib_dskd.training.batch_norm import fresh_statistics
from anomalib_dskd.training.feature_cache import FeatureCache
from anomalib_dskd.training.weight_average import WeightAverage

__all__ = ["DistillationMixin"]

logger = logging.getLogger(__name__)

SPLITS = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("test",),
}
"""What is read of a data module in each stage."""
OURS = "anomalib_dskd"  # key in checkpoints
ONNX_OPSET = 18  # torch's exporter writes it; asked for an older one, as anomalib does, it tries to convert and fails

if TYPE_CHECKING:  # anomalib finds models among the direct subclasses of AnomalibModule: this can only stand beside it
    Base = AnomalibModule
else:
    Base = object


class DistillationMixin(Base):
    """Trains students on a frozen teacher's features, and finds defects where they differ.

    A model is ``class Name(DistillationMixin, AnomalibModule)``. Its constructor sets :attr:`options`, :attr:`model`
    and what :meth:`compute_losses` needs.
    """

    model: DistillationModel
    """The networks."""
    options: TrainingOptions
    """How they are trained."""
    training_only: ClassVar[frozenset[str]] = TRAINING_ONLY
    """Arguments that a trained model's results do not depend on any more."""
    map_only: ClassVar[frozenset[str]] = frozenset({"sigma"})
    """Arguments that the training does not depend on: a benchmark trains once for models that differ in these alone."""
    backbones: ClassVar[frozenset[str]] = frozenset({"teacher"})
    """Arguments that name a timm model."""
    like_layers: ClassVar[frozenset[str]] = frozenset()
    """Arguments that mean ``layers`` if they are not given."""
    training_parts: ClassVar[tuple[str, ...]] = ()
    """Attributes beside :attr:`model` that training alone needs: no export holds them."""
    weight_average: WeightAverage | None = None
    """Set while training with ``ema_decay``."""
    _resumed_average: dict[str, Any] | None = None
    """What a checkpoint has of it, until training goes on."""

    @abstractmethod
    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return each part of the loss by name; training minimises their sum.

        Args:
            batch: normalised images ``(B, 3, H, W)``, channels last, and their paths.
        """

    # --- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Look at the headers of a data module's images before any is decoded, and prepare a training.

        That is how checkpoints are saved, how weights lie, and images that are decoded once.
        """
        super().setup(stage)
        self._leave_training()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, AnomalibDataModule):
            check_names(data)
            splits = SPLITS[TrainerFn(stage)]
            check_data_files(data, splits)
            if "val" in splits and self.options.seed is not None:
                seed_pseudo_defects(data, self.options.seed)
            if stage == TrainerFn.FITTING:
                cache_training_images(data, memory=self.options.image_cache)
        handle_checkpoints(self.trainer)
        if stage == TrainerFn.FITTING:
            # faster on CPUs with bfloat16 units; now, because several processes exchange gradients as the weights lie
            for trained in self._trained_modules():
                trained.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Load the teacher's weights, unless a checkpoint has brought them, and seed what is drawn before an epoch."""
        check_trainer(self.trainer)
        self.train()  # an export or a prediction before has left the students in evaluation mode
        if self.model.teacher.weights_origin is None:
            self.load_teacher_weights()
        if self.options.seed is not None:
            seed_everything(self.options.seed, workers=True, verbose=False)

    def on_train_start(self) -> None:
        """Order the first batches, and make room for averaged weights and the teacher's features of training images."""
        self._start_weight_average()
        check_last_step(self.trainer)
        if self.options.schedule != "constant":
            check_planned_steps(self.trainer)
        loader = _training_loader(self.trainer)
        self.model.teacher_cache = None  # of a training that was broken off
        if self.options.seed is not None:
            seed_epoch(self.trainer, loader, self.options.seed)
            start_loader_anew(self.trainer)
        if self.options.teacher_cache > 0 and is_deterministic(getattr(loader.dataset, "augmentations", None)):
            self.model.teacher_cache = FeatureCache(
                self.model.teacher, images=_images(loader), memory=self.options.teacher_cache
            )

    def on_train_epoch_start(self) -> None:
        """Draw the same random numbers in this epoch, whether or not training was stopped before it."""
        if self.options.seed is not None:
            seed_epoch(self.trainer, _training_loader(self.trainer), self.options.seed)

    def _start_weight_average(self) -> None:
        resumed, decay = self._resumed_average, self.options.ema_decay
        self.weight_average = self._resumed_average = None
        if resumed is None and decay == 0:
            return
        average = WeightAverage(self.model, decay=decay)
        if resumed is not None:
            average.load_state_dict(resumed)
            average.put_back()
        if decay > 0:
            self.weight_average = average
        else:
            logger.warning("the checkpoint's averaged weights are dropped: ema_decay is 0 from here on.")

    def _leave_training(self) -> None:
        """Leave averaged weights in place where an error or a user has broken a training off."""
        if self.weight_average is not None:
            self.weight_average.use()
        self.weight_average = self._resumed_average = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Go on to learn from the last step's weights, where averaged ones have been scored with."""
        if self.weight_average is not None:
            self.weight_average.put_back()

    def on_train_end(self) -> None:
        """Leave averaged weights in place; free the room that others and the teacher's features took."""
        if self.weight_average is not None and not self.weight_average.is_in_use:  # no validation was the last
            self._prepare_to_score()
        self._leave_training()
        self.model.teacher_cache = None

    def on_fit_end(self) -> None:
        """Name the best checkpoint where the last weights are worse."""
        if self.trainer.is_global_zero:
            name_best_checkpoint(self.trainer)

    def load_teacher_weights(self) -> None:
        """Find and load the teacher's pretrained weights; training does this by itself.

        Raises:
            TeacherWeightsError: weights missing, unreadable, or of another architecture.
        """
        name = self.model.teacher.backbone.name
        self.model.teacher.load_weights(find_teacher_weights(name, self.options.teacher_weights))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the losses.

        Raises:
            DivergedError: the loss is not finite.
        """
        _look_at(batch)
        losses = self.compute_losses(_channels_last(batch))
        total = torch.stack(list(losses.values())).sum()
        check_loss(self._trainer, total, batch, batch_idx)
        logged = {"train_loss": total, **{f"train_loss_{name}": loss for name, loss in losses.items()}}
        for name, loss in logged.items():
            on_bar = name == "train_loss"
            self.log(
                name,
                loss.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=on_bar,
                batch_size=batch.batch_size,
                sync_dist=True,
            )
        return total

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Note that the students have learnt something, so that results may be asked of them."""
        if self.students_learn:
            self.model.is_trained = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        """Take a step, and its weights into the average."""
        super().optimizer_step(*args, **kwargs)
        if self.weight_average is not None and self.students_learn:
            self.weight_average.update()

    def on_train_epoch_end(self) -> None:
        """Let the cache take stock; without a validation, make the model fit to be saved here.

        Raises:
            DivergedError: a weight is not finite.
        """
        if self.model.teacher_cache is not None:
            self.model.teacher_cache.end_epoch()
        if not self.trainer.enable_validation:
            self._prepare_to_score()

    def _prepare_to_score(self) -> None:
        """Take the weights that images are to be scored with, and their own batch-norm statistics."""
        if self.weight_average is not None:
            self.weight_average.use()
        self.estimate_batch_norm(self.model, self.run_students)
        self._check_weights()

    def _trained_modules(self) -> list[nn.Module]:
        parts = (getattr(self, name) for name in self.training_parts)
        return [self.model, *(part for part in parts if isinstance(part, nn.Module))]

    def _check_weights(self) -> None:
        for trained in self._trained_modules():
            check_weights(trained, epoch=self.current_epoch)

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through all that is trained."""
        self.compute_losses(batch)

    @torch.no_grad()
    def estimate_batch_norm(self, network: nn.Module, run: Callable[[ImageBatch], object]) -> None:
        """Estimate batch-norm statistics anew from ``batch_norm_images`` training images, in random order.

        Args:
            network: whose statistics are estimated.
            run: passes a training batch through it.
        """
        if not self.options.batch_norm_images:
            return
        loader = _training_loader(self.trainer)
        order = torch.randperm(_images(loader), generator=torch.Generator().manual_seed(0))
        chosen = order[: self.options.batch_norm_images]
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        was_training = network.training
        network.train()
        with fresh_statistics(network), self.trainer.precision_plugin.forward_context():
            # of nearly the same size, since each batch counts the same
            for part in torch.tensor_split(chosen, math.ceil(len(chosen) / size)):
                batch = loader.collate_fn([loader.dataset[index] for index in part.tolist()])
                batch = self.trainer.strategy.batch_to_device(batch)
                if isinstance(self.pre_processor, PreProcessor):
                    self.pre_processor.on_train_batch_start(self.trainer, self, batch, 0)
                run(_channels_last(batch))
        network.train(was_training)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam (DSKD, section 4.1.2) over all but the teacher, and its schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            trained,
            lr=self.options.learning_rate,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
            fused=may_be_fused(self._trainer),  # the same arithmetic in one pass over the weights
        )
        if self.options.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.options.learning_rate,
            total_steps=number_of_steps(self.trainer),
            cycle_momentum=False,  # beta stays the paper's
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, *_: Any, **__: Any) -> InferenceBatch:  # noqa: ANN401 - anomalib's signature
        """Map images as they were read to normalised scores, maps and labels, as exported models do.

        Args:
            batch: images ``(B, 3, H, W)`` of any height and width, from 0 to 1.

        Returns:
            ``pred_score`` and ``pred_label`` ``(B, 1)``, ``anomaly_map`` and ``pred_mask`` ``(B, 1, H', W')`` of the
            size that the pre-processor resizes to.

        Raises:
            ArgumentError: another shape, type or range, or the model is in training mode.
        """
        if not torch.compiler.is_exporting():
            check_images(batch, self.pre_processor, dtype=next(self.parameters()).dtype)
            if self.training:
                msg = f"this {self.name} is in training mode: call .eval() first, or use anomalib's Engine."
                raise ArgumentError(msg)
        return super().forward(batch)

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:  # type: ignore[override] # noqa: ARG002
        """Put map ``(B, 1, H, W)`` and score ``(B, 1)`` on the batch."""
        _look_at(batch)
        predictions: InferenceBatch = self.model(batch.image)
        keep_raw_scores(batch, predictions, largest=self.model.largest_score)
        batch.update(**predictions._asdict())
        return batch

    test_step = predict_step = validation_step  # type: ignore[assignment]

    def on_validation_start(self) -> None:
        """Refuse to validate before training; within training, validate what a checkpoint is to hold.

        Raises:
            NotTrainedError: training has not begun.
            DivergedError: within training, a weight is not finite.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._prepare_to_score()
        else:
            self._require_training("validate")

    def on_test_start(self) -> None:
        """Refuse to test before training."""
        self._require_training("test")

    def on_predict_start(self) -> None:
        """Refuse to predict before training, or from images that are not read as they are."""
        self._require_training("predict")
        self._warn_without_thresholds()
        check_headers(dataset_paths(self.trainer.predict_dataloaders))  # before they are decoded

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401 - passed on
        """Export as anomalib does, once trained."""
        self._require_training("export")
        self._warn_without_thresholds()
        with self._without_training_parts():
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override] # noqa: ANN401 - passed on
        """Export as anomalib does, once trained; OpenVINO goes through here too."""
        self._require_training("export")
        self._warn_without_thresholds()
        kwargs.setdefault("opset_version", ONNX_OPSET)
        with self._without_training_parts():
            return super().to_onnx(*args, **kwargs)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        *,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> Path:
        """Export as anomalib does, once trained; ``int8_ptq`` quantises the networks and not the anomaly map.

        Args:
            export_root: folder of the results.
            compression_type: none, ``fp16`` and ``int8`` (weights alone), or ``int8_ptq`` (activations too).
            datamodule: training images for ``int8_ptq``.
            **kwargs: anomalib's, such as ``input_size``.

        Returns:
            The model's ``.xml`` file.

        Raises:
            ArgumentError: the compression is not known to work, or has no images to work with.
        """
        if compression_type == CompressionType.INT8_ACQ:
            msg = (
                "compression_type 'int8_acq' wants defects to check the accuracy on, and quantises the anomaly map "
                "too. Legal are none, 'fp16', 'int8' (weights alone) and 'int8_ptq' (activations too)."
            )
            raise ArgumentError(msg)
        if compression_type != CompressionType.INT8_PTQ:
            return super().to_openvino(export_root, compression_type=compression_type, datamodule=datamodule, **kwargs)
        if datamodule is None:
            msg = "compression_type 'int8_ptq' needs training images: give --data and its arguments, or a datamodule."
            raise ArgumentError(msg)
        path = super().to_openvino(export_root, **kwargs)
        quantize_file(path, calibration_images(datamodule, kwargs.get("input_size") or self.input_size))
        return path

    @contextmanager
    def _without_training_parts(self) -> Iterator[None]:
        self._leave_training()
        parts = {name: getattr(self, name) for name in self.training_parts}
        try:
            for name in parts:
                setattr(self, name, None)
            yield
        finally:
            for name, part in parts.items():
                setattr(self, name, part)

    def _require_training(self, purpose: str) -> None:
        if not self.model.is_trained:
            msg = (
                f"cannot {purpose}: what scores images has not been trained in this {self.name}, its scores would be "
                f"random. Give a trained model with --ckpt_path (`anomalib {purpose} ... --ckpt_path "
                "results/.../model.ckpt`), or train it, to the end."
            )
            raise NotTrainedError(msg)

    def _warn_without_thresholds(self) -> None:
        """Say it if no validation has set what is defective: the scores as such are right."""
        post_processor = self.post_processor
        if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
            return
        if post_processor.image_threshold.isnan():
            logger.warning(
                "no validation has set thresholds of this %s: scores are not normalised, and labels mean nothing. "
                "Train with a validation at the end (limit_val_batches above 0).",
                self.name,
            )

    # --- anomalib's contract ------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override] # noqa: ANN401 - passed on
        """Load a model as anomalib does; arguments may be those that results do not depend on.

        Raises:
            CheckpointError: the file is no checkpoint, is damaged, or holds more than data.
            ArgumentError: an argument differs that results depend on.
        """
        with named_errors(checkpoint_path):
            return cast("Self", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save as anomalib does, but no weights that are not finite: they would take a good checkpoint's place.

        Raises:
            DivergedError: a weight is not finite.
        """
        self._check_weights()
        super().on_save_checkpoint(checkpoint)
        # Lightning's own copy of the arguments is merged with those that load_from_checkpoint is given
        arguments = {name: value for name, value in self.hparams.items() if name not in TRAINING_ONLY}
        checkpoint[OURS] = {"arguments": arguments, "max_epochs": getattr(self._trainer, "max_epochs", None)}
        if self.weight_average is not None:  # results are the average's, in a checkpoint between validations too
            checkpoint[OURS]["weight_average"] = self.weight_average.state_dict()
            average = {f"model.{name}": weight for name, weight in self.weight_average.average.items()}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with other arguments than this model was built with.

        Raises:
            ArgumentError: arguments that results depend on differ, or a training cannot go on as it was planned.
        """
        super().on_load_checkpoint(checkpoint)
        # figures may be measured with other metrics than in training; anomalib's AUPRO leaves a buffer in the model's
        # state, and in that of the evaluator as a callback
        if isinstance(self.evaluator, Evaluator):
            checkpoint.get("callbacks", {}).pop(self.evaluator.state_key, None)
        trained = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("evaluator.")}
        checkpoint["state_dict"] = {**trained, **own}
        self._refuse_other_arguments(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._go_on(checkpoint)

    @property
    def students_learn(self) -> bool:
        """Whether the networks that score images learn in the present epoch."""
        return True

    @property
    def planned(self) -> frozenset[str]:
        """Arguments by which what happens in an epoch depends on how many there will be; empty if it does not."""
        return frozenset() if self.options.schedule == "constant" else frozenset({"learning_rate", "schedule"})

    def _go_on(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a training, with this model's learning rate, betas and weight decay where they may be changed."""
        self._resumed_average = checkpoint.get(OURS, {}).get("weight_average")
        trained = checkpoint.get("hyper_parameters", {})
        given: dict[str, Any] = {name: self.hparams[name] for name in sorted({"schedule"} | self.planned)}
        planned = {name: trained.get(name, value) for name, value in given.items()}
        if self.planned and OURS in checkpoint:
            planned["max_epochs"], given["max_epochs"] = checkpoint[OURS]["max_epochs"], self.trainer.max_epochs
        if planned.get("max_epochs") == -1:
            msg = "the checkpoint's training was planned by max_steps alone, and cannot be resumed: start anew."
            raise ArgumentError(msg)
        changed = [name for name in planned if planned[name] != given[name]]
        if changed:
            listed = "; ".join(f"{name}: {planned[name]!r} there, {given[name]!r} here" for name in changed)
            msg = f"the checkpoint's training was planned with other arguments: {listed}. Give the same, or start anew."
            raise ArgumentError(msg)
        for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
            group.update(betas=self.options.betas, weight_decay=self.options.weight_decay)
            if self.options.schedule == "constant":
                group["lr"] = self.options.learning_rate

    def _refuse_other_arguments(self, checkpoint: dict[str, Any]) -> None:
        trained = checkpoint.get(OURS, {}).get("arguments") or checkpoint.get("hyper_parameters", {})
        built = dict(self.hparams)
        names = [name for name in trained if name in built and name not in self.training_only]
        changed = [name for name in names if self.meaning_of(name, trained) != self.meaning_of(name, built)]
        if changed:
            listed = "; ".join(f"{name}: {trained[name]!r} there, {built[name]!r} here" for name in changed)
            msg = (
                f"the checkpoint was trained with other arguments: {listed}. Give the same arguments or --config, "
                f"or use {self.name}.load_from_checkpoint(path) without any, which takes them from the checkpoint."
            )
            raise ArgumentError(msg)

    @classmethod
    def meaning_of(cls, name: str, arguments: Mapping[str, Any]) -> object:
        """Make equal what is spelt differently: defaults, a backbone's default tag, what else :func:`meaning` does."""
        value = arguments[name]
        if name in cls.backbones and value is not None:
            return full_name(value)
        return meaning("layers" if name in cls.like_layers and value is None else name, arguments)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that this model imposes on Lightning's Trainer."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images alone."""
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

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the paper's figures on unclamped scores."""
        return RawScoreEvaluator()


def _training_loader(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        msg = f"training images come from {type(loader).__name__}. Legal is one torch DataLoader."
        raise DataError(msg)
    return loader


def _look_at(batch: ImageBatch) -> None:
    """Refuse images that were not read as they are, and name those that show nothing."""
    check_headers(batch.image_path)
    warn_of_flat_images(torch.as_tensor(batch.image), batch.image_path)


def _channels_last(batch: ImageBatch) -> ImageBatch:
    images = torch.as_tensor(batch.image)
    batch.image = images.contiguous(memory_format=torch.channels_last)  # faster on CPUs with bfloat16 units
    return batch


def _images(loader: DataLoader[Any]) -> int:
    return len(cast("Sized", loader.dataset))
