"""Evaluation metrics of the paper (AUROC, AUPRO, F1), computed on raw scores.

anomalib's post-processor normalizes scores and clamps them to [0, 1] before its metrics read them. This makes the
most anomalous images indistinguishable and lowers AUROC and AUPRO. :func:`keep_raw_scores` adds the unclamped values
to the batch, and the metrics of :class:`RawScoreEvaluator` read those. No other module works around the clamping;
``tests/unit/test_evaluation.py`` fails when anomalib no longer needs the workaround.
"""

from collections.abc import Sequence

from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score

__all__ = ["FPR_LIMIT", "RawScoreEvaluator", "drop_raw_scores", "keep_raw_scores"]

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


def drop_raw_scores(batch: ImageBatch) -> None:
    """Remove from ``batch`` what :func:`keep_raw_scores` adds."""
    for name in RAW_FIELDS:
        del vars(batch)[f"raw_{name}"]


class RawScoreEvaluator(Evaluator):
    """Image AUROC and F1, pixel AUROC and F1, and AUPRO up to a false positive rate of 0.3.

    Pixel metrics are omitted if the dataset has no masks. The F1 scores are those of the labels and masks that the
    post-processor's thresholds give.

    Args:
        validation: whether to compute the metrics that need no threshold (AUROC, AUPRO) in each validation too, so
            that early stopping and checkpoints can monitor them.
    """

    def __init__(self, *, validation: bool = False) -> None:
        super().__init__(
            val_metrics=_ranking_metrics() if validation else None,
            test_metrics=[*_ranking_metrics(), *_label_metrics()],
        )


def _ranking_metrics() -> Sequence[AnomalibMetric]:
    pixel_fields = ["raw_anomaly_map", "gt_mask"]
    return [
        AUROC(fields=["raw_pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=pixel_fields, prefix="pixel_", strict=False),
        AUPRO(fields=pixel_fields, prefix="pixel_", strict=False, fpr_limit=FPR_LIMIT),
    ]


def _label_metrics() -> Sequence[AnomalibMetric]:
    return [
        F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
        F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
    ]
