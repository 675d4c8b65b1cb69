"""The command ``anomalib-dskd benchmark`` as a user types it, on small real images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from safetensors.torch import save_file

from anomalib_dskd.cli import main
from tests.conftest import TEACHER

COMMAND = [sys.executable, "-W", "ignore", "-m", "anomalib_dskd.cli"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights with the shapes of ResNet18."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


def config(root: Path, **changes) -> dict:
    dskd = {"class_path": "anomalib_dskd.Dskd", "init_args": {"teacher": TEACHER.partition(".")[0], "sigma": 2.0}}
    padim = {
        "class_path": "anomalib.models.Padim",
        "init_args": {"backbone": "resnet18", "layers": ["layer1"], "n_features": 10},
    }
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(root), "train_batch_size": 4}}
    return {
        "models": [{"name": "DSKD", "model": dskd, "epochs": 2}, {"name": "PaDiM", "model": padim}],
        "datasets": [{"data": data}],
        "image_size": 64,
        "measure": {"speed": False},
        **changes,
    }


@pytest.fixture
def command(magnetic_tile_root, teacher_weights, weights, tmp_path):
    """A function that starts the benchmark with a configuration."""

    def start(*arguments: str, **changes) -> subprocess.Popen:
        path = tmp_path / "config.yaml"
        files = {TEACHER.partition(".")[0]: str(teacher_weights), "resnet18": str(weights)}
        path.write_text(yaml.safe_dump(config(magnetic_tile_root, weights=files, **changes)))
        return subprocess.Popen(
            [*COMMAND, "benchmark", "--config", str(path), "--run_folder", str(tmp_path / "run"), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    return start


def results(folder: Path) -> list[dict]:
    path = folder / "run" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_killed_benchmark_is_resumed_and_repeats_no_job(command, tmp_path, capsys):
    process = command()
    deadline = time.monotonic() + 200
    logs = (tmp_path / "run" / "jobs").glob
    while process.poll() is None and time.monotonic() < deadline:
        second = results(tmp_path) and [
            log for log in logs("*/log.txt") if log.parent.name != results(tmp_path)[0]["job"]
        ]
        if second and "GPU available" in second[0].read_text():  # its Trainer is created
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (first,) = results(tmp_path)
    again = command()
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    dskd, padim = results(tmp_path)
    assert dskd == first
    assert (dskd["model"], padim["model"]) == ("DSKD", "PaDiM")
    assert "2 of 2: PaDiM on MagneticTile, seed 0: image_AUROC" in " ".join(errors.split())
    assert dskd["training"]["epochs"] == 2
    assert [[weights["name"] for weights in record["weights"]] for record in (dskd, padim)] == [
        ["test_efficientnet"],
        ["resnet18"],
    ]
    with np.load(tmp_path / "run" / "jobs" / padim["job"] / "predictions.npz") as archive:
        assert archive["maps"].shape == (12, 64, 64)
        assert archive["scores"].max() > 1  # a distance, neither normalized nor clamped
        assert sorted(set(archive["classes"])) == ["Blowhole", "Break", "Crack", "Fray", "Free", "Uneven"]
    assert {path.name for path in (tmp_path / "run").glob("r*.*")} >= {"report.html", "report.md", "results.csv"}

    arguments = ["benchmark", "--config", str(tmp_path / "config.yaml"), "--run_folder", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert results(tmp_path) == [dskd, padim]  # all jobs were done
    assert main([*arguments, "--image_size", "96"]) == 2
    errors = capsys.readouterr().err
    assert "-image_size: 64" in errors
    assert "+image_size: 96" in errors
    assert results(tmp_path) == [dskd, padim]


def test_a_job_that_fails_is_a_row_and_the_others_are_run(command, tmp_path):
    broken = {"class_path": "anomalib_dskd.Dskd", "init_args": {"teacher": "test_efficientnet", "layers": [1, 9]}}
    models = [
        {"name": "broken", "model": broken, "epochs": 1},
        config(tmp_path)["models"][1],
    ]
    process = command(models=models)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    failed, done = results(tmp_path)
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert "layers [1, 9] do not fit teacher 'test_efficientnet'" in failed["reason"]
    assert "FAILED" in errors
    assert "layers [1, 9] do not fit" in (tmp_path / "run" / "results.csv").read_text()


@pytest.mark.slow
def test_equal_seeds_give_equal_results(command, tmp_path):
    models = config(tmp_path)["models"][:1]
    scores = []
    for name in ("a", "b"):
        process = command("--run_folder", str(tmp_path / name / "run"), models=models)
        process.communicate(timeout=300)
        (result,) = results(tmp_path / name)
        with np.load(tmp_path / name / "run" / "jobs" / result["job"] / "predictions.npz") as archive:
            scores.append(archive["scores"])
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [{"model": {"class_path": "anomalib.models.Nope"}, "epochs": 1}]}, "has no attribute 'Nope'"),
        ({"weights": {"resnet18": "gone.safetensors"}}, "'gone.safetensors' does not exist"),
        ({"datasets": []}, "datasets is empty"),
    ],
)
def test_a_faulty_configuration_is_an_error_before_training(changes, message, magnetic_tile_root, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(magnetic_tile_root, **changes)))
    assert main(["benchmark", "--config", str(path), "--run_folder", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_the_report_of_a_missing_folder_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
