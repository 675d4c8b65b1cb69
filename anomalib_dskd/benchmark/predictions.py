"""Scores and maps as a model gives them, and the figures computed from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import Batch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, F1Max
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from anomalib_dskd.errors import DskdError
from anomalib_dskd.evaluation import FPR_LIMIT

__all__ = ["Predictions", "ScoreRecorder", "figures", "figures_by_class"]


@dataclass(frozen=True)
class Predictions:
    """What a model says of a test set of N images of ``(h, w)`` pixels.

    Attributes:
        paths: files of the images.
        labels: 1 for images with a defect, else 0; ``(N,)``.
        classes: the data set's name for the kind of defect, empty where it has none.
        scores: image scores, on the model's own scale; ``(N,)``.
        maps: anomaly maps, on the model's own scale, ``(N, h, w)``; or none.
        masks: 1 for pixels with a defect, ``(N, h, w)``; or none.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    scores: NDArray[np.float32]
    maps: NDArray[np.float32] | None
    masks: NDArray[np.uint8] | None

    def save(self, path: Path) -> None:
        """Write a compressed NumPy archive, maps in 16 bits scaled into [0, 1]: enough to look at."""
        arrays: dict[str, Any] = {
            "paths": np.array(self.paths),
            "labels": self.labels,
            "classes": np.array(self.classes),
            "scores": self.scores,
        }
        if self.maps is not None:
            arrays["maps"] = _into_unit_range(self.maps).astype(np.float16)
        if self.masks is not None:
            arrays["masks"] = self.masks
        np.savez_compressed(path, **arrays)


class ScoreRecorder(Callback):
    """Keeps scores and maps of a test before the post-processor rescales and clamps them.

    anomalib's metrics read what the post-processor has clamped, which ties the most anomalous images with one
    another. Callbacks given to the trainer run before those that the model brings, its post-processor among them.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forget an earlier test."""
        self._batches.clear()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401, ARG002
        """Copy a batch's scores, maps, labels and masks."""
        names = ("pred_score", "anomaly_map", "gt_label", "gt_mask")
        self._batches.append(
            {"image_path": list(outputs.image_path), **{name: _copy(getattr(outputs, name, None)) for name in names}}
        )

    def predictions(self, classes: dict[str, str]) -> Predictions:
        """Put the batches together.

        Args:
            classes: kind of defect by image path.

        Raises:
            DskdError: scores or maps are not finite, or there are no labels.
        """
        scores = _joined(self._batches, "pred_score")
        if scores is None:
            scores = _largest(_joined(self._batches, "anomaly_map"))
        maps = _joined(self._batches, "anomaly_map")
        for name, values in (("score", scores), ("anomaly map", maps)):
            if values is not None and not np.isfinite(values).all():
                msg = (
                    f"the {name} of {int((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))).sum())} test "
                    "images is not finite: the training diverged, or the weights file lacks a layer that is used."
                )
                raise DskdError(msg)
        masks = _joined(self._batches, "gt_mask")
        labels = _joined(self._batches, "gt_label")
        if labels is None:
            msg = (
                "the test images have no labels: nothing can be compared. Give a data module with a labelled test set."
            )
            raise DskdError(msg)
        paths = [path for batch in self._batches for path in batch["image_path"]]
        return Predictions(
            paths=[str(Path(path).absolute()) for path in paths],  # to be found from any folder
            labels=np.asarray(labels).astype(np.int64).reshape(-1),
            classes=[classes.get(path, "") for path in paths],
            scores=np.asarray(scores, dtype=np.float32).reshape(-1),
            maps=None if maps is None else maps.reshape(len(paths), *maps.shape[-2:]).astype(np.float32),
            masks=None if masks is None else masks.reshape(len(paths), *masks.shape[-2:]).astype(np.uint8),
        )


def figures(predictions: Predictions) -> dict[str, float | None]:
    """Return image AUROC, image F1 at its best threshold, pixel AUROC, and AUPRO up to a false positive rate of 0.3.

    As fractions; none where the test set lacks good images, defects, maps or masks.
    """
    labels = predictions.labels
    result: dict[str, float | None] = dict.fromkeys(("image_AUROC", "image_F1", "pixel_AUROC", "AUPRO"))
    if len(set(labels.tolist())) > 1:
        scores = _into_unit_range(predictions.scores)
        result["image_AUROC"] = _compute(AUROC, scores, labels)
        result["image_F1"] = _compute(F1Max, scores, labels)
    if predictions.maps is not None and predictions.masks is not None and predictions.masks.any():
        maps = _into_unit_range(predictions.maps)
        result["pixel_AUROC"] = _compute(AUROC, maps, predictions.masks)
        result["AUPRO"] = _compute(AUPRO, maps, predictions.masks, fpr_limit=FPR_LIMIT)
    return result


def figures_by_class(predictions: Predictions) -> dict[str, dict[str, float | int | None]]:
    """Return the number of images and the figures of each kind of defect, against all good images."""
    good = predictions.labels == 0
    kinds = sorted(
        {kind for kind, label in zip(predictions.classes, predictions.labels, strict=True) if label and kind}
    )
    result: dict[str, dict[str, float | int | None]] = {}
    for kind in kinds:
        of_kind = np.array([name == kind for name in predictions.classes]) & ~good
        result[kind] = {"images": int(of_kind.sum()), **figures(_subset(predictions, good | of_kind))}
    return result


def _subset(predictions: Predictions, chosen: NDArray[np.bool_]) -> Predictions:
    def pick(values: Sequence[str]) -> list[str]:
        return [value for value, keep in zip(values, chosen, strict=True) if keep]

    return Predictions(
        paths=pick(predictions.paths),
        labels=predictions.labels[chosen],
        classes=pick(predictions.classes),
        scores=predictions.scores[chosen],
        maps=None if predictions.maps is None else predictions.maps[chosen],
        masks=None if predictions.masks is None else predictions.masks[chosen],
    )


def _compute(
    metric_class: Callable[..., AnomalibMetric], predicted: NDArray[Any], truth: NDArray[Any], **arguments: float
) -> float:
    metric = metric_class(fields=["predicted", "truth"], **arguments)
    batch = SimpleNamespace(predicted=torch.from_numpy(predicted), truth=torch.from_numpy(truth).int())
    metric.update(cast("Batch[Any]", batch))  # all that a metric reads of a batch are its fields
    return float(metric.compute())


def _into_unit_range(values: NDArray[Any]) -> NDArray[Any]:
    """Scale all values of a test set together: torchmetrics would pass those outside [0, 1] through a sigmoid.

    (:func:`anomalib_dskd.evaluation.keep_raw_scores` sees one batch at a time, and divides by a known bound.)
    """
    low, high = float(values.min()), float(values.max())
    wide = (values.astype(np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)
    scaled: NDArray[Any] = wide.astype(np.float32)
    return scaled


def _copy(values: Tensor | None) -> NDArray[Any] | None:
    if values is None:
        return None
    detached = torch.as_tensor(values).detach()
    array: NDArray[Any] = (detached.float() if detached.is_floating_point() else detached).cpu().numpy().copy()
    return array


def _joined(batches: list[dict[str, Any]], name: str) -> NDArray[Any] | None:
    values = [batch[name] for batch in batches]
    if not values or any(value is None for value in values):
        return None
    joined: NDArray[Any] = np.concatenate(values)
    return joined


def _largest(maps: NDArray[Any] | None) -> NDArray[Any]:
    if maps is None:
        msg = "the model gives neither a score nor an anomaly map."
        raise DskdError(msg)
    largest: NDArray[Any] = maps.reshape(len(maps), -1).max(axis=1)
    return largest
