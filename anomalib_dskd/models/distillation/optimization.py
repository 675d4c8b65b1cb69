"""The optimizer and the learning-rate schedule of all models."""

from collections.abc import Iterable

import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.trainer_checks import number_of_steps
from anomalib_dskd.models.distillation.training_options import TrainingOptions

__all__ = ["create_optimizer"]


def create_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainingOptions, trainer: Trainer | None
) -> OptimizerLRScheduler:
    """Return Adam (DSKD, section 4.1.2) over the trainable parameters, and its schedule.

    Args:
        parameters: those without gradient are left out.
        options: learning rate, betas, weight decay and schedule.
        trainer: needed by a schedule other than ``constant``.

    Raises:
        ArgumentError: the schedule needs the number of steps, and it is not known.
    """
    optimizer = torch.optim.Adam(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=_supports_fused(trainer),  # the same arithmetic in one pass over the weights
    )
    if options.schedule == "constant":
        return optimizer
    if trainer is None:
        msg = f"schedule {options.schedule!r} needs to know the number of steps: train with anomalib's Engine."
        raise ArgumentError(msg)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=options.learning_rate,
        total_steps=number_of_steps(trainer),
        cycle_momentum=False,  # beta stays the paper's
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _supports_fused(trainer: Trainer | None) -> bool:
    """Whether Lightning accepts a fused optimizer: not where gradients are clipped under autocast.

    It refuses one there even in BF16, where there are no scaled gradients to unscale first.
    """
    if trainer is None or not trainer.gradient_clip_val:
        return True
    return not isinstance(trainer.precision_plugin, MixedPrecision)
