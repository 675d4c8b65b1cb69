"""What a model makes of unusual images: an error where no result would make sense, else a warning."""

import logging
from collections.abc import Sequence

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import ToDtype

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_images", "is_flat", "warn_of_flat_images"]

logger = logging.getLogger(__name__)

COLOURS = 3
CAST = (torch.float32, torch.bfloat16, torch.float16)  # what mixed precision turns into one another
ROUNDING = 1e-3  # of an interpolation; a quarter of a gray level
GRAY_LEVEL = 1 / 255 / 0.225  # after normalisation with ImageNet's deviation

_told: set[str] = set()  # files that a warning has named


def check_images(images: Tensor, pre_processor: nn.Module | None, *, dtype: torch.dtype = torch.float32) -> None:
    """Raise unless a tensor given in Python is a batch of colour images with values from 0 to 1.

    anomalib's readers see to this for files; a call of the model sees to nothing.

    Args:
        images: what the model was called with.
        pre_processor: the model's. Without one, or with one that converts types, values and types are its caller's.
        dtype: of the model's weights.

    Raises:
        ArgumentError: another shape, type or range, or values that are not finite.
    """
    legal = "Legal are floating-point tensors of shape (B, 3, H, W) with values from 0 to 1."
    if images.ndim != 4 or images.shape[1] != COLOURS:  # noqa: PLR2004 - (B, C, H, W)
        msg = f"images of shape {tuple(images.shape)}. {legal} Repeat a gray channel, drop an alpha channel."
        raise ArgumentError(msg)
    if not isinstance(pre_processor, PreProcessor) or extract_transforms_by_type(pre_processor.transform, ToDtype):
        return
    if not images.is_floating_point():
        msg = f"images of type {images.dtype}. {legal} For 8 bits: images.float() / 255."
        raise ArgumentError(msg)
    if images.dtype not in ({dtype, *CAST} if torch.is_autocast_enabled(images.device.type) else {dtype}):
        msg = f"images of type {images.dtype}, and a model of {dtype}. Give images.to({dtype})."
        raise ArgumentError(msg)
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        msg = f"images with values from {low:g} to {high:g}. {legal} Scale 8 bits by 1/255; do not normalise."
        raise ArgumentError(msg)


def is_flat(images: Tensor) -> Tensor:
    """Tell which images of a batch are of one colour, give or take about a gray level.

    Args:
        images: normalised ``(B, 3, H, W)``.

    Returns:
        Booleans ``(B,)``.

    Example:
        >>> import torch
        >>> is_flat(torch.stack([torch.full((3, 8, 8), 0.5), torch.linspace(0, 1, 192).view(3, 8, 8)])).tolist()
        [True, False]
    """
    flat: Tensor = (images.float().std(dim=(-2, -1)) < GRAY_LEVEL).all(dim=1)  # (B, 3) to (B,)
    return flat


def warn_of_flat_images(images: Tensor, paths: Sequence[str] | None) -> None:
    """Name each image file without contrast in a warning, once a process.

    Args:
        images: normalised ``(B, 3, H, W)``.
        paths: files of the images, if they are known.
    """
    for index in is_flat(images).nonzero().flatten().tolist():
        name = repr(str(paths[index])) if paths else "of unknown name"
        if name not in _told:
            _told.add(name)
            logger.warning("image %s has hardly any contrast: no camera picture? Its score may mean nothing.", name)
