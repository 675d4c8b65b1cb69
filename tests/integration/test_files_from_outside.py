"""Files that someone else has sent are data: what they hold is not run, and nothing is written where they point to."""

import csv
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import Folder, PredictDataset
from PIL import Image

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.cli import main
from anomalib_dskd.data.data_module_checks import check_names
from anomalib_dskd.errors import ArgumentError, CheckpointError, DataError, TeacherWeightsError
from tests.conftest import TEACHER, engine

ARGUMENTS = {"teacher": TEACHER, "image_size": 64, "sigma": 2.0, "visualizer": False}


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def as_checkpoint(trace: Path, path: Path, model: Dskd) -> None:
    torch.save({"state_dict": model.state_dict(), "callbacks": Malicious(trace)}, path)


def as_hyper_parameter(trace: Path, path: Path, model: Dskd) -> None:
    contents = {"state_dict": model.state_dict(), "hyper_parameters": {"teacher": TEACHER, "layers": Malicious(trace)}}
    torch.save({**contents, "pytorch-lightning_version": "2.5.0", "epoch": 0, "global_step": 0}, path)


def as_legacy_file(trace: Path, path: Path, model: Dskd) -> None:
    contents = {"state_dict": model.state_dict(), "callbacks": Malicious(trace)}
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def as_pickle(trace: Path, path: Path, _: Dskd) -> None:
    path.write_bytes(pickle.dumps(Malicious(trace)))


WRITERS = [as_checkpoint, as_hyper_parameter, as_legacy_file, as_pickle]


def commands(folder: Path, root: Path) -> dict[str, Callable[[Path], object]]:
    data = MagneticTile(root, train_batch_size=4)
    model, pictures = Dskd(**ARGUMENTS), PredictDataset(root / "MT_Free" / "Imgs")
    return {
        "fit": lambda path: engine(folder, max_epochs=1).fit(model, datamodule=data, ckpt_path=path),
        "validate": lambda path: engine(folder).validate(model, datamodule=data, ckpt_path=path),
        "test": lambda path: engine(folder).test(model, datamodule=data, ckpt_path=path),
        "predict": lambda path: engine(folder).predict(model, dataset=pictures, ckpt_path=path),
        "export": lambda path: engine(folder).export(model, "onnx", ckpt_path=path),
        "Python": Dskd.load_from_checkpoint,
    }


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "Python"])
def test_code_in_a_checkpoint_does_not_run(command, write, tiny_model, magnetic_tile_root, tmp_path):
    path, trace = tmp_path / "model.ckpt", tmp_path / "it_ran"
    write(trace, path, tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = commands(tmp_path, magnetic_tile_root)[command]
        with pytest.raises(CheckpointError, match=r"model.ckpt' is damaged, or holds more .* which was not run"):
            run(path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("command", ["fit", "test", "Python"])
def test_a_damaged_checkpoint_is_named(command, share, tiny_model, magnetic_tile_root, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tiny_model.state_dict(), "epoch": 0}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = commands(tmp_path, magnetic_tile_root)[command]
        with pytest.raises(CheckpointError, match=r"the checkpoint '.*model.ckpt' is damaged"):
            run(path)


def test_code_named_in_a_checkpoint_does_not_run(tiny_model, tmp_path, monkeypatch):
    """Lightning imports a function that a checkpoint of plain values may name: an allow-list stands before it."""
    (tmp_path / "sent_along.py").write_text(f"import os; os.mkdir({str(tmp_path / 'it_ran')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    hyper_parameters = {"teacher": TEACHER, "_instantiator": "sent_along.build"}
    contents = {"state_dict": tiny_model.state_dict(), "hyper_parameters": hyper_parameters, "epoch": 0}
    torch.save({**contents, "pytorch-lightning_version": "2.5.0", "global_step": 0}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="not in the allowlist"):
        Dskd.load_from_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("write", WRITERS)
def test_code_in_teacher_weights_does_not_run(write, tiny_model, magnetic_tile_root, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "it_ran"
    write(trace, path, tiny_model)
    model = Dskd(**ARGUMENTS, teacher_weights=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            TeacherWeightsError, match=r"weights.pth' (hold more than tensors .*were not run|cannot be read)"
        ):
            engine(tmp_path, max_epochs=1).fit(model, datamodule=MagneticTile(magnetic_tile_root, train_batch_size=4))
    assert not trace.exists()


def test_code_in_a_benchmarks_weights_does_not_run(tiny_model, magnetic_tile_root, tmp_path, capsys):
    path, trace = tmp_path / "weights.pth", tmp_path / "it_ran"
    as_checkpoint(trace, path, tiny_model)
    config = {
        "models": [{"model": {"class_path": "anomalib_dskd.Dskd", "init_args": {"teacher": TEACHER}}, "epochs": 1}],
        "datasets": [
            {"data": {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}}
        ],
        "image_size": 64,
        "weights": {TEACHER.partition(".")[0]: str(path)},
        "run_folder": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["benchmark", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "hold more than tensors" in capsys.readouterr().err
    assert not trace.exists()


# --- a run folder of someone else's ------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "jobs" / "0123456789ab").mkdir(parents=True)
    write_results(folder)
    return folder


def write_results(folder: Path, **changes: object) -> None:
    record = {
        "job": "0123456789ab",
        "status": "done",
        "model": "DSKD",
        "class_path": "anomalib_dskd.Dskd",
        "init_args": {},
        "data": "Parts",
        "category": None,
        "seed": 0,
        "epochs": 1,
        "epochs_source": "this configuration",
        "image_size": [64, 64],
        "precision": "32-true",
        "accelerator": "cpu",
        "metrics": {"image_AUROC": 0.9},
        **changes,
    }
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")


def write_predictions(folder: Path, paths: list[str], **changes: object) -> None:
    arrays = {
        "paths": np.array(paths),
        "labels": np.arange(len(paths)) % 2,
        "classes": np.array([""] * len(paths)),
        "scores": np.arange(len(paths), dtype=np.float32),
        "maps": np.random.default_rng(0).random((len(paths), 8, 8)).astype(np.float16),
        **changes,
    }
    np.savez_compressed(folder / "jobs" / "0123456789ab" / "predictions.npz", **arrays)


@pytest.mark.parametrize("job", ["../../outside", "/outside", "0123456789AB", "0123456789ab\n", "", 5, None])
def test_a_job_cannot_name_another_folder(job, run_folder):
    write_results(run_folder, job=job)
    with pytest.raises(DataError, match="is not the twelve hexadecimal digits that a benchmark gives"):
        write_report(run_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": ["a"]}, r"category \['a'\] is not a string or null"),
        ({"init_args": "x"}, "init_args 'x' is not a mapping"),
        ({"classes": []}, r"classes \[\] is not a mapping"),
        ({"weights": {}}, r"weights \{\} is not a list"),
    ],
)
def test_results_of_another_kind_are_refused(changes, message, run_folder):
    write_results(run_folder, **changes)
    with pytest.raises(DataError, match=message):
        write_report(run_folder)


@pytest.mark.parametrize("name", ["results.csv", "report.md", "report.html", "report.html.part"])
def test_a_link_in_a_run_folder_is_replaced_and_not_followed(name, run_folder, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (run_folder / name).symlink_to(precious)
    paths = write_report(run_folder)
    assert precious.read_text() == "mine"
    assert not any(path.is_symlink() for path in paths)
    assert "DSKD" in (run_folder / "report.html").read_text()
    assert {path.name for path in run_folder.iterdir()} == {"jobs", "results.jsonl", *(path.name for path in paths)}


def test_code_in_predictions_does_not_run(run_folder, tmp_path):
    trace = tmp_path / "it_ran"
    write_predictions(run_folder, ["a.png", "b.png"], classes=np.array([Malicious(trace), ""], dtype=object))
    with pytest.raises(DataError, match=r"predictions.npz' cannot be read: Object arrays cannot be loaded"):
        write_report(run_folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(5)}, "have the shapes"),
        ({"labels": np.array(["0", "1"])}, "are not numbers"),
        ({"maps": np.zeros((1, 8, 8))}, r"maps of 2 images have the shape \(1, 8, 8\)"),
        ({"maps": np.zeros((2, 8))}, r"have the shape \(2, 8\)"),
    ],
)
def test_forged_predictions_are_refused(changes, message, run_folder):
    write_predictions(run_folder, ["a.png", "b.png"], **changes)
    with pytest.raises(DataError, match=message):
        write_report(run_folder)


def test_predictions_that_would_fill_the_memory_are_not_unpacked(run_folder, monkeypatch):
    monkeypatch.setattr("anomalib_dskd.benchmark.predictions_file.MOST_BYTES", 10_000)
    write_predictions(run_folder, ["a.png", "b.png"], masks=np.zeros((2, 200, 200), dtype=np.uint8))
    with pytest.raises(
        DataError, match="predictions.npz' cannot be read: its uncompressed size is 0.0 GiB, the limit is 0 GiB"
    ):
        write_report(run_folder)


def test_pictures_that_are_not_safe_to_decode_are_left_out(run_folder, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "program.png", "EPS")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "picture.png")
    write_predictions(run_folder, [str(tmp_path / "program.png"), str(tmp_path / "picture.png")])
    write_report(run_folder)
    page = (run_folder / "report.html").read_text()
    assert page.count("the file cannot be read") == 1
    assert "Input picture.png" in page


FORMULAS = ["=HYPERLINK(1)", "+1", "-1", "@x", "\tx"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_finds_no_formulas(text, run_folder):
    write_results(run_folder, model=text, metrics={"image_AUROC": -0.25})
    write_report(run_folder)
    with (run_folder / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == f"'{text}"
    assert row["image_AUROC_fraction"] == "-0.25"  # a number stays one


@pytest.mark.parametrize("hostile", ["<script>x</script>\"'", "</title><img src=x onerror=x>"])
@pytest.mark.parametrize("field", ["model", "data", "category", "epochs_source", "precision"])
def test_texts_are_not_markup(field, hostile, run_folder):
    write_results(run_folder, **{field: hostile})
    harmless = shutil.copytree(run_folder, run_folder.parent / "harmless")
    write_results(harmless)
    for folder in (run_folder, harmless):
        write_report(folder)
    tags = [
        {tag: (folder / "report.html").read_text().count(tag) for tag in ("<script", "<img", "onerror=")}
        for folder in (run_folder, harmless)
    ]
    assert tags[0]["<script"] == tags[1]["<script"]
    assert tags[0]["<img"] == tags[1]["<img"]


# --- names as folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "..\\elsewhere", "a/../../b", "C:\\elsewhere"])
@pytest.mark.parametrize("what", ["name", "category"])
def test_results_stay_in_their_folder(what, name, tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "good.png")
    data = Folder(name if what == "name" else "parts", normal_dir=tmp_path, num_workers=0)
    if what == "category":
        data.category = name
    with pytest.raises(ArgumentError, match=rf"^{what} '.*' of the data would put results outside of their folder"):
        check_names(data)


def test_a_training_with_such_a_name_leaves_no_file(tiny_model, tmp_path):
    for index in range(8):
        Image.new("RGB", (80, 80), (index, 0, 0)).save(tmp_path / f"{index}.png")
    data = Folder("../../elsewhere", normal_dir=tmp_path, num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArgumentError, match="outside of their folder. Give a name, not a path"):
            engine(tmp_path / "results", max_epochs=1).fit(tiny_model, datamodule=data)
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["parts", "my parts", "a/b", "parts.v2", ".hidden", ""])
def test_usual_names_are_legal(name, tmp_path):
    check_names(Folder(name, normal_dir=tmp_path))
