"""Find images that anomalib silently leaves out, because a link leads to them."""

import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from anomalib.data import (
    ADAM3D,
    BMAD,
    MPDD,
    VAD,
    AnomalibDataModule,
    AutoVI,
    BTech,
    Folder,
    Folder3D,
    Kolektor,
    MVTec3D,
    MVTecAD,
    MVTecAD2,
    MVTecLOCO,
)
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_dskd.data.data_module_checks import as_list, sample_tables
from anomalib_dskd.errors import DataError

__all__ = ["check_data_links", "check_links"]

SEARCHED = (ADAM3D, BMAD, MPDD, VAD, AutoVI, BTech, Folder, Folder3D, Kolektor, MVTec3D, MVTecAD, MVTecAD2, MVTecLOCO)
"""anomalib's data modules that search folders for images."""


def check_data_links(data: AnomalibDataModule) -> None:
    """Raise if a data module has left out images because of links.

    Args:
        data: data module that has been set up.

    Raises:
        DataError: see :func:`check_links`.
    """
    if not isinstance(data, SEARCHED):
        return
    files = {
        str(path)
        for table in sample_tables(data)
        for name in ("image_path", "mask_path", "depth_path")
        for cell in table.get(name, ())
        for path in (cell if isinstance(cell, list) else [cell])
        if path
    }
    suffixes = getattr(data, "extensions", None) or IMG_EXTENSIONS
    for folder in _folders(data):
        check_links(folder, files, suffixes=suffixes, follows_files=not isinstance(data, MVTecAD))


def check_links(
    folder: str | Path,
    found: Iterable[str | Path],
    *,
    suffixes: Container[str] = IMG_EXTENSIONS,
    follows_files: bool = True,
) -> None:
    """Raise if links in a folder lead to images that have not been found.

    Args:
        folder: folder that anomalib searches, without following links to folders.
        found: the files that it has found there.
        suffixes: lower-case suffixes of images.
        follows_files: whether anomalib follows links to files, as it does except in ``MVTecAD``.

    Raises:
        DataError: the first of the images, their number, and the link.
    """
    linked = [path for path in _linked_files(folder, follows_files=follows_files) if path.suffix.lower() in suffixes]
    if not linked:
        return
    known = {os.path.realpath(path) for path in found}
    missing = sorted(path for path in linked if os.path.realpath(path) not in known)
    if missing:
        below = [path for path in (*reversed(missing[0].parents), missing[0]) if Path(folder) in path.parents]
        link = next((path for path in below if path.is_symlink()), below[0])  # a Windows junction is no symlink
        msg = (
            f"{len(missing)} images below {str(folder)!r}, such as {str(missing[0])!r}, would be left out, because "
            f"anomalib does not follow links such as {str(link)!r}. Put the files themselves there, or give the folder "
            "that the link leads to; the folders of the data module Folder may be lists."
        )
        raise DataError(msg)


def _folders(data: AnomalibDataModule) -> list[Path]:
    """Return the folders that a data module searches."""
    root = Path(getattr(data, "root", None) or "")
    if isinstance(data, Folder | Folder3D):
        return [root / name for key, names in vars(data).items() if key.endswith("_dir") for name in as_list(names)]
    return [root / (getattr(data, "category", None) or "")]


def _linked_files(folder: str | Path, *, follows_files: bool) -> Iterator[Path]:
    """Yield the files in a folder that only links lead to that anomalib does not follow, each real folder once."""
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        is_linked = real != os.path.normpath(os.path.join(os.path.realpath(folder), os.path.relpath(parent, folder)))
        for path in map(Path(parent).joinpath, files):
            if is_linked or (not follows_files and path.is_symlink()):
                yield path
