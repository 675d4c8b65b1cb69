"""Checkpoints that are written whole or not at all."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from anomalib_dskd.errors import CheckpointError

__all__ = ["AtomicCheckpointIO", "save_atomically"]


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


def save_atomically(trainer: Trainer) -> None:
    """Let a Trainer save with :class:`AtomicCheckpointIO`, unless it was given a way of its own."""
    current = trainer.strategy.checkpoint_io
    if type(current) in {TorchCheckpointIO, AnomalibCheckpointIO}:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(getattr(current, "extra_safe_globals", ()))
