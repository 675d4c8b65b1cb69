"""Cache of decoded and resized training images, which saves decoding them again in each epoch."""

import logging
import mmap
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.dataclasses import ImageItem
from anomalib.data.datasets.base import AnomalibDataset
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

__all__ = ["CachedImages", "cache_training_images", "is_deterministic"]

logger = logging.getLogger(__name__)

GIB = 2**30
DETERMINISTIC = (v2.CenterCrop, v2.Grayscale, v2.Identity, v2.Normalize, v2.Pad, v2.Resize, v2.ToDtype, v2.ToImage)
"""Deterministic transforms. Any other counts as random, which costs time but never gives a wrong image."""
NOT_READ, WITH_MASK, WITHOUT_MASK, NOT_CACHEABLE = range(4)


def cache_training_images(data: AnomalibDataModule, *, memory: float) -> None:
    """Wrap the training set so that each image is decoded only once, if its augmentations are deterministic.

    Decoding a JPEG or PNG in each epoch takes longer than an image's share of a training step on a small CPU.

    Args:
        data: data module that has been set up. Its ``train_data`` is replaced, unless its augmentations may be random.
        memory: size of the cache in GiB; images that do not fit are decoded in each epoch. 0 disables the cache.
    """
    dataset = data.train_data
    if isinstance(dataset, CachedImages):  # of an earlier training run, with its own limit
        dataset = data.train_data = dataset.dataset
    if memory <= 0 or not len(dataset):
        return
    if not is_deterministic(dataset.augmentations):
        logger.info("training images are decoded in each epoch: %s may be random", dataset.augmentations)
        return
    data.train_data = cast("AnomalibDataset", CachedImages(dataset, memory=memory))


def is_deterministic(transform: nn.Module | None) -> bool:
    """Whether a transform is known to give the same result each time.

    >>> is_deterministic(v2.Compose([v2.Resize(8), v2.ToDtype(torch.float32)])), is_deterministic(v2.RandomCrop(8))
    (True, False)
    """
    if isinstance(transform, v2.Compose):
        return all(is_deterministic(part) for part in transform.transforms)
    if isinstance(transform, nn.Sequential):
        return all(is_deterministic(part) for part in transform)
    return transform is None or type(transform) in DETERMINISTIC


class CachedImages(Dataset[ImageItem]):
    """An anomalib data set that decodes each normal image only once and returns the same item afterwards.

    Attributes that are set, such as ``samples`` and ``augmentations``, are set on the data set, and empty the cache.

    The cache is in memory that forked worker processes share, so an image that one of them has decoded is available to
    all in the next epoch. Spawned workers (Windows, macOS) decode each time. Images whose mask has a defect, or whose
    size differs from the first image's, are not cached, nor are rows of ``samples`` that have changed since. Nothing is
    cached if augmentations may be random or items have more than image, mask and label.

    Args:
        dataset: the data set that reads files. All attributes except the items are forwarded to it.
        memory: size of the cache in GiB.
    """

    def __init__(self, dataset: AnomalibDataset, *, memory: float) -> None:
        vars(self).update(dataset=dataset, memory=memory)
        self._allocate()

    def _allocate(self) -> None:
        cache = vars(self)
        cache.update(_images=None, _states=None, _rows=[])
        if not len(self.dataset):
            return
        item = self.dataset[0]
        image = torch.as_tensor(item.image)
        cache["_shape"], size = image.shape, image.numel() * image.element_size()
        rows = min(len(self.dataset), int(self.memory * GIB) // size)
        is_supported = type(item) is ImageItem and image.dtype == torch.float32  # MVTec 3D-AD's items have a depth too
        if rows and is_supported and is_deterministic(self.dataset.augmentations):
            cache["_images"] = _shared_zeros(rows * size, np.float32).reshape(rows, *self._shape)
            cache["_states"] = _shared_zeros(rows, np.uint8)
            cache["_rows"] = [self._row(index) for index in range(rows)]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of the data set
        if name in {"dataset", "_images", "_states"}:  # missing while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of the data set; a new value may change its items."""
        if getattr(self.dataset, name, None) is not value:
            setattr(self.dataset, name, value)
            self._allocate()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache, which cannot be sent to another process."""
        return {**vars(self), "_images": None, "_states": None}

    def __getitem__(self, index: int) -> ImageItem:
        """Return an item, from the cache if it has been read before."""
        if self._images is None or self._states is None or index >= len(self._states):
            return self._read(index)
        if self._row(index) != self._rows[index]:  # the user has changed a row in place
            return self._read(index)
        state = self._states[index]
        if state in {WITH_MASK, WITHOUT_MASK}:
            return self._cached_item(index, with_mask=bool(state == WITH_MASK))
        item = self._read(index)
        if state == NOT_READ:
            self._states[index] = self._cache(index, item)
        return item

    def _row(self, index: int) -> tuple[str, ...]:
        """Return what an item depends on."""
        sample = self.dataset.samples.iloc[index]
        return str(sample.image_path), str(sample.mask_path), str(sample.label_index)

    def _read(self, index: int) -> ImageItem:
        return cast("ImageItem", self.dataset[index])

    def _cache(self, index: int, item: ImageItem) -> int:
        """Cache an item if possible; return its state."""
        assert self._images is not None  # checked by the caller
        image, mask = torch.as_tensor(item.image), item.gt_mask
        if image.shape != self._shape or (mask is not None and torch.as_tensor(mask).any()):
            return NOT_CACHEABLE
        self._images[index] = image.numpy()
        return WITHOUT_MASK if mask is None else WITH_MASK

    def _cached_item(self, index: int, *, with_mask: bool) -> ImageItem:
        assert self._images is not None  # checked by the caller
        sample = self.dataset.samples.iloc[index]
        return ImageItem(
            image=Image(torch.from_numpy(self._images[index].copy())),
            gt_mask=Mask(torch.zeros(self._shape[-2:], dtype=torch.uint8)) if with_mask else None,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )


def _shared_zeros(size: int, dtype: type[np.generic]) -> np.ndarray:
    """Return ``size`` bytes of zeros that forked processes share; not in /dev/shm, which is small in containers."""
    return np.frombuffer(mmap.mmap(-1, size), dtype=dtype)
