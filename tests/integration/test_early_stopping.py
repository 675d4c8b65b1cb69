"""Stopping by metrics on pseudo-defects, with the configuration that users add to their own."""

from pathlib import Path

import pytest
import torch
import yaml

from anomalib_dskd import Dskd
from tests.commands import QUIET, checkpoints, run, start_server
from tests.conftest import TEACHER

EARLY_STOPPING = Path(__file__).parents[2] / "configs" / "early_stopping.yaml"
PATIENCE = 4  # looks


@pytest.fixture(scope="module")
def base(teacher_weights: Path, magnetic_tile_root: Path, tmp_path_factory) -> Path:
    """A configuration whose students learn too slowly for any figure to change."""
    model = {"teacher": TEACHER, "teacher_weights": str(teacher_weights), "layers": [1, 2], "image_size": 64}
    model |= {"sigma": 2.0, "seed": 0, "learning_rate": 1e-30}
    data = {"root": str(magnetic_tile_root), "train_batch_size": 2}
    written = {
        "model": {"class_path": "anomalib_dskd.Dskd", "init_args": model},
        "data": {"class_path": "anomalib_dskd.MagneticTile", "init_args": data},
    }
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def test_a_training_without_progress_stops_and_its_best_checkpoint_can_be_tested(base, tmp_path):
    start_server()
    configs = ["--config", base, "--config", EARLY_STOPPING]
    short = ["--trainer.max_epochs", "20", "--trainer.check_val_every_n_epoch", "2", "--data.val_split_ratio", "0.5"]
    run("fit", *configs, *short, *QUIET, folder=tmp_path)
    kept = {path.name: torch.load(path, weights_only=False)["epoch"] for path in checkpoints(tmp_path)}
    assert kept == {"best.ckpt": 1, "model.ckpt": 1 + 2 * PATIENCE}
    best = next(tmp_path.rglob("best.ckpt"))
    post_processor = Dskd.load_from_checkpoint(best).post_processor
    assert post_processor.image_threshold.isfinite()
    twice = 2 * post_processor.image_threshold.item()  # what it would be with good pictures alone
    assert post_processor.image_max.item() != pytest.approx(twice, rel=1e-3)
    printed = run("test", "--config", base, "--ckpt_path", best, *QUIET, folder=tmp_path)
    assert all(figure in printed for figure in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"))
