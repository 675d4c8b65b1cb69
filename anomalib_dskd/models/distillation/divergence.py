"""Detection of a diverged training run, before a good checkpoint is overwritten."""

from itertools import chain

import torch
from anomalib.data import ImageBatch
from lightning import Trainer
from torch import Tensor, nn

from anomalib_dskd.errors import DivergedError

__all__ = ["check_loss", "check_weights"]

ADVICE = (
    "Training has diverged, and stops before the last checkpoint is overwritten. Check the images, lower "
    "learning_rate, or train with --trainer.precision 32-true, from that checkpoint or from the start."
)


def check_loss(trainer: Trainer | None, loss: Tensor, batch: ImageBatch, batch_idx: int) -> None:
    """Raise in all processes if the loss is not finite in one: the others would wait for it forever.

    Args:
        trainer: asks the other processes; without it only this one counts.
        loss: scalar.
        batch: the batch that the loss was computed on, for the message.
        batch_idx: index of the batch in the epoch.

    Raises:
        DivergedError: the loss is not finite here or in another process.
    """
    is_finite = bool(torch.isfinite(loss))
    if is_finite if trainer is None else trainer.strategy.reduce_boolean_decision(is_finite):
        return
    files = ", ".join(str(path) for path in batch.image_path or ["of unknown name"])
    place = f"batch {batch_idx} of epoch {trainer.current_epoch if trainer is not None else 0}"
    found = f"in another process's part of {place}" if is_finite else f"{loss.item()} in {place}"
    msg = f"the loss is {'not finite ' if is_finite else ''}{found}. The batch's images: {files}. {ADVICE}"
    raise DivergedError(msg)


def check_weights(model: nn.Module, *, epoch: int) -> None:
    """Raise unless all trained weights are finite: the last step of an epoch has not been checked by any loss.

    Args:
        model: network; its ``teacher`` is left out.
        epoch: current epoch, for the message.

    Raises:
        DivergedError: a weight or a batch-norm statistic is not finite.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    non_finite = [name for name, values in tensors if not name.startswith("teacher.") and not values.isfinite().all()]
    if non_finite:
        found = f"{len(non_finite)} tensors, the first {non_finite[0]!r}"
        msg = f"the weights are not finite in epoch {epoch}: {found}. {ADVICE}"
        raise DivergedError(msg)
