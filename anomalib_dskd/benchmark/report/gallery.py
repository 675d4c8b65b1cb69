"""Gallery of a report: the test images that the models rank worst and best, with mask and heatmaps."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion

from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.benchmark.predictions_file import read_arrays, read_rows, unreadable
from anomalib_dskd.benchmark.run_folder import PREDICTIONS, job_path
from anomalib_dskd.data.image_files import READABLE_ERRORS, open_image
from anomalib_dskd.errors import UnsafeImageError

__all__ = ["Example", "Gallery", "GalleryImage", "make_gallery", "share_below"]

Numbers = NDArray[np.float64]

SIDE = 192  # pixels of an image's longer side: sharp at the 6 rem of the page's style sheet, on phone screens too
QUALITY = 80
RANGE = (1.0, 99.9)  # percentiles of a model's maps that are drawn in the darkest and the brightest color
MOST_SAMPLED = 10_000_000  # pixels of a job that the percentiles are computed from
OUTLINE = (94, 214, 255)  # light blue, which the heatmap's colors do not include


@dataclass(frozen=True)
class GalleryImage:
    """An image as a ``data:`` URI, or None and the reason why there is none; and a caption."""

    alt: str
    uri: str | None
    reason: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Example:
    """A test image: its name, kind of defect, rank, and its images in the columns of the gallery."""

    name: str
    kind: str
    rank: str
    images: list[GalleryImage]


@dataclass(frozen=True)
class Gallery:
    """Groups of examples by heading; the columns are input, mask and one heatmap per model."""

    columns: list[str]
    groups: list[tuple[str, list[Example]]]


def make_gallery(run_folder: Path, results: Iterable[JobResult], *, images: int) -> Gallery | None:
    """Show the images of one data set that the models, on average, rank worst and best.

    The rank of a defect is the fraction of normal images with lower scores, that of a normal image the fraction of
    defects with lower scores, each averaged over the models. Of several seeds the first is shown.

    Args:
        run_folder: holds the predictions of the jobs.
        results: of the finished jobs on one data set.
        images: number of images under each of three headings.

    Returns:
        The gallery, or None if no job has predictions of both normal images and defects.

    Raises:
        DataError: a predictions file cannot be read.
    """
    frames = [frame for result in _first_seeds(results) if (frame := _read_ranks(run_folder, result)) is not None]
    if not frames or not images:
        return None
    ranks = pd.concat(frames, ignore_index=True).drop_duplicates(["path", "model"], keep="last")
    groups = {title: paths for title, paths in _choose_images(ranks, images).items() if paths}
    models = list(ranks.model.unique())
    ranks = ranks[ranks.path.isin([path for paths in groups.values() for path in paths])]
    maps, masks = _read_maps(ranks)
    examples = {
        str(path): _example(str(path), of_image, [maps.get((path, model)) for model in models], masks.get(path), models)
        for path, of_image in ranks.groupby("path")
    }
    return Gallery(
        columns=["Input", "Mask", *models],
        groups=[(title, [examples[path] for path in paths]) for title, paths in groups.items()],
    )


def share_below(scores: Numbers, references: Numbers) -> Numbers:
    """Return the fraction of ``references`` ``(M,)`` that are lower than each of ``scores`` ``(N,)``.

    Equal values count one half: with defects as scores and normal images as references, the mean is the AUROC.

    Example:
        >>> share_below(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 0.375, 1.0]
    """
    ordered = np.sort(references)
    lower, not_higher = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    shares: Numbers = (lower + not_higher) / (2 * len(references))
    return shares


# --- reading and ranking -----------------------------------------------------------------------------------------


def _first_seeds(results: Iterable[JobResult]) -> list[JobResult]:
    first: dict[tuple[str, str | None], JobResult] = {}
    for result in results:
        key = (result.model, result.category)
        first[key] = min(first.get(key, result), result, key=lambda candidate: candidate.seed)
    return list(first.values())


def _read_ranks(run_folder: Path, result: JobResult) -> pd.DataFrame | None:
    """Return one row per test image of a job, without the maps, or None if there is nothing to rank.

    ``share`` is the fraction of images of the other kind (normal or defect) that score lower, ``share_of_all`` that of
    all images, which orders images of equal ``share``; ``row`` is the image's index in the predictions file.
    """
    file = job_path(run_folder, result.job) / PREDICTIONS
    if not file.is_file():
        return None
    paths, labels, classes, scores = read_arrays(file, "paths", "labels", "classes", "scores")
    shapes = {array.shape for array in (paths, labels, classes, scores)}
    if len(shapes) != 1 or labels.ndim != 1 or not all(np.issubdtype(a.dtype, np.number) for a in (labels, scores)):
        reason = f"paths, labels, classes and scores have the shapes {sorted(shapes)}, or are not numbers"
        raise unreadable(file, reason)
    is_defect, scores = labels > 0, scores.astype(np.float64)
    if is_defect.all() or not is_defect.any():
        return None
    return pd.DataFrame(
        {
            "model": result.model,
            "file": file,
            "row": range(len(paths)),
            "path": paths.astype(str),
            "is_defect": is_defect,
            "kind": [f"{result.category or ''} {name}".strip() for name in classes],
            "share": np.where(
                is_defect, share_below(scores, scores[~is_defect]), share_below(scores, scores[is_defect])
            ),
            "share_of_all": share_below(scores, scores),
        }
    )


def _choose_images(ranks: pd.DataFrame, number: int) -> dict[str, list[str]]:
    """Return the paths of the images under each heading."""
    order = ["share", "share_of_all"]
    images = ranks.groupby("path", sort=False).agg({"is_defect": "first", **dict.fromkeys(order, "mean")})
    defects = list(images[images.is_defect].sort_values(order).index)
    normal = list(images[~images.is_defect].sort_values(order, ascending=False).index)
    return {
        "Hardest defects": defects[:number],
        "Easiest defects": defects[number:][-number:][::-1],
        "Normal images with the highest scores": normal[:number],
    }


def _read_maps(ranks: pd.DataFrame) -> tuple[dict[tuple[str, str], Numbers], dict[str, NDArray[np.bool_]]]:
    """Read maps, scaled into [0, 1], by path and model, and masks by path.

    Files are read one after the other: the maps of all jobs together can take gigabytes.
    """
    maps: dict[tuple[str, str], Numbers] = {}
    masks: dict[str, NDArray[np.bool_]] = {}
    for (model, file), of_job in ranks.groupby(["model", "file"], sort=False):
        path_of = dict(zip(of_job.row, of_job.path, strict=True))
        number = len(read_arrays(file, "scores")[0])
        chosen, low, high = _read_job_maps(file, path_of, number)
        for path, values in chosen.items():
            scaled = (values.astype(np.float64) - low) / (high - low) if high > low else values * 0.0
            maps[path, model] = np.nan_to_num(np.clip(scaled, 0, 1))
        for path, values in _choose_rows(read_rows(file, "masks", number), path_of):
            masks.setdefault(path, values > 0)
    return maps, masks


def _read_job_maps(file: Path, path_of: Mapping[int, str], number: int) -> tuple[dict[str, NDArray[Any]], float, float]:
    """Return the maps of chosen images by path, and the percentiles :data:`RANGE` of the job's maps."""
    sampled: list[NDArray[Any]] = []

    def sample(rows: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        for row in rows:
            step = -(-number * row.size // MOST_SAMPLED)  # rounded up
            sampled.append(row.ravel()[::step].astype(np.float32))
            yield row

    chosen = dict(_choose_rows(sample(read_rows(file, "maps", number)), path_of))
    low, high = np.percentile(np.concatenate(sampled), RANGE) if sampled else (0.0, 0.0)
    return chosen, float(low), float(high)


def _choose_rows(rows: Iterable[NDArray[Any]], path_of: Mapping[int, str]) -> Iterator[tuple[str, NDArray[Any]]]:
    return ((path_of[index], row) for index, row in enumerate(rows) if index in path_of)


# --- drawing -----------------------------------------------------------------------------------------------------


def _example(
    path: str,
    ranks: pd.DataFrame,
    maps: Sequence[Numbers | None],
    mask: NDArray[np.bool_] | None,
    models: Sequence[str],
) -> Example:
    """Draw one image, its mask and one map per model; ``ranks`` has one row per model that has predictions for it."""
    name, kind, is_defect = Path(path).name, ranks.kind.iloc[0], ranks.is_defect.iloc[0]
    shares: Mapping[str, float] = dict(zip(ranks.model, ranks.share, strict=True))
    title = f"{kind} {name}".strip()
    photograph, reason = _read_image(path)
    arrays = [array for array in (*maps, mask) if array is not None]
    size = _fit(photograph.size if photograph else arrays[0].shape[::-1] if arrays else (SIDE, SIDE))
    uri = _jpeg(photograph.resize(size, Image.Resampling.LANCZOS)) if photograph else None
    images = [GalleryImage(f"Input {title}", uri, reason), _mask_image(mask, size, title, is_defect=is_defect)]
    for model, values in zip(models, maps, strict=True):
        uri = None if values is None else _jpeg(_heatmap(values, mask, size))
        caption = f"above {100 * shares[model]:.1f} %" if model in shares else ""
        images.append(GalleryImage(f"Anomaly map of {model} for {title}", uri, "n/a", caption))
    rank = f"scores above {100 * ranks.share.mean():.1f} % of the {'normal images' if is_defect else 'defects'}"
    return Example(name, kind, rank if len(shares) == 1 else f"{rank}, mean of {len(shares)} models", images)


def _read_image(path: str) -> tuple[Image.Image | None, str]:
    """Return the image, or None and the reason."""
    if not Path(path).is_file():
        return None, "the file is gone"
    try:
        with open_image(path) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # decodes a large JPEG at a lower resolution
            return image.convert("RGB"), ""
    except (*READABLE_ERRORS, UnsafeImageError):
        return None, "the file cannot be read"


def _fit(size: tuple[int, ...]) -> tuple[int, int]:
    """Scale a width and height to the gallery's size; square maps get the aspect ratio of their image."""
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _mask_image(mask: NDArray[np.bool_] | None, size: tuple[int, int], title: str, *, is_defect: bool) -> GalleryImage:
    if not is_defect or mask is None or not mask.any():
        return GalleryImage("", None, "normal" if not is_defect else "no mask" if mask is None else "empty mask")
    return GalleryImage(f"Mask of {title}", _jpeg(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)))


def _heatmap(values: Numbers, mask: NDArray[np.bool_] | None, size: tuple[int, int]) -> Image.Image:
    """Color a map ``(h, w)`` of values in [0, 1], and draw the outline of the mask."""
    resized = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    pixels = mpl.colormaps["inferno"](np.asarray(resized), bytes=True)[..., :3].copy()
    if mask is not None:
        inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        pixels[inside & ~binary_erosion(inside)] = OUTLINE
    return Image.fromarray(pixels)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
