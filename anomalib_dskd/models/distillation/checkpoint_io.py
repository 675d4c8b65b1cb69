"""Reading and writing of checkpoint files: written whole or not at all, read as data."""

import contextlib
import io
import logging
import math
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
from anomalib_dskd.file_writing import write_file

__all__ = ["AtomicCheckpointIO", "install_checkpoint_io", "named_errors", "warn_of_better_checkpoint"]

logger = logging.getLogger(__name__)

MOST_NAMED = 3  # checkpoints in an error


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Replaces a checkpoint only once the new one is complete on the disk.

    Lightning writes to the folder for temporary files and moves the file from there. Where that folder is on another
    file system than the checkpoint, as often with ``/tmp``, the move is a copy over the last checkpoint, and a kill or
    a full disk during the copy loses both. URLs of remote storage are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401 - Lightning's
        """Write a checkpoint to a file.

        Raises:
            CheckpointError: the file cannot be written; what was there before is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch's own writing to a full disk ends in errors that do not name it
        torch.save(checkpoint, buffer)
        content, path = buffer.getbuffer(), Path(path)
        try:
            write_file(path, content)
        except OSError as error:
            previous, advice = (
                ("The previous one is unchanged", "resume with `anomalib fit ... --ckpt_path` and the last checkpoint")
                if path.exists()
                else ("There is no previous one", "start again")
            )
            msg = (
                f"the checkpoint '{path}' of {content.nbytes / 2**20:.1f} MiB cannot be written: "
                f"{error.strerror or error}. {previous}. Free disk space, or choose another folder "
                f"(--default_root_dir), and {advice}."
            )
            raise CheckpointError(msg) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - Lightning's
        """Read a checkpoint from a file, as anomalib does.

        Raises:
            CheckpointError: the file is no checkpoint, is damaged, or holds more than data.
        """
        with named_errors(path):
            return super().load_checkpoint(path, *args, **kwargs)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Turn torch's errors about an unreadable checkpoint, which advise running the code in it, into one that names it.

    Raises:
        CheckpointError: the path is a folder, or torch cannot read the file, or refuses to.
    """
    try:
        yield
    except IsADirectoryError as error:
        files = sorted(map(str, Path(path).rglob("*.ckpt")))
        found = f"Checkpoints in it: {', '.join(files[:MOST_NAMED])}" if files else "It contains no .ckpt file"
        msg = f"the checkpoint '{path}' is a folder. {found}. Give a file, such as results/.../model.ckpt."
        raise CheckpointError(msg) from error
    except pickle.UnpicklingError as error:
        msg = (
            f"the checkpoint '{path}' is damaged, or holds more than tensors and plain values, such as code, which was "
            "not run. Give one that anomalib has written with this package, such as results/.../model.ckpt."
        )
        raise CheckpointError(msg) from error
    except (EOFError, RuntimeError) as error:
        if "PytorchStreamReader" not in str(error) and not isinstance(error, EOFError):  # of torch's file reader
            raise
        msg = f"the checkpoint '{path}' is damaged: {error or 'it ends too early'}. Give another, or copy it again."
        raise CheckpointError(msg) from error


def install_checkpoint_io(trainer: Trainer) -> None:
    """Let a Trainer save and load with :class:`AtomicCheckpointIO`, unless it was given a plugin of the user's own."""
    current = trainer.strategy.checkpoint_io
    if type(current) in {TorchCheckpointIO, AnomalibCheckpointIO}:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(getattr(current, "extra_safe_globals", ()))


def warn_of_better_checkpoint(trainer: Trainer) -> None:
    """After training, warn if a metric that a checkpoint callback monitors was better in an earlier checkpoint.

    ``anomalib train`` without ``--ckpt_path`` goes on to test the last weights, whatever a callback has saved.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None or callback.best_model_score is None:
            continue
        best, last = float(callback.best_model_score), trainer.callback_metrics.get(callback.monitor)
        if last is None or not math.isfinite(best):  # NaN is stored as infinity
            continue
        is_worse = last > best if callback.mode == "min" else last < best
        if is_worse or last.isnan():
            logger.warning(
                "%s is %.4f at the end, and was better before: %.4f, the best since this start. `anomalib train` tests "
                "the last weights; for the best, give --ckpt_path '%s' to `anomalib test`, `predict` and `export`.",
                callback.monitor,
                last.item(),
                best,
                callback.best_model_path,
            )
