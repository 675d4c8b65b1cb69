"""Pseudo-defects on good images: anomalib's Perlin noise, the same for an image and an epoch wherever it is drawn."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor

from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.errors import ArgumentError

__all__ = ["PseudoDefects"]


class PseudoDefects:
    """Damages normalised images by anomalib's :class:`PerlinAnomalyGenerator`.

    What an image gets depends on ``seed``, the epoch, and the image alone: on the last two parts of its path, so
    that the data may lie elsewhere, or on its pixels where it has none. So it is the same whatever batch the image
    comes in, whatever process has read it, and whether a training was interrupted. The generator draws from
    PyTorch's generator alone, which is as before afterwards. It works on the CPU, where the numbers are the same for
    all accelerators, and on pixels in [0, 1], within which the damaged ones are kept.

    Args:
        mean: that the images are normalised with, one a channel.
        std: as ``mean``.
        seed: whole number, or none for that which PyTorch's generator was last seeded with.
        probability: of an image to be damaged.

    Raises:
        ArgumentError: the probability is 0, or not within [0, 1].
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, seed: int | None = None, probability: float = 1.0
    ) -> None:
        if not 0 < probability <= 1:
            msg = f"defect_probability {probability!r} must be larger than 0, and 1 at most."
            raise ArgumentError(msg)
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.seed = torch.initial_seed() if seed is None else seed
        with seeded(self.seed):  # its constructor draws a threshold
            self.generator = PerlinAnomalyGenerator(probability=probability)

    def __call__(self, images: Tensor, paths: Sequence[str | Path] | None, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Damage images.

        Args:
            images: normalised, ``(B, 3, H, W)``; they are left as they are.
            paths: of their files, if they have any.
            epoch: each one brings other damage.

        Returns:
            Normalised images that are damaged where the masks ``(B, 1, H, W)`` are 1, and the same as before where
            those are 0.
        """
        pixels = (images.detach().cpu().float() * self.std + self.mean).contiguous()
        names: list[str | None]
        names = [None] * len(pixels) if paths is None else ["/".join(Path(path).parts[-2:]) for path in paths]
        drawn = [self._damage(image, name, epoch) for image, name in zip(pixels, names, strict=True)]
        masks = torch.stack([mask for _, mask in drawn])  # (B, 1, H, W)
        normalised = (torch.stack([damaged for damaged, _ in drawn]) - self.mean) / self.std  # (B, 3, H, W)
        masks, normalised = masks.to(images.device), normalised.to(images)
        # in the memory format of the images, which a convolution's speed depends on
        return torch.empty_like(images).copy_(torch.where(masks > 0, normalised, images)), masks

    def _damage(self, image: Tensor, name: str | None, epoch: int) -> tuple[Tensor, Tensor]:
        # mixed precision would turn the noise in bfloat16
        with seeded(self._number(image, name, epoch)), torch.autocast("cpu", enabled=False):
            damaged, mask = self.generator(image)
        return damaged.clamp(0, 1), mask

    def _number(self, image: Tensor, name: str | None, epoch: int) -> int:
        """Return a whole number of 63 bits that stands for the image in this epoch."""
        key = image.numpy().tobytes() if name is None else name.encode()
        digest = hashlib.blake2b(f"{self.seed} {epoch} ".encode() + key, digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1
