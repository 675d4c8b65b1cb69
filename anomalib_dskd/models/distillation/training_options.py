"""What the models may be built and trained with: checks, and what arguments mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from anomalib.pre_processing import PreProcessor
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from typing_extensions import Self

from anomalib_dskd.argument_checks import check_choice, check_not_negative
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.pre_processing import check_normalisation, create_pre_processor

__all__ = [
    "DEFAULT_IMAGE_SIZE",
    "DEFAULT_TEACHER",
    "TRAINING_ONLY",
    "Schedule",
    "TrainingOptions",
    "check_last_step",
    "check_planned_steps",
    "check_trainer",
    "may_be_fused",
    "meaning",
    "number_of_steps",
    "resolve_pre_processor",
    "steps_an_epoch",
]

DEFAULT_TEACHER = "resnet18.tv_in1k"  # section 4.1.2; timm's own default tag has newer weights
DEFAULT_IMAGE_SIZE = (256, 256)  # section 4.1.2, for MVTec AD and MVTec 3D-AD
Schedule = Literal["constant", "one_cycle"]
LARGEST_SEED = 2**32 - 1  # of NumPy's generator
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # anomalib's batches stay in 32 bits under 64-true


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Arguments that every model takes for its training, and that a trained model's results do not depend on any more.

    The models' own docstrings say what each one means.

    Raises:
        ArgumentError: a value is out of range.
    """

    teacher_weights: str | Path | None
    learning_rate: float
    schedule: Schedule
    betas: tuple[float, float]
    weight_decay: float
    batch_norm_images: int
    ema_decay: float
    teacher_cache: float
    image_cache: float
    seed: int | None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Pick them out of all arguments of a model's constructor."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    def __post_init__(self) -> None:
        """Check the values."""
        check_not_negative(
            weight_decay=self.weight_decay, teacher_cache=self.teacher_cache, image_cache=self.image_cache
        )
        if not (isinstance(self.batch_norm_images, int) and self.batch_norm_images >= 0):
            msg = (
                f"batch_norm_images {self.batch_norm_images!r} must be a whole number of images, or 0 for running "
                "averages."
            )
            raise ArgumentError(msg)
        if not 0 <= self.ema_decay < 1:
            msg = f"ema_decay {self.ema_decay!r} must be a number from 0, for no average, up to, not including, 1."
            raise ArgumentError(msg)
        if self.ema_decay > 0 and self.batch_norm_images == 0:
            msg = (
                f"ema_decay {self.ema_decay!r} with batch_norm_images 0: averaged weights need batch-norm statistics "
                "of their own. Give batch_norm_images above 0, such as 256, or ema_decay 0."
            )
            raise ArgumentError(msg)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            msg = f"learning_rate {self.learning_rate!r} must be a finite number larger than 0."
            raise ArgumentError(msg)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):  # noqa: PLR2004 - Adam has two
            msg = f"betas {self.betas!r} must be two numbers from 0 up to, not including, 1."
            raise ArgumentError(msg)
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed <= LARGEST_SEED):
            msg = f"seed {self.seed!r} must be a whole number from 0 to {LARGEST_SEED}, or none to draw anew each time."
            raise ArgumentError(msg)
        check_choice(Schedule, schedule=self.schedule)


TRAINING_ONLY = frozenset(option.name for option in fields(TrainingOptions))


def number_of_steps(trainer: Trainer) -> int:
    """Return the number of optimiser steps of the whole training, which a schedule with an end needs."""
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        msg = "schedule 'one_cycle' needs to know the end: give --trainer.max_epochs or --trainer.max_steps."
        raise ArgumentError(msg)
    return int(steps)


def steps_an_epoch(trainer: Trainer) -> int | None:
    """Return the number of optimiser steps of an epoch, once training has begun; None if it has no end."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def may_be_fused(trainer: Trainer | None) -> bool:
    """Return whether Lightning takes a fused optimiser: not where gradients are clipped under autocast.

    It refuses one there even in bfloat16, where no scaled gradients are to be unscaled first.
    """
    if trainer is None or not trainer.gradient_clip_val:
        return True
    return not isinstance(trainer.precision_plugin, MixedPrecision)


def check_trainer(trainer: Trainer) -> None:
    """Raise unless the Trainer's settings lead to a result."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            msg = (
                f"callback {type(callback).__name__}: its averaged weights would have thresholds of others, or none, "
                "and may count as untrained. Give --model.ema_decay 0.99 instead, which averages weights too."
            )
            raise ArgumentError(msg)
    epochs, interval = trainer.max_epochs or 0, trainer.check_val_every_n_epoch or 1
    if trainer.enable_validation and epochs > 0 and epochs % interval:
        msg = (
            f"max_epochs {epochs} is no multiple of check_val_every_n_epoch {interval}: the last epochs would have "
            "neither thresholds nor a checkpoint. Change one of them (--trainer.max_epochs, "
            "--trainer.check_val_every_n_epoch)."
        )
        raise ArgumentError(msg)
    if trainer.ckpt_path and trainer.max_steps != -1:
        msg = (
            f"max_steps {trainer.max_steps}: with it Lightning counts a resumed checkpoint's epoch twice, and would "
            "end an epoch early. Give --trainer.max_epochs alone to go on with a training."
        )
        raise ArgumentError(msg)
    if str(trainer.precision) not in PRECISIONS:
        msg = (
            f"precision {trainer.precision!r} is too coarse for the anomaly map, or not that of the images. Legal are "
            f"{', '.join(PRECISIONS)}."
        )
        raise ArgumentError(msg)


def check_last_step(trainer: Trainer) -> None:
    """Raise if training ends between two validations by ``max_steps``, now that the number of batches is known."""
    steps, an_epoch = trainer.max_steps, steps_an_epoch(trainer)
    if steps <= 0 or not trainer.enable_validation or an_epoch is None or trainer.check_val_every_n_epoch is None:
        return
    if trainer.val_check_batch != trainer.num_training_batches or 0 < (trainer.max_epochs or -1) * an_epoch <= steps:
        return  # validated within epochs, or ended by them
    interval = an_epoch * trainer.check_val_every_n_epoch
    if steps % interval:
        msg = (
            f"max_steps {steps} is no multiple of the {interval} steps from one validation to the next: the last steps "
            "would have neither thresholds nor a checkpoint. Give a multiple, or --trainer.max_epochs."
        )
        raise ArgumentError(msg)


def check_planned_steps(trainer: Trainer) -> None:
    """Raise if a resumed schedule was made for another number of steps: it would end early, or in an error."""
    (config,) = trainer.lr_scheduler_configs
    planned, steps = getattr(config.scheduler, "total_steps", None), number_of_steps(trainer)
    if planned != steps:
        msg = (
            f"the checkpoint's schedule was planned for {planned} steps, and this training has {steps}. Give the same "
            "batch size, accumulate_grad_batches, devices and max_epochs, or start anew."
        )
        raise ArgumentError(msg)


def resolve_pre_processor(
    pre_processor: nn.Module | bool, teacher: str, image_size: int | tuple[int, int] | None
) -> nn.Module | bool:
    """Return the pre-processor that was given, or the teacher's for an image size."""
    if pre_processor is not True:
        if image_size is not None:
            msg = "image_size and pre_processor exclude each other: resize in the pre_processor, or leave that out."
            raise ArgumentError(msg)
        if isinstance(pre_processor, PreProcessor):
            check_normalisation(pre_processor, teacher)
        return pre_processor
    size = _size(image_size)
    if len(size) != 2 or min(size) < 1:  # noqa: PLR2004 - height and width
        msg = f"image_size {image_size!r} must be one number of pixels, or height and width, each at least 1."
        raise ArgumentError(msg)
    return create_pre_processor(teacher, (size[0], size[1]))


def meaning(name: str, arguments: Mapping[str, Any]) -> object:
    """Make equal what is spelt differently: a square's side, lists and tuples."""
    value = arguments[name]
    if name == "image_size":
        return _size(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def _size(image_size: int | Sequence[int] | None) -> tuple[int, ...]:
    if image_size is None:
        return DEFAULT_IMAGE_SIZE
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
