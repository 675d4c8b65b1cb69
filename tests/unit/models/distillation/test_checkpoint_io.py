import errno
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.errors import CheckpointError
from anomalib_dskd.models.distillation.checkpoint_io import (
    AtomicCheckpointIO,
    install_checkpoint_io,
    warn_of_better_checkpoint,
)
from tests.conftest import engine


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


def test_a_full_disk_leaves_the_last_checkpoint_and_an_error(tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 0}, path)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    message = r"model.ckpt' of 0.0 MiB cannot be written: No space left on device. The previous one is unchanged. Free"
    with pytest.raises(CheckpointError, match=message):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.ckpt' .*written: .*There is no previous one"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "file" / "model.ckpt")


def test_a_folder_in_place_of_a_checkpoint_is_an_error_that_names_the_checkpoints_in_it(tmp_path):
    load = (AtomicCheckpointIO().load_checkpoint, Dskd.load_from_checkpoint)
    for method in load:
        with pytest.raises(CheckpointError, match="' is a folder. It contains no .ckpt file. Give a file"):
            method(tmp_path)
    (tmp_path / "v0").mkdir()
    (tmp_path / "v0" / "model.ckpt").touch()
    for method in load:
        with pytest.raises(CheckpointError, match=r"' is a folder. Checkpoints in it: .*v0/model.ckpt. Give a file"):
            method(tmp_path)


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
    install_checkpoint_io(trainer)
    assert type(trainer.strategy.checkpoint_io) is used
    if isinstance(given, AnomalibCheckpointIO):
        assert trainer.strategy.checkpoint_io.extra_safe_globals == [Path]


def test_the_best_checkpoint_is_named_where_the_last_is_worse(tiny_model, magnetic_tile_root, tmp_path, caplog):
    # the loss falls, so that its largest value is that of the first epoch
    callback = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="train_loss", mode="max")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(magnetic_tile_root, train_batch_size=4)
        engine(tmp_path, max_epochs=3, callbacks=[callback]).fit(tiny_model, datamodule=data)
    (message,) = [record.getMessage() for record in caplog.records if "better before" in record.getMessage()]
    assert f"--ckpt_path '{tmp_path / 'epoch=0.ckpt'}'" in message
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["epoch"] == 0


@pytest.mark.parametrize(
    ("monitor", "mode", "best", "last", "is_told"),
    [
        ("auroc", "max", 0.9, 0.8, True),
        ("auroc", "max", 0.8, 0.9, False),  # the end was not among what is saved
        ("auroc", "max", 0.9, 0.9, False),
        ("loss", "min", 0.1, 0.2, True),
        ("loss", "min", 0.2, 0.1, False),
        ("auroc", "max", 0.9, float("nan"), True),
        ("auroc", "max", float("-inf"), float("nan"), False),
        ("auroc", "max", None, 0.9, False),
        ("auroc", "max", 0.9, None, False),
        (None, "min", None, 0.9, False),
    ],
)
def test_what_is_no_worse_is_not_told(monitor, mode, best, last, is_told, caplog):
    callback = LightningCheckpoint(monitor=monitor, mode=mode, save_top_k=1 if monitor else -1)
    callback.best_model_score = None if best is None else torch.tensor(best, dtype=torch.float64)
    metrics = {} if last is None else {monitor: torch.tensor(last, dtype=torch.float64)}
    warn_of_better_checkpoint(SimpleNamespace(checkpoint_callbacks=[callback], callback_metrics=metrics))
    assert ("better before" in caplog.text) == is_told
