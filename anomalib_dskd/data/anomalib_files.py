"""Workarounds of faults in how anomalib handles files. They are in effect once this package has been imported.

They replace names in anomalib's modules, so that its own data modules, readers and commands have them too.
``tests/unit/data/test_anomalib_files.py`` tells when one is no longer needed.
"""

from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import tifffile
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.datasets.base import depth as depth_module
from anomalib.data.utils import image as image_module
from anomalib.data.utils import path as path_module
from anomalib.engine import engine as engine_module
from anomalib.utils.path import _is_windows_junction, create_versioned_dir
from numpy.typing import NDArray
from PIL import Image

from anomalib_dskd.data.image_files import READABLE_ERRORS, open_image
from anomalib_dskd.data.links import check_links
from anomalib_dskd.errors import UnreadableImageError

__all__ = ["install_workarounds", "name_files_in_workers"]

POINTER = ".version_pointer"  # in the folder that anomalib creates on Windows where a link is not possible
_list_folder = image_module.get_image_filenames_from_dir


def install_workarounds() -> None:
    """Replace the names in anomalib's modules."""
    replacements: list[tuple[ModuleType, str, object]] = [
        # it takes all but ASCII for not printable, and so refuses most languages' names of folders
        (path_module, "contains_non_printable_characters", contains_non_printable_characters),
        # PIL's errors for truncated files, and those of tifffile, do not name the file
        (image_module, "Image", SimpleNamespace(open=open_decoded)),
        (depth_module, "Image", SimpleNamespace(open=open_decoded)),
        (image_module, "tiff", SimpleNamespace(imread=read_tiff)),
        # images in linked folders are silently left out
        (image_module, "get_image_filenames_from_dir", get_image_filenames_from_dir),
        # a folder `latest` that `anomalib test` has created makes every later training run fail
        (engine_module, "create_versioned_dir", create_next_version),
    ]
    for module, name, value in replacements:
        setattr(module, name, value)


def name_files_in_workers(dataset: object) -> None:
    """Let worker processes that are spawned (Windows, macOS) have the workarounds.

    Such a process imports only what it receives refers to: the data set gets an attribute that refers to this module.
    """
    if isinstance(dataset, AnomalibDataset | PredictDataset):
        dataset.open_image = open_decoded  # type: ignore[union-attr]


def contains_non_printable_characters(path: str | Path) -> bool:
    r"""Whether a path contains control characters, or bytes that are no text.

    >>> contains_non_printable_characters("Müller/検査"), contains_non_printable_characters("a\nb")
    (False, True)
    """
    return not str(path).isprintable()


def open_decoded(path: str | Path) -> Image.Image:
    """Open an image and decode it, as ``PIL.Image.open(path).convert(...)`` does.

    Raises:
        UnreadableImageError: it is truncated or damaged; the message names the file.
        UnsafeImageError: see :func:`~anomalib_dskd.data.image_files.open_image`.
    """
    image = open_image(path)  # its errors name the file
    try:
        image.load()
    except READABLE_ERRORS as error:
        image.close()
        raise UnreadableImageError.of(path, error) from error
    return image


def read_tiff(path: str | Path) -> NDArray[np.generic]:
    """Read a depth image.

    Raises:
        UnreadableImageError: it is truncated or damaged; the message names the file.
    """
    try:
        pixels: NDArray[np.generic] = tifffile.imread(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # it raises many kinds
        raise UnreadableImageError.of(path, error) from error
    return pixels


@wraps(_list_folder)
def get_image_filenames_from_dir(path: str | Path) -> list[Path]:
    """List the images in a folder as anomalib does, unless it would leave out some.

    Raises:
        DataError: a link leads to images that would be left out.
    """
    check_links(path, Path(path).rglob("*"))
    return _list_folder(path)


@wraps(create_versioned_dir)
def create_next_version(root_dir: str | Path) -> Path:
    """Create the next version folder as anomalib does; a folder ``latest`` that is no link first becomes a version.

    ``anomalib test`` and ``predict`` create such a folder where no model has been trained.
    """
    root = Path(root_dir).resolve()
    latest = root / "latest"
    is_link = latest.is_symlink() or _is_windows_junction(latest) or (latest / POINTER).exists()
    if latest.is_dir() and not is_link:
        versions = [int(path.name[1:]) for path in root.glob("v*") if path.name[1:].isdigit()]
        latest.rename(root / f"v{max(versions, default=-1) + 1}")
    return create_versioned_dir(root_dir)
