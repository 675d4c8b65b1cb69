"""Checkpoints that are written whole or not at all, and read as data."""

import contextlib
import io
import logging
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from anomalib_dskd.errors import CheckpointError

__all__ = ["AtomicCheckpointIO", "handle_checkpoints", "name_best_checkpoint", "named_errors"]

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Puts a checkpoint in its predecessor's place once it is whole on the disk.

    Lightning writes to the folder for temporary files and moves the file from there. Where that folder is on another
    file system than the checkpoint, as often with ``/tmp``, the move is a copy over the last checkpoint, and a kill or
    a full disk in the midst of it leaves neither the old nor the new one. Here the new one is written beside the old
    one, as ``<name>.part``, and renamed. Addresses of remote storage are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401 - Lightning's
        """Write a checkpoint to a file.

        Raises:
            CheckpointError: the file cannot be written; what was there before is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writing to a full disk ends in errors that do not name it
        torch.save(checkpoint, content)
        _replace(Path(path), content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - Lightning's
        """Read a checkpoint from a file, as anomalib does.

        Raises:
            CheckpointError: it is none, is damaged, or holds more than data.
        """
        with named_errors(path):
            return super().load_checkpoint(path, *args, **kwargs)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Name the checkpoint that torch cannot read; torch itself advises to run the code in it.

    Raises:
        CheckpointError: torch has refused it.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        msg = (
            f"the checkpoint '{path}' is damaged, or holds more than tensors and plain values, such as code, which was "
            "not run. Give one that anomalib has written with this package, such as results/.../model.ckpt."
        )
        raise CheckpointError(msg) from error
    except (EOFError, RuntimeError) as error:
        if "PytorchStreamReader" not in str(error) and not isinstance(error, EOFError):  # torch's reader of files
            raise
        msg = f"the checkpoint '{path}' is damaged: {error or 'it ends too early'}. Give another, or copy it anew."
        raise CheckpointError(msg) from error


def _replace(path: Path, content: memoryview) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a rename can reach the disk before the content does
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept, again = (
            ("The one from before is kept", "go on with `anomalib fit ... --ckpt_path` and the last checkpoint")
            if path.exists()
            else ("There is none from before", "start again")
        )
        msg = (
            f"the checkpoint '{path}' of {content.nbytes / 2**20:.1f} MiB cannot be written: "
            f"{error.strerror or error}. {kept}. Make room there, or choose another folder (--default_root_dir), and "
            f"{again}."
        )
        raise CheckpointError(msg) from error


def handle_checkpoints(trainer: Trainer) -> None:
    """Let a Trainer save and load with :class:`AtomicCheckpointIO`, unless it was given a way of its own."""
    current = trainer.strategy.checkpoint_io
    if type(current) in {TorchCheckpointIO, AnomalibCheckpointIO}:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(getattr(current, "extra_safe_globals", ()))


def name_best_checkpoint(trainer: Trainer) -> None:
    """After a training, warn if a figure that a callback watches was better in a checkpoint than it is at the end.

    ``anomalib train`` without ``--ckpt_path`` goes on to test the last weights, whatever a callback has kept.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None or callback.best_model_score is None:
            continue
        best, last = float(callback.best_model_score), trainer.callback_metrics.get(callback.monitor)
        if last is None or not math.isfinite(best):  # not a number is kept as infinity
            continue
        is_worse = last > best if callback.mode == "min" else last < best
        if is_worse or last.isnan():
            logger.warning(
                "%s is %.4f at the end, and was better before: %.4f, the best since this start. `anomalib train` tests "
                "the end; for the best, give --ckpt_path '%s' to `anomalib test`, `predict` and `export`.",
                callback.monitor,
                last.item(),
                best,
                callback.best_model_path,
            )
