import logging
import re

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_dskd import Dskd
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from tests.conftest import TEACHER

RANDOM = np.random.default_rng(0)
NORMAL_MAPS = RANDOM.gamma(4, 0.05, size=(40, 8, 8)).astype(np.float32)
NORMAL_SCORES = NORMAL_MAPS.max(axis=(1, 2))
BUFFERS = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")
NO_DEFECTS_WARNING = "does not contain any anomalous images"


def batches(maps, labels=None, masks=None, *, size=16):
    """Validation batches from maps ``(N, 8, 8)``; the scores ``(N, 1)`` are their largest values."""
    for start in range(0, len(maps), size):
        part = slice(start, start + size)
        some = torch.from_numpy(maps[part])
        yield ImageBatch(
            image=torch.zeros(len(some), 3, 8, 8),
            anomaly_map=some[:, None],
            pred_score=some.amax(dim=(-2, -1))[:, None],
            gt_label=None if labels is None else torch.from_numpy(labels[part]),
            gt_mask=None if masks is None else torch.from_numpy(masks[part]),
        )


def validated(post_processor, maps, labels=None, masks=None):
    for batch in batches(maps, labels, masks):
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def normal_only(post_processor=None, maps=NORMAL_MAPS, *, with_masks=True):
    masks = np.zeros(maps.shape, dtype=bool) if with_masks else None
    return validated(post_processor or NormalQuantilePostProcessor(), maps, np.zeros(len(maps), dtype=bool), masks)


def with_defects():
    maps, labels, masks = NORMAL_MAPS.copy(), np.zeros(40, dtype=bool), np.zeros(NORMAL_MAPS.shape, dtype=bool)
    labels[::3] = True
    masks[::3, 2:5, 2:5] = True
    maps[masks] += 0.3
    return maps, labels, masks


def values(post_processor):
    return {name: getattr(post_processor, name).item() for name in BUFFERS}


def middle_below(threshold, scores):
    """The middle between a score and the next lower one."""
    return (threshold + scores[scores < threshold].max()) / 2


def middles(post_processor, maps):
    """The values of anomalib's post-processor, with the middle below each threshold instead of it."""
    expected = values(post_processor)
    expected["_image_threshold"] = middle_below(expected["_image_threshold"], maps.max(axis=(1, 2)))
    expected["_pixel_threshold"] = middle_below(expected["_pixel_threshold"], maps)
    return expected


def test_with_anomalous_images_thresholds_are_just_below_anomalibs_and_the_range_is_anomalibs():
    maps, *truth = with_defects()
    ours, theirs = (validated(kind(), maps, *truth) for kind in (NormalQuantilePostProcessor, PostProcessor))
    found, expected = values(ours), middles(theirs, maps)
    # pixels are counted in bins of 0.05 %
    assert found.pop("_pixel_threshold") == pytest.approx(expected.pop("_pixel_threshold"), rel=5e-4)
    assert found == pytest.approx(expected, rel=1e-6)
    assert not any(np.isnan(value) for value in values(ours).values())


def predicted(post_processor, scores):
    scores = torch.tensor(scores)[:, None]
    return post_processor(InferenceBatch(pred_score=scores, anomaly_map=scores[..., None, None])).pred_label.flatten()


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([0.1, 0.2, 0.3, 0.7, 0.9], [0, 0, 0, 1, 1], 0.5),
        ([0.1, 0.6, 0.3, 0.5, 0.9], [0, 0, 0, 1, 1], 0.4),  # one false alarm
        ([0.3, 0.4, 0.2, 0.6], [0, 1, 1, 1], 0.1),  # nothing lower: all are called anomalous
        ([0.8, 0.6, 0.7], [1, 1, 1], 0.3),  # no normal image
    ],
)
def test_the_defect_that_sets_the_threshold_is_found_on_images_and_pixels(scores, labels, threshold):
    maps = np.array(scores, dtype=np.float32)[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    truth = np.array(labels, dtype=bool)
    masks = truth[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    ours = validated(NormalQuantilePostProcessor(), maps, truth, masks)
    assert ours.image_threshold.item() == pytest.approx(threshold, rel=1e-6)
    assert ours.pixel_threshold.item() == pytest.approx(threshold, rel=5e-4)
    assert predicted(ours, scores)[truth].all()


def test_a_threshold_without_a_lower_score_is_lower_for_negative_scores_too():
    maps = np.full((2, 8, 8), -0.4, dtype=np.float32)
    ours = validated(NormalQuantilePostProcessor(), maps, np.ones(2, dtype=bool), np.ones(maps.shape, dtype=bool))
    assert ours.image_threshold.item() == pytest.approx(-0.6)


# If this fails, anomalib's labels include the defect that sets the threshold, and `_middle_below` can be removed.
def test_anomalib_still_misses_the_defect_that_sets_the_threshold():
    maps, *truth = with_defects()
    theirs = validated(PostProcessor(), maps, *truth)
    lowest = theirs.image_threshold.item()
    assert lowest in maps.max(axis=(1, 2))[truth[0]]
    assert not predicted(theirs, [lowest]).any()


# If this fails, anomalib no longer takes the largest score, and our post-processor may no longer be needed.
def test_anomalib_still_takes_the_largest_normal_score(caplog):
    caplog.set_level(logging.WARNING)
    theirs = normal_only(PostProcessor())
    assert theirs.image_threshold.item() == NORMAL_SCORES.max()
    assert NO_DEFECTS_WARNING in caplog.text


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 1.0])
def test_with_normal_images_only_the_threshold_is_their_quantile(quantile, caplog):
    caplog.set_level(logging.WARNING)
    ours = normal_only(NormalQuantilePostProcessor(normal_quantile=quantile))
    expected = np.quantile(NORMAL_SCORES, quantile)
    assert ours.image_threshold.item() == pytest.approx(expected, rel=1e-6)
    assert ours.pixel_threshold.item() == pytest.approx(expected, rel=1e-6)  # of the images, not of the pixels
    assert not caplog.text
    predictions = ours(InferenceBatch(pred_score=torch.from_numpy(NORMAL_SCORES)[:, None], anomaly_map=None))
    assert predictions.pred_label.sum() == np.ceil(39 * (1 - quantile))  # those above the quantile


def test_a_normalized_score_is_the_share_of_twice_the_threshold():
    ours = normal_only()
    threshold = np.quantile(NORMAL_SCORES, 0.95)
    scores = torch.tensor([0.0, 0.5, 1.0, 1.2, 1.9, 3.0])[:, None] * threshold
    maps = scores[:, None, None].expand(6, 1, 2, 2)
    result = ours(InferenceBatch(pred_score=scores, anomaly_map=maps))
    expected = [0.0, 0.25, 0.5, 0.6, 0.95, 1.0]
    assert result.pred_score.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert result.anomaly_map[:, 0, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    # the third equals the threshold, where rounding determines the label
    assert result.pred_label.flatten()[[0, 1, 3, 4, 5]].tolist() == [False, False, True, True, True]
    assert torch.equal(result.pred_mask[:, 0, 0, 0], result.pred_label.flatten())


def test_images_that_are_predicted_normal_have_empty_masks():
    ours = normal_only()
    (batch,) = batches(NORMAL_MAPS, size=40)
    ours.post_process_batch(batch)
    assert torch.equal(batch.pred_mask.flatten(1).any(dim=1), batch.pred_label)
    assert batch.pred_label.sum() == 2


def test_one_outlier_among_the_normal_images_does_not_determine_the_threshold():
    maps = NORMAL_MAPS.copy()
    maps[7] += 5
    before, after = normal_only(), normal_only(maps=maps)
    theirs = normal_only(PostProcessor(), maps=maps)
    assert after.image_threshold < 1.1 * before.image_threshold
    assert theirs.image_threshold > 5 * before.image_threshold
    defect = InferenceBatch(pred_score=torch.tensor([[1.5 * before.image_threshold]]), anomaly_map=None)
    assert after(defect).pred_label
    assert not theirs(defect).pred_label


def test_without_masks_maps_are_normalized_like_scores():
    with_masks, without = normal_only(), normal_only(with_masks=False)
    assert without._pixel_threshold.isnan()
    assert without.pixel_threshold == without.image_threshold == with_masks.image_threshold
    for name in ("image_min", "image_max", "pixel_min", "pixel_max"):
        assert getattr(without, name) == getattr(with_masks, name)


def test_anomalous_images_with_empty_masks_do_not_set_the_pixel_threshold():
    maps, labels, masks = with_defects()
    ours = validated(NormalQuantilePostProcessor(), maps, labels, np.zeros_like(masks))
    theirs = validated(PostProcessor(), maps, labels, np.zeros_like(masks))
    expected = middle_below(theirs.image_threshold.item(), maps.max(axis=(1, 2)))
    assert ours.image_threshold.item() == pytest.approx(expected, rel=1e-6)
    assert ours.image_max == theirs.image_max
    assert ours.pixel_threshold.item() == pytest.approx(np.quantile(maps.max(axis=(1, 2)), 0.95), rel=1e-6)


def test_without_labels_thresholds_are_anomalibs():
    ours, theirs = (validated(kind(), NORMAL_MAPS) for kind in (NormalQuantilePostProcessor, PostProcessor))
    assert str(values(ours)) == str(values(theirs))  # NaN is NaN


def test_scores_that_can_be_negative_have_anomalibs_range():
    ours, theirs = (normal_only(kind(), NORMAL_MAPS - 1) for kind in (NormalQuantilePostProcessor, PostProcessor))
    assert (ours.image_min, ours.image_max) == (theirs.image_min, theirs.image_max)
    assert ours.image_threshold < theirs.image_threshold


def test_a_later_validation_sets_everything_again():
    ours = validated(normal_only(), *with_defects())
    assert values(ours) == values(validated(NormalQuantilePostProcessor(), *with_defects()))
    assert values(normal_only(ours)) == values(normal_only())


def test_disabled_steps_stay_disabled():
    raw = normal_only(NormalQuantilePostProcessor(enable_normalization=False))
    assert raw.image_min.isnan()
    scores = InferenceBatch(pred_score=torch.tensor([[0.123]]), anomaly_map=None)
    assert raw(scores).pred_score.item() == pytest.approx(0.123)
    unlabeled = normal_only(NormalQuantilePostProcessor(enable_thresholding=False))
    assert unlabeled.image_threshold.isnan()
    assert unlabeled(scores).pred_label is None


@pytest.mark.parametrize(("sensitivity", "factor"), [(0.25, 1.5), (0.4, 1.2), (0.6, 0.8)])
def test_sensitivity_moves_the_decision_threshold(sensitivity, factor):
    ours = normal_only(NormalQuantilePostProcessor(image_sensitivity=sensitivity))
    decision = factor * np.quantile(NORMAL_SCORES, 0.95)
    scores = torch.tensor([[0.99 * decision], [1.01 * decision]], dtype=torch.float32)
    assert ours(InferenceBatch(pred_score=scores, anomaly_map=None)).pred_label.flatten().tolist() == [False, True]


def test_given_settings_override_those_of_the_checkpoint():
    trained = NormalQuantilePostProcessor(image_sensitivity=0.7, normal_quantile=0.9).checkpoint_config()
    assert trained["normal_quantile"] == 0.9
    default, given = NormalQuantilePostProcessor(), NormalQuantilePostProcessor(image_sensitivity=0.2)
    for post_processor in (default, given):
        post_processor.load_checkpoint_config(trained)
    assert (default.image_sensitivity, default.normal_quantile) == (0.7, 0.9)
    assert (given.image_sensitivity, given.pixel_sensitivity, given.normal_quantile) == (0.2, 0.5, 0.9)
    theirs = PostProcessor(image_sensitivity=0.2)
    theirs.load_checkpoint_config(trained)
    assert theirs.image_sensitivity == 0.7  # anomalib's post-processor takes the checkpoint's value
    assert normal_only(default).image_threshold.item() == pytest.approx(np.quantile(NORMAL_SCORES, 0.9), rel=1e-6)


def test_a_quantile_that_is_set_later_counts_in_the_next_validation():
    ours = NormalQuantilePostProcessor()
    ours.normal_quantile = 0.9
    assert normal_only(ours).image_threshold.item() == pytest.approx(np.quantile(NORMAL_SCORES, 0.9), rel=1e-6)


def test_checkpoints_of_anomalibs_post_processor_load():
    theirs, ours = normal_only(PostProcessor(image_sensitivity=0.7)), NormalQuantilePostProcessor()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    ours.load_checkpoint_config(theirs.checkpoint_config())
    assert values(ours) == values(theirs)
    assert (ours.image_sensitivity, ours.normal_quantile) == (0.7, 0.95)


@pytest.mark.parametrize(("images", "quantile", "needed"), [(19, 0.95, 20), (40, 0.99, 100), (20, 0.95, None)])
def test_too_few_normal_images_are_warned_of_once(images, quantile, needed, caplog):
    caplog.set_level(logging.WARNING)
    ours = NormalQuantilePostProcessor(normal_quantile=quantile)
    for _ in range(2):
        normal_only(ours, NORMAL_MAPS[:images])
    warning = f"validation has {images} normal images and no anomalous ones: .* {needed} or more"
    expected = [] if needed is None else [warning]
    assert len(caplog.messages) == len(expected)
    for message, pattern in zip(caplog.messages, expected, strict=True):
        assert re.search(pattern, message)


@pytest.mark.parametrize("name", ["normal_quantile", "image_sensitivity", "pixel_sensitivity"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ArgumentError, match=f"{name} {value!r} must be a number from 0 to 1"):
        NormalQuantilePostProcessor(**{name: value})


def test_models_use_it_by_default():
    assert isinstance(Dskd(teacher=TEACHER).post_processor, NormalQuantilePostProcessor)
    assert Dskd(teacher=TEACHER, post_processor=False).post_processor is None
    own = PostProcessor(image_sensitivity=0.3)
    assert Dskd(teacher=TEACHER, post_processor=own).post_processor is own
