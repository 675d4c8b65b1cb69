"""A report's gallery: the images that models find hardest and easiest, and their heatmaps side by side."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_dskd.benchmark.report.tables import Record
from anomalib_dskd.benchmark.run_folder import PREDICTIONS, job_path
from anomalib_dskd.data.image_files import READABLE_ERRORS, open_image
from anomalib_dskd.errors import DataError, UnsafeImageError

__all__ = ["Example", "Gallery", "Picture", "make_gallery", "share_below"]

Numbers = NDArray[np.float64]

SIDE = 192  # pixels of a picture's longer side: sharp at the 6 rem that the page gives it, on a phone's screen too
QUALITY = 80
RANGE = (1.0, 99.9)  # percentiles of a model's maps that are drawn black and brightest
MOST_BYTES = 8 * 2**30  # of a file of predictions, unpacked: 40,000 images with maps and masks of 256x256
OUTLINE = (94, 214, 255)  # a light blue, which the heatmap's colours do not have


@dataclass(frozen=True)
class Picture:
    """A picture as a ``data:`` address, or None and the reason why there is none; and a line below it."""

    alt: str
    uri: str | None
    reason: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Example:
    """An image of the test set: its name, kind of defect and rank, its pictures in the gallery's columns."""

    name: str
    kind: str
    rank: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """Examples under three headings, each with input, mask and one heatmap a model."""

    columns: list[str]
    parts: list[tuple[str, list[Example]]]


# --- which images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """What one job says of its test images, without the maps, which are read for the chosen images alone."""

    model: str
    category: str
    file: Path
    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    shares: Numbers
    among_all: Numbers


@dataclass(frozen=True)
class _Ranked:
    path: str
    is_defect: bool
    kind: str
    shares: dict[str, float]  # by model, of images of the other kind that score lower
    among_all: dict[str, float]  # the same of all images, which decides between equals

    @property
    def mean(self) -> float:
        return sum(self.shares.values()) / len(self.shares)

    @property
    def order(self) -> tuple[float, float]:
        return self.mean, sum(self.among_all.values()) / len(self.among_all)


def share_below(scores: Numbers, references: Numbers) -> Numbers:
    """Return the fraction of ``references`` ``(M,)`` that score lower than each of ``scores`` ``(N,)``.

    An equal score counts one half, so that the mean over defects, with good images as references, is the AUROC.

    Example:
        >>> share_below(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 0.375, 1.0]
    """
    ordered = np.sort(references)
    lower, not_higher = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    shares: Numbers = (lower + not_higher) / (2 * len(references))
    return shares


def make_gallery(run_folder: Path, records: Iterable[Record], *, images: int) -> Gallery | None:
    """Show the images of one data set that models, on average, rank worst and best.

    A defect's rank is the fraction of good images that score lower, a good image's the fraction of defects that
    do; both are averaged over the models. Of several seeds the first one is shown.

    Args:
        run_folder: holds the jobs' predictions.
        records: finished jobs of one data set.
        images: number of images under each of three headings.

    Returns:
        The gallery, or None where no job left predictions of both good images and defects.

    Raises:
        DataError: a file of predictions cannot be read.
    """
    jobs = [job for record in _first_seeds(records) if (job := _read_scores(run_folder, record)) is not None]
    if not jobs or not images:
        return None
    ranked = _rank(jobs)
    defects = sorted((image for image in ranked if image.is_defect), key=lambda image: image.order)
    good = sorted((image for image in ranked if not image.is_defect), key=lambda image: image.order, reverse=True)
    worst = defects[:images]
    best = defects[len(worst) :][-images:][::-1]
    models = list(dict.fromkeys(job.model for job in jobs))
    drawings = _read_drawings(jobs, {image.path for image in [*worst, *best, *good[:images]]})
    parts = [
        (title, [_example(image, models, drawings[image.path]) for image in chosen])
        for title, chosen in (
            ("Hardest defects", worst),
            ("Easiest defects", best),
            ("Good images with the highest scores", good[:images]),
        )
    ]
    return Gallery(columns=["Input", "Mask", *models], parts=[part for part in parts if part[1]])


def _first_seeds(records: Iterable[Record]) -> list[Record]:
    first: dict[tuple[str, str | None], Record] = {}
    for record in records:
        key = (record["model"], record.get("category"))
        if key not in first or record["seed"] < first[key]["seed"]:
            first[key] = record
    return list(first.values())


def _read_scores(run_folder: Path, record: Record) -> _Scored | None:
    file = job_path(run_folder, record["job"]) / PREDICTIONS
    if not file.is_file():
        return None
    paths, labels, classes, scores = _read_arrays(file, "paths", "labels", "classes", "scores")
    sizes = {array.shape for array in (paths, labels, classes, scores)}
    if len(sizes) != 1 or labels.ndim != 1 or not all(np.issubdtype(a.dtype, np.number) for a in (labels, scores)):
        raise _damaged(file, f"paths, labels, classes and scores have the shapes {sorted(sizes)}, or are no numbers")
    is_defect = labels > 0
    if is_defect.all() or not is_defect.any():  # nothing to rank against
        return None
    scores = scores.astype(np.float64)
    shares = np.where(is_defect, share_below(scores, scores[~is_defect]), share_below(scores, scores[is_defect]))
    return _Scored(
        model=record["model"],
        category=record.get("category") or "",
        file=file,
        paths=[str(path) for path in paths],
        labels=labels,
        classes=[str(name) for name in classes],
        shares=shares,
        among_all=share_below(scores, scores),
    )


def _read_arrays(file: Path, *names: str) -> list[NDArray[Any]]:
    """Read arrays of one file; one that it lacks is empty."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            size = sum(info.file_size for info in arrays.zip.infolist())
            if size > MOST_BYTES:
                msg = f"it unpacks to {size / 2**30:.1f} GiB, and {MOST_BYTES / 2**30:.0f} are the most that is read"
                raise ValueError(msg)
            return [arrays[name] if name in arrays else np.zeros(0) for name in names]
    except Exception as error:  # a damaged or forged archive lets many kinds escape
        raise _damaged(file, str(error) or type(error).__name__) from error


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(
        f"predictions {str(file)!r} cannot be read: {reason}. Delete the file, and the report is made without its "
        "pictures; or remove the job's line from results.jsonl, and run the benchmark again."
    )


def _rank(jobs: Iterable[_Scored]) -> list[_Ranked]:
    images: dict[str, _Ranked] = {}
    for job in jobs:
        columns = (job.paths, job.labels, job.classes, job.shares, job.among_all)
        for path, label, name, share, among_all in zip(*columns, strict=True):
            kind = " ".join(part for part in (job.category, name) if part)
            image = images.setdefault(path, _Ranked(path, bool(label > 0), kind, {}, {}))
            image.shares[job.model] = float(share)
            image.among_all[job.model] = float(among_all)
    return list(images.values())


# --- how they are drawn ------------------------------------------------------------------------------------------


@dataclass
class _Drawing:
    """The mask of an image, or None, and its maps by model, scaled to 0 to 1."""

    mask: NDArray[np.bool_] | None
    maps: dict[str, Numbers]


def _read_drawings(jobs: Iterable[_Scored], chosen: set[str]) -> dict[str, _Drawing]:
    """Read masks and maps of the chosen images, one job's at a time: all maps together can take gigabytes."""
    drawings: dict[str, _Drawing] = defaultdict(lambda: _Drawing(None, {}))
    for job in jobs:
        rows = {path: row for row, path in enumerate(job.paths) if path in chosen}
        if not rows:
            continue
        maps, masks = _read_arrays(job.file, "maps", "masks")
        for array in (maps, masks):
            if array.size and (array.ndim != 3 or len(array) != len(job.paths)):  # noqa: PLR2004 - (N, h, w)
                raise _damaged(job.file, f"maps or masks of {len(job.paths)} images have the shape {array.shape}")
        low, high = np.percentile(maps.astype(np.float32), RANGE) if maps.size else (0.0, 0.0)
        for path, row in rows.items():
            drawing = drawings[path]
            if maps.size:
                drawing.maps[job.model] = _scaled(maps[row].astype(np.float64), float(low), float(high))
            if masks.size and drawing.mask is None:
                drawing.mask = masks[row] > 0
    return drawings


def _scaled(values: Numbers, low: float, high: float) -> Numbers:
    scaled: Numbers = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1)) if high > low else values * 0
    return scaled


def _example(image: _Ranked, models: Sequence[str], drawing: _Drawing) -> Example:
    name = Path(image.path).name
    photograph, reason = _read_image(image.path)
    size = _fit(photograph.size if photograph else _map_size(drawing))
    against = "good images" if image.is_defect else "defects"
    what = f"{image.kind} {name}".strip()
    uri = _jpeg(photograph.resize(size, Image.Resampling.LANCZOS)) if photograph else None
    pictures = [Picture(f"Input {what}", uri, reason), _mask_picture(image, drawing.mask, size, what)]
    for model in models:
        share = image.shares.get(model)
        caption = "" if share is None else f"above {100 * share:.1f} %"
        drawn = drawing.maps.get(model)
        uri = None if drawn is None else _jpeg(_heatmap(drawn, drawing.mask, size))
        pictures.append(Picture(f"Anomaly map of {model} for {what}", uri, "n/a", caption))
    rank = f"scores above {100 * image.mean:.1f} % of the {against}"
    return Example(
        name, image.kind, rank if len(image.shares) == 1 else f"{rank}, mean of {len(image.shares)} models", pictures
    )


def _read_image(path: str) -> tuple[Image.Image | None, str]:
    """Return the image, or None and why."""
    if not Path(path).is_file():
        return None, "the file is gone"
    try:
        with open_image(path) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded small at once
            return image.convert("RGB"), ""
    except (*READABLE_ERRORS, UnsafeImageError):
        return None, "the file cannot be read"


def _map_size(drawing: _Drawing) -> tuple[int, int]:
    arrays: list[NDArray[Any]] = [*drawing.maps.values(), *([] if drawing.mask is None else [drawing.mask])]
    height, width = arrays[0].shape if arrays else (SIDE, SIDE)
    return width, height


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    """Scale a width and height to the pictures' size; what the model saw as a square gets its shape back."""
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _mask_picture(image: _Ranked, mask: NDArray[np.bool_] | None, size: tuple[int, int], what: str) -> Picture:
    if not image.is_defect:
        return Picture("", None, "good")
    if mask is None:
        return Picture("", None, "no mask")
    if not mask.any():
        return Picture("", None, "empty mask")
    return Picture(
        f"Mask of {what}", _jpeg(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST))
    )


def _heatmap(values: Numbers, mask: NDArray[np.bool_] | None, size: tuple[int, int]) -> Image.Image:
    """Colour a map ``(h, w)`` from 0 to 1, and draw the mask's outline over it."""
    resized = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    pixels = mpl.colormaps["inferno"](np.asarray(resized), bytes=True)[..., :3].copy()
    if mask is not None:
        inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        padded = np.pad(inside, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels[inside & ~core] = OUTLINE
    return Image.fromarray(pixels)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
