"""Checks of the images that a model is called with: errors where a result would be wrong, warnings otherwise."""

import logging
from collections.abc import Sequence

import torch
from anomalib.data import ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import ToDtype

from anomalib_dskd.data.image_files import check_headers
from anomalib_dskd.errors import ArgumentError

__all__ = ["check_batch", "check_images", "is_flat", "warn_of_flat_images"]

logger = logging.getLogger(__name__)

CHANNELS = 3
CAST = (torch.float32, torch.bfloat16, torch.float16)  # types that mixed precision casts between
ROUNDING = 1e-3  # error of an interpolation: a quarter of a gray level
GRAY_LEVEL = 1 / 255 / 0.225  # after normalization with ImageNet's standard deviation

_warned: set[str] = set()  # files that a warning has named


def check_images(images: Tensor, pre_processor: nn.Module | None, *, dtype: torch.dtype = torch.float32) -> None:
    """Raise unless a tensor is a batch of color images with values from 0 to 1.

    anomalib's readers guarantee this for files; for a call of the model nothing does.

    Args:
        images: what the model was called with.
        pre_processor: the model's. Without one, or with one that converts types, values and types are not checked.
        dtype: of the model's weights.

    Raises:
        ArgumentError: another shape, type or range, or values that are not finite.
    """
    supported = "Supported: floating-point tensors of shape (B, 3, H, W) with values from 0 to 1."
    if images.ndim != 4 or images.shape[1] != CHANNELS:  # noqa: PLR2004 - (B, C, H, W)
        msg = f"images of shape {tuple(images.shape)}. {supported} Repeat a gray channel, drop an alpha channel."
        raise ArgumentError(msg)
    if not isinstance(pre_processor, PreProcessor) or extract_transforms_by_type(pre_processor.transform, ToDtype):
        return
    if not images.is_floating_point():
        msg = f"images of type {images.dtype}. {supported} For 8-bit images: images.float() / 255."
        raise ArgumentError(msg)
    if images.dtype not in ({dtype, *CAST} if torch.is_autocast_enabled(images.device.type) else {dtype}):
        msg = f"images of type {images.dtype} for a model of {dtype}. Give images.to({dtype})."
        raise ArgumentError(msg)
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        msg = f"images with values from {low:g} to {high:g}. {supported} Divide 8-bit values by 255; do not normalize."
        raise ArgumentError(msg)


def check_batch(batch: ImageBatch) -> None:
    """Refuse image files that are misread, and warn about images without contrast.

    Args:
        batch: normalized images ``(B, 3, H, W)``, and their paths.

    Raises:
        DataError: an image file that is not supported.
    """
    check_headers(batch.image_path)
    warn_of_flat_images(torch.as_tensor(batch.image), batch.image_path)


def is_flat(images: Tensor) -> Tensor:
    """Return which images of a batch have a single color, up to about one gray level.

    Args:
        images: normalized ``(B, 3, H, W)``.

    Returns:
        Booleans ``(B,)``.

    Example:
        >>> import torch
        >>> is_flat(torch.stack([torch.full((3, 8, 8), 0.5), torch.linspace(0, 1, 192).view(3, 8, 8)])).tolist()
        [True, False]
    """
    pixels = images.float()  # not Tensor.std, which takes three times as long on a CPU
    deviations = pixels - pixels.mean(dim=(-2, -1), keepdim=True)
    flat: Tensor = (deviations.square().mean(dim=(-2, -1)) < GRAY_LEVEL**2).all(dim=1)  # (B, 3) to (B,)
    return flat


def warn_of_flat_images(images: Tensor, paths: Sequence[str] | None) -> None:
    """Warn about each image without contrast, once per process.

    Args:
        images: normalized ``(B, 3, H, W)``.
        paths: files of the images, if known.
    """
    for index in is_flat(images).nonzero().flatten().tolist():
        name = repr(str(paths[index])) if paths else "of unknown name"
        if name not in _warned:
            _warned.add(name)
            logger.warning("image %s has hardly any contrast: is it a photograph? Its score may mean nothing.", name)
