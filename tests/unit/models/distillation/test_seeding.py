"""Trainings that are stopped and go on, or run twice, against one that runs through: the same bits."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from lightning import Callback
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.callbacks.seeding import seed_pseudo_defects
from tests.conftest import TEACHER, differing, engine

BATCHES = 2  # of four images, in an epoch
EPOCHS = 3
SELDOM = {"check_val_every_n_epoch": 2, "max_epochs": 4}
SMALL = {"teacher": TEACHER, "layers": (1, 2), "image_size": 64, "sigma": 2.0}


class Stop(Exception):  # noqa: N818 - as Ctrl+C, not an error
    """Ends a training wherever it is."""


class StopAt(Callback):
    """Ends the training before a batch of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
        if (trainer.current_epoch, batch_idx) == self.place:
            raise Stop


class Record(Callback):
    """Keeps each batch's files, and its first pixels' sum."""

    def __init__(self) -> None:
        self.batches: dict[tuple[int, int], tuple[list[str], float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: ImageBatch, batch_idx):  # noqa: ARG002
        names = [Path(path).name for path in batch.image_path]
        self.batches[trainer.current_epoch, batch_idx] = (names, float(batch.image.double().sum()))


class Noise(v2.Transform):
    """A random augmentation that draws from all three generators."""

    def transform(self, image, params):  # noqa: ARG002
        if image.ndim < 3:  # a mask
            return image
        return image + 0.1 * torch.rand(1) * np.random.rand()


def fit(folder: Path, root: Path, weights: Path, *callbacks: Callback, data=None, trainer=None, ckpt=None, **arguments):
    model = Dskd(**SMALL, teacher_weights=weights, **arguments)
    settings = {"callbacks": list(callbacks), "max_epochs": EPOCHS, **(trainer or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = MagneticTile(root, **{"train_batch_size": 4, "num_workers": 0, **(data or {})})
        engine(folder, **settings).fit(model, datamodule=module, ckpt_path=ckpt)
    return model


def stopped_and_resumed(folder: Path, root: Path, weights: Path, *, at: tuple[int, int], record=None, **arguments):
    with pytest.raises(Stop):
        fit(folder / "stopped", root, weights, StopAt(*at), **arguments)
    (checkpoint,) = (folder / "stopped").rglob("v0/**/*.ckpt")
    torch.rand(7)  # what else is drawn in the meantime does not matter
    callbacks = [] if record is None else [record]
    return fit(folder / "resumed", root, weights, *callbacks, ckpt=checkpoint, **arguments)


@pytest.mark.parametrize(
    ("at", "arguments"),
    [
        ((1, 0), {}),  # between epochs, right after the checkpoint
        ((2, 1), {}),
        ((1, 1), {"data": {"num_workers": 2}}),
        ((2, 1), {"schedule": "one_cycle"}),
        ((2, 1), {"batch_norm_images": 0, "teacher_cache": 0.0, "image_cache": 0.0}),
        ((3, 1), {"trainer": SELDOM}),  # saved by the validation, not after the epoch
        ((3, 1), {"trainer": SELDOM, "data": {"num_workers": 2}}),
        ((1, 1), {"trainer": {"limit_val_batches": 0, "accumulate_grad_batches": 2}}),
        ((2, 1), {"data": {"train_augmentations": Noise()}}),
        ((2, 1), {"data": {"train_augmentations": Noise(), "num_workers": 2}}),
    ],
    ids=str,
)
def test_a_resumed_training_ends_with_the_same_weights(at, arguments, magnetic_tile_root, teacher_weights, tmp_path):
    place = (magnetic_tile_root, teacher_weights)
    through, resumed = Record(), Record()
    expected = fit(tmp_path / "through", *place, through, seed=5, **arguments)
    model = stopped_and_resumed(tmp_path, *place, at=at, record=resumed, seed=5, **arguments)
    trainer = arguments.get("trainer", {})
    interval = trainer.get("check_val_every_n_epoch", 1)
    repeated = range(at[0] // interval * interval, trainer.get("max_epochs", EPOCHS))  # from the last checkpoint on
    assert set(resumed.batches) == {(epoch, batch) for epoch in repeated for batch in range(BATCHES)}
    assert all(through.batches[key] == batch for key, batch in resumed.batches.items())
    assert not differing(model.model.state_dict(), expected.model.state_dict())


def test_a_training_that_ends_by_steps_is_not_resumed(magnetic_tile_root, teacher_weights, tmp_path):
    fit(tmp_path / "whole", magnetic_tile_root, teacher_weights, seed=5, trainer={"max_steps": 2})
    (checkpoint,) = tmp_path.rglob("v0/**/*.ckpt")
    with pytest.raises(ArgumentError, match=r"max_steps 4: .* give only --trainer.max_epochs"):
        fit(tmp_path, magnetic_tile_root, teacher_weights, seed=5, trainer={"max_steps": 4}, ckpt=checkpoint)


def test_each_epoch_has_an_order_of_its_own(magnetic_tile_root, teacher_weights, tmp_path):
    record = Record()
    fit(tmp_path, magnetic_tile_root, teacher_weights, record, seed=5)
    orders = {tuple(record.batches[epoch, 0][0] + record.batches[epoch, 1][0]) for epoch in range(EPOCHS)}
    assert len(orders) == EPOCHS
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(next(iter(orders))))}


def test_every_run_gives_the_same_weights_with_worker_processes_or_without(
    magnetic_tile_root, teacher_weights, tmp_path
):
    first, *others = [
        fit(tmp_path / str(run), magnetic_tile_root, teacher_weights, seed=5, data={"num_workers": workers})
        for run, workers in enumerate((0, 0, 2))
    ]
    for other in others:
        assert not differing(first.model.state_dict(), other.model.state_dict())


def test_another_seed_gives_another_order(magnetic_tile_root, teacher_weights, tmp_path):
    records = [Record(), Record()]
    for seed, record in enumerate(records):
        fit(tmp_path / str(seed), magnetic_tile_root, teacher_weights, record, seed=seed)
    assert records[0].batches != records[1].batches


def test_without_a_seed_the_order_is_random(magnetic_tile_root, teacher_weights, tmp_path):
    records = [Record(), Record()]
    for run, record in enumerate(records):
        fit(tmp_path / str(run), magnetic_tile_root, teacher_weights, record)
    assert records[0].batches != records[1].batches  # the same once in 8! to the 3rd


def test_a_sampler_of_ones_own_is_left_alone(magnetic_tile_root, teacher_weights, tmp_path):
    class Sequential(MagneticTile):
        def train_dataloader(self):
            shuffled = super().train_dataloader()
            sampler = SequentialSampler(shuffled.dataset)
            return DataLoader(shuffled.dataset, 4, sampler=sampler, collate_fn=shuffled.collate_fn)

    class Chosen(MagneticTile):
        def train_dataloader(self):
            shuffled = super().train_dataloader()
            sampler = RandomSampler(shuffled.dataset, replacement=True, num_samples=40)
            return DataLoader(shuffled.dataset, 4, sampler=sampler, collate_fn=shuffled.collate_fn)

    counts = {}
    for module in (Sequential, Chosen):
        model = Dskd(**SMALL, teacher_weights=teacher_weights, seed=0)
        record = Record()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            two_epochs = engine(tmp_path, callbacks=[record], max_epochs=2, limit_val_batches=0)
            two_epochs.fit(model, datamodule=module(magnetic_tile_root))
        counts[module] = len(record.batches)
        if module is Sequential:
            assert record.batches[0, 0] == record.batches[1, 0]
    assert counts == {Sequential: 2 * 2, Chosen: 2 * 10}


def watched(data: Folder) -> list[tuple[float, float, int]]:
    return [(float(item.image.sum()), float(item.gt_mask.sum()), int(item.gt_label)) for item in data.val_data]


def tiles(root: Path, **arguments) -> Folder:
    settings = {"normal_dir": "MT_Free/Imgs", "extensions": (".jpg",), "num_workers": 0, "seed": 0}
    return Folder("tiles", root=root, **{**settings, "val_split_ratio": 0.5, **arguments})


def test_a_training_draws_its_pseudo_defects_from_the_seed(magnetic_tile_root, teacher_weights, tmp_path):
    def drawn(seed: int, before: int) -> list[tuple[float, float, int]]:
        torch.manual_seed(before)
        np.random.seed(before)
        data = tiles(magnetic_tile_root, test_split_mode="none", val_split_mode="synthetic")
        model = Dskd(**SMALL, teacher_weights=teacher_weights, seed=seed, visualizer=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine(tmp_path, max_epochs=1).fit(model, datamodule=data)
        return watched(data)

    first, same, other = drawn(3, before=1), drawn(3, before=2), drawn(4, before=1)
    assert {label for *_, label in first} == {0, 1}
    assert first == same != other


def test_drawing_pseudo_defects_disturbs_no_generator(magnetic_tile_root):
    data = tiles(magnetic_tile_root, test_split_mode="none", val_split_mode="synthetic")
    data.setup()
    expected = watched(data), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    seed_pseudo_defects(data, 5)
    assert torch.get_rng_state().tolist() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]
    assert watched(data) != expected[0]


@pytest.mark.parametrize("mode", ["from_test", "same_as_test"])
def test_a_synthetic_test_set_stays_as_it_was_divided(mode, magnetic_tile_root):
    data = tiles(magnetic_tile_root, test_split_mode="synthetic", test_split_ratio=0.5, val_split_mode=mode)
    data.setup()
    sets = data.val_data, data.test_data
    seed_pseudo_defects(data, 5)
    assert (data.val_data, data.test_data) == sets
