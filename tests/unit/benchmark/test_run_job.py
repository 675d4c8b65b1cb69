import dataclasses
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from anomalib import LearningType
from anomalib.data import Folder
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_dskd import Dskd, Tad
from anomalib_dskd.benchmark import build_job, run_job
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, Measurements, ModelSpec, Task, expand
from anomalib_dskd.benchmark.job_result import Cost, Weights
from anomalib_dskd.benchmark.machine import describe_machine
from anomalib_dskd.benchmark.run_benchmark import _tasks
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.runners import LocalRunner
from anomalib_dskd.errors import ArgumentError, DataError
from tests.conftest import ASSISTANT, TEACHER


@pytest.fixture
def job(magnetic_tile_root):
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    models = [ModelSpec({"class_path": "anomalib_dskd.Dskd"}, epochs=1)]
    return expand(BenchmarkConfig(models=models, datasets=[DatasetSpec(data)], image_size=96))[0]


@pytest.mark.parametrize("model", ["anomalib_dskd.Dskd", "anomalib.models.Padim"])
def test_a_job_with_wrong_masks_is_refused(model, tmp_path):
    for name in ("good/0", "good/1", "bad/1", "masks/12"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks"}
    arguments = {"name": "parts", "root": str(tmp_path), "num_workers": 0, "val_split_mode": "same_as_test", **folders}
    data = {"class_path": "anomalib.data.Folder", "init_args": arguments}
    network = {"pre_trained": False} if model.endswith("Padim") else {"teacher": TEACHER}
    specification = ModelSpec({"class_path": model, "init_args": network}, epochs=1)
    config = BenchmarkConfig(models=[specification], datasets=[DatasetSpec(data)], image_size=64)
    with pytest.raises(DataError, match=r"bad/1.png' with '.*masks/12.png'"):
        run_job.run_job(expand(config)[0], tmp_path / "job", lambda *_: None)


def test_a_measurement_that_fails_becomes_a_note(job, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such\n operator")

    monkeypatch.setattr(run_job, "measure_cost", lambda *_: {"macs": 5})
    monkeypatch.setattr(run_job, "measure_pytorch", lambda *_, **__: 2.5)
    monkeypatch.setattr(run_job, "measure_openvino", fail)
    job = dataclasses.replace(job, measure=Measurements(speed=True, int8=True, seconds=1.0))
    speed, cost, notes = run_job._measure(job, None, None, Cost(trained_parameters=0, peak_memory_mib=7.0))
    assert cost == Cost(macs=5, trained_parameters=0, peak_memory_mib=7.0)
    assert speed.pytorch_ms == 2.5
    assert speed.openvino_ms is None
    assert notes == [
        "OpenVINO: RuntimeError: no such operator",
        "OpenVINO INT8: RuntimeError: no such operator",
    ]


def test_openvino_measurements_are_part_of_the_result(job, monkeypatch):
    result = {"milliseconds": 3.0, "throughput": 400.0, "batch": 4, "mib": 80.0, "label_f1": 0.75}
    monkeypatch.setattr(run_job, "measure_cost", lambda *_: {})
    monkeypatch.setattr(run_job, "measure_pytorch", lambda *_, **__: 2.5)
    monkeypatch.setattr(run_job, "measure_openvino", lambda *_, **__: result)
    job = dataclasses.replace(job, measure=Measurements(speed=True, int8=True, seconds=1))
    speed, cost, notes = run_job._measure(job, None, None, Cost())
    assert vars(speed) == {
        "pytorch_ms": 2.5,
        "openvino_ms": 3.0,
        "openvino_int8_ms": 3.0,
        "throughput": 400.0,
        "throughput_batch": 4,
    }
    assert (cost.export_mib, cost.int8_F1_at_threshold) == (80.0, 0.75)
    assert notes == []


@pytest.mark.parametrize(
    ("class_path", "size_in"),
    [
        ("anomalib_dskd.Dskd", "image_size"),
        ("anomalib.models.FoundAD", "image_size"),  # takes one side
        ("anomalib.models.Padim", "pre_processor"),
    ],
)
def test_models_get_the_image_size_by_the_argument_that_they_have(job, class_path, size_in):
    arguments = build_job._model_arguments(dataclasses.replace(job, class_path=class_path))
    assert {"evaluator", "visualizer", size_in} == set(arguments)
    assert arguments["evaluator"] is False
    if size_in == "image_size":
        assert arguments["image_size"] == (96 if class_path.endswith("FoundAD") else (96, 96))
    else:
        assert list(arguments["pre_processor"].transform.transforms[0].size) == [96, 96]


class Base:
    def __init__(self, image_size: tuple[int, int] | int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size


class Forwarding(Base, AnomalibModule):
    """A model with one argument of its own, which forwards all others to its bases."""

    learning_type = LearningType.ONE_CLASS
    trainer_arguments = {}  # noqa: RUF012

    def __init__(self, fusion: str = "learned", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fusion = fusion


def test_arguments_that_are_forwarded_to_base_classes_are_found(job):
    names = {"fusion", "image_size", "pre_processor", "post_processor", "evaluator", "visualizer"}
    assert build_job.parameter_names(Forwarding) == names
    job = dataclasses.replace(job, class_path=f"{__name__}.Forwarding", init_args={"fusion": "equal"})
    expected = {"visualizer": False, "evaluator": False, "fusion": "equal", "image_size": (96, 96)}
    assert build_job._model_arguments(job) == expected
    build_job.check_job(job)
    with pytest.raises(ArgumentError, match="(?s)'fusoin' is not accepted"):
        build_job.check_job(dataclasses.replace(job, init_args={"fusoin": "equal"}))


@pytest.mark.parametrize(
    ("transforms", "notes"),
    [
        ([Resize((96, 96))], []),
        (
            [Resize((240, 240)), CenterCrop(224)],
            ["uses images of 224 x 224 pixels instead of the benchmark's image size"],
        ),
    ],
    ids=["same size", "other size"],
)
def test_a_model_with_another_image_size_has_a_note(transforms, notes, job):
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the tiny teacher's
    model = Dskd(teacher=TEACHER, pre_processor=PreProcessor(transform=Compose([*transforms, normalize])))
    assert run_job._notes(job, model, is_shared=False) == notes


def test_weights_are_those_of_the_teacher_and_not_of_untrained_networks(job, tiny_model):
    name, other = TEACHER.partition(".")[0], ASSISTANT
    assert run_job._weights(job, tiny_model) == [Weights(name, **tiny_model.model.teacher.weights_origin)]
    tad = Tad(teacher=TEACHER, assistant=other, image_size=64)
    tad.model.teacher.weights_origin = {"file": "of the cache"}
    given = [{"name": name, "file": "a", "sha256": "1"}, {"name": other, "file": "b", "sha256": "2"}]
    job = dataclasses.replace(job, weights=given)
    assert run_job._weights(job, tad) == [Weights(**given[0])]
    peer = SimpleNamespace(modules=lambda: [timm.create_model(other, features_only=True), torch.nn.ReLU()])
    assert run_job._weights(job, peer) == [Weights(**given[1])]


@pytest.mark.parametrize(
    ("class_path", "init_args", "message"),
    [
        ("anomalib.models.Padim", {"bckbone": "resnet18"}, "'anomalib.models.Padim' .* 'bckbone' is not accepted"),
        ("anomalib.models.Nope", {}, "has no attribute 'Nope'"),
        ("anomalib_dskd.MagneticTile", {}, "is not a model that can be built"),
        ("json.loads", {}, "is not a model that can be built"),
        ("nowhere.Model", {}, "is not a model that can be built"),
    ],
)
def test_models_that_cannot_be_built_are_an_error(job, class_path, init_args, message):
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        build_job.check_job(dataclasses.replace(job, class_path=class_path, init_args=init_args))


@pytest.fixture
def tiny_job(job, teacher_weights):
    arguments = {"teacher": TEACHER, "teacher_weights": str(teacher_weights), "sigma": 2.0}
    return dataclasses.replace(
        job, init_args=arguments, image_size=(64, 64), measure=Measurements(speed=False, int8=False, seconds=1)
    )


def with_arguments(job, **arguments):
    return dataclasses.replace(job, init_args={**job.init_args, **arguments})


def test_jobs_with_equal_training_share_a_training_run(job):
    same = [job, with_arguments(job, map_layers=[2]), with_arguments(job, map_pair="E-D", sigma=1.0)]
    other = [
        with_arguments(job, losses="decoder"),
        with_arguments(job, l2_weight=0.2),
        dataclasses.replace(job, seed=1),
        dataclasses.replace(job, epochs=2),
        dataclasses.replace(job, precision="bf16-mixed"),
    ]
    assert len({run_job.training_run_id(one) for one in same}) == 1
    assert len({run_job.training_run_id(one) for one in [job, *other]}) == 6
    assert run_job.training_run_id(dataclasses.replace(job, class_path="anomalib.models.Padim")) is None


def test_only_shared_training_runs_have_a_checkpoint(job, tmp_path):
    single, first, second = with_arguments(job, losses="decoder"), job, with_arguments(job, map_layers=[2])
    with RunFolder(tmp_path / "run", "config") as folder:
        tasks = _tasks([single, first, second], set(), folder)
        assert tasks[0].checkpoint is None
        assert tasks[1].checkpoint == tasks[2].checkpoint == folder.checkpoint(run_job.training_run_id(first))
        left = _tasks([single, first, second], {first.id}, folder)  # the first was done before the process was killed
    assert [(task.job, task.checkpoint) for task in left] == [(single, None), (second, tasks[1].checkpoint)]


@pytest.mark.parametrize(
    "arguments",
    [{"map_layers": [2]}, {"sigma": 0.0}, {"sigma": 1.0}, {"sigma": 1.9}],  # 1.9: a blur of the same size as 2
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # of libraries
def test_a_shared_training_run_gives_the_same_results_as_a_separate_one(arguments, tiny_job, tmp_path):
    other_map = with_arguments(tiny_job, **arguments)
    results = {}
    for name, job, checkpoint in (
        ("first", tiny_job, tmp_path / "checkpoints" / "shared.pt"),
        ("shared", other_map, tmp_path / "checkpoints" / "shared.pt"),
        ("separate", other_map, None),
    ):
        (tmp_path / name).mkdir()
        results[name] = run_job.run_job(job, tmp_path / name, lambda *_: None, checkpoint)
    assert results["shared"].training == results["first"].training
    assert [result.notes for result in results.values()] == [
        [],
        ["shares the training run of another row: training time and memory are those of that row"],
        [],
    ]
    assert [weights.file for weights in results["shared"].weights] == [f"{TEACHER}.safetensors"]
    assert results["shared"].cost.trained_parameters == results["separate"].cost.trained_parameters > 0
    assert vars(results["shared"].metrics) == pytest.approx(vars(results["separate"].metrics), abs=1e-4)
    maps = {name: np.load(tmp_path / name / "predictions.npz")["maps"] for name in results}
    np.testing.assert_allclose(maps["shared"], maps["separate"], atol=1e-3)  # stored as FP16
    assert np.abs(maps["shared"] - maps["first"]).max() > 5e-3


def test_kinds_of_defects_of_a_folder_are_the_names_of_their_folders(tmp_path):
    for name in ("good", "bad/crack", "bad/scratch"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    data = Folder(
        "parts",
        root=tmp_path,
        normal_dir="good",
        abnormal_dir=["bad/crack", "bad/scratch"],
        val_split_mode="same_as_test",
    )
    data.setup()
    kinds = run_job.kinds_of_defects(data.test_data.samples)
    defects = {Path(path).parent.name: kind for path, kind in kinds.items() if "bad" in path}
    assert defects == {"crack": "crack", "scratch": "scratch"}


def test_kinds_of_defects_do_not_depend_on_how_pandas_stores_roles():
    samples = pd.DataFrame({"image_path": ["bad/crack/0.png"], "label": ["abnormal"]})
    assert run_job.kinds_of_defects(samples) == {"bad/crack/0.png": "crack"}


def test_kinds_of_defects_are_the_labels_of_the_data_set():
    samples = pd.DataFrame({"image_path": ["test/a/0.png", "test/b/1.png"], "label": ["broken", "good"]})
    assert run_job.kinds_of_defects(samples) == {"test/a/0.png": "broken", "test/b/1.png": "good"}
    assert set(run_job.kinds_of_defects(samples[["image_path"]]).values()) == {""}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("Afkd", {"fusion": "equal"}), ("Dtgd", {"gate": False}), ("Tad", {"assistant": ASSISTANT})],
)
@pytest.mark.filterwarnings("ignore")  # of libraries
def test_metrics_of_the_sibling_models_are_computed(kind, arguments, tiny_job, tmp_path):
    job = dataclasses.replace(with_arguments(tiny_job, **arguments), class_path=f"anomalib_dskd.{kind}", epochs=2)
    result = run_job.run_job(job, tmp_path, lambda *_: None)
    assert (result.status, result.training.epochs, result.notes) == ("done", 2, [])
    with np.load(tmp_path / "predictions.npz") as archive:
        expected = roc_auc_score(archive["labels"], archive["scores"])
        predicted = f1_score(archive["labels"], archive["predicted_labels"])
    assert result.metrics.image_AUROC == pytest.approx(expected, abs=1e-4)
    assert result.metrics.image_F1_at_threshold == pytest.approx(predicted, abs=1e-6)
    assert [weights.name for weights in result.weights] == [TEACHER.partition(".")[0]]


def test_a_job_whose_process_is_killed_has_failed(tiny_job, tmp_path):
    def kill(_job, _fraction, text):
        if text.startswith("epoch"):
            for process in multiprocessing.active_children():
                process.kill()

    result = LocalRunner({}, kill).run_one(Task(tiny_job, tmp_path))
    assert result.status == "failed"
    assert "was killed by signal 9" in result.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries
def test_speed_and_cost_of_a_real_model_are_measured(tiny_job, tmp_path):
    measure = Measurements(speed=True, int8=True, seconds=0.1)
    result = run_job.run_job(dataclasses.replace(tiny_job, measure=measure), tmp_path, lambda *_: None)
    assert result.notes == []
    assert all(value > 0 for value in vars(result.speed).values())
    assert result.speed.throughput_batch in {1, 4, 16}
    assert all(value > 0 for value in vars(result.cost).values())
    assert result.cost.trained_parameters < result.cost.parameters


def test_results_stay_in_the_run_folder(job, tmp_path):
    data = {"name": "../../elsewhere", "normal_dir": str(tmp_path)}
    job = dataclasses.replace(job, data_class_path="anomalib.data.Folder", data_init_args=data)
    with pytest.raises(ArgumentError, match="'../../elsewhere' of the data would put results outside of their folder"):
        run_job.run_job(job, tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_a_machine_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert describe_machine("auto").gpu == "a GPU"
    described = describe_machine("cpu")
    assert described.gpu is None
    assert described.cores >= 1
    assert described.torch.startswith("2.")
    assert described.anomalib_dskd
