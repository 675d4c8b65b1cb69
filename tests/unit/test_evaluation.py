import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUROC
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_dskd.evaluation import RawScoreEvaluator, keep_raw_scores
from tests.conftest import plain_aupro

LARGEST = 6.6


@pytest.fixture
def batches() -> list[ImageBatch]:
    """Maps and scores: up to 6.6 in some batches, below 1 in others."""
    random = np.random.default_rng(0)
    made = []
    for index in range(4):
        mask = np.zeros((3, 24, 24), dtype=bool)
        mask[0, 2:8, 3:9] = mask[0, 15:20, 10:22] = mask[1, 5:7, 5:7] = True
        maps = random.uniform(0, 0.9 if index % 2 else LARGEST, size=mask.shape) * (0.5 + 0.5 * mask)
        made.append(
            ImageBatch(
                image=torch.zeros(3, 3, 24, 24),
                gt_mask=torch.from_numpy(mask),
                gt_label=torch.tensor([1, 1, 0]),
                pred_score=torch.from_numpy(maps.max(axis=(1, 2))).float(),
                anomaly_map=torch.from_numpy(maps).float(),
            )
        )
    return made


def evaluate(
    evaluator: RawScoreEvaluator, batches: list[ImageBatch], post_processor: PostProcessor
) -> dict[str, float]:
    for batch in batches:
        predictions = InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)
        keep_raw_scores(batch, predictions, largest=LARGEST)
        post_processor.post_process_batch(batch)
        evaluator.on_test_batch_end(None, None, None, batch, 0)
    return {metric.name: metric.compute() for metric in evaluator.test_metrics}


def narrow_post_processor() -> PostProcessor:
    """Normalization for scores from 0 to 1: all larger scores are clamped to 1."""
    post_processor = PostProcessor()
    for name in ("image", "pixel"):
        getattr(post_processor, f"{name}_min").fill_(0.0)
        getattr(post_processor, f"{name}_max").fill_(1.0)
        getattr(post_processor, f"_{name}_threshold").fill_(0.5)
    return post_processor


def test_metrics_equal_scikit_learns_and_a_plain_aupros_on_raw_scores(batches):
    scores = np.concatenate([batch.pred_score.numpy() for batch in batches])
    labels = np.concatenate([batch.gt_label.numpy() for batch in batches])
    maps = np.concatenate([batch.anomaly_map.numpy() for batch in batches])
    masks = np.concatenate([batch.gt_mask.numpy() for batch in batches])
    metrics = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4)
    assert metrics["pixel_AUPRO"] == pytest.approx(plain_aupro(maps, masks), abs=1e-4)


def test_raw_scores_are_divided_by_the_largest_and_rounding_errors_are_clipped(batches):
    values = torch.tensor([[-0.001], [0.5], [2.0], [2.001]])
    predictions = InferenceBatch(pred_score=values, anomaly_map=values.view(4, 1, 1, 1))
    keep_raw_scores(batches[0], predictions, largest=2.0)
    assert batches[0].raw_pred_score.flatten().tolist() == [0, 0.25, 1, 1]
    assert batches[0].raw_anomaly_map.flatten().tolist() == [0, 0.25, 1, 1]


def test_f1_is_that_of_the_thresholds(batches):
    scores = torch.cat([batch.pred_score for batch in batches])
    truth = torch.cat([batch.gt_label for batch in batches]).bool()
    predicted = scores > 0.5
    expected = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    metrics = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert metrics["image_F1Score"] == pytest.approx(expected.item(), abs=1e-6)


def test_anomalibs_own_metric_still_suffers_from_clamping(batches):
    """If this fails, anomalib evaluates unclamped scores, and `keep_raw_scores` can be removed."""
    scores = np.concatenate([batch.pred_score.numpy() for batch in batches])
    labels = np.concatenate([batch.gt_label.numpy() for batch in batches])
    clamped, post_processor = AUROC(fields=["pred_score", "gt_label"]), narrow_post_processor()
    for batch in batches:
        post_processor.post_process_batch(batch)
        clamped.update(batch)
    assert abs(clamped.compute().item() - roc_auc_score(labels, scores)) > 0.01


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_pixel_metrics_are_omitted_without_masks(batches):
    for batch in batches:
        batch.gt_mask = None
    metrics = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert metrics["pixel_AUROC"] is None
    assert metrics["pixel_AUPRO"] is None
    assert metrics["image_AUROC"] is not None


def test_validation_metrics_are_computed_on_request():
    assert len(RawScoreEvaluator().val_metrics) == 0
    names = [metric.name for metric in RawScoreEvaluator(validation=True).val_metrics]
    assert names == ["image_AUROC", "pixel_AUROC", "pixel_AUPRO"]
