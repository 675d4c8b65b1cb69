from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from anomalib import metrics
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUROC, Evaluator
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.evaluation import RawScoreEvaluator, check_labels, keep_raw_scores
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
    found = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert found["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert found["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4)
    assert found["pixel_AUPRO"] == pytest.approx(plain_aupro(maps, masks), abs=1e-4)


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
    found = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert found["image_F1Score"] == pytest.approx(expected.item(), abs=1e-6)


def test_anomalibs_own_metric_still_suffers_from_clamping(batches):
    """If this fails, anomalib evaluates unclamped scores, and `keep_raw_scores` can be removed."""
    scores = np.concatenate([batch.pred_score.numpy() for batch in batches])
    labels = np.concatenate([batch.gt_label.numpy() for batch in batches])
    clamped, post_processor = AUROC(fields=["pred_score", "gt_label"]), narrow_post_processor()
    for batch in batches:
        post_processor.post_process_batch(batch)
        clamped.update(batch)
    assert abs(clamped.compute().item() - roc_auc_score(labels, scores)) > 0.01


def test_pixel_metrics_are_omitted_without_masks(batches):
    for batch in batches:
        batch.gt_mask = None
    found = evaluate(RawScoreEvaluator(), batches, narrow_post_processor())
    assert found["pixel_AUROC"] is None
    assert found["pixel_AUPRO"] is None
    assert found["image_AUROC"] is not None


def chosen(batches, label):
    """The images of a label, and their masks."""
    for batch in batches:
        keep = batch.gt_label == label
        yield ImageBatch(
            image=batch.image[keep],
            gt_mask=batch.gt_mask[keep],
            gt_label=batch.gt_label[keep],
            pred_score=batch.pred_score[keep],
            anomaly_map=batch.anomaly_map[keep],
        )


def outcome(batches, post_processor, caplog):
    """Metrics as in a test, without those that are None, and the warnings."""
    evaluator = RawScoreEvaluator()
    evaluator.log = Mock()
    evaluator.on_test_start(None, SimpleNamespace(post_processor=post_processor))
    for batch in batches:
        predictions = InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)
        keep_raw_scores(batch, predictions, largest=LARGEST)
        if post_processor is not None:
            post_processor.post_process_batch(batch)
        evaluator.on_test_batch_end(None, None, None, batch, 0)
    caplog.clear()
    evaluator.on_test_epoch_end(SimpleNamespace(barebones=False), None)
    found = {metric.name: metric.compute() for metric in evaluator.test_metrics}
    return {name for name, value in found.items() if value is not None}, sorted(caplog.messages)


RANKING = {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"}


def test_normal_images_only_have_no_metrics_and_a_reason(batches, caplog):
    names, messages = outcome(chosen(batches, False), narrow_post_processor(), caplog)
    assert not names
    assert messages == [
        "n/a: no anomalous images (image_AUROC, image_F1Score)",
        "n/a: no anomalous pixels (pixel_AUROC, pixel_AUPRO, pixel_F1Score)",
    ]


def test_anomalous_images_only_have_no_image_auroc_and_a_reason(batches, caplog):
    names, messages = outcome(chosen(batches, True), narrow_post_processor(), caplog)
    assert names == {"pixel_AUROC", "pixel_AUPRO", "image_F1Score", "pixel_F1Score"}
    assert messages == ["n/a: no normal images (image_AUROC)"]


@pytest.mark.parametrize(
    ("post_processor", "reason"),
    [
        (None, "no post_processor"),
        (PostProcessor(enable_thresholding=False), "the post_processor has enable_thresholding false"),
        (PostProcessor(), "no threshold: no validation has set one"),
    ],
    ids=["no post-processor", "no thresholding", "no threshold"],
)
def test_without_labels_there_is_no_f1_score_and_a_reason(post_processor, reason, batches, caplog):
    names, messages = outcome(batches, post_processor, caplog)
    assert names == RANKING
    assert messages == [f"n/a: {reason} (image_F1Score, pixel_F1Score)"]


def test_without_masks_no_reason_is_needed(batches, caplog):
    for batch in batches:
        batch.gt_mask = None
    assert outcome(batches, narrow_post_processor(), caplog) == ({"image_AUROC", "image_F1Score"}, [])


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_anomalibs_own_metric_is_still_0_without_anomalous_images(batches):
    """If this fails, anomalib's metrics are undefined where ours are, which then need no class of their own."""
    theirs = metrics.AUROC(fields=["pred_score", "gt_label"])
    for batch in chosen(batches, False):
        batch.pred_score = batch.pred_score / LARGEST
        theirs.update(batch)
    assert theirs.compute() == 0


@pytest.mark.parametrize("post_processor", [None, PostProcessor(enable_thresholding=False)], ids=["none", "disabled"])
def test_a_metric_that_needs_labels_is_refused_where_there_are_none(post_processor):
    strict = metrics.F1Score(fields=["pred_label", "gt_label"], prefix="image_")
    ranking = AUROC(fields=["pred_score", "gt_label"])
    with pytest.raises(ArgumentError, match="the evaluator's image_F1Score needs predicted labels, .* strict=False"):
        check_labels(Evaluator(test_metrics=[strict, ranking]), post_processor)
    check_labels(Evaluator(test_metrics=[strict, ranking]), PostProcessor())
    check_labels(Evaluator(test_metrics=[ranking]), post_processor)
    for evaluator in (RawScoreEvaluator(), None):
        check_labels(evaluator, post_processor)


def test_validation_metrics_are_computed_on_request():
    assert len(RawScoreEvaluator().val_metrics) == 0
    names = [metric.name for metric in RawScoreEvaluator(validation=True).val_metrics]
    assert names == ["image_AUROC", "pixel_AUROC", "pixel_AUPRO"]
