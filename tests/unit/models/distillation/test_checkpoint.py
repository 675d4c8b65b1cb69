import os
from pathlib import Path

import pytest
import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from anomalib_dskd.errors import CheckpointError
from anomalib_dskd.models.distillation.checkpoint import AtomicCheckpointIO, handle_checkpoints


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_what_was_saved_and_all_that_is_left(tmp_path):
    path = tmp_path / "new" / "model.ckpt"
    for epoch in range(2):
        AtomicCheckpointIO().save_checkpoint({"epoch": epoch, "weights": torch.arange(3.0)}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["weights"], torch.arange(3.0))
    assert list(contents(path.parent)) == ["model.ckpt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_new_checkpoint_is_whole_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path, seen = tmp_path / "model.ckpt", []
    AtomicCheckpointIO().save_checkpoint({"epoch": 0}, path)
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(contents(tmp_path)))
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    assert seen == [{"model.ckpt": old, "model.ckpt.part": path.read_bytes()}]


def test_a_full_disk_leaves_the_last_checkpoint_and_an_error(tmp_path):
    path = tmp_path / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 0}, path)
    before = contents(tmp_path)
    (tmp_path / "model.ckpt.part").symlink_to("/dev/full")  # refuses all that is written to it
    message = r"model.ckpt' of 0.0 MiB cannot be written: No space left on device. The one from before is kept. .*room"
    with pytest.raises(CheckpointError, match=message):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.ckpt' .*written: .*There is none from before"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "file" / "model.ckpt")


def test_addresses_are_left_to_lightning(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, f"file://{tmp_path}/model.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "model.ckpt") == {"epoch": 3}


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (TorchCheckpointIO(), AtomicCheckpointIO),
        (AnomalibCheckpointIO(extra_safe_globals=[Path]), AtomicCheckpointIO),
        (AsyncCheckpointIO(TorchCheckpointIO()), AsyncCheckpointIO),
    ],
)
def test_a_users_own_way_of_saving_is_left_alone(given, used):
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[given])
    handle_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is used
    if isinstance(given, AnomalibCheckpointIO):
        assert trainer.strategy.checkpoint_io.extra_safe_globals == [Path]
