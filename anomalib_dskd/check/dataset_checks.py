"""Checks across the images of a data set: splits, sizes, duplicates, files that are not read."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule

from anomalib_dskd.check.finding import Finding
from anomalib_dskd.check.image_checks import ImageSummary
from anomalib_dskd.check.samples import Sample
from anomalib_dskd.data.links import check_data_links
from anomalib_dskd.errors import DataError

__all__ = ["check_duplicates", "check_linked_files", "check_sizes", "check_splits", "check_unread_files"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".heic"}
FEW_IMAGES = 10  # in the training set
MAX_ASPECT_RATIO = 1.5  # of longer to shorter side; above it, resizing to a square distorts the content
NEAR_DUPLICATE = 12  # of 256 bits of the perceptual hash: an image saved or scaled again; unrelated ones differ in 128


def check_splits(data: AnomalibDataModule) -> Iterator[Finding]:
    """Check the numbers of images in the training, validation and test set of a data module that has been set up."""
    normal, defective = _count(data, "train")
    if not normal + defective:
        yield Finding("error", "no-training-images", "the training set is empty.")
    elif defective:
        text = f"{defective} of {normal + defective} training images are labeled as defective: use only normal images."
        yield Finding("error", "defects-in-training", text)
    elif normal < FEW_IMAGES:
        text = f"the training set has {normal} images: results depend on their choice. 50 or more are usual."
        yield Finding("warning", "few-training-images", text)
    for split, name, effect in (
        ("val", "validation", "no threshold can be set"),
        ("test", "test", "no metric can be computed"),
    ):
        normal, defective = _count(data, split)
        if not normal + defective:
            yield Finding("error", f"no-{name}-images", f"the {name} set is empty: {effect}.")
        elif not defective:
            text = f"the {name} set has no defective image: AUROC, AUPRO and F1 are meaningless."
            yield Finding("warning", f"no-defects-in-{name}", text)
        elif not normal:
            text = f"the {name} set has no normal image: AUROC and F1 are meaningless, false positives are unknown."
            yield Finding("warning", f"no-good-images-in-{name}", text)


def _count(data: AnomalibDataModule, split: str) -> tuple[int, int]:
    """Return the numbers of normal and of defective images."""
    dataset = getattr(data, f"{split}_data", None)
    if dataset is None or not len(dataset.samples):
        return 0, 0
    defective = int((dataset.samples.label_index == 1).sum())
    return len(dataset.samples) - defective, defective


def check_linked_files(data: AnomalibDataModule) -> Iterator[Finding]:
    """Find images that are left out because anomalib does not follow links to folders."""
    try:
        check_data_links(data)
    except DataError as error:
        yield Finding("error", "linked", str(error))


def check_sizes(images: dict[str, ImageSummary]) -> Iterator[Finding]:
    """Find out whether images differ in size, or are far from square."""
    sizes = {image.size for image in images.values()}
    if len(sizes) > 1:
        smallest, largest = ("x".join(map(str, size)) for size in (min(sizes), max(sizes)))
        text = f"images have {len(sizes)} sizes, from {smallest} to {largest}; all are resized to one size"
        yield Finding("note", "sizes", text)
    stretched = [path for path, image in images.items() if max(image.size) > MAX_ASPECT_RATIO * min(image.size)]
    if stretched:
        text = "is far from square: a square image_size distorts it. Give height and width, such as '[96, 128]'"
        yield Finding("warning", "aspect-ratio", text, stretched)


def check_duplicates(samples: list[Sample], images: dict[str, ImageSummary]) -> Iterator[Finding]:
    """Find images that a data set has more than once, under the same name or another.

    Args:
        samples: the images of all splits. Validation and test set count as one.
        images: summaries of the readable images, by path.
    """
    train = {sample.image for sample in samples if sample.split == "train"} & images.keys()
    test = {sample.image for sample in samples if sample.split != "train"} & images.keys()
    for path in sorted(train & test):
        yield Finding("error", "same-file", "is in the training set and in the test set", [path])
    labels = {sample.image: sample.is_anomalous for sample in samples}
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for path in sorted(train | test):
        by_digest[images[path].digest].append(path)
    for paths in by_digest.values():
        if len(paths) > 1:
            is_leak = not train.isdisjoint(paths) and not test.isdisjoint(paths)
            is_contradiction = len({labels[path] for path in paths}) > 1
            text = "are the same image under different names"
            text += ", one labeled as normal and one as defective" if is_contradiction else ""
            text += ", in the training set and in the test set" if is_leak else ""
            text += f": {', '.join(Path(path).name for path in paths)}"
            yield Finding("error" if is_leak or is_contradiction else "warning", "same-picture", text, paths)
    yield from _check_near_duplicates(sorted(train), sorted(test - train), images)


def _check_near_duplicates(train: list[str], test: list[str], images: dict[str, ImageSummary]) -> Iterator[Finding]:
    if not train:
        return
    hashes = np.stack([images[path].hash for path in train])  # (N, bits)
    for path in test:
        distances = (hashes != images[path].hash).sum(axis=1)
        nearest = train[int(distances.argmin())]
        if distances.min() <= NEAR_DUPLICATE and images[nearest].digest != images[path].digest:
            names = f"{Path(nearest).name}, {Path(path).name}"
            text = f"look alike, the first one in the training set, the second one in the test set: {names}"
            yield Finding("warning", "near-duplicate", text, [nearest, path])


def check_unread_files(samples: list[Sample]) -> Iterator[Finding]:
    """Find image files next to those of the data set that are not read."""
    known = {Path(path).resolve() for sample in samples for path in (sample.image, *sample.masks, *sample.depths)}
    for folder in sorted({path.parent for path in known if path.parent.is_dir()}):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and path.resolve() not in known:
                text = "is next to images of the data set and is not read: unsupported suffix, or in no split"
                yield Finding("warning", "ignored", text, [str(path)])
