"""Reading image files with errors that name the file, and without what a file could do to its reader."""

import re
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from PIL import Image, UnidentifiedImageError

from anomalib_dskd.errors import DataError, UnsafeImageError

__all__ = [
    "check_data_files",
    "check_header",
    "check_headers",
    "dataset_paths",
    "is_deep",
    "open_image",
    "read_named_image",
]

READABLE_ERRORS = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)
PROGRAMS = ("EPS",)  # PostScript, which PIL gives to Ghostscript to run, whatever the file's suffix
REMEMBERED = 2**17  # files whose header is read once a process


def is_deep(mode: str) -> bool:
    """Whether images of a PIL mode have more than 8 bits a channel.

    >>> is_deep("I;16"), is_deep("RGB")
    (True, False)
    """
    return mode.startswith(("I", "F"))


def open_image(path: str | Path) -> Image.Image:
    """Open an image as ``PIL.Image.open`` does, which reads its header, and refuse what is not safe to decode.

    Raises:
        UnsafeImageError: it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, of which PIL warns alone, or it is a
            program.
        OSError: it cannot be read; ``READABLE_ERRORS`` has what else PIL raises then.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:  # twice as many
            number = re.search(r"\d+", str(error))
            raise _too_large(path, int(number[0]) if number else 0) from None
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        image.close()
        raise _too_large(path, pixels)
    if image.format in PROGRAMS:
        image.close()
        msg = f"image {str(path)!r} is a PostScript program, which is not run. Convert it to PNG, or remove it."
        raise UnsafeImageError(msg)
    return image


def _too_large(path: str | Path, pixels: int) -> UnsafeImageError:
    return UnsafeImageError(
        f"image {str(path)!r} has {pixels:,} pixels, more than the {Image.MAX_IMAGE_PIXELS:,} that are decoded. Cut it "
        "into tiles, or scale it down. If images are meant to be so large, raise PIL.Image.MAX_IMAGE_PIXELS in Python."
    )


@lru_cache(maxsize=REMEMBERED)
def check_header(path: str | Path, *, is_mask: bool = False) -> None:
    """Refuse images that are not safe to decode, or that ``anomalib.data.utils.read_image`` would turn white.

    Only the file's header is read, once a process; a file that cannot be opened is left to its reader.

    Args:
        path: file of the image.
        is_mask: it may have more than 8 bits a channel.

    Raises:
        DataError: 16-bit, 32-bit or floating-point image, or, as ``UnsafeImageError``, what :func:`open_image` refuses.
    """
    try:
        with open_image(path) as image:
            mode = image.mode
    except READABLE_ERRORS:
        return
    if is_deep(mode) and not is_mask:
        msg = (
            f"image {str(path)!r} has more than 8 bits a channel (PIL mode {mode!r}); anomalib would clip it to "
            "white. Convert the data set to 8 bits, with one fixed range for all images, such as "
            "`(pixels / 65535 * 255).astype('uint8')`."
        )
        raise DataError(msg)


def check_headers(paths: Iterable[str | Path] | None) -> None:
    """Apply :func:`check_header` to images, if there are names of any."""
    for path in () if paths is None else paths:
        check_header(path)


def check_data_files(data: AnomalibDataModule, splits: Iterable[str]) -> None:
    """Apply :func:`check_header` to all images and masks of a data module's sets, before training decodes any.

    Of pseudo-defects also to the images that they are painted on, which anomalib has decoded by then.

    Args:
        data: it has been set up.
        splits: the ones of ``train``, ``val`` and ``test`` to look at.
    """
    datasets = [getattr(data, f"{split}_data", None) for split in splits]
    tables = [getattr(dataset, name, None) for dataset in datasets for name in ("samples", "source_samples")]
    for samples in (table for table in tables if table is not None):
        check_headers(samples.image_path)
        for path in samples.get("mask_path", ()):
            if isinstance(path, str) and path:
                check_header(path, is_mask=True)


def dataset_paths(loaders: Any) -> Iterator[str | Path]:  # noqa: ANN401 - whatever the trainer was given
    """Yield the image files behind data loaders, as far as anomalib's data sets name them."""
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        yield from getattr(dataset, "image_filenames", ())
        yield from getattr(getattr(dataset, "samples", None), "image_path", ())


def read_named_image(path: str | Path) -> torch.Tensor:
    """Read an image as ``(3, H, W)`` floats from 0 to 1.

    Raises:
        DataError: the file is missing, truncated, no image, of more than 8 bits a channel, or not safe to decode.
    """
    check_header(path)
    try:
        image = read_image(path, as_tensor=True)
    except READABLE_ERRORS as error:
        msg = f"image {str(path)!r} cannot be read: {error}. Replace the file, or remove it from the data set."
        raise DataError(msg) from error
    return torch.as_tensor(image)
