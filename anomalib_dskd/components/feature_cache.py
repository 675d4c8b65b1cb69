"""A frozen teacher's features of the training images, kept from one epoch to the next."""

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
    """Keeps what a frozen network returns for an image, found again by the image's pixels.

    Without random augmentation a frozen teacher sees the same images in every epoch, and need be run in the
    first one alone. Features are kept with unit norm over channels, which is all that a cosine asks for, in
    float16 (a step of 5e-4 of each value, which changes ``1 - cos`` by about 1e-7). As an image's pixels are
    its key, a randomly augmented image can never get another one's features; it merely is not found, and a
    full cache that misses most images in an epoch empties and switches itself off.

    Up to ``memory`` the features are in memory, beyond it in a temporary file that vanishes with the process.
    If that cannot grow, the images left over are computed each time.

    Args:
        network: maps images ``(B, 3, H, W)`` to one ``(B, C_k, H_k, W_k)`` tensor a level, without gradient.
        images: number of images to keep at most: that of the training set.
        memory: size in GiB up to which features are kept in memory.

    Example:
        >>> calls = []
        >>> cache = FeatureCache(lambda images: calls.append(len(images)) or [2 * images], images=1, memory=1.0)
        >>> images = torch.eye(3).view(1, 3, 3, 1)
        >>> first, again = cache(images), cache(images)  # the second time from the cache
        >>> calls, torch.equal(again[0], images)
        ([1], True)
    """

    def __init__(self, network: Callable[[Tensor], list[Tensor]], *, images: int, memory: float) -> None:
        self.network = network
        self.images = images
        self.memory = memory
        self.is_on = True
        self._can_grow = True
        self._was_complete = False
        self._found = self._seen = 0
        self._forget()

    def __reduce__(self) -> tuple[Callable[..., "FeatureCache"], tuple[Any, ...]]:
        """Copy and pickle without the features: they are quickly computed anew."""
        return functools.partial(FeatureCache, images=self.images, memory=self.memory), (self.network,)

    def _forget(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._blocks: list[np.ndarray] = []
        self._shapes: list[torch.Size] | None = None

    def __len__(self) -> int:
        """Return the number of images whose features are kept."""
        return len(self._rows)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of features in memory."""
        return sum(block.nbytes for block in self._blocks if not isinstance(block, np.memmap))

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of features in the temporary file."""
        return sum(block.nbytes for block in self._blocks if isinstance(block, np.memmap))

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the features of images ``(B, 3, H, W)``: the network's own, or of unit norm where they were kept.

        Images that are not on the CPU go straight to the network, which is quicker there than fetching features.
        """
        if not self.is_on or images.device.type != "cpu":
            return self.network(images)
        keys = [_key(image) for image in images]
        found = [index for index, key in enumerate(keys) if key in self._rows]
        missing = [index for index, key in enumerate(keys) if key not in self._rows]
        self._seen += len(keys)
        self._found += len(found)
        if not missing:
            return self._read(keys)
        computed = self.network(images[missing])
        features = _merged(computed, missing, self._read([keys[i] for i in found]), found) if found else computed
        if self._can_grow and len(self) < self.images:
            self._write({keys[index]: row for row, index in enumerate(missing)}, computed)
        return features

    def end_epoch(self) -> None:
        """Take stock: a cache that had all images when the epoch began, and missed most, is of no use."""
        if self._was_complete and 2 * self._found < self._seen:
            logger.info("teacher features are computed in each epoch: images differ from epoch to epoch")
            self.is_on = False
            self._forget()
        self._was_complete = len(self) == self.images
        self._found = self._seen = 0

    def _write(self, missing: dict[bytes, int], features: list[Tensor]) -> None:
        shapes = [level.shape[1:] for level in features]
        if self._shapes is None:
            self._shapes = shapes
        if self._shapes != shapes:  # images of another size: not worth a second set of blocks
            return
        rows = np.concatenate([_pack(level).numpy() for level in features], axis=1)  # (B, values)
        for key, index in missing.items():
            row = len(self._rows)
            if row == BLOCK * len(self._blocks) and row < self.images:
                self._can_grow = self._grow(rows.shape[1])
            if row == self.images or not self._can_grow:
                return
            self._blocks[row // BLOCK][row % BLOCK] = rows[index]
            self._rows[key] = row

    def _read(self, keys: list[bytes]) -> list[Tensor]:
        assert self._shapes is not None  # a key was found
        rows = [self._rows[key] for key in keys]
        values = torch.from_numpy(np.stack([self._blocks[row // BLOCK][row % BLOCK] for row in rows]))
        levels = torch.split(values, [shape.numel() for shape in self._shapes], dim=1)
        return [_unpack(level, shape) for level, shape in zip(levels, self._shapes, strict=True)]

    def _grow(self, values: int) -> bool:
        """Add a block, in memory or in the file; return whether that worked."""
        size = BLOCK * values * np.dtype(np.float16).itemsize
        if self.bytes_in_memory + size <= self.memory * GIB:
            self._blocks.append(np.empty((BLOCK, values), dtype=np.float16))
            return True
        try:
            self._blocks.append(_block_on_disk(size, values))
        except OSError as error:
            logger.warning(
                "teacher features of %d images are kept; the others are computed in each epoch, since the temporary "
                "file in %s cannot grow: %s. Make room there, or set TMPDIR to another folder.",
                len(self),
                tempfile.gettempdir(),
                error,
            )
            return False
        return True


def _block_on_disk(size: int, values: int) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="anomalib-dskd-") as file:  # the map keeps it; with the map it is gone
        file.write(bytes(size))  # written, not only made longer: a full disk shows here, not in a crash later
        file.flush()
        return np.memmap(file, dtype=np.float16, mode="r+", shape=(BLOCK, values))


def _merged(computed: list[Tensor], missing: list[int], kept: list[Tensor], found: list[int]) -> list[Tensor]:
    """Put the levels of two parts of a batch in the batch's order."""
    order = torch.tensor(missing + found).argsort()
    return [torch.cat([new.float(), old])[order] for new, old in zip(computed, kept, strict=True)]


def _key(image: Tensor) -> bytes:
    pixels = image.contiguous().numpy()
    return repr(pixels.shape).encode() + hashlib.blake2b(pixels.data, digest_size=16).digest()


def _pack(level: Tensor) -> Tensor:
    """``(B, C, h, w)`` to ``(B, h w C)`` of unit norm, channels last, as the students' features lie."""
    return F.normalize(level.float(), dim=1).permute(0, 2, 3, 1).flatten(1).half()


def _unpack(values: Tensor, shape: torch.Size) -> Tensor:
    channels, height, width = shape
    return values.view(-1, height, width, channels).permute(0, 3, 1, 2).float()  # (B, C, h, w)
