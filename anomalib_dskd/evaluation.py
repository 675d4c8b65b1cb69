"""The paper's figures, computed on scores as the model gives them.

anomalib's post-processor rescales scores and clamps them to [0, 1] before its metrics see them, which ties the
most anomalous images with one another and lowers AUROC and AUPRO. :func:`keep_raw_scores` puts the unclamped
values beside the others on the batch, and the metrics of :class:`RawScoreEvaluator` read those. This is the one
place that works around it; ``tests/unit/test_evaluation.py`` tells when it is no longer needed.
"""

from collections.abc import Sequence

from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score

__all__ = ["FPR_LIMIT", "RawScoreEvaluator", "keep_raw_scores"]

FPR_LIMIT = 0.3  # of AUPRO; section 4.1.3


def keep_raw_scores(batch: ImageBatch, predictions: InferenceBatch, *, largest: float) -> None:
    """Put score and map, divided by their upper bound, on ``batch`` for the metrics.

    The division keeps the order and brings the values into [0, 1]: torchmetrics passes a batch with any value
    outside through a sigmoid, and others not.

    Args:
        batch: gains ``raw_pred_score`` ``(B, 1)`` and ``raw_anomaly_map`` ``(B, 1, H, W)``.
        predictions: the model's output before post-processing.
        largest: upper bound of both.
    """
    for name in ("pred_score", "anomaly_map"):
        vars(batch)[f"raw_{name}"] = (getattr(predictions, name) / largest).clamp(0, 1)  # rounding errors


class RawScoreEvaluator(Evaluator):
    """Image AUROC and F1, pixel AUROC and F1, and AUPRO up to a false positive rate of 0.3.

    The pixel figures are left out where the data has no masks. The F1 scores are those of the labels that the
    post-processor's thresholds give.

    Args:
        validation: compute the figures that need no threshold (AUROC, AUPRO) on the validation set too, each
            time it is run; early stopping and checkpoints can monitor them.
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
