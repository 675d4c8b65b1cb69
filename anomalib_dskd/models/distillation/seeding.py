"""Random numbers that depend on seed and epoch alone: a training draws the same ones, stopped on the way or not."""

import random
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

__all__ = ["seed_epoch", "seed_pseudo_defects", "start_loader_anew"]


def seed_epoch(trainer: Trainer, loader: DataLoader[Any], seed: int) -> None:
    """Make all that is drawn in an epoch a function of ``seed`` and the epoch's number.

    That is the order of the batches, what worker processes draw, and what Python's, NumPy's and PyTorch's own
    generators give. The order is that of PyTorch's ``DistributedSampler``, which Lightning uses for several processes:
    one process and several see the same global batches. A sampler that is not plain shuffling is left as it is.

    Args:
        trainer: knows the epoch that begins, and which of several processes this one is.
        loader: of the training images.
        seed: whole number from 0 up.
    """
    numbers = np.random.SeedSequence((seed, trainer.current_epoch, trainer.global_rank))
    own = int(numbers.generate_state(1).item())
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    # workers' seeds come from here, and no longer from the generator that augmentations use
    loader.generator = torch.Generator().manual_seed(own)
    batches = loader.batch_sampler
    if isinstance(batches, BatchSampler):
        if _is_plain_shuffling(batches.sampler):
            batches.sampler = DistributedSampler(loader.dataset, num_replicas=1, rank=0, seed=seed)
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(trainer.current_epoch)


def seed_pseudo_defects(data: AnomalibDataModule, seed: int) -> None:
    """Draw the pseudo-defects of a synthetic validation split anew, as a function of ``seed`` and the pictures.

    anomalib draws them when a data module is set up, from generators that no one has seeded by then: a resumed training
    would be watched by other figures than before, and several processes each by their own. A synthetic test set is
    left as it is: it may have been divided since.

    Args:
        data: has been set up.
        seed: whole number from 0 up.
    """
    dataset = getattr(data, "val_data", None)
    if data.val_split_mode != ValSplitMode.SYNTHETIC or not isinstance(dataset, SyntheticAnomalyDataset):
        return
    with isolate_rng():
        np.random.seed(seed)
        torch.manual_seed(seed)
        data.val_data = SyntheticAnomalyDataset(dataset.augmentations, dataset.source_samples, data.name)


def start_loader_anew(trainer: Trainer) -> None:
    """Fetch the first batches again, in the order that is known now.

    Lightning starts the loader, and with it worker processes that read ahead, before it tells any hook or sampler
    which epoch a resumed training has come to.
    """
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _is_plain_shuffling(sampler: object) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )
