"""Check that each mask belongs to the image that anomalib has paired it with.

anomalib sorts the images with defects and the masks, pairs them by position, and compares only file names, of which the
image's must be a part of the mask's: ``1.png`` with ``12.png`` passes, and so do equal names in folders of other
defects.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from anomalib.data import BMAD, MPDD, VAD, AnomalibDataModule, Folder, Folder3D, Kolektor, MVTecAD

from anomalib_dskd.data.data_module_checks import as_list, sample_tables
from anomalib_dskd.errors import DataError

__all__ = ["WrongPair", "check_mask_pairs", "find_wrong_pairs", "image_names"]

PAIRED_BY_POSITION = (BMAD, MPDD, VAD, Folder, Folder3D, Kolektor, MVTecAD)
"""anomalib's data modules that pair sorted lists. Others compose a mask's path from its image's, or read a table."""
WORDS = "mask|gt|ground[-_. ]?truth|label|seg|segmentation|annotation"
AFFIXES = tuple(re.compile(affix, re.IGNORECASE) for affix in (rf"[-_. ]?(?:{WORDS})$", rf"^(?:{WORDS})[-_. ]?"))
MAX_NAMED = 3  # pairs in an error


class WrongPair(NamedTuple):
    """An image and the mask that anomalib has paired it with, and why they do not belong together."""

    image: Path
    mask: Path
    reason: str


def image_names(mask: str) -> set[str]:
    """Return the names that a mask's image may have, all without suffix: the mask's, or that without ``_mask`` etc.

    >>> sorted(image_names("007_gt_mask")), sorted(image_names("mask7")), sorted(image_names("12"))
    (['007', '007_gt', '007_gt_mask'], ['7', 'mask7'], ['12'])
    """
    shorter = {affix.sub("", mask) for affix in AFFIXES} - {mask, ""}
    return {mask}.union(*map(image_names, shorter))


def check_mask_pairs(data: AnomalibDataModule) -> None:
    """Raise unless all masks belong to their images.

    Args:
        data: data module that has been set up.

    Raises:
        DataError: the pairs that do not belong together.
    """
    wrong = find_wrong_pairs(data)
    if wrong:
        pairs = "; ".join(f"{str(image)!r} with {str(mask)!r}: {reason}" for image, mask, reason in wrong[:MAX_NAMED])
        msg = (
            f"{len(wrong)} masks are paired with images that they do not belong to, because anomalib pairs sorted "
            f"lists of files: {pairs}. Rename files or folders so that images and masks sort alike; `anomalib-dskd "
            "check` lists all pairs."
        )
        raise DataError(msg)


def find_wrong_pairs(data: AnomalibDataModule) -> list[WrongPair]:
    """Return the images whose masks do not belong to them, as far as names tell.

    A mask has its image's name, or that with an affix such as ``_mask``. Where several masks have it, the one in the
    folder named as the image's belongs to it. Of a ``Folder`` with several ``abnormal_dir`` and as many ``mask_dir``,
    ``mask_dir[i]`` has the masks of ``abnormal_dir[i]``.

    Args:
        data: data module that has been set up. Modules that do not pair by position have no wrong pairs.
    """
    pairs = dict(_list_pairs(data)) if isinstance(data, PAIRED_BY_POSITION) else {}
    if not pairs:
        return []
    folders = _paired_folders(data)
    everywhere = _Masks(pairs.values(), pairs)
    within = {folder: _Masks((m for m in pairs.values() if m.is_relative_to(folder)), pairs) for _, folder in folders}
    wrong = []
    for image, mask in pairs.items():
        own = [masks for images, masks in folders if image.is_relative_to(images)]
        if image.stem not in image_names(mask.stem):
            reason: str | None = "the mask's name is not the image's, with or without an affix such as '_mask'"
        elif own and not mask.is_relative_to(own[0]):
            reason = f"its masks are in {str(own[0])!r}, by the order of abnormal_dir and mask_dir"
        else:
            reason = (within[own[0]] if own else everywhere).nearer_mask(image, mask)
        if reason:
            wrong.append(WrongPair(image, mask, reason))
    return wrong


class _Masks:
    """Masks that an image's may be among.

    Args:
        masks: their files.
        images: the images, to find the folder that they and the masks have in common.
    """

    def __init__(self, masks: Iterable[Path], images: Iterable[Path]) -> None:
        self.masks = list(masks)
        self.images = images
        self._nearest: dict[Path, tuple[Path, int]] = {}

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        by_name = defaultdict(list)
        for mask in self.masks:
            for name in image_names(mask.stem):
                by_name[name].append(mask)
        return by_name

    def _nearest_folder(self, images: Path) -> tuple[Path, int]:
        """Return the folder of masks that has most names in common with a folder of images, and their number."""
        if images not in self._nearest:
            folders = sorted({mask.parent for mask in self.masks})
            self._nearest[images] = max(
                ((folder, self._shared_names(images, folder)) for folder in folders), key=itemgetter(1)
            )
        return self._nearest[images]

    @cached_property
    def _depth(self) -> int:
        """Length of the path that all images and masks have in common."""
        try:
            return len(Path(os.path.commonpath([path.parent for path in (*self.masks, *self.images)])).parts)
        except ValueError:  # drives of Windows
            return 0

    def nearer_mask(self, image: Path, mask: Path) -> str | None:
        """Return why another mask may rather be the image's, or None."""
        shared = self._shared_names(image.parent, mask.parent)
        nearest, most = self._nearest_folder(image.parent)
        if most > shared:
            return f"the folder {str(nearest)!r} is named as the image's"
        for other in self._by_name[image.stem]:
            if other != mask and self._shared_names(image.parent, other.parent) == shared:
                return f"{str(other)!r} has the name too, and names of folders do not tell which one is right"
        return None

    def _shared_names(self, first: Path, second: Path) -> int:
        """Return how many names of folders two paths have in common, below the folder that all files are in."""
        counts = (Counter(path.parts[self._depth :]) for path in (first, second))
        return (next(counts) & next(counts)).total()


def _list_pairs(data: AnomalibDataModule) -> Iterator[tuple[Path, Path]]:
    for table in sample_tables(data):
        for image, mask in zip(table.image_path, table.get("mask_path", ()), strict=False):
            if isinstance(mask, str) and mask:
                yield Path(image), Path(mask)


def _paired_folders(data: AnomalibDataModule) -> list[tuple[Path, Path]]:
    """Return ``(abnormal_dir[i], mask_dir[i])`` where there are as many of both."""
    root = Path(getattr(data, "root", None) or "")
    images, masks = (as_list(getattr(data, name, None)) for name in ("abnormal_dir", "mask_dir"))
    if len(images) != len(masks):
        return []
    return [((root / image).resolve(), (root / mask).resolve()) for image, mask in zip(images, masks, strict=True)]
