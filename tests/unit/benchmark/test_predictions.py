from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

from anomalib_dskd.benchmark.predictions import (
    Predictions,
    ScoreRecorder,
    compute_metrics,
    compute_metrics_by_class,
    predict_labels,
)
from anomalib_dskd.errors import DskdError
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from tests.conftest import plain_aupro


def predictions(scale: float = 300.0) -> Predictions:
    random = np.random.default_rng(0)
    labels = np.array([0] * 6 + [1] * 6)
    masks = np.zeros((12, 16, 16), dtype=np.uint8)
    masks[6:, 3:9, 4:12] = 1
    maps = (random.random((12, 16, 16)) + 0.4 * masks).astype(np.float32) * scale
    return Predictions(
        paths=[f"{index}.png" for index in range(12)],
        labels=labels,
        classes=["good"] * 6 + ["crack"] * 2 + ["stain"] * 4,
        scores=((random.random(12) + 0.3 * labels) * scale).astype(np.float32),
        maps=maps,
        masks=masks,
    )


def test_metrics_equal_those_of_scikit_learn_on_raw_values():
    given = predictions()
    result = compute_metrics(given)
    assert result.image_AUROC == pytest.approx(roc_auc_score(given.labels, given.scores), abs=1e-6)
    best = max(f1_score(given.labels, given.scores >= threshold) for threshold in given.scores)
    assert result.image_F1 == pytest.approx(best, abs=1e-6)
    pixels = roc_auc_score(given.masks.ravel(), given.maps.ravel())
    assert result.pixel_AUROC == pytest.approx(pixels, abs=1e-5)
    aupro = result.AUPRO
    assert aupro == pytest.approx(plain_aupro(given.maps, given.masks), abs=1e-3)


def test_f1_at_the_threshold_is_that_of_the_predicted_labels():
    given = predictions()
    predicted = (given.scores > np.median(given.scores) * 1.2).astype(int)
    result = compute_metrics(Predictions(**{**vars(given), "predicted_labels": predicted}))
    assert result.image_F1_at_threshold == pytest.approx(f1_score(given.labels, predicted), abs=1e-6)
    assert result.image_F1_at_threshold < result.image_F1 - 0.01
    of_cracks = compute_metrics_by_class(Predictions(**{**vars(given), "predicted_labels": predicted}))["crack"]
    chosen = [*range(6), 6, 7]
    expected = f1_score(given.labels[chosen], predicted[chosen])
    assert of_cracks.image_F1_at_threshold == pytest.approx(expected, abs=1e-6)
    assert compute_metrics(given).image_F1_at_threshold is None


@pytest.mark.parametrize("kind", [PostProcessor, NormalQuantilePostProcessor, MEBinPostProcessor])
def test_labels_are_those_of_the_post_processor(kind):
    scores, post_processor = predictions().scores, kind()
    post_processor._image_threshold.fill_(200.0)
    post_processor.image_min.fill_(100.0)
    post_processor.image_max.fill_(300.0)
    assert predict_labels(post_processor, scores).tolist() == (scores > 200).tolist()
    post_processor.image_sensitivity = 0.75
    assert predict_labels(post_processor, scores).tolist() == (scores > 150).tolist()
    direct = post_processor(
        InferenceBatch(pred_score=torch.from_numpy(scores)[:, None], anomaly_map=torch.rand(12, 1, 8, 8))
    )
    assert predict_labels(post_processor, scores).tolist() == direct.pred_label.flatten().tolist()


@pytest.mark.parametrize(
    "post_processor",
    [None, PostProcessor(), PostProcessor(enable_thresholding=False), nn.Identity()],
    ids=["none", "no validation", "disabled", "unknown"],
)
def test_without_a_threshold_there_are_no_labels(post_processor):
    assert predict_labels(post_processor, predictions().scores) is None


def test_metrics_do_not_depend_on_the_models_scale():
    small, large = compute_metrics(predictions(0.01)), compute_metrics(predictions(1e4))
    assert vars(small) == pytest.approx(vars(large), abs=1e-4)  # pixels are counted in bins of 0.05 %


def test_aupro_is_one_for_perfect_maps_and_zero_for_inverted_ones():
    given = predictions()
    perfect = Predictions(**{**vars(given), "maps": given.masks.astype(np.float32)})
    inverted = Predictions(**{**vars(given), "maps": 1 - given.masks.astype(np.float32)})
    best, worst = (compute_metrics(each).AUPRO for each in (perfect, inverted))
    assert best == pytest.approx(1, abs=1e-2)
    assert worst == pytest.approx(0, abs=1e-6)


def test_each_kind_of_defect_is_compared_with_all_normal_images():
    given = predictions()
    result = compute_metrics_by_class(given)
    assert {kind: values.images for kind, values in result.items()} == {"crack": 2, "stain": 4}
    chosen = [*range(6), 6, 7]
    expected = roc_auc_score(given.labels[chosen], given.scores[chosen])
    assert result["crack"].image_AUROC == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["maps", "masks"])
def test_without_maps_or_masks_there_are_no_pixel_metrics(name):
    result = compute_metrics(Predictions(**{**vars(predictions()), name: None}))
    assert result.image_AUROC is not None
    assert (result.pixel_AUROC, result.AUPRO) == (None, None)


def test_with_only_normal_images_there_are_no_metrics():
    given = predictions()
    normal = Predictions(**{**vars(given), "labels": np.zeros(12, dtype=int), "masks": np.zeros_like(given.masks)})
    assert set(vars(compute_metrics(normal)).values()) == {None}


def batch(**changes) -> SimpleNamespace:
    values = {
        "image_path": ["a.png", "b.png"],
        "pred_score": torch.tensor([[250.0], [3.0]]),
        "anomaly_map": torch.rand(2, 1, 4, 4) * 300,
        "gt_label": torch.tensor([True, False]),
        "gt_mask": torch.zeros(2, 4, 4, dtype=torch.bool),
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def record(tmp_path):
    """A function that records batches as a test does."""
    return partial(recorded, tmp_path)


def recorded(folder, *batches) -> ScoreRecorder:
    recorder = ScoreRecorder(folder)
    recorder.on_test_start(None, None)
    for index, each in enumerate(batches):
        recorder.on_test_batch_end(None, None, each, each, index)
    return recorder


def test_recorder_copies_values_that_the_post_processor_changes_later(record):
    first = batch()
    recorder = record(first, batch(image_path=["c.png", "d.png"]))
    first.pred_score.clamp_(0, 1)
    result = recorder.predictions({"a.png": "crack", "b.png": "good"})
    assert result.scores.tolist() == [250.0, 3.0, 250.0, 3.0]
    assert result.labels.tolist() == [1, 0, 1, 0]
    assert result.classes == ["crack", "good", "", ""]
    assert (result.maps.shape, result.masks.shape) == ((4, 4, 4), (4, 4, 4))
    assert result.maps.max() > 1


def test_scores_of_a_model_that_predicts_only_maps_are_their_maxima(record):
    given = batch(pred_score=None)
    result = record(given).predictions({})
    assert result.scores.tolist() == pytest.approx(given.anomaly_map.flatten(1).max(1).values.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_score": torch.tensor([[torch.nan], [1.0]])}, "the score of 1 test images is not finite"),
        ({"anomaly_map": torch.full((2, 1, 4, 4), torch.inf)}, "the anomaly map of 2 test images is not finite"),
        ({"pred_score": None, "anomaly_map": None}, "neither a score nor an anomaly map"),
    ],
)
def test_unusable_predictions_are_an_error(changes, message, record):
    with pytest.raises(DskdError, match=message):
        record(batch(**changes)).predictions({})


def test_saved_predictions_can_be_read(tmp_path):
    given = predictions()
    given.save(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz") as archive:
        assert set(archive) == {"paths", "labels", "classes", "scores", "maps", "masks"}
        np.testing.assert_array_equal(archive["scores"], given.scores)
        order = np.argsort(given.maps.ravel(), kind="stable")
        assert (np.diff(archive["maps"].ravel()[order].astype(float)) >= 0).all()
        assert archive["maps"].dtype == np.float16


def test_maps_and_masks_are_on_the_disk_and_those_of_a_second_test_replace_them(tmp_path):
    recorder = recorded(tmp_path, batch(), batch())
    first = recorder.predictions({})
    assert isinstance(first.maps, np.memmap)
    assert isinstance(first.masks, np.memmap)
    again = batch()
    recorder.on_test_start(None, None)
    recorder.on_test_batch_end(None, None, again, again, 0)
    np.testing.assert_array_equal(recorder.predictions({}).maps, again.anomaly_map[:, 0].numpy())


def test_without_masks_of_all_images_there_are_none(record):
    result = record(batch(), batch(gt_mask=None)).predictions({})
    assert result.masks is None
    assert len(result.maps) == 4
