"""Settings with which a result cannot be had: refused before training, or left out with the reason."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from anomalib.data import Folder
from anomalib.metrics import Evaluator, F1Score
from anomalib.post_processing import PostProcessor
from PIL import Image

from anomalib_dskd import Dskd
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from tests.conftest import TEACHER, engine

RANKING = {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"}
F1_SCORES = {"image_F1Score", "pixel_F1Score"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Small crops of a texture, some with an inverted square."""
    root, random = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 20:40] = 255
    for name, count in {"good": 8, "good_test": 4, "bad": 4, "masks": 4}.items():
        (root / name).mkdir()
        for index in range(count):
            top, left = random.integers(0, 448, size=2)
            pixels = skimage.data.brick()[top : top + 64, left : left + 64].copy()
            pixels ^= mask if name == "bad" else 0
            Image.fromarray(mask if name == "masks" else pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def train(parts, teacher_weights, tmp_path):
    """A function that trains and tests a model, and returns the names of its metrics."""

    def run(model: dict | None = None, data: dict | None = None, **trainer) -> set[str]:
        weights = {"teacher": TEACHER, "teacher_weights": teacher_weights}
        built = Dskd(**weights, image_size=64, sigma=2.0, seed=0, visualizer=False, **(model or {}))
        folders = {"normal_test_dir": "good_test", "abnormal_dir": "bad", "mask_dir": "masks"}
        settings = {**folders, "val_split_mode": "same_as_test", **(data or {})}
        folder = Folder("parts", root=parts, normal_dir="good", num_workers=0, train_batch_size=4, seed=0, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (metrics,) = engine(tmp_path, **{"max_epochs": 1, **trainer}).train(built, datamodule=folder)
        return set(metrics)

    return run


def test_usual_settings_have_all_metrics_and_no_reason(train, caplog):
    assert train() == RANKING | F1_SCORES
    assert "n/a" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "reason"), [("none", "gives no validation images"), ("from_dir", "needs a validation folder")]
)
def test_a_split_without_validation_images_is_refused(mode, reason, train):
    message = f"val_split_mode '{mode}' {reason}.* Supported values: 'same_as_test', 'from_train'"
    with pytest.raises(ArgumentError, match=message):
        train(data={"val_split_mode": mode})


def test_an_empty_validation_split_is_refused(train):
    with pytest.raises(ArgumentError, match="validation split of the data is empty.* larger val_split_ratio than 0.01"):
        train(data={"val_split_mode": "from_train", "val_split_ratio": 0.01})


@pytest.mark.parametrize("mode", ["same_as_test", "none"])
def test_without_validation_there_are_no_f1_scores_and_it_is_said_at_the_start(mode, train, caplog):
    assert train(data={"val_split_mode": mode}, limit_val_batches=0) == RANKING
    told = [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_dskd")]
    assert told[0].startswith("there will be no validation, and so no thresholds")
    assert told[-1] == "n/a: no threshold: no validation has set one (image_F1Score, pixel_F1Score)"


@pytest.mark.parametrize(
    ("post_processor", "reason"),
    [
        (False, "no post_processor"),
        (PostProcessor(enable_thresholding=False), "the post_processor has enable_thresholding false"),
        (NormalQuantilePostProcessor(enable_thresholding=False), "the post_processor has enable_thresholding false"),
    ],
    ids=["none", "anomalib's", "ours"],
)
def test_without_labels_there_are_no_f1_scores(post_processor, reason, train, caplog):
    caplog.set_level(logging.WARNING, logger="anomalib_dskd")
    assert train({"post_processor": post_processor}) == RANKING
    assert f"n/a: {reason} (image_F1Score, pixel_F1Score)" in caplog.messages


def test_an_own_metric_that_needs_labels_is_refused_before_training(train):
    evaluator = Evaluator(test_metrics=[F1Score(fields=["pred_label", "gt_label"], prefix="image_")])
    with pytest.raises(ArgumentError, match="the evaluator's image_F1Score needs predicted labels"):
        train({"post_processor": False, "evaluator": evaluator})


def test_a_test_without_defects_has_no_metrics(train, caplog):
    normal = {"abnormal_dir": None, "mask_dir": None}
    assert not train(data=normal)
    assert "n/a: no anomalous images (image_AUROC, image_F1Score)" in caplog.messages
