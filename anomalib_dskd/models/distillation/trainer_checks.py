"""Checks of the Trainer's settings before and at the start of training."""

import logging
import math

from lightning import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_callbacks", "check_last_step", "check_planned_steps", "check_trainer", "number_of_steps"]

logger = logging.getLogger(__name__)

WEIGHT_AVERAGING = (
    "its averaged weights would be saved with thresholds of other weights or none, and may count as untrained. Give "
    "--model.ema_decay 0.99 instead, which averages weights too."
)
UNSUPPORTED_CALLBACKS = {
    BatchSizeFinder: (
        "it tries batches before the teacher's weights are loaded. Give the batch sizes, such as "
        "--data.train_batch_size 16."
    ),
    LearningRateFinder: (
        "it trains before the teacher's weights are loaded, and the model would not use the rate that it finds. Give "
        "--model.learning_rate; the default is the paper's."
    ),
    StochasticWeightAveraging: WEIGHT_AVERAGING,
    WeightAveraging: WEIGHT_AVERAGING,
}
"""Lightning's callbacks that lead to an error or to wrong results, and the reason."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # anomalib's batches stay in FP32 under 64-true


def number_of_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps of the whole training run.

    Raises:
        ArgumentError: it has no end, or Lightning cannot tell the number.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        msg = (
            "callback GradientAccumulationScheduler: it changes the number of steps per epoch, and the learning-rate "
            "schedule, phases or hard mining would not fit it. Give --trainer.accumulate_grad_batches instead."
        )
        raise ArgumentError(msg)
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:  # Lightning gives -1 where only the data have no end
        msg = (
            "this training run has no end, which its learning-rate schedule, phases or hard mining depend on: "
            "give --trainer.max_epochs or --trainer.max_steps."
        )
        raise ArgumentError(msg)
    return int(steps)


def check_callbacks(trainer: Trainer) -> None:
    """Raise if one of the Trainer's callbacks is not supported.

    Raises:
        ArgumentError: the callback, the reason, and what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for unsupported, reason in UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, unsupported):
                msg = f"callback {type(callback).__name__} is not supported: {reason}"
                raise ArgumentError(msg)


def check_trainer(trainer: Trainer) -> None:
    """Raise unless the Trainer's settings lead to a result; warn of a training run without thresholds.

    Raises:
        ArgumentError: a setting that loses checkpoints, thresholds or precision.
    """
    if not trainer.enable_validation:
        logger.warning(
            "there will be no validation, and so no thresholds: scores are not normalized, and there are no labels "
            "and no F1 scores. Give validation images, and --trainer.limit_val_batches above 0."
        )
    epochs, interval = trainer.max_epochs or 0, trainer.check_val_every_n_epoch or 1
    if trainer.enable_validation and epochs > 0 and epochs % interval:
        msg = (
            f"max_epochs {epochs} is not a multiple of check_val_every_n_epoch {interval}: the last epochs would have "
            "neither thresholds nor a checkpoint. Change one of them (--trainer.max_epochs, "
            "--trainer.check_val_every_n_epoch)."
        )
        raise ArgumentError(msg)
    if trainer.ckpt_path and trainer.max_steps != -1:
        msg = (
            f"max_steps {trainer.max_steps}: with it Lightning counts a resumed checkpoint's epoch twice, and would "
            "end an epoch early. To resume training, give only --trainer.max_epochs."
        )
        raise ArgumentError(msg)
    if str(trainer.precision) not in PRECISIONS:
        msg = (
            f"precision {trainer.precision!r} is too coarse for the anomaly map, or differs from the images'. "
            f"Supported values: {', '.join(PRECISIONS)}."
        )
        raise ArgumentError(msg)


def check_last_step(trainer: Trainer) -> None:
    """Raise if training ends between two validations by ``max_steps``, now that the number of batches is known."""
    steps, batches = trainer.max_steps, trainer.num_training_batches
    if steps <= 0 or not trainer.enable_validation or math.isinf(batches) or trainer.check_val_every_n_epoch is None:
        return
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    if trainer.val_check_batch != trainer.num_training_batches or 0 < (trainer.max_epochs or -1) * per_epoch <= steps:
        return  # validated within epochs, or ended by them
    interval = per_epoch * trainer.check_val_every_n_epoch
    if steps % interval:
        msg = (
            f"max_steps {steps} is not a multiple of the {interval} steps between validations: the last steps would "
            "have neither thresholds nor a checkpoint. Give a multiple, or --trainer.max_epochs."
        )
        raise ArgumentError(msg)


def check_planned_steps(planned: int, steps: int) -> None:
    """Raise if a resumed training run was planned for another number of steps, which it depends on.

    Args:
        planned: number of steps in the checkpoint; 0 if it contains none.
        steps: number of steps now.
    """
    if planned != steps:
        msg = (
            f"the checkpoint's training run has {planned or 'an unknown number of'} steps, and this one has {steps}. "
            "Give the same batch size, accumulate_grad_batches, devices and max_epochs, or start a new training run."
        )
        raise ArgumentError(msg)
