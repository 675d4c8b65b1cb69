"""Look at every file of a data set once, before any time is spent on training with it."""

import contextlib
import hashlib
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import imagehash
import numpy as np
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_depth_image
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageStat

from anomalib_dskd.check.finding import Finding, Severity
from anomalib_dskd.check.mask_pairs import find_unpaired
from anomalib_dskd.data.image_files import READABLE_ERRORS, is_deep, open_image
from anomalib_dskd.errors import UnsafeImageError

__all__ = ["check_data", "check_splits"]

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".heic"}
FEW = 10  # training images
STRETCHED = 1.5  # longer by shorter side, from where on a square resize distorts what is seen
NEAR = 12  # of 256 bits of the perceptual hash: the same picture, saved or scaled differently; others differ in 128
HASH_SIZE = 16
FLAT = 1.0  # gray level: standard deviation of a picture without contrast
INVERTED = 0.9  # of an image that its mask calls defective
UPRIGHT = 1  # EXIF
ALPHA: tuple[Severity, str] = (
    "warning",
    "has an alpha channel; it is dropped, and transparent pixels show what lies below",
)
MODES: dict[str, tuple[Severity, str]] = {
    "P": ("note", "has a palette; it is read as its colours"),
    "CMYK": ("warning", "is CMYK; it is converted to RGB without a colour profile, which shifts its colours"),
    "YCbCr": ("note", "is YCbCr; it is converted to RGB"),
    "LAB": ("warning", "is LAB; it is converted to RGB without a colour profile"),
    "HSV": ("note", "is HSV; it is converted to RGB"),
    "1": ("note", "is black and white; it is read as 0 and 255"),
    "RGBA": ALPHA,
    "LA": ALPHA,
    "PA": ALPHA,
}


class _Sample(NamedTuple):
    """An image of one split."""

    split: str
    image: str
    is_anomalous: bool
    masks: tuple[str, ...]  # added up, if there are several
    threshold: int | None  # of the masks, where the data set has one
    depths: tuple[str, ...]


class _Picture(NamedTuple):
    """What is compared between images."""

    size: tuple[int, int]  # width and height
    digest: bytes  # of the decoded pixels
    hash: NDArray[np.bool_]  # perceptual


def check_data(data: AnomalibDataModule, *, progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> list[Finding]:
    """Set a data module up, and look at all its files.

    Args:
        data: any data module of anomalib or of a plugin.
        progress: wraps the iteration over the files.

    Returns:
        What was found, errors first. One finding stands for all files that it is true of.
    """
    try:
        data.prepare_data()
        data.setup()
    except Exception as error:  # data modules raise many kinds
        failed = Finding("error", "setup", f"the data module cannot be set up: {type(error).__name__}: {error}")
        return [failed, *find_unpaired(data)]
    if not all("label_index" in dataset.samples for dataset in _datasets(data).values()):
        text = (
            f"{type(data).__name__} has no label of each image (label_index), as data modules of videos have none: "
            "legal are those of single images"
        )
        return [Finding("error", "no-labels", text)]
    samples = list(_samples(data))
    findings = _Findings()
    findings.extend(check_splits(data))
    pictures: dict[str, _Picture] = {}
    needs_mask = _has_masks(data)
    by_image = {sample.image: sample for sample in samples}
    for path in progress(list(by_image)):
        picture = _look_at_image(path, findings)
        if picture is not None:
            pictures[path] = picture
        _look_at_masks(by_image[path], picture, findings, needs_mask=needs_mask)
        for depth in by_image[path].depths:
            _look_at_depth(depth, findings)
    _compare_folders(samples, findings)
    _compare_sizes(pictures, findings)
    _compare_pictures(samples, pictures, findings)
    _find_ignored(samples, findings)
    return findings.sorted()


def check_splits(data: AnomalibDataModule) -> list[Finding]:
    """Look at what is in the training, validation and test set of a data module that has been set up."""
    counts = {name: _counts(getattr(data, f"{name}_data", None)) for name in SPLITS}
    findings = []
    good, bad = counts["train"]
    if not good + bad:
        findings.append(Finding("error", "no-training-images", "the training set is empty."))
    elif bad:
        text = f"{bad} of {good + bad} training images are labelled as defective: train on good parts alone."
        findings.append(Finding("error", "defects-in-training", text))
    elif good < FEW:
        text = f"{good} training images are few: results will depend on which ones. 50 or more are usual."
        findings.append(Finding("warning", "few-training-images", text))
    for name, told in (("val", "validation"), ("test", "test")):
        good, bad = counts[name]
        if not good + bad:
            what = "no threshold can be set" if name == "val" else "no figure can be computed"
            findings.append(Finding("error", f"no-{told}-images", f"the {told} set is empty: {what}."))
        elif not bad:
            text = f"the {told} set has no defective image: AUROC, AUPRO and F1 mean nothing on it."
            findings.append(Finding("warning", f"no-defects-in-{told}", text))
        elif not good:
            text = f"the {told} set has no good image: AUROC and F1 mean nothing on it, false alarms stay unknown."
            findings.append(Finding("warning", f"no-good-images-in-{told}", text))
    return findings


class _Findings:
    """Collects findings, one for all files of a kind."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[str, str], Finding] = {}

    def add(self, severity: Severity, kind: str, message: str, *files: str) -> None:
        finding = self._by_kind.setdefault((kind, message), Finding(severity, kind, message))
        finding.files.extend(file for file in files if file not in finding.files)

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.add(finding.severity, finding.kind, finding.message, *finding.files)

    def sorted(self) -> list[Finding]:
        order = get_args(Severity)
        return sorted(self._by_kind.values(), key=lambda finding: order.index(finding.severity))


def _counts(dataset: Any) -> tuple[int, int]:  # noqa: ANN401 - a data set of anomalib, or none
    """Return the numbers of good and of defective images."""
    if dataset is None or not len(dataset.samples):
        return 0, 0
    bad = int((dataset.samples.label_index == 1).sum())
    return len(dataset.samples) - bad, bad


def _datasets(data: AnomalibDataModule) -> dict[str, Any]:
    """Return the data sets that there are, by split."""
    datasets = {split: getattr(data, f"{split}_data", None) for split in SPLITS}
    return {split: dataset for split, dataset in datasets.items() if dataset is not None}


def _samples(data: AnomalibDataModule) -> Iterator[_Sample]:
    for split, dataset in _datasets(data).items():
        # of pseudo-defects the pictures that anomalib has painted on; the painted ones are its own, in temporary files
        are_painted = isinstance(dataset, SyntheticAnomalyDataset)
        samples = dataset.source_samples if are_painted else dataset.samples
        for sample in samples.itertuples():
            yield _Sample(
                split,
                str(sample.image_path),
                is_anomalous=bool(sample.label_index == 1),
                masks=_paths(getattr(sample, "mask_path", None)),
                threshold=getattr(dataset, "mask_threshold", None),
                depths=_paths(getattr(sample, "depth_path", None)),
            )


def _paths(value: object) -> tuple[str, ...]:
    """Return the paths in a cell of a data set's table: one, several (MVTec LOCO), or none in some form."""
    paths = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(path) for path in paths if isinstance(path, str | Path) and str(path))


def _has_masks(data: AnomalibDataModule) -> bool:
    return bool(getattr(getattr(data, "test_data", None), "task", None) == TaskType.SEGMENTATION)


# --- one file ----------------------------------------------------------------------------------------------------


def _look_at_image(path: str, findings: _Findings) -> _Picture | None:
    """Note how an image will be read; return what it is compared by, unless it cannot be read."""
    try:
        with open_image(path) as image:
            has_16_bits = _has_16_bits(image)  # before anything else makes PIL forget it
            if getattr(image, "n_frames", 1) > 1:
                findings.add("warning", "frames", "has more than one frame; the first alone is read", path)
            if _orientation(image) != UPRIGHT:
                text = "says by EXIF that it is rotated, which anomalib ignores: rotate the pixels instead"
                findings.add("warning", "exif-orientation", text, path)
            if is_deep(image.mode):
                text = "has more than 8 bits a channel; anomalib would clip it to white. Convert the data set to 8 bits"
                findings.add("error", "deep", text, path)
            elif image.mode in MODES:
                severity, text = MODES[image.mode]
                findings.add(severity, f"mode-{image.mode.lower()}", text, path)
            elif "transparency" in image.info:
                severity, text = ALPHA
                findings.add(severity, "mode-transparency", text, path)
            elif has_16_bits:
                findings.add("note", "mode-16", "has 16 bits a channel; the upper 8 are read", path)
            colours = image.convert("RGB")
    except UnsafeImageError as error:
        findings.add("error", "unsafe", _without_name(error, path), path)
        return None
    except READABLE_ERRORS as error:
        reason = str(error).replace(f" {path!r}", "").replace(path, "it") or type(error).__name__
        findings.add("error", "unreadable", f"cannot be read: {reason}. Replace or remove it", path)
        return None
    if max(ImageStat.Stat(colours).stddev) < FLAT:
        text = "has hardly any contrast: a camera that was covered, or an empty picture"
        findings.add("warning", "flat", text, path)
    return _Picture(colours.size, hashlib.sha256(colours.tobytes()).digest(), _perceptual_hash(colours))


def _orientation(image: Image.Image) -> int:
    """Return what EXIF says, or upright if that is damaged, which does not keep the pixels from being read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except (*READABLE_ERRORS, struct.error, TypeError):
        return UPRIGHT


def _has_16_bits(image: Image.Image) -> bool:
    """Whether PIL reads the upper halves of 16 bits, as it does of colour images; its mode does not tell."""
    return any(re.search(";16[BLN]", str(tile.args)) for tile in getattr(image, "tile", ()))


def _perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    bits: NDArray[np.bool_] = imagehash.phash(image, hash_size=HASH_SIZE).hash.ravel()
    return bits


def _look_at_masks(sample: _Sample, picture: _Picture | None, findings: _Findings, *, needs_mask: bool) -> None:
    masks = [mask for mask in sample.masks if sample.is_anomalous or Path(mask).is_file()]
    if not masks and sample.is_anomalous and needs_mask:
        text = "is defective and has no mask, as others have: the pixel figures would be wrong"
        findings.add("error", "no-mask", text, sample.image)
    for path in masks:
        mask = _read_mask(path, findings)
        if mask is not None:
            _look_at_mask(path, mask, sample, picture, findings)


def _read_mask(path: str, findings: _Findings) -> NDArray[np.uint8] | None:
    try:
        with open_image(path) as image:
            return np.asarray(image.convert("L"))
    except FileNotFoundError:
        findings.add("error", "no-mask", "is the mask of a defective image, and is not there", path)
    except UnsafeImageError as error:
        findings.add("error", "unsafe", _without_name(error, path), path)
    except READABLE_ERRORS as error:
        findings.add("error", "unreadable-mask", f"is a mask that cannot be read: {type(error).__name__}", path)
    return None


def _look_at_mask(
    path: str, mask: NDArray[np.uint8], sample: _Sample, picture: _Picture | None, findings: _Findings
) -> None:
    if picture is not None and mask.shape[::-1] != picture.size:
        findings.add(
            "error", "mask-size", "is a mask of another size than its image: it would lie beside the defect", path
        )
    if sample.threshold is None and len(np.unique(mask)) > 2:  # noqa: PLR2004 - good and defective
        text = "is a mask with values between black and white: all but 0 count as defective"
        findings.add("warning", "mask-not-binary", text, path)
    defective = (mask > (sample.threshold or 0)).mean()
    if sample.is_anomalous and not defective:
        text = "is an empty mask of a defective image: its pixels count as good"
        findings.add("warning", "mask-empty", text, path)
    if sample.is_anomalous and defective > INVERTED:
        text = "is a mask that calls nearly the whole image defective: is it inverted? Defects are white"
        findings.add("warning", "mask-inverted", text, path)
    if not sample.is_anomalous and defective:
        findings.add("error", "mask-of-good-image", "is a mask with a defect, of an image labelled as good", path)


def _look_at_depth(path: str, findings: _Findings) -> None:
    try:
        with contextlib.suppress(*READABLE_ERRORS):  # a format that PIL does not know
            open_image(path).close()
        read_depth_image(path)
    except UnsafeImageError as error:
        findings.add("error", "unsafe", _without_name(error, path), path)
    except Exception as error:  # its reader raises many kinds
        text = f"is a depth image that cannot be read: {type(error).__name__}"
        findings.add("error", "unreadable-depth", text, path)


def _without_name(error: UnsafeImageError, path: str) -> str:
    return str(error).removeprefix(f"image {path!r} ").removesuffix(".")


# --- many files --------------------------------------------------------------------------------------------------


def _compare_folders(samples: list[_Sample], findings: _Findings) -> None:
    """Find masks of another kind of defect: anomalib pairs sorted lists, and compares the files' names alone."""
    kinds = {Path(mask).parent.name for sample in samples for mask in sample.masks}
    for sample in samples:
        kind = Path(sample.image).parent.name
        for mask in sample.masks:
            if kind in kinds and Path(mask).parent.name != kind:
                text = "is an image whose mask is taken from another folder than its own; let both sort alike"
                findings.add("error", "mask-of-other-image", text, sample.image)


def _compare_sizes(pictures: dict[str, _Picture], findings: _Findings) -> None:
    sizes = {picture.size for picture in pictures.values()}
    if len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        span = f"from {small[0]}x{small[1]} to {large[0]}x{large[1]}"
        text = f"images have {len(sizes)} sizes, {span}; all are resized to one"
        findings.add("note", "sizes", text)
    stretched = [path for path, picture in pictures.items() if max(picture.size) > STRETCHED * min(picture.size)]
    if stretched:
        text = "is far from square: a square image_size distorts it. Give height and width, as in '[96, 128]'"
        findings.add("warning", "aspect-ratio", text, *stretched)


def _compare_pictures(samples: list[_Sample], pictures: dict[str, _Picture], findings: _Findings) -> None:
    """Find pictures that are there more than once, under the same or another name."""
    train = {sample.image for sample in samples if sample.split == "train" and sample.image in pictures}
    test = {sample.image for sample in samples if sample.split != "train" and sample.image in pictures}
    for path in sorted(train & test):
        findings.add("error", "same-file", "is in the training set and in the test set", path)
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for path in sorted(train | test):
        by_digest[pictures[path].digest].append(path)
    is_bad = {sample.image: sample.is_anomalous for sample in samples}
    for paths in by_digest.values():
        if len(paths) > 1:
            is_leak = bool(train & set(paths)) and bool(test & set(paths))
            is_contradiction = len({is_bad[path] for path in paths}) > 1
            what = ", one called good and one defective" if is_contradiction else ""
            what += ", in training set and test set" if is_leak else ""
            names = ", ".join(Path(path).name for path in paths)
            text = f"are the same picture under different names{what}: {names}"
            findings.add("error" if is_leak or is_contradiction else "warning", "same-picture", text, *paths)
    _find_near(sorted(train), sorted(test - train), pictures, findings)


def _find_near(train: list[str], test: list[str], pictures: dict[str, _Picture], findings: _Findings) -> None:
    if not train or not test:
        return
    hashes = np.stack([pictures[path].hash for path in train])  # (N, bits)
    for path in test:
        distances = (hashes != pictures[path].hash).sum(axis=1)
        nearest = int(distances.argmin())
        is_same = pictures[train[nearest]].digest == pictures[path].digest
        if distances[nearest] <= NEAR and not is_same:
            names = f"{Path(train[nearest]).name}, {Path(path).name}"
            text = f"look like one another, the first in the training set, the second in the test set: {names}"
            findings.add("warning", "near-duplicate", text, train[nearest], path)


def _find_ignored(samples: list[_Sample], findings: _Findings) -> None:
    """Find pictures that lie beside those of the data set and are not read."""
    known = {Path(path).resolve() for sample in samples for path in (sample.image, *sample.masks, *sample.depths)}
    for folder in sorted({path.parent for path in known if path.parent.is_dir()}):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and path.resolve() not in known:
                text = "lies beside images of the data set and is not read: another suffix, or left out by a split"
                findings.add("warning", "ignored", text, str(path))
