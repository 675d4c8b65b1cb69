"""Seeding of training by seed and epoch: a run draws the same random numbers whether it was interrupted or not."""

import random
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from anomalib_dskd.models.distillation.training_loader import training_loader

__all__ = ["SeedTraining", "seed_pseudo_defects"]


class SeedTraining(Callback):
    """Makes all random numbers of an epoch a function of a seed and the epoch's number.

    Args:
        seed: integer from 0 up.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Redraw the pseudo-defects of a synthetic validation split."""
        data = getattr(trainer, "datamodule", None)
        if stage in {TrainerFn.FITTING, TrainerFn.VALIDATING} and isinstance(data, AnomalibDataModule):
            seed_pseudo_defects(data, self.seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Seed what is drawn before the first epoch."""
        seed_everything(self.seed, workers=True, verbose=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Seed the first epoch's batches.

        Lightning starts the loader, and with it worker processes that read ahead, before it tells any hook or sampler
        which epoch a resumed training run has reached: the first batches are fetched again.
        """
        _seed_epoch(trainer, self.seed)
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Seed the epoch."""
        _seed_epoch(trainer, self.seed)


def _seed_epoch(trainer: Trainer, seed: int) -> None:
    """Seed the order of the batches, the worker processes, and Python's, NumPy's and PyTorch's own generators.

    The order is that of PyTorch's ``DistributedSampler``, which Lightning uses for several processes: one process and
    several see the same global batches. A sampler other than plain shuffling is left unchanged.
    """
    loader: DataLoader[Any] = training_loader(trainer)
    numbers = np.random.SeedSequence((seed, trainer.current_epoch, trainer.global_rank))
    own = int(numbers.generate_state(1).item())
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    # seeds the workers instead of the generator that augmentations use
    loader.generator = torch.Generator().manual_seed(own)
    batches = loader.batch_sampler
    if isinstance(batches, BatchSampler):
        if _is_plain_shuffling(batches.sampler):
            batches.sampler = DistributedSampler(loader.dataset, num_replicas=1, rank=0, seed=seed)
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(trainer.current_epoch)


def seed_pseudo_defects(data: AnomalibDataModule, seed: int) -> None:
    """Redraw the pseudo-defects of a synthetic validation split, as a function of ``seed`` and the images.

    anomalib draws them when a data module is set up, from generators that are not seeded at that time: a resumed
    training run would be monitored by other metrics than before, and each of several processes by its own. A synthetic
    test set is left unchanged: it may have been split since.

    Args:
        data: has been set up.
        seed: integer from 0 up.
    """
    dataset = getattr(data, "val_data", None)
    if data.val_split_mode != ValSplitMode.SYNTHETIC or not isinstance(dataset, SyntheticAnomalyDataset):
        return
    with isolate_rng():
        np.random.seed(seed)
        torch.manual_seed(seed)
        data.val_data = SyntheticAnomalyDataset(dataset.augmentations, dataset.source_samples, data.name)


def _is_plain_shuffling(sampler: object) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )
