"""Pseudo-defects on normal images: anomalib's Perlin noise, reproducible for each image and epoch."""

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
    """Adds pseudo-defects to normalized images with anomalib's :class:`PerlinAnomalyGenerator`.

    The defect of an image depends only on ``seed``, the epoch and the image: on the last two parts of its path, so
    that the dataset can be moved, or on its pixels if it has no path. It is therefore independent of the batch, of the
    process that reads the image, and of interruptions of the training run. The generator draws only from PyTorch's
    CPU generator, whose state is restored afterwards. It runs on the CPU, where random numbers are the same for all
    accelerators, and on pixels in [0, 1]; defective pixels are clamped to that range.

    Args:
        mean: mean that the images are normalized with, one value per channel.
        std: standard deviation that the images are normalized with, one value per channel.
        seed: integer, or None for the last seed of PyTorch's generator.
        probability: probability that an image gets a defect.

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
        with seeded(self.seed):  # the constructor draws a threshold
            self.generator = PerlinAnomalyGenerator(probability=probability)

    def __call__(self, images: Tensor, paths: Sequence[str | Path] | None, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Add pseudo-defects to a batch.

        Args:
            images: normalized images ``(B, 3, H, W)``; they are not modified.
            paths: paths of the image files, if they have any.
            epoch: index of the epoch; defects differ from epoch to epoch.

        Returns:
            Normalized images ``(B, 3, H, W)`` and masks ``(B, 1, H, W)``; the images have defects where the masks are
            1, and are unchanged where they are 0.
        """
        pixels = (images.detach().cpu().float() * self.std + self.mean).contiguous()
        names = [None] * len(pixels) if paths is None else ["/".join(Path(path).parts[-2:]) for path in paths]
        drawn = [self._add_defect(image, name, epoch) for image, name in zip(pixels, names, strict=True)]
        masks = torch.stack([mask for _, mask in drawn]).to(images.device)  # (B, 1, H, W)
        defective = ((torch.stack([image for image, _ in drawn]) - self.mean) / self.std).to(images)  # (B, 3, H, W)
        # in the memory format of the images, which the speed of a convolution depends on
        return torch.empty_like(images).copy_(torch.where(masks > 0, defective, images)), masks

    def _add_defect(self, image: Tensor, name: str | None, epoch: int) -> tuple[Tensor, Tensor]:
        # autocast would rotate the noise in BF16
        with seeded(self._image_seed(image, name, epoch)), torch.autocast("cpu", enabled=False):
            defective, mask = self.generator(image)
        return defective.clamp(0, 1), mask

    def _image_seed(self, image: Tensor, name: str | None, epoch: int) -> int:
        """Return a seed of 63 bits for the image in this epoch."""
        key = image.numpy().tobytes() if name is None else name.encode()
        digest = hashlib.blake2b(f"{self.seed} {epoch} ".encode() + key, digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1
