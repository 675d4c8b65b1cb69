"""The data loader of the training images, and batches from it."""

import math
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.pre_processing import PreProcessor
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from anomalib_dskd.errors import DataError
from anomalib_dskd.models.distillation.tiling import random_tiles
from anomalib_dskd.training.batch_norm import reestimated_statistics

if TYPE_CHECKING:
    from anomalib_dskd.models.distillation.lightning_model import DistillationModule

__all__ = ["estimate_batch_norm", "number_of_images", "prepare_batch", "training_loader"]


def training_loader(trainer: Trainer) -> DataLoader[Any]:
    """Return the loader of the training images.

    Raises:
        DataError: it is none of torch's, or there are several.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        msg = f"training images come from {type(loader).__name__}. Supported: one torch DataLoader."
        raise DataError(msg)
    return loader


def number_of_images(loader: DataLoader[Any]) -> int:
    """Return the number of images that a loader reads."""
    return len(cast("Sized", loader.dataset))


def prepare_batch(batch: ImageBatch, tiler: Tiler | None, generator: torch.Generator | None = None) -> ImageBatch:
    """Replace a training batch's images by what the networks train on: images, or a tile of each.

    They are stored channels last, which is faster on CPUs with BF16 units.
    """
    images = torch.as_tensor(batch.image)
    if tiler is not None:
        images = random_tiles(images, tiler, generator)
    batch.image = images.contiguous(memory_format=torch.channels_last)
    return batch


@torch.no_grad()
def estimate_batch_norm(module: "DistillationModule", network: nn.Module, run: Callable[[ImageBatch], object]) -> None:
    """Re-estimate batch-norm statistics from ``batch_norm_images`` random training images, the same ones each time.

    Args:
        module: is being trained.
        network: network whose statistics are estimated.
        run: passes a training batch through it.
    """
    if not module.options.batch_norm_images:
        return
    trainer = module.trainer
    loader = training_loader(trainer)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(number_of_images(loader), generator=generator)
    chosen = order[: module.options.batch_norm_images]
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    was_training = network.training
    network.train()
    with reestimated_statistics(network), trainer.precision_plugin.forward_context():
        # batches of nearly equal size, since each counts the same
        for part in torch.tensor_split(chosen, math.ceil(len(chosen) / size)):
            batch = loader.collate_fn([loader.dataset[index] for index in part.tolist()])
            batch = trainer.strategy.batch_to_device(batch)
            if isinstance(module.pre_processor, PreProcessor):
                module.pre_processor.on_train_batch_start(trainer, module, batch, 0)
            run(prepare_batch(batch, module.model.tiler, generator))
    network.train(was_training)
