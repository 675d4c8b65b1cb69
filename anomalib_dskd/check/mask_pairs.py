"""Which masks belong to which images, for data modules that cannot be set up: anomalib then names none of them.

anomalib sorts images and masks, pairs them by their order, and asks afterwards whether an image's name is part of its
mask's.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomalib.data import AnomalibDataModule, Folder
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_dskd.check.finding import Finding

__all__ = ["find_unpaired"]

GOOD = ("good", "ok")  # folder of the test set's good images, in MVTec AD and in BTech


class _Files(NamedTuple):
    """Defective images, and the masks that there are, each sorted as anomalib does."""

    images: list[Path]
    masks: list[Path]


def find_unpaired(data: AnomalibDataModule) -> list[Finding]:
    """Name defective images without a mask or with several, masks without an image, or else those whose order differs.

    Args:
        data: a ``Folder``, or a module for a layout as that of MVTec AD (``test``, ``ground_truth``). It need not have
            been set up.
    """
    images, masks = _defects(data)
    if not masks:  # their folder is misnamed, or the data has none
        return []
    belonging = _pair(images, masks)
    lacking = [str(image) for image, found in belonging.items() if not found]
    surplus = sorted(map(str, set(masks).difference(*belonging.values())))
    several = [str(image) for image, found in belonging.items() if len(found) > 1]
    findings = []
    if several:
        text = "is defective, and several masks have its name: leave one, or name them after different images"
        findings.append(Finding("error", "masks-twice", text, several))
    if lacking:
        text = "is defective, and no mask has its name: add one, or use the data without masks"
        findings.append(Finding("error", "no-mask", text, lacking))
    if surplus:
        text = "is a mask, and no defective image has its name: remove it, or add the image"
        findings.append(Finding("error", "surplus-mask", text, surplus))
    if not findings:  # so that there are as many masks as images
        swapped = [str(image) for image, mask in zip(images, masks, strict=True) if mask not in belonging[image]]
        text = "sorts to another place than its mask does, and anomalib pairs them by their order: use equal names"
        findings = [Finding("error", "mask-order", text, swapped)] if swapped else []
    return findings


def _defects(data: AnomalibDataModule) -> _Files:
    root, suffixes = Path(getattr(data, "root", None) or ""), set(IMG_EXTENSIONS)
    if isinstance(data, Folder):
        suffixes = {suffix.lower() for suffix in data.extensions or suffixes}
        folders = [_as_list(names) for names in (data.abnormal_dir, data.mask_dir)]
        images, masks = ([path for name in names for path in (root / name).rglob("*")] for names in folders)
    else:
        root /= getattr(data, "category", None) or ""
        images = [path for path in root.glob("test/*/*") if path.parent.name not in GOOD]
        masks = list(root.glob("ground_truth/*/*"))
    return _Files(*(sorted(path for path in paths if path.suffix.lower() in suffixes) for paths in (images, masks)))


def _as_list(names: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    return [names] if isinstance(names, str | Path) else names or []


def _pair(images: list[Path], masks: list[Path]) -> dict[Path, set[Path]]:
    """Return the masks of each image, those in the folder of its kind of defect if there is one.

    They have its name as a word in theirs, or, where no image is found so, as a part.
    """
    of_kind: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        of_kind[mask.parent.name].append(mask)
    for pattern in (r"(?<![0-9A-Za-z]){}(?![0-9A-Za-z])", "{}"):
        pairs = {}
        for image in images:
            name = re.compile(pattern.format(re.escape(image.stem)))
            pairs[image] = {mask for mask in of_kind.get(image.parent.name, masks) if name.search(mask.stem)}
        if any(pairs.values()):
            break
    return pairs
