import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_dskd.pixel_metrics import (
    BINS,
    PixelAUPRO,
    PixelAUROC,
    area_under_curve,
    bin_indices,
    bin_limits,
    find_best_threshold,
    weight_by_region,
)
from tests.conftest import plain_aupro


def images(seed: int = 0, *, scale: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Maps with defects of different sizes, one of two pixels that touch at a corner, and normal images."""
    random = np.random.default_rng(seed)
    masks = np.zeros((9, 20, 24), dtype=bool)
    masks[0, 2:9, 3:15] = masks[0, 12:14, 20:22] = masks[3, 5, 5] = masks[3, 6, 6] = masks[8, 0:2] = True
    maps = random.gamma(2, size=masks.shape) + 1.5 * masks * random.random(masks.shape)
    return (maps * scale + offset).astype(np.float32), masks


def updated(metric, maps: np.ndarray, masks: np.ndarray, size: int = 4):
    for start in range(0, len(maps), size):
        part = slice(start, start + size)
        metric.update(torch.from_numpy(maps[part])[:, None], torch.from_numpy(masks[part])[:, None])
    return metric


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (3e4, 0.0), (1.0, -3.0), (-1.0, 0.0)])
def test_areas_are_those_of_scikit_learn_and_of_a_plain_aupro_on_any_scale(scale, offset):
    maps, masks = images(scale=scale, offset=offset)
    assert updated(PixelAUROC(), maps, masks).compute() == pytest.approx(
        roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4
    )
    assert updated(PixelAUPRO(0.3), maps, masks).compute() == pytest.approx(plain_aupro(maps, masks), abs=1e-4)


def test_equal_scores_count_one_half():
    maps = np.round(images()[0])
    masks = images()[1]
    assert updated(PixelAUROC(), maps, masks).compute() == pytest.approx(
        roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6
    )
    constant = np.ones_like(maps)
    assert updated(PixelAUROC(), constant, masks).compute() == pytest.approx(0.5)
    assert updated(PixelAUPRO(0.3), constant, masks).compute() == pytest.approx(0.15)  # a straight line to (0.3, 0.3)


def test_areas_do_not_depend_on_batches_or_processes():
    maps, masks = images()
    for make in (PixelAUROC, lambda: PixelAUPRO(0.3)):
        expected = updated(make(), maps, masks, 9).compute().item()
        assert updated(make(), maps, masks, 1).compute().item() == pytest.approx(expected, abs=1e-7)
        first, second = updated(make(), maps[:5], masks[:5]), updated(make(), maps[5:], masks[5:])
        first.merge_state(second)  # as torchmetrics joins the states of processes
        assert first.compute().item() == pytest.approx(expected, abs=1e-7)


def test_counts_may_lie_on_another_device_than_the_metric():
    """On a GPU, anomalib's evaluator moves them to the CPU after each batch (``compute_on_cpu``)."""
    maps, masks = images()
    metric = updated(PixelAUROC(), maps[:5], masks[:5])
    metric._device = torch.device("meta")
    assert updated(metric, maps[5:], masks[5:]).compute() == updated(PixelAUROC(), maps, masks).compute()


def test_memory_does_not_grow_with_the_number_of_images():
    metric = PixelAUROC()
    assert not metric.normal_counts
    sizes = set()
    for seed in range(3):
        updated(metric, *images(seed))
        sizes.add(sum(counts.numel() for counts in (*metric.normal_counts, *metric.anomalous_counts)))
    assert sizes == {2 * BINS}
    metric.reset()
    assert not metric.normal_counts
    assert not metric.anomalous_counts


def test_bins_have_the_order_of_scores_and_contain_them():
    random = np.random.default_rng(0)
    scores = np.sort(np.concatenate([sign * 10 ** random.uniform(-30, 30, 500) for sign in (-1, 1)]))
    scores = torch.from_numpy(np.append(scores, [np.finfo(np.float32).max])).float()
    bins = bin_indices(scores)
    assert (bins.diff() >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < BINS
    for score, index in zip(scores.double().tolist()[:-1], bins.tolist()[:-1], strict=True):
        low, high = bin_limits(index)
        assert low <= score <= high
        assert high - low <= 5e-4 * abs(score)
    assert bin_indices(torch.tensor(-0.0)) == bin_indices(torch.tensor(0.0))


def test_each_region_weighs_one():
    masks = torch.from_numpy(images()[1])
    weights = weight_by_region(masks)
    assert weights.sum().item() == pytest.approx(4)
    assert weights[3, 5, 5].item() == weights[3, 6, 6].item() == 0.5  # one region: they touch at a corner
    assert weights[0, 12, 20].item() == 0.25
    assert not weights[~masks].any()


def test_the_area_up_to_a_limit_is_that_of_the_interpolated_curve():
    normal, anomalous = torch.tensor([2.0, 1.0, 1.0]).double(), torch.tensor([0.0, 1.0, 3.0]).double()
    # the curve: (0, 0), (1/4, 3/4), (1/2, 1), (1, 1)
    assert area_under_curve(normal, anomalous) == pytest.approx(3 / 32 + 7 / 32 + 1 / 2)
    assert area_under_curve(normal, anomalous, limit=0.5) == pytest.approx((3 / 32 + 7 / 32) / 0.5)
    to_limit = 3 / 32 + 0.1 * (0.75 + 0.85) / 2
    assert area_under_curve(normal, anomalous, limit=0.35) == pytest.approx(to_limit / 0.35)


def test_the_best_threshold_is_that_of_a_plain_search():
    maps, masks = images()
    threshold = find_best_threshold(*updated(PixelAUROC(), maps, masks).sum_counts())
    truth, scores = masks.ravel(), maps.ravel()
    best = max(f1_score(truth, scores >= candidate) for candidate in np.unique(scores[truth]))
    assert f1_score(truth, scores > threshold) == pytest.approx(best, abs=1e-3)
