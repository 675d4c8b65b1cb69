"""Training as users meet it: killed, with a full disk, diverging, in several processes."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad
from anomalib_dskd.errors import DivergedError
from anomalib_dskd.models.dskd.loss import DskdLoss
from tests.commands import QUIET, checkpoints, run, start, start_server, wait_until
from tests.conftest import ASSISTANT, TEACHER, differing, engine

EPOCHS = 4
SIBLINGS = {Afkd: {}, Dtgd: {}, Tad: {"assistant": ASSISTANT}}
every_sibling = pytest.mark.parametrize("kind", SIBLINGS, ids=lambda kind: kind.__name__)
SMALL = {"teacher": TEACHER, "layers": [1, 2], "image_size": 64, "sigma": 2.0, "seed": 0}


@pytest.fixture(scope="module")
def fit(teacher_weights: Path, magnetic_tile_root: Path) -> list[str]:
    """The command, with two batches an epoch."""
    model = {**SMALL, "teacher_weights": teacher_weights}
    data = {"root": magnetic_tile_root, "train_batch_size": 4}
    arguments = ["fit", "--model", "anomalib_dskd.Dskd", "--data", "anomalib_dskd.MagneticTile", *QUIET]
    arguments += [part for name, value in model.items() for part in (f"--model.{name}", str(value))]
    arguments += [part for name, value in data.items() for part in (f"--data.{name}", str(value))]
    return [*arguments, "--trainer.max_epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def through(fit: list[str], tmp_path_factory) -> tuple[dict, float, int]:
    """The last checkpoint of a training that is left alone, the seconds that it took, and the checkpoint's bytes."""
    start_server()
    folder, begin = tmp_path_factory.mktemp("through"), time.monotonic()
    run(*fit, folder=folder)
    seconds = time.monotonic() - begin
    return loaded(folder), seconds, checkpoints(folder)[-1].stat().st_size


def of_kind(kind: type, fit: list[str]) -> list[str]:
    """The command for another model."""
    own = [part for name, value in SIBLINGS[kind].items() for part in (f"--model.{name}", value)]
    return [f"anomalib_dskd.{kind.__name__}" if part == "anomalib_dskd.Dskd" else part for part in fit] + own


def loaded(folder: Path) -> dict:
    """The newest checkpoint, as anomalib reads it; it must load, and be a model that can be used."""
    path = checkpoints(folder)[-1]
    Dskd.load_from_checkpoint(path)
    return torch.load(path, weights_only=False)


def assert_same(first: dict, second: dict) -> None:
    assert first["epoch"] == second["epoch"]
    assert first["global_step"] == second["global_step"]
    assert not differing(first["state_dict"], second["state_dict"])
    mine, theirs = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second))
    assert not [index for index in mine if differing(mine[index], theirs[index])]


def go_on(fit: list[str], folder: Path) -> dict:
    """Resume from the newest checkpoint if there is one, else begin anew; return the last checkpoint."""
    found = checkpoints(folder)
    run(*fit, *(["--ckpt_path", str(found[-1])] if found else []), folder=folder)
    return loaded(folder)


def wait_for_saves(number: int, folder: Path, process: BaseProcess) -> None:
    """Wait until a checkpoint has been saved that many times, or the training has ended."""
    times = set()

    def enough() -> bool:
        times.update(path.stat().st_mtime_ns for path in checkpoints(folder))
        return len(times) >= number

    assert wait_until(enough, process) or not process.is_alive()


def slow_disk() -> None:
    """Let each checkpoint take half a second to reach the disk."""
    synchronize = os.fsync
    os.fsync = lambda file: (time.sleep(0.5), synchronize(file))[1]


def test_two_runs_and_worker_processes_give_the_same_weights(fit, through, tmp_path):
    for workers in ("0", "2"):
        run(*fit, "--data.num_workers", workers, folder=tmp_path / workers)
        assert_same(loaded(tmp_path / workers), through[0])


def test_a_training_that_is_killed_goes_on_to_the_same_weights(fit, through, tmp_path):
    process = start(*fit, folder=tmp_path, prepare=slow_disk)  # so that it is not over before it is killed
    assert wait_until(lambda: len(checkpoints(tmp_path)) > 0, process)
    time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode < 0
    assert loaded(tmp_path)["epoch"] < EPOCHS - 1
    assert_same(go_on(fit, tmp_path), through[0])


@pytest.mark.slow
@every_sibling
def test_a_sibling_that_is_killed_goes_on_to_the_same_weights(kind, fit, tmp_path):
    start_server()
    command = of_kind(kind, fit)
    run(*command, folder=tmp_path / "through")
    expected = torch.load(checkpoints(tmp_path / "through")[-1], weights_only=False)
    process = start(*command, folder=tmp_path / "killed", prepare=slow_disk)
    assert wait_until(lambda: len(checkpoints(tmp_path / "killed")) > 0, process)
    process.kill()
    process.join()
    found = checkpoints(tmp_path / "killed")[-1]
    assert torch.load(found, weights_only=False)["epoch"] < EPOCHS - 1
    run(*command, "--ckpt_path", str(found), folder=tmp_path / "killed")
    assert_same(torch.load(checkpoints(tmp_path / "killed")[-1], weights_only=False), expected)


def test_a_kill_while_saving_leaves_the_checkpoint_before(fit, through, tmp_path):
    process = start(*fit, folder=tmp_path, prepare=slow_disk)
    assert wait_until(lambda: bool(checkpoints(tmp_path)) and bool(list(tmp_path.rglob("*.part"))), process)
    process.kill()
    process.join()
    assert list(tmp_path.rglob("*.part"))
    assert loaded(tmp_path)["epoch"] == 0
    assert_same(go_on(fit, tmp_path), through[0])


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_more_than_an_epoch(fit, through, tmp_path):
    expected, seconds, _ = through
    moments, reached, killed = random.Random(0), set(), 0
    while killed < 2 * EPOCHS:  # at once after each number of checkpoints, then at random moments
        folder, saved = tmp_path / str(killed), killed % EPOCHS
        process = start(*fit, folder=folder)
        wait_for_saves(saved, folder, process)  # no clock finds an epoch on a machine that is busy now and idle then
        if killed >= EPOCHS:
            time.sleep(moments.uniform(0, 1) * seconds / (EPOCHS if saved else 1))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was quicker this time
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        reached.add(loaded(folder)["epoch"] if checkpoints(folder) else None)
        assert_same(go_on(fit, folder), expected)
    assert len(reached) > 3  # the last saved epochs, or none yet: kills are all over the training


@pytest.fixture
def small_disk(through, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint, and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={through[2] * 3 // 2}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(fit, small_disk, tmp_path):
    printed = run(*fit, "--default_root_dir", small_disk, folder=tmp_path, fails=True)
    assert "CheckpointError: the checkpoint '" in printed
    assert "cannot be written: No space left on device. The previous one is unchanged" in printed
    assert loaded(small_disk)["epoch"] == 0
    assert not list(small_disk.rglob("*.part"))


def diverge_later() -> None:
    """Let the loss of one process, or of the second of two, be no number from the fifth batch on."""
    forward, calls = DskdLoss.forward, []

    def non_finite(self, teacher, students, **arguments):
        calls.append(None)
        losses = forward(self, teacher, students, **arguments)
        is_meant = os.environ.get("LOCAL_RANK", "1") == "1" and len(calls) > 4
        return {name: loss * torch.nan if is_meant else loss for name, loss in losses.items()}

    DskdLoss.forward = non_finite
    report = DivergedError.__init__

    def reported(self, message):
        report(self, message)
        print(f"process {os.environ.get('LOCAL_RANK')}: {message}", flush=True)

    DivergedError.__init__ = reported  # of several processes, only the first one's error is printed else


def test_a_training_that_diverges_leaves_the_checkpoint_before(fit, through, tmp_path):
    printed = run(*fit, folder=tmp_path, fails=True, prepare=diverge_later)
    assert "DivergedError: the loss is nan in batch 0 of epoch 2. The batch's images: " in printed
    named = re.findall(r"exp1_num_\d\.jpg", printed.partition("The batch's images: ")[2])
    assert len(set(named)) == 4
    assert loaded(tmp_path)["epoch"] == 1
    assert_same(go_on(fit, tmp_path), through[0])


def overflow_later() -> None:
    """Let the last step of the second epoch make a weight infinite: no loss is computed with it before it is saved."""
    step, calls = torch.optim.Adam.step, []

    def non_finite(self, closure=None):
        calls.append(None)
        loss = step(self, closure)
        if len(calls) == 4:
            self.param_groups[0]["params"][-1].data[0] = torch.inf
        return loss

    torch.optim.Adam.step = non_finite


@pytest.mark.parametrize("validation", [[], ["--trainer.limit_val_batches", "0"]], ids=["validated", "not validated"])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(fit, validation, tmp_path):
    printed = run(*fit, *validation, folder=tmp_path, fails=True, prepare=overflow_later)
    assert "DivergedError: the weights are not finite in epoch 1: 1 tensors, the first 'decoder_student." in printed
    assert loaded(tmp_path)["epoch"] == 0


class AsTwoProcesses(Sampler[int]):
    """The order in which one process sees, batch of two after batch of two, what two processes see at once."""

    def __init__(self, images: int, seed: int) -> None:
        self.order = DistributedSampler(range(images), num_replicas=1, rank=0, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        order = list(self.order)
        for first in range(0, len(order), 4):
            yield from order[first : first + 4 : 2]
            yield from order[first + 1 : first + 4 : 2]


class InOneProcess(MagneticTile):
    def train_dataloader(self) -> DataLoader:
        data = self.train_data
        return DataLoader(data, 2, sampler=AsTwoProcesses(len(data), seed=0), collate_fn=data.collate_fn)


class KeepLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer, pl_module):  # noqa: ARG002
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def in_one_process(folder: Path, root: Path, weights: Path, kind: type = Dskd, **arguments) -> tuple[list[float], dict]:
    """Two batches of two images a step: each batch norm sees the images that it sees in one of two processes."""
    record = KeepLosses()
    model = kind(**SMALL, **SIBLINGS.get(kind, {}), teacher_weights=weights, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_process = engine(folder, callbacks=[record], max_epochs=3, accumulate_grad_batches=2)
        one_process.fit(model, datamodule=InOneProcess(root, train_batch_size=2))
    return record.losses, model.state_dict()


TWO = ["--trainer.devices", "2", "--data.train_batch_size", "2", "--trainer.max_epochs", "3"]
TWO += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]


def assert_learnt_the_same(folder: Path, losses: list[float], state: dict) -> None:
    with next((folder / "logs").rglob("metrics.csv")).open() as file:
        logged = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert logged == pytest.approx(losses, rel=1e-4)
    (path,) = checkpoints(folder)
    learned = torch.load(path, weights_only=False)["state_dict"]
    for name, values in state.items():
        if isinstance(values, torch.Tensor) and values.is_floating_point():
            torch.testing.assert_close(learned[name], values, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_learn_and_average_what_one_does(fit, magnetic_tile_root, teacher_weights, tmp_path):
    averaging = ["--model.ema_decay", "0.2"]
    printed = run(*fit, *TWO, *averaging, "--trainer.strategy", "ddp_fork", folder=tmp_path / "two")
    assert "Grad strides do not match" not in printed
    expected = in_one_process(tmp_path / "one", magnetic_tile_root, teacher_weights, ema_decay=0.2)
    assert_learnt_the_same(tmp_path / "two", *expected)


@pytest.mark.slow
@every_sibling
def test_two_processes_of_a_sibling_learn_what_one_learns(kind, fit, magnetic_tile_root, teacher_weights, tmp_path):
    printed = run(*of_kind(kind, fit), *TWO, "--trainer.strategy", "ddp_fork", folder=tmp_path / "two")
    assert "Grad strides do not match" not in printed
    expected = in_one_process(tmp_path / "one", magnetic_tile_root, teacher_weights, kind)
    assert_learnt_the_same(tmp_path / "two", *expected)


def test_all_processes_stop_when_one_diverges(fit, tmp_path):
    strategy = ["--trainer.strategy", "ddp_fork"]
    printed = run(*fit, *TWO, *strategy, folder=tmp_path, fails=True, prepare=diverge_later)
    assert "process 0: the loss is not finite in another process's part of batch 0 of epoch 2" in printed
    assert "process 1: the loss is nan in batch 0 of epoch 2" in printed
    assert "Connection closed by peer" not in printed


@pytest.mark.slow
def test_two_processes_started_by_lightning_learn_what_one_learns(fit, magnetic_tile_root, teacher_weights, tmp_path):
    command = [sys.executable, "-m", "anomalib.cli.cli", *fit, *TWO, "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "two"
    folder.mkdir()
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Grad strides do not match" not in result.stderr
    expected = in_one_process(tmp_path / "one", magnetic_tile_root, teacher_weights)
    assert_learnt_the_same(folder, *expected)
