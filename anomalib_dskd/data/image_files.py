"""Reading image files with errors that name the file."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from PIL import Image, UnidentifiedImageError

from anomalib_dskd.errors import DataError

__all__ = ["check_depth", "check_depths", "is_deep", "read_named_image"]

READABLE_ERRORS = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


def is_deep(mode: str) -> bool:
    """Whether images of a PIL mode have more than 8 bits a channel.

    >>> is_deep("I;16"), is_deep("RGB")
    (True, False)
    """
    return mode.startswith(("I", "F"))


@cache
def check_depth(path: str | Path) -> None:
    """Refuse images of more than 8 bits a channel, which ``anomalib.data.utils.read_image`` turns white.

    Only the file's header is read, once a process; a file that cannot be opened is left to its reader.

    Raises:
        DataError: 16-bit, 32-bit or floating-point image.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
    except READABLE_ERRORS:
        return
    if is_deep(mode):
        msg = (
            f"image {str(path)!r} has more than 8 bits a channel (PIL mode {mode!r}); anomalib would clip it to "
            "white. Convert the data set to 8 bits, with one fixed range for all images, such as "
            "`(pixels / 65535 * 255).astype('uint8')`."
        )
        raise DataError(msg)


def check_depths(paths: Iterable[str | Path] | None) -> None:
    """Apply :func:`check_depth` to a batch's files, if the batch names them."""
    for path in paths or ():
        check_depth(path)


def read_named_image(path: str | Path) -> torch.Tensor:
    """Read an image as ``(3, H, W)`` floats from 0 to 1.

    Raises:
        DataError: the file is missing, truncated, no image, or of more than 8 bits a channel.
    """
    check_depth(path)
    try:
        image = read_image(path, as_tensor=True)
    except READABLE_ERRORS as error:
        msg = f"image {str(path)!r} cannot be read: {error}. Replace the file, or remove it from the data set."
        raise DataError(msg) from error
    return torch.as_tensor(image)
