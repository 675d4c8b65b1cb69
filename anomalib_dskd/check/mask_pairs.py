"""Find images without masks, and masks without images, in data modules that cannot be set up.

anomalib sorts images and masks, pairs them by their order, and then checks that each image's name is part of its mask's
name. Its error does not name the files.
"""

import re
from collections import defaultdict
from pathlib import Path

from anomalib.data import AnomalibDataModule, Folder
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_dskd.check.finding import Finding
from anomalib_dskd.data.data_module_checks import as_list

__all__ = ["find_unpaired"]

NORMAL_FOLDERS = ("good", "ok")  # of the test set's normal images, in MVTec AD and in BTech


def find_unpaired(data: AnomalibDataModule) -> list[Finding]:
    """Find defective images without a mask or with several, and masks without an image, or else a different order.

    Args:
        data: a ``Folder``, or a module for the layout of MVTec AD (``test``, ``ground_truth``). It need not have been
            set up.
    """
    images, masks = _list_files(data)
    if not masks:  # the data set has none, or their folder is misnamed
        return []
    pairs = _pair(images, masks)
    several = [str(image) for image, found in pairs.items() if len(found) > 1]
    missing = [str(image) for image, found in pairs.items() if not found]
    surplus = sorted(map(str, set(masks).difference(*pairs.values())))
    problems = [
        ("masks-twice", several, "is defective, and several masks have its name: remove or rename all but one"),
        ("no-mask", missing, "is defective, and no mask has its name: add one, or use the data set without masks"),
        ("surplus-mask", surplus, "is a mask, and no defective image has its name: remove it, or add the image"),
    ]
    findings = [Finding("error", kind, text, files) for kind, files, text in problems if files]
    if findings:
        return findings
    unordered = [str(image) for image, mask in zip(images, masks, strict=True) if mask not in pairs[image]]
    text = "has another position among the sorted images than its mask among the sorted masks: use equal names"
    return [Finding("error", "mask-order", text, unordered)] if unordered else []


def _list_files(data: AnomalibDataModule) -> tuple[list[Path], list[Path]]:
    """Return defective images and masks, sorted as anomalib sorts them."""
    root, suffixes = Path(getattr(data, "root", None) or ""), set(IMG_EXTENSIONS)
    if isinstance(data, Folder):
        suffixes = {suffix.lower() for suffix in data.extensions or suffixes}
        images, masks = (
            [path for name in as_list(names) for path in (root / name).rglob("*")]
            for names in (data.abnormal_dir, data.mask_dir)
        )
    else:
        root /= getattr(data, "category", None) or ""
        images = [path for path in root.glob("test/*/*") if path.parent.name not in NORMAL_FOLDERS]
        masks = list(root.glob("ground_truth/*/*"))
    images, masks = (sorted(path for path in paths if path.suffix.lower() in suffixes) for paths in (images, masks))
    return images, masks


def _pair(images: list[Path], masks: list[Path]) -> dict[Path, set[Path]]:
    """Return the masks of each image, from the folder with the name of its defect class if there is one.

    A mask's name contains the image's name as a word or, if no image has such a mask, as any part.
    """
    by_folder: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        by_folder[mask.parent.name].append(mask)
    for pattern in (r"(?<![0-9A-Za-z]){}(?![0-9A-Za-z])", "{}"):
        pairs = {}
        for image in images:
            name = re.compile(pattern.format(re.escape(image.stem)))
            pairs[image] = {mask for mask in by_folder.get(image.parent.name, masks) if name.search(mask.stem)}
        if any(pairs.values()):
            break
    return pairs
