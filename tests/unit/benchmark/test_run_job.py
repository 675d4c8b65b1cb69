import dataclasses
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from anomalib.pre_processing import PreProcessor
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_dskd import Dskd, Tad
from anomalib_dskd.benchmark import run_job
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, ModelSpec, Task, expand
from anomalib_dskd.benchmark.machine import machine
from anomalib_dskd.benchmark.run_benchmark import _tasks
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.runners import LocalRunner
from anomalib_dskd.errors import ArgumentError
from tests.conftest import TEACHER


@pytest.fixture
def job(magnetic_tile_root):
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    models = [ModelSpec({"class_path": "anomalib_dskd.Dskd"}, epochs=1)]
    return expand(BenchmarkConfig(models=models, datasets=[DatasetSpec(data)], image_size=96))[0]


def test_what_cannot_be_measured_costs_no_other_figure(job, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such\n operator")

    monkeypatch.setattr(run_job, "measure_cost", lambda *_: {"macs": 5})
    monkeypatch.setattr(run_job, "measure_pytorch", lambda *_, **__: 2.5)
    monkeypatch.setattr(run_job, "measure_openvino", fail)
    job = dataclasses.replace(job, measure={"speed": True, "int8": True, "seconds": 1.0})
    measured = run_job._measure(job, None, None, 0)
    assert measured["cost"] == {"macs": 5, "export_mib": None}
    assert measured["speed"]["pytorch_ms"] == 2.5
    assert measured["speed"]["openvino_ms"] is None
    assert measured["notes"] == [
        "OpenVINO: RuntimeError: no such operator",
        "OpenVINO INT8: RuntimeError: no such operator",
    ]


def test_openvino_figures_reach_the_record(job, monkeypatch):
    result = {"milliseconds": 3.0, "throughput": 400.0, "batch": 4, "mib": 80.0}
    monkeypatch.setattr(run_job, "measure_cost", lambda *_: {})
    monkeypatch.setattr(run_job, "measure_pytorch", lambda *_, **__: 2.5)
    monkeypatch.setattr(run_job, "measure_openvino", lambda *_, **__: result)
    measured = run_job._measure(
        dataclasses.replace(job, measure={"speed": True, "int8": False, "seconds": 1}), *[None] * 3
    )
    assert measured["speed"] == {
        "pytorch_ms": 2.5,
        "openvino_ms": 3.0,
        "openvino_int8_ms": None,
        "throughput": 400.0,
        "throughput_batch": 4,
    }
    assert measured["cost"]["export_mib"] == 80.0
    assert measured["notes"] == []


@pytest.mark.parametrize(
    ("class_path", "size_in"),
    [
        ("anomalib_dskd.Dskd", "image_size"),
        ("anomalib.models.FoundAD", "image_size"),  # which takes one side
        ("anomalib.models.Padim", "pre_processor"),
    ],
)
def test_every_model_gets_the_size_in_its_own_way(job, class_path, size_in):
    arguments = run_job._model_arguments(dataclasses.replace(job, class_path=class_path))
    assert {"evaluator", "visualizer", size_in} == set(arguments)
    assert arguments["evaluator"] is False
    if size_in == "image_size":
        assert arguments["image_size"] == (96 if class_path.endswith("FoundAD") else (96, 96))
    else:
        assert list(arguments["pre_processor"].transform.transforms[0].size) == [96, 96]


@pytest.mark.parametrize(
    ("transforms", "notes"),
    [
        ([Resize((96, 96))], []),
        (
            [Resize((240, 240)), CenterCrop(224)],
            ["takes images of 224 x 224 pixels, whatever size the benchmark asks for"],
        ),
    ],
    ids=["its size", "another"],
)
def test_a_model_with_a_size_of_its_own_is_told(transforms, notes, job):
    normalise = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # the tiny teacher's
    model = Dskd(teacher=TEACHER, pre_processor=PreProcessor(transform=Compose([*transforms, normalise])))
    assert run_job._notes(job, model, is_shared=False) == notes


def test_weights_are_those_of_the_teacher_and_not_of_what_starts_at_random(job, tiny_model):
    name, other = TEACHER.partition(".")[0], "test_efficientnet"
    assert run_job._weights(job, tiny_model) == [{"name": name, **tiny_model.model.teacher.weights_origin}]
    tad = Tad(teacher=TEACHER, assistant=other, image_size=64)
    tad.model.teacher.weights_origin = {"file": "of the cache"}
    given = [{"name": name, "file": "a", "sha256": "1"}, {"name": other, "file": "b", "sha256": "2"}]
    job = dataclasses.replace(job, weights=given)
    assert run_job._weights(job, tad) == given[:1]
    peer = SimpleNamespace(modules=lambda: [timm.create_model(other, features_only=True), torch.nn.ReLU()])
    assert run_job._weights(job, peer) == given[1:]


@pytest.mark.parametrize(
    ("class_path", "init_args", "message"),
    [
        ("anomalib.models.Padim", {"bckbone": "resnet18"}, "'anomalib.models.Padim' .* 'bckbone' is not accepted"),
        ("anomalib.models.Nope", {}, "has no attribute 'Nope'"),
        ("anomalib_dskd.MagneticTile", {}, "is no model that can be built"),
        ("json.loads", {}, "is no model that can be built"),
        ("nowhere.Model", {}, "is no model that can be built"),
    ],
)
def test_models_that_cannot_be_built_are_refused(job, class_path, init_args, message):
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        run_job.check_job(dataclasses.replace(job, class_path=class_path, init_args=init_args))


@pytest.fixture
def tiny_job(job, teacher_weights):
    arguments = {"teacher": TEACHER, "teacher_weights": str(teacher_weights), "sigma": 2.0}
    return dataclasses.replace(
        job, init_args=arguments, image_size=(64, 64), measure={"speed": False, "int8": False, "seconds": 1}
    )


def with_arguments(job, **arguments):
    return dataclasses.replace(job, init_args={**job.init_args, **arguments})


def test_jobs_share_a_training_where_it_is_the_same(job):
    same = [job, with_arguments(job, map_layers=[2]), with_arguments(job, map_pair="E-D", sigma=1.0)]
    other = [
        with_arguments(job, losses="decoder"),
        with_arguments(job, l2_weight=0.2),
        dataclasses.replace(job, seed=1),
        dataclasses.replace(job, epochs=2),
        dataclasses.replace(job, precision="bf16-mixed"),
    ]
    assert len({run_job.training_id(one) for one in same}) == 1
    assert len({run_job.training_id(one) for one in [job, *other]}) == 6
    assert run_job.training_id(dataclasses.replace(job, class_path="anomalib.models.Padim")) is None


def test_only_a_training_that_is_shared_is_kept(job, tmp_path):
    alone, first, second = with_arguments(job, losses="decoder"), job, with_arguments(job, map_layers=[2])
    with RunFolder(tmp_path / "run", "config") as folder:
        tasks = _tasks([alone, first, second], set(), folder)
        assert tasks[0].training is None
        assert tasks[1].training == tasks[2].training == folder.training(run_job.training_id(first))
        left = _tasks([alone, first, second], {first.id}, folder)  # of which one was done before a kill
    assert [(task.job, task.training) for task in left] == [(alone, None), (second, tasks[1].training)]


@pytest.mark.parametrize(
    "arguments",
    [{"map_layers": [2]}, {"sigma": 0.0}, {"sigma": 1.0}, {"sigma": 1.9}],  # 1.9: a blur of the same size as 2
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_a_shared_training_gives_what_a_training_of_its_own_gives(arguments, tiny_job, tmp_path):
    other_map = with_arguments(tiny_job, **arguments)
    records = {}
    for name, job, training in (
        ("whole", tiny_job, tmp_path / "trainings" / "shared.pt"),
        ("shared", other_map, tmp_path / "trainings" / "shared.pt"),
        ("alone", other_map, None),
    ):
        (tmp_path / name).mkdir()
        records[name] = run_job.run_job(job, tmp_path / name, lambda *_: None, training)
    assert records["shared"]["training"] == records["whole"]["training"]
    assert [record["notes"] for record in records.values()] == [
        [],
        ["trained together with another row: times and memory of the training are that row's"],
        [],
    ]
    assert [weights["file"] for weights in records["shared"]["weights"]] == [f"{TEACHER}.safetensors"]
    assert records["shared"]["cost"]["trained_parameters"] == records["alone"]["cost"]["trained_parameters"] > 0
    assert records["shared"]["figures"] == pytest.approx(records["alone"]["figures"], abs=1e-6)
    maps = {name: np.load(tmp_path / name / "predictions.npz")["maps"] for name in records}
    np.testing.assert_allclose(maps["shared"], maps["alone"], atol=1e-3)  # they are kept in 16 bits
    assert np.abs(maps["shared"] - maps["whole"]).max() > 5e-3


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("Afkd", {"fusion": "equal"}), ("Dtgd", {"gate": False}), ("Tad", {"assistant": "test_efficientnet"})],
)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_siblings_have_figures_too(kind, arguments, tiny_job, tmp_path):
    job = dataclasses.replace(with_arguments(tiny_job, **arguments), class_path=f"anomalib_dskd.{kind}", epochs=2)
    record = run_job.run_job(job, tmp_path, lambda *_: None)
    assert (record["status"], record["training"]["epochs"], record["notes"]) == ("done", 2, [])
    with np.load(tmp_path / "predictions.npz") as archive:
        expected = roc_auc_score(archive["labels"], archive["scores"])
    assert record["figures"]["image_AUROC"] == pytest.approx(expected, abs=1e-4)
    assert [weights["name"] for weights in record["weights"]] == [TEACHER.partition(".")[0]]


def test_a_job_whose_process_dies_is_a_failed_row(tiny_job, tmp_path):
    def kill(_job, _fraction, text):
        if text.startswith("epoch"):
            for process in multiprocessing.active_children():
                process.kill()

    record = LocalRunner({}, kill).run_one(Task(tiny_job, tmp_path))
    assert record["status"] == "failed"
    assert "was killed by signal 9" in record["reason"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_speed_and_cost_of_a_real_model_are_measured(tiny_job, tmp_path):
    measure = {"speed": True, "int8": True, "seconds": 0.1}
    record = run_job.run_job(dataclasses.replace(tiny_job, measure=measure), tmp_path, lambda *_: None)
    assert record["notes"] == []
    assert all(value > 0 for value in record["speed"].values())
    assert record["speed"]["throughput_batch"] in {1, 4, 16}
    assert all(value > 0 for value in record["cost"].values())
    assert record["cost"]["trained_parameters"] < record["cost"]["parameters"]


def test_results_stay_in_the_run_folder(job, tmp_path):
    data = {"name": "../../elsewhere", "normal_dir": str(tmp_path)}
    job = dataclasses.replace(job, data_class_path="anomalib.data.Folder", data_init_args=data)
    with pytest.raises(ArgumentError, match="'../../elsewhere' of the data would put results outside of their folder"):
        run_job.run_job(job, tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_a_machine_is_described():
    described = machine()
    assert described["cores"] >= 1
    assert described["torch"].startswith("2.")
    assert described["anomalib_dskd"]
