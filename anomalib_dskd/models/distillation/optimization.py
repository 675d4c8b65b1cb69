"""The optimizer and the learning-rate schedule of all models."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

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
    optimizer = Adam(
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


class Adam(torch.optim.Adam):
    """Adam whose fused step on a CPU reads channels-last tensors where they are.

    PyTorch's kernel makes a contiguous copy of each gradient, and does not use it (``fused_adam_kernel`` in
    FusedAdamKernel.cpp, up to PyTorch 2.14). A permuted view of a channels-last tensor is contiguous and is not copied.
    """

    def _init_group(self, group: dict[str, Any], *tensors: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *tensors)  # type: ignore[no-untyped-call]
        roles = [role for role in tensors[:-1] if role]  # parameters, gradients and moments; the last are step counts
        for index, values in enumerate(zip(*roles, strict=True)):
            if group["fused"] and all(map(_is_channels_last_on_cpu, values)):
                for role in roles:
                    role[index] = role[index].permute(0, 2, 3, 1)
        return has_complex


def _is_channels_last_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous(memory_format=torch.channels_last)


def _supports_fused(trainer: Trainer | None) -> bool:
    """Whether Lightning accepts a fused optimizer: not where gradients are clipped under autocast.

    It refuses one there even in BF16, where there are no scaled gradients to unscale first.
    """
    if trainer is None or not trainer.gradient_clip_val:
        return True
    return not isinstance(trainer.precision_plugin, MixedPrecision)
