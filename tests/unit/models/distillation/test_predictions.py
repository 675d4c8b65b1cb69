import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from PIL import Image

from anomalib_dskd import Dskd
from anomalib_dskd.models.distillation.callbacks import ReportPredictions, predictions
from anomalib_dskd.visualization import ResultVisualizer
from tests.conftest import TEACHER, engine


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normal textures, and four with a defect."""
    folder, random = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name, count in {"good": 24, "bad": 4}.items():
        (folder / name).mkdir()
        for index in range(count):
            pixels = random.integers(100, 150, (64, 64), dtype=np.uint8)
            if name == "bad":
                pixels[20:40, 20:40] = 255
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    return folder


def data(parts: Path) -> Folder:
    return Folder("parts", root=parts, normal_dir="good", abnormal_dir="bad", num_workers=0, seed=0)


@pytest.fixture(scope="module")
def trained(parts: Path, teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Dskd:
    model = Dskd(teacher=TEACHER, teacher_weights=teacher_weights, image_size=64, sigma=2.0, seed=0, visualizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path_factory.mktemp("run"), max_epochs=1).fit(model, datamodule=data(parts))
    return model


def run(stage: str, model: Dskd, folder: Path, **arguments):
    model.visualizer = ResultVisualizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(engine(folder), stage)(model, **arguments)


def test_a_prediction_writes_score_and_verdict_of_each_image(trained, parts, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="anomalib_dskd")
    batches = run("predict", trained, tmp_path, data_path=parts / "bad")
    expected = {batch.image_path[0]: batch.pred_score.item() for batch in batches}
    assert not [name for batch in batches for name in vars(batch) if name.startswith("raw_")]  # they take memory
    file = next(tmp_path.rglob("predictions.csv"))
    results = pd.read_csv(file)
    assert list(results.columns) == ["file", "score", "verdict"]
    assert list(results["file"]) == sorted(expected)
    assert list(results["score"]) == pytest.approx([expected[path] for path in results["file"]])
    assert list(results["verdict"]) == ["anomalous" if score > 0.5 else "normal" for score in results["score"]]
    assert len(list(file.parent.rglob("*.png"))) == 4  # beside the images
    assert [r.getMessage() for r in caplog.records][-2:] == [
        f"Scores: {file}",
        f"Images with anomaly maps: {file.parent}",
    ]


def test_a_test_writes_the_ground_truth_too(trained, parts, tmp_path):
    run("test", trained, tmp_path, datamodule=data(parts))
    results = pd.read_csv(next(tmp_path.rglob("predictions.csv")))
    folders = [Path(file).parent.name for file in results["file"]]
    assert set(folders) == {"good", "bad"}
    assert list(results["ground_truth"]) == [{"good": "normal", "bad": "anomalous"}[name] for name in folders]


def test_the_command_prints_a_table_and_keeps_no_predictions(trained, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anomalib", "predict"])
    monkeypatch.setenv("COLUMNS", "120")
    assert run("predict", trained, tmp_path, data_path=parts) is None
    output = capsys.readouterr().out
    results = pd.read_csv(next(tmp_path.rglob("predictions.csv")))
    rows = [line.split("│")[1:4] for line in output.splitlines() if line.startswith("│")]
    assert len(rows) == 20  # of 28, the highest first
    highest = results.nlargest(20, "score")
    assert {row[0].strip() for row in rows} == {"/".join(Path(file).parts[-2:]) for file in highest["file"]}
    assert [float(row[1]) for row in rows] == pytest.approx(list(highest["score"]), abs=0.01)
    number = (results["verdict"] == "anomalous").sum()
    assert f"{number} of 28 images are anomalous; the 20 highest scores are shown" in output


def test_nothing_is_printed_in_python(trained, parts, tmp_path, capsys):
    run("predict", trained, tmp_path, data_path=parts / "bad")
    assert "anomalous" not in capsys.readouterr().out


@pytest.mark.parametrize(("program", "files"), [("python", 0), ("anomalib", 1)])
def test_without_a_visualizer_only_the_command_writes_scores(
    trained, parts, tmp_path, program, files, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", [program, "predict"])
    caplog.set_level(logging.INFO, logger="anomalib_dskd")
    trained.visualizer = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path).predict(trained, data_path=parts / "bad")
    assert len(list(tmp_path.rglob("predictions.csv"))) == files
    assert "anomaly maps" not in caplog.text


def test_without_a_threshold_there_is_no_verdict_and_without_a_file_no_row():
    report = ReportPredictions()
    image, score = torch.zeros(1, 3, 8, 8), torch.tensor([0.25])
    report.on_test_batch_end(None, None, ImageBatch(image=image, pred_score=score))
    assert report.rows == []
    report.on_test_batch_end(None, None, ImageBatch(image=image, pred_score=score, image_path=["a.png"]))
    assert report.rows == [{"file": "a.png", "score": 0.25, "verdict": ""}]


def test_images_on_several_drives_are_named_whole(monkeypatch, capsys):
    def commonpath(_):
        raise ValueError("Paths don't have the same drive")  # as on Windows

    monkeypatch.setattr("os.path.commonpath", commonpath)
    predictions.print_table(pd.DataFrame({"file": ["/c/a.png", "/d/b.png"], "score": [0.6, 0.4], "verdict": "normal"}))
    printed = capsys.readouterr().out
    assert "│ /c/a.png" in printed  # and not relative to the working directory
    assert "│ /d/b.png" in printed
