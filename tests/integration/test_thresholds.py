"""Thresholds and scores of models that are trained and validated on normal images only."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image

from anomalib_dskd import Dskd
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from tests.conftest import engine
from tests.integration.conftest import ARGUMENTS, IMAGE_SENSITIVITY, NORMAL_QUANTILE, Trained


def raw_scores(model: Dskd, paths: list[str]) -> np.ndarray:
    images = torch.stack([torch.as_tensor(read_image(path, as_tensor=True)) for path in paths])
    with torch.no_grad():
        return model.model(model.pre_processor(images)).pred_score.flatten().numpy()


def test_threshold_is_the_quantile_of_the_validation_scores(trained: Trained):
    paths = list(trained.data.val_data.samples.image_path)
    assert not trained.data.val_data.samples.label_index.any()
    assert len(paths) == 6
    expected = np.quantile(raw_scores(trained.model, paths), NORMAL_QUANTILE)
    assert trained.model.post_processor.image_threshold.item() == pytest.approx(expected, rel=1e-4)
    assert trained.model.post_processor.image_max.item() == pytest.approx(2 * expected, rel=1e-4)


def test_predictions_of_the_checkpoint_are_shares_of_twice_the_threshold(
    trained: Trained, factory: Path, tmp_path: Path
):
    threshold = trained.model.post_processor.image_threshold.item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = PredictDataset(factory / "new")
        batches = engine(tmp_path).predict(Dskd(**ARGUMENTS), dataset=data, ckpt_path=trained.checkpoint)
    paths = [path for batch in batches for path in batch.image_path]
    scores = [score.item() for batch in batches for score in batch.pred_score]
    labels = [bool(label) for batch in batches for label in batch.pred_label]
    expected = np.clip(raw_scores(trained.model, paths) / (2 * threshold), 0, 1)
    assert min(expected) < 1  # otherwise all are clamped
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert labels == (expected > 1 - IMAGE_SENSITIVITY).tolist()


def test_checkpoint_has_the_settings_and_arguments_override_them(trained: Trained):
    loaded = Dskd.load_from_checkpoint(trained.checkpoint).post_processor
    assert (loaded.normal_quantile, loaded.image_sensitivity) == (NORMAL_QUANTILE, IMAGE_SENSITIVITY)
    own = NormalQuantilePostProcessor(image_sensitivity=0.3)
    given = Dskd.load_from_checkpoint(trained.checkpoint, post_processor=own).post_processor
    assert (given.normal_quantile, given.image_sensitivity) == (NORMAL_QUANTILE, 0.3)
    assert given.image_threshold == loaded.image_threshold == trained.model.post_processor.image_threshold


def test_checkpoints_without_a_quantile_load(trained: Trained, tmp_path: Path):
    contents = torch.load(trained.checkpoint, weights_only=True)
    del contents["anomalib_post_processor_config"]["normal_quantile"]
    torch.save(contents, tmp_path / "old.ckpt")
    loaded = Dskd.load_from_checkpoint(tmp_path / "old.ckpt").post_processor
    assert loaded.image_threshold == trained.model.post_processor.image_threshold
    assert loaded.normal_quantile == 0.95


def test_command_line_takes_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = "anomalib_dskd.post_processing.NormalQuantilePostProcessor"
    given = ["--model.post_processor", name, "--model.post_processor.normal_quantile", "0.99"]
    given += ["--model.post_processor.image_sensitivity", "0.6"]
    data = ["--data", "Folder", "--data.name", "parts", "--data.root", str(tmp_path), "--data.normal_dir", "good"]
    cli = AnomalibCLI(args=["train", "--model", "anomalib_dskd.Dskd", *given, *data], run=False)
    post_processor = cli.model.post_processor
    assert (post_processor.normal_quantile, post_processor.image_sensitivity) == (0.99, 0.6)
