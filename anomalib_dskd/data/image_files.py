"""Read image files safely: errors name the file, and files that are dangerous to decode are refused."""

import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_dskd.data.data_module_checks import sample_tables
from anomalib_dskd.errors import DataError, UnreadableImageError, UnsafeImageError

__all__ = [
    "READABLE_ERRORS",
    "check_data_files",
    "check_header",
    "check_headers",
    "dataset_paths",
    "has_high_bit_depth",
    "loader_datasets",
    "open_image",
    "read_named_image",
]

READABLE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for an image that cannot be read."""
PROGRAM_FORMATS = ("EPS",)  # PostScript: PIL runs it with Ghostscript, whatever the file's suffix
MAX_CHECKED_FILES = 2**17  # per process, whose headers are not read again


def has_high_bit_depth(mode: str) -> bool:
    """Whether images of a PIL mode have more than 8 bits per channel.

    >>> has_high_bit_depth("I;16"), has_high_bit_depth("RGB")
    (True, False)
    """
    return mode.startswith(("I", "F"))


def open_image(path: str | Path) -> Image.Image:
    """Open an image with ``PIL.Image.open``, which reads only the header, and refuse files that are unsafe to decode.

    Raises:
        UnsafeImageError: the image has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, or is a PostScript program.
        UnreadableImageError: its header cannot be read.
        FileNotFoundError: there is no such file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        msg = (
            f"image {str(path)!r} is too large to decode. {error} Cut it into tiles, or scale it down. If images are "
            f"meant to be so large, raise PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}) in Python."
        )
        raise UnsafeImageError(msg) from None
    except FileNotFoundError:
        raise
    except READABLE_ERRORS as error:
        raise UnreadableImageError.of(path, error) from error
    if image.format in PROGRAM_FORMATS:
        image.close()
        msg = f"image {str(path)!r} is a PostScript program, which is not run. Convert it to PNG, or remove it."
        raise UnsafeImageError(msg)
    return image


@lru_cache(maxsize=MAX_CHECKED_FILES)
def check_header(path: str | Path, *, is_mask: bool = False) -> None:
    """Refuse images that are unsafe to decode, or that ``anomalib.data.utils.read_image`` would turn white.

    Only the header is read, once per process. Files that cannot be opened pass: reading them raises an error.

    Args:
        path: image file.
        is_mask: whether the image is a mask, which may have more than 8 bits per channel.

    Raises:
        UnsafeImageError: see :func:`open_image`.
        DataError: the image has 16-bit, 32-bit or floating-point channels.
    """
    try:
        with open_image(path) as image:
            mode = image.mode
    except READABLE_ERRORS:
        return
    if has_high_bit_depth(mode) and not is_mask:
        msg = (
            f"image {str(path)!r} has more than 8 bits per channel (PIL mode {mode!r}); anomalib would clip it to "
            "white. Convert the data set to 8 bits, with the same range for all images, such as "
            "`(pixels / 65535 * 255).astype('uint8')`."
        )
        raise DataError(msg)


def check_headers(paths: Iterable[str | Path] | None) -> None:
    """Apply :func:`check_header` to images; ``None`` stands for no paths."""
    for path in () if paths is None else paths:
        check_header(path)


def check_data_files(data: AnomalibDataModule, splits: Iterable[str]) -> None:
    """Apply :func:`check_header` to all images and masks of a data module, before any of them is decoded.

    For synthetic defects these are the source images.

    Args:
        data: data module that has been set up.
        splits: splits to check, of ``train``, ``val`` and ``test``.
    """
    for samples in sample_tables(data, splits):
        check_headers(samples.image_path)
        for path in samples.get("mask_path", ()):
            if isinstance(path, str) and path:
                check_header(path, is_mask=True)


def loader_datasets(loaders: Any) -> list[Any]:  # noqa: ANN401 - any type that a trainer accepts
    """Return the data sets of one data loader or of several; None for a loader without."""
    return [
        getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])
    ]


def dataset_paths(loaders: Any) -> Iterator[str | Path]:  # noqa: ANN401 - any type that a trainer accepts
    """Yield the image files of data loaders' data sets, as far as these list them as anomalib's do."""
    for dataset in loader_datasets(loaders):
        yield from getattr(dataset, "image_filenames", ())
        yield from getattr(getattr(dataset, "samples", None), "image_path", ())


def read_named_image(path: str | Path) -> torch.Tensor:
    """Read an image as ``(3, H, W)`` floats from 0 to 1; an error names the file.

    Raises:
        DataError: the file is missing, truncated, not an image, has more than 8 bits per channel, or is unsafe to
            decode.
    """
    check_header(path)
    try:
        image = read_image(path, as_tensor=True)
    except DataError:  # anomalib_files names truncated files
        raise
    except READABLE_ERRORS as error:
        raise UnreadableImageError.of(path, error) from error
    return torch.as_tensor(image)
