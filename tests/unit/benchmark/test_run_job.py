import dataclasses

import pytest

from anomalib_dskd.benchmark import run_job
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, ModelSpec, expand
from anomalib_dskd.benchmark.machine import machine
from anomalib_dskd.errors import ArgumentError


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
    [("anomalib_dskd.Dskd", "image_size"), ("anomalib.models.Padim", "pre_processor")],
)
def test_every_model_gets_the_size_in_its_own_way(job, class_path, size_in):
    arguments = run_job._model_arguments(dataclasses.replace(job, class_path=class_path))
    assert {"evaluator", "visualizer", size_in} == set(arguments)
    assert arguments["evaluator"] is False
    if size_in == "image_size":
        assert arguments["image_size"] == (96, 96)
    else:
        assert list(arguments["pre_processor"].transform.transforms[0].size) == [96, 96]


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


def test_a_machine_is_described():
    described = machine()
    assert described["cores"] >= 1
    assert described["torch"].startswith("2.")
    assert described["anomalib_dskd"]
