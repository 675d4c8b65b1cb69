"""Anomaly scores and maps that a model predicts for a test set, and the metrics computed from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AUROC, AnomalibMetric, F1Max, F1Score
from anomalib.post_processing import PostProcessor
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn

from anomalib_dskd.benchmark.job_result import ClassMetrics, Metrics
from anomalib_dskd.benchmark.predictions_file import ArrayFile, write_arrays
from anomalib_dskd.errors import DskdError
from anomalib_dskd.evaluation import FPR_LIMIT
from anomalib_dskd.pixel_metrics import PixelAUPRO, PixelAUROC

__all__ = ["Predictions", "ScoreRecorder", "compute_metrics", "compute_metrics_by_class", "label_f1", "predict_labels"]


FILES = {"anomaly_map": np.float32, "gt_mask": np.uint8}  # fields of a batch, and the type that they are stored with
PIXELS_AT_ONCE = 1 << 22  # a batch of maps in memory: adding up its counts takes no longer than counting


@dataclass(frozen=True)
class Predictions:
    """Predictions for a test set of N images of ``(h, w)`` pixels.

    Attributes:
        paths: image files.
        labels: 1 for images with a defect, else 0; ``(N,)``.
        classes: the data set's name for the kind of defect; empty if it has none.
        scores: image scores, on the model's own scale; ``(N,)``.
        maps: anomaly maps, on the model's own scale, ``(N, h, w)``; or None. They may be mapped from the disk.
        masks: 1 for pixels with a defect, ``(N, h, w)``; or None. They may be mapped from the disk.
        predicted_labels: 1 for images that the model's threshold calls anomalous, else 0, ``(N,)``; or None.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    scores: NDArray[np.float32]
    maps: NDArray[np.float32] | None
    masks: NDArray[np.uint8] | None
    predicted_labels: NDArray[np.int64] | None = None

    def save(self, path: Path) -> None:
        """Write a compressed NumPy archive; maps are stored as FP16, scaled into [0, 1]."""
        arrays: dict[str, Any] = {name: values for name, values in vars(self).items() if values is not None}
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows deletes no file that is mapped
            if self.maps is not None:
                scaled, limits = ArrayFile(Path(folder, "maps"), np.float16), _limits(self.maps)
                for each in self.maps:
                    scaled.append(_into_unit_range(each, limits)[None])
                arrays["maps"] = scaled.read()
            write_arrays(path, arrays)


class ScoreRecorder(Callback):
    """Records scores and maps during a test, before the post-processor normalizes and clamps them.

    anomalib's metrics read the clamped values, which gives the most anomalous images equal scores. Callbacks passed
    to the trainer run before the callbacks of the model, and so before its post-processor.

    Args:
        folder: for maps and masks, which can be larger than the memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._batches: list[dict[str, Any]] = []
        self._files: dict[str, ArrayFile] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Discard the predictions of an earlier test."""
        self._batches.clear()
        for name, kind in FILES.items():
            path = self._folder / name
            path.unlink(missing_ok=True)
            self._files[name] = ArrayFile(path, kind)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401, ARG002
        """Copy a batch's scores, maps, labels and masks."""
        names = ("pred_score", "gt_label")
        self._batches.append(
            {"image_path": list(outputs.image_path), **{name: _copy(getattr(outputs, name, None)) for name in names}}
        )
        for name, file in self._files.items():
            values = _copy(getattr(outputs, name, None))
            if values is not None:
                file.append(values.reshape(-1, *values.shape[-2:]))  # (B, 1, h, w) to (B, h, w)

    def predictions(self, classes: dict[str, str]) -> Predictions:
        """Concatenate the recorded batches.

        Args:
            classes: kind of defect by image path.

        Raises:
            DskdError: scores or maps are not finite, the model predicts neither, or there are no labels.
        """
        paths = [path for batch in self._batches for path in batch["image_path"]]
        maps, masks = (self._read(name, len(paths)) for name in FILES)
        scores, labels = self._concatenate("pred_score"), self._concatenate("gt_label")
        if scores is None and maps is not None:
            scores = maps.reshape(len(maps), -1).max(axis=1)
        if scores is None:
            msg = "the model gives neither a score nor an anomaly map."
            raise DskdError(msg)
        _check_finite("score", scores)
        if maps is not None:
            _check_finite("anomaly map", maps)
        if labels is None:
            msg = "the test images have no labels, which metrics need. Give a data module with a labeled test set."
            raise DskdError(msg)
        return Predictions(
            paths=[str(Path(path).absolute()) for path in paths],  # valid from any working directory
            labels=labels.astype(np.int64).reshape(-1),
            classes=[classes.get(path, "") for path in paths],
            scores=scores.astype(np.float32).reshape(-1),
            maps=maps,
            masks=masks,
        )

    def _read(self, name: str, images: int) -> NDArray[Any] | None:
        """Return maps or masks, unless images lack them."""
        values = self._files[name].read()
        return values if values is not None and len(values) == images else None

    def _concatenate(self, name: str) -> NDArray[Any] | None:
        values = [batch[name] for batch in self._batches]
        return np.concatenate(values) if values and all(value is not None for value in values) else None


def predict_labels(post_processor: nn.Module | None, scores: NDArray[np.float32]) -> NDArray[np.int64] | None:
    """Return the labels that a model and its exports give images, or None if it has no threshold.

    Args:
        post_processor: the model's.
        scores: image scores, on the model's own scale; ``(N,)``.
    """
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return None
    if post_processor.image_threshold.isnan():  # anomalib takes scores for labels then
        return None
    predictions = InferenceBatch(pred_score=torch.from_numpy(scores)[:, None], anomaly_map=None)
    # not the method of a subclass, which may need maps for its masks
    labels = cast("Tensor", PostProcessor.forward(post_processor, predictions).pred_label)
    return labels.flatten().numpy().astype(np.int64)


def compute_metrics(predictions: Predictions, chosen: NDArray[np.bool_] | slice = slice(None)) -> Metrics:
    """Compute image AUROC, image F1, pixel AUROC, and AUPRO up to a false positive rate of 0.3.

    Image F1 is computed at the best threshold for these images, and at the model's own.

    Args:
        predictions: for a test set of N images.
        chosen: which images to include, ``(N,)``; all by default.

    Returns:
        Fractions; None where the images include no normal image, no defect, no maps, no masks or no labels.
    """
    labels, scores = predictions.labels[chosen], predictions.scores[chosen]
    predicted = predictions.predicted_labels
    image_auroc = image_f1 = None
    if len(np.unique(labels)) > 1:
        scores = _into_unit_range(scores, _limits(scores))
        image_auroc, image_f1 = _compute(AUROC, scores, labels), _compute(F1Max, scores, labels)
    pixel_auroc, aupro = _compute_pixel_metrics(predictions, chosen)
    return Metrics(
        image_AUROC=image_auroc,
        image_F1=image_f1,
        image_F1_at_threshold=None if predicted is None else label_f1(predicted[chosen], labels),
        pixel_AUROC=pixel_auroc,
        AUPRO=aupro,
    )


def _compute_pixel_metrics(
    predictions: Predictions, chosen: NDArray[np.bool_] | slice
) -> tuple[float | None, float | None]:
    maps, masks = predictions.maps, predictions.masks
    if maps is None or masks is None:
        return None, None
    has_defects = False
    metrics = PixelAUROC(), PixelAUPRO(FPR_LIMIT)
    rows = np.arange(len(maps))[chosen]
    images = max(1, PIXELS_AT_ONCE // maps[0].size)
    for start in range(0, len(rows), images):
        some = rows[start : start + images]
        batch = torch.from_numpy(maps[some]), torch.from_numpy(masks[some])  # copies: `some` are not a slice
        has_defects |= bool(batch[1].any())
        for metric in metrics:
            metric.update(*batch)
    return (float(metrics[0].compute()), float(metrics[1].compute())) if has_defects else (None, None)


def label_f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    """Return the F1 score of predicted labels ``(N,)``, or None unless there are normal and anomalous images.

    >>> label_f1(np.array([1, 0, 1]), np.array([1, 1, 0])), label_f1(np.array([1]), np.array([1]))
    (0.5, None)
    """
    has_both = len(np.unique(labels)) > 1
    return _compute(F1Score, predicted.astype(np.int64), labels.astype(np.int64)) if has_both else None


def compute_metrics_by_class(predictions: Predictions) -> dict[str, ClassMetrics]:
    """Compute the number of images and the metrics of each kind of defect, each against all normal images."""
    classes, is_normal = np.array(predictions.classes), predictions.labels == 0
    result = {}
    for kind in sorted(set(classes[~is_normal].tolist()) - {""}):
        of_kind = (classes == kind) & ~is_normal
        metrics = compute_metrics(predictions, is_normal | of_kind)
        result[kind] = ClassMetrics(**vars(metrics), images=int(of_kind.sum()))
    return result


def _compute(metric_class: Callable[..., AnomalibMetric], predicted: NDArray[Any], truth: NDArray[Any]) -> float:
    metric = metric_class(fields=["predicted", "truth"])
    batch = SimpleNamespace(predicted=torch.from_numpy(predicted), truth=torch.from_numpy(truth).int())
    metric.update(cast("Batch[Any]", batch))  # a metric reads only its fields of a batch
    return float(metric.compute())


def _limits(values: NDArray[Any]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _into_unit_range(values: NDArray[Any], limits: tuple[float, float]) -> NDArray[np.float32]:
    """Scale values, whose limits are those of a test set, into [0, 1].

    torchmetrics applies a sigmoid to values outside of it. (:mod:`anomalib_dskd.evaluation` sees one batch at a time,
    and divides by a known bound.)
    """
    low, high = limits
    scaled = (values.astype(np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)
    return scaled.astype(np.float32)


def _check_finite(name: str, values: NDArray[Any]) -> None:
    unusable = sum(not np.isfinite(value).all() for value in values)
    if unusable:
        msg = (
            f"the {name} of {unusable} test images is not finite: the training run diverged, or the "
            "weights file lacks a layer that is used."
        )
        raise DskdError(msg)


def _copy(values: Tensor | None) -> NDArray[Any] | None:
    if values is None:
        return None
    detached = torch.as_tensor(values).detach()
    array: NDArray[Any] = (detached.float() if detached.is_floating_point() else detached).cpu().numpy().copy()
    return array
