"""Evaluation metrics of the paper (AUROC, AUPRO, F1), computed on raw scores.

anomalib's post-processor normalizes scores and clamps them to [0, 1] before its metrics read them. This makes the
most anomalous images indistinguishable and lowers AUROC and AUPRO. :func:`keep_raw_scores` adds the unclamped values
to the batch, and the metrics of :class:`RawScoreEvaluator` read those. No other module works around the clamping;
``tests/unit/test_evaluation.py`` fails when anomalib no longer needs the workaround.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from anomalib import metrics
from anomalib.data import Batch, ImageBatch, InferenceBatch
from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from anomalib_dskd import pixel_metrics
from anomalib_dskd.errors import ArgumentError

__all__ = [
    "AUROC",
    "FPR_LIMIT",
    "F1Score",
    "PixelAUPRO",
    "PixelAUROC",
    "RawScoreEvaluator",
    "check_labels",
    "keep_raw_scores",
]

logger = logging.getLogger(__name__)

FPR_LIMIT = 0.3  # of AUPRO; section 4.1.3
RAW_FIELDS = ("pred_score", "anomaly_map")


def keep_raw_scores(batch: ImageBatch, predictions: InferenceBatch, *, largest: float) -> None:
    """Add score and map, divided by their upper bound, to ``batch`` for the metrics.

    The division preserves the order and brings the values into [0, 1]: torchmetrics applies a sigmoid to a batch that
    has any value outside that range, and not to other batches.

    Args:
        batch: gets ``raw_pred_score`` ``(B, 1)`` and ``raw_anomaly_map`` ``(B, 1, H, W)``.
        predictions: the model's output before post-processing.
        largest: upper bound of score and map.
    """
    for name in RAW_FIELDS:
        vars(batch)[f"raw_{name}"] = (getattr(predictions, name) / largest).clamp(0, 1)  # against rounding errors


class _DefinedMetric(Metric):
    """Mixin of anomalib's metrics that returns None, with a reason, where they return a number that means nothing.

    anomalib's AUROC of normal images only is 0, as if the model had failed.
    """

    fields: Sequence[str]
    needs_normal = True
    """Whether the metric is undefined without normal images or pixels."""
    normal: Tensor
    anomalous: Tensor

    def __init__(self, fields: Sequence[str], *, prefix: str, **kwargs: Any) -> None:  # noqa: ANN401 - anomalib's
        super().__init__(fields=fields, prefix=prefix, strict=False, **kwargs)
        self.name = prefix + type(self).__name__.removeprefix("Pixel")  # as anomalib's metrics
        self.unit = "pixels" if fields[1] == "gt_mask" else "images"
        self.undefined: str | None = None
        """Why the last result is None, if it is known."""
        for kind in ("normal", "anomalous"):
            self.add_state(kind, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, batch: Batch[Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Add a batch, unless one of the fields is missing."""
        predicted, truth = (getattr(batch, field, None) for field in self.fields)
        if predicted is None or truth is None:
            return
        super().update(batch)  # type: ignore[safe-super] # that of anomalib's metric
        count = int(truth.bool().sum())
        self.anomalous += count
        self.normal += truth.numel() - count

    def compute(self) -> Tensor | None:
        """Return the metric, or None with the reason in :attr:`undefined`."""
        self.undefined = self.find_reason()
        if self.undefined is not None or not self.normal + self.anomalous:
            return None
        value: Tensor = super().compute()  # type: ignore[safe-super]
        return value

    def find_reason(self) -> str | None:
        """Return why the metric is undefined; None if it is defined, or the data set lacks labels or masks."""
        if not self.normal + self.anomalous:
            return None
        if not self.anomalous:
            return f"no anomalous {self.unit}"
        return f"no normal {self.unit}" if self.needs_normal and not self.normal else None


class AUROC(_DefinedMetric, metrics.AUROC):  # type: ignore[misc]
    """anomalib's AUROC; None without normal or without anomalous images."""


class PixelAUROC(_DefinedMetric, AnomalibMetric, pixel_metrics.PixelAUROC):  # type: ignore[misc]
    """AUROC of pixels, whose memory does not grow with their number; None without normal or anomalous ones."""


class PixelAUPRO(_DefinedMetric, AnomalibMetric, pixel_metrics.PixelAUPRO):  # type: ignore[misc]
    """AUPRO, whose memory does not grow with the number of pixels; None without normal or anomalous ones."""


class F1Score(_DefinedMetric, metrics.F1Score):  # type: ignore[misc]
    """anomalib's F1 score of labels or masks; None without anomalous images or pixels, and without a threshold."""

    needs_normal = False
    no_labels: str | None = None
    """Why the post-processor predicts no labels or masks; None if it does."""

    def find_reason(self) -> str | None:
        """Return why there are no labels, or no anomalous images or pixels."""
        return self.no_labels or super().find_reason()

    def find_labels(self, post_processor: nn.Module | None) -> None:
        """Set :attr:`no_labels`: where a threshold is NaN, anomalib takes scores for labels."""
        self.no_labels = _reason_for_no_labels(post_processor)
        if self.no_labels is None and isinstance(post_processor, PostProcessor):
            is_image = self.fields[0] == "pred_label"
            threshold = post_processor.image_threshold if is_image else post_processor.pixel_threshold
            self.no_labels = "no threshold: no validation has set one" if threshold.isnan() else None


class RawScoreEvaluator(Evaluator):
    """Image AUROC and F1, pixel AUROC and F1, and AUPRO up to a false positive rate of 0.3.

    Pixel metrics are omitted if the dataset has no masks. The F1 scores are those of the labels and masks that the
    post-processor's thresholds give. A metric that is undefined, such as the AUROC of normal images only, is omitted
    too, and a warning gives the reason.

    Args:
        validation: whether to compute the metrics that need no threshold (AUROC, AUPRO) in each validation too, so
            that early stopping and checkpoints can monitor them.
    """

    def __init__(self, *, validation: bool = False) -> None:
        super().__init__(
            val_metrics=_ranking_metrics() if validation else None,
            test_metrics=[
                *_ranking_metrics(),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
            ],
        )
        self._warned: set[str] = set()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Find out whether the post-processor predicts labels."""
        self._warned.clear()
        for metric in self.test_metrics:
            if isinstance(metric, F1Score):
                metric.find_labels(getattr(pl_module, "post_processor", None))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log validation metrics."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._warn_of_undefined(self.val_metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log test metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        self._warn_of_undefined(self.test_metrics)

    def _warn_of_undefined(self, computed: Iterable[Any]) -> None:
        """Log a warning for each reason why metrics are undefined, once."""
        names = defaultdict(list)
        for metric in computed:
            metric.compute()  # torchmetrics keeps the result, which Lightning then logs
            names[metric.undefined].append(metric.name)
        for reason in names.keys() - self._warned - {None}:
            self._warned.add(reason)
            logger.warning("n/a: %s (%s)", reason, ", ".join(names[reason]))


def check_labels(evaluator: nn.Module | None, post_processor: nn.Module | None) -> None:
    """Raise if a metric needs labels that will not be predicted: anomalib would, but only after training.

    Raises:
        ArgumentError: the metrics, and what keeps the post-processor from predicting labels.
    """
    reason = _reason_for_no_labels(post_processor)
    tested: Iterable[Any] = evaluator.test_metrics if isinstance(evaluator, Evaluator) else ()
    strict = [metric for metric in tested if getattr(metric, "strict", False)]
    names = [metric.name for metric in strict if {"pred_label", "pred_mask"} & set(metric.fields)]
    if reason is not None and names:
        msg = (
            f"the evaluator's {', '.join(names)} needs predicted labels, and there are none: {reason}. Give the "
            "metric strict=False, leave it out, or use a post_processor with enable_thresholding true."
        )
        raise ArgumentError(msg)


def _reason_for_no_labels(post_processor: nn.Module | None) -> str | None:
    if post_processor is None:
        return "no post_processor"
    has_labels = getattr(post_processor, "enable_thresholding", True)
    return None if has_labels else "the post_processor has enable_thresholding false"


def _ranking_metrics() -> Sequence[AnomalibMetric]:
    pixel_fields = ["raw_anomaly_map", "gt_mask"]
    return [
        AUROC(fields=["raw_pred_score", "gt_label"], prefix="image_"),
        PixelAUROC(fields=pixel_fields, prefix="pixel_"),
        PixelAUPRO(fields=pixel_fields, prefix="pixel_", fpr_limit=FPR_LIMIT),
    ]
