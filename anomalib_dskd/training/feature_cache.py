"""Cache of a frozen teacher's features of the training images, in memory and in a temporary file."""

import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["FeatureCache"]

logger = logging.getLogger(__name__)

BLOCK = 128  # images; memory and temporary files grow by this many at a time
GIB = 2**30


class FeatureCache:
    """Caches the features that a frozen network returns for an image; the key is the image's pixels.

    Without random augmentation, a frozen teacher gets the same images in every epoch, and has to be run only in the
    first. Features are returned with unit norm over channels, which does not change cosines, and rounded to FP16 (a
    relative step of 5e-4, which changes ``1 - cos`` by about 1e-7). Because pixels are the key, a randomly augmented
    image never gets the features of another one. A full cache that does not have most images of an epoch is emptied
    and switched off.

    Up to ``memory``, the features are in memory, beyond it in a temporary file that is deleted with the process. If
    the file cannot grow, the features of the remaining images are computed each time.

    Args:
        network: maps images ``(B, 3, H, W)`` to one ``(B, C_k, H_k, W_k)`` tensor per level, without gradient.
        images: maximum number of images: the size of the training set.
        memory: size in GiB up to which features are in memory.

    Example:
        >>> calls = []
        >>> cache = FeatureCache(lambda images: calls.append(len(images)) or [2 * images], images=1, memory=1.0)
        >>> images = torch.eye(3).view(1, 3, 3, 1)
        >>> first, second = cache(images), cache(images)  # the second time from the cache
        >>> calls, torch.equal(first[0], images), torch.equal(second[0], images)
        ([1], True, True)
    """

    def __init__(self, network: Callable[[Tensor], list[Tensor]], *, images: int, memory: float) -> None:
        self.network = network
        self.images = images
        self.memory = memory
        self.is_on = True
        self._can_grow = True
        self._was_complete = False
        self._hits = self._requests = 0
        self._clear()

    def __reduce__(self) -> tuple[Callable[..., "FeatureCache"], tuple[Any, ...]]:
        """Copy and pickle without the features, which are quickly computed again."""
        return functools.partial(FeatureCache, images=self.images, memory=self.memory), (self.network,)

    def _clear(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._blocks: list[np.ndarray] = []
        self._shapes: list[torch.Size] | None = None

    def __len__(self) -> int:
        """Return the number of images whose features are cached."""
        return len(self._rows)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of features in memory."""
        return sum(block.nbytes for block in self._blocks if not isinstance(block, np.memmap))

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the features of images ``(B, 3, H, W)``, rounded in the same way whether cached or just computed.

        An image that is not cached goes through the network as a batch of one, since other images in its batch could
        change the last bit of its features. The features are therefore the same in all epochs and in a training run
        that is resumed. Images that are not on the CPU go straight to the network: there this is faster than the cache.
        """
        if not self.is_on or images.device.type != "cpu":
            return self.network(images)
        rows, shapes = [], self._shapes
        for index, image in enumerate(images):
            key = _key(image)
            if key in self._rows:
                row = self._rows[key]
                rows.append(self._blocks[row // BLOCK][row % BLOCK])
                self._hits += 1
            else:
                computed = self.network(images[index : index + 1])
                shapes = [level.shape[1:] for level in computed]
                rows.append(np.concatenate([_pack(level).numpy()[0] for level in computed]))
                self._store(key, rows[-1], shapes)
        self._requests += len(rows)
        assert shapes is not None  # set by the first image ever computed
        levels = torch.split(torch.from_numpy(np.stack(rows)), [shape.numel() for shape in shapes], dim=1)
        return [_unpack(level, shape) for level, shape in zip(levels, shapes, strict=True)]

    def end_epoch(self) -> None:
        """Switch off a cache that was complete at the start of the epoch but did not have most of its images."""
        if self._was_complete and 2 * self._hits < self._requests:
            logger.info("teacher features are computed in each epoch: images differ from epoch to epoch")
            self.is_on = False
            self._clear()
        self._was_complete = len(self) == self.images
        self._hits = self._requests = 0

    def _store(self, key: bytes, values: np.ndarray, shapes: list[torch.Size]) -> None:
        if self._shapes is None:
            self._shapes = shapes
        row = len(self._rows)
        # images of another size are not worth a second set of blocks
        if not self._can_grow or row == self.images or self._shapes != shapes:
            return
        if row == BLOCK * len(self._blocks):
            self._can_grow = self._grow(len(values))
        if self._can_grow:
            self._blocks[row // BLOCK][row % BLOCK] = values
            self._rows[key] = row

    def _grow(self, values: int) -> bool:
        """Add a block, in memory or in the temporary file; return whether that was possible."""
        size = BLOCK * values * np.dtype(np.float16).itemsize
        if self.bytes_in_memory + size <= self.memory * GIB:
            self._blocks.append(np.empty((BLOCK, values), dtype=np.float16))
            return True
        try:
            self._blocks.append(_block_on_disk(size, values))
        except OSError as error:
            logger.warning(
                "teacher features of %d images are cached; those of the others are computed in each epoch, because the "
                "temporary file in %s cannot grow: %s. Free disk space there, or set TMPDIR to another folder.",
                len(self),
                tempfile.gettempdir(),
                error,
            )
            return False
        return True


def _block_on_disk(size: int, values: int) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="anomalib-dskd-") as file:  # the memory map keeps it open until it is deleted
        file.write(bytes(size))  # written, not just extended: a full disk raises here instead of crashing later
        file.flush()
        return np.memmap(file, dtype=np.float16, mode="r+", shape=(BLOCK, values))


def _key(image: Tensor) -> bytes:
    pixels = image.contiguous().numpy()
    return repr(pixels.shape).encode() + hashlib.blake2b(pixels.data, digest_size=16).digest()


def _pack(level: Tensor) -> Tensor:
    """``(B, C, h, w)`` to ``(B, h w C)`` with unit norm, channels last like the students' features."""
    return F.normalize(level.float(), dim=1).permute(0, 2, 3, 1).flatten(1).half()


def _unpack(values: Tensor, shape: torch.Size) -> Tensor:
    channels, height, width = shape
    return values.view(-1, height, width, channels).permute(0, 3, 1, 2).float()  # (B, C, h, w)
