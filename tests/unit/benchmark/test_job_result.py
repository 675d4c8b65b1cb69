import json
import math

import pytest

from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, ModelSpec, expand
from anomalib_dskd.benchmark.job_result import ClassMetrics, Cost, JobResult, Machine, Metrics, Weights, failure

(JOB,) = expand(
    BenchmarkConfig(
        [ModelSpec({"class_path": "anomalib_dskd.Dskd", "init_args": {"map_layers": [1], "sigma": 2.0}})],
        [DatasetSpec({"class_path": "anomalib_dskd.MagneticTile"})],
    )
)
RESULT = JobResult.of(
    JOB,
    status="done",
    metrics=Metrics(image_AUROC=0.9, AUPRO=1),
    classes={"Crack": ClassMetrics(image_F1=0.5, images=57)},
    cost=Cost(macs=10**12),
    weights=[Weights("resnet18", "resnet18.pth"), Weights("other", "other.pth", "ab")],
    machine=Machine(cpu="A processor", cores=2),
    notes=["a note"],
)


def test_a_result_has_the_settings_of_its_job():
    assert (RESULT.job, RESULT.model, RESULT.init_args) == (JOB.id, "Dskd", {"map_layers": [1], "sigma": 2.0})
    assert (RESULT.epochs, RESULT.epochs_source, RESULT.image_size) == (200, "the paper", [256, 256])


@pytest.mark.parametrize("result", [RESULT, failure(JOB, "out of memory")], ids=["done", "failed"])
def test_a_result_is_the_same_after_json(result):
    text = result.to_json()
    assert "\n" not in text
    assert JobResult.from_json(text) == JobResult.from_json(text.encode()) == result


def test_measurements_may_be_missing_or_not_finite():
    values = json.loads(RESULT.to_json())
    del values["cost"], values["metrics"]["AUPRO"]
    values["metrics"]["image_AUROC"] = math.nan
    result = JobResult.from_json(json.dumps(values))
    assert result.cost == Cost()
    assert result.metrics.AUPRO is None
    assert math.isnan(result.metrics.image_AUROC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": "../../elsewhere"}, "job '../../elsewhere' is not the twelve hexadecimal digits"),
        ({"seed": None}, "^seed None is not an integer$"),
        ({"category": 5}, "^category 5 is not a string or null$"),
        ({"image_size": [128, "128"]}, "^image_size.1 '128' is not an integer$"),
        ({"accuracy": 1, "score": 2}, "^accuracy is not a field of a result; score is not a field of a result$"),
        ({"machine": {"tpu": "none"}}, "^machine.tpu is not a field of a result$"),
        ({"classes": {"Crack": {"AUPRO": "high"}}}, "^classes.Crack.AUPRO 'high' is not a number or null$"),
        ({"notes": [["a note"]]}, r"^notes.0 \['a note'\] is not a string$"),
    ],
)
def test_the_error_for_a_faulty_result_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        JobResult.from_json(json.dumps({**json.loads(RESULT.to_json()), **changes}))


def test_settings_are_required():
    with pytest.raises(
        ValueError, match="^accelerator is missing; category is missing; class_path is missing; data is"
    ):
        JobResult.from_json('{"job": "0123456789ab", "status": "done"}')


@pytest.mark.parametrize("text", ["[]", "5", "null"])
def test_a_result_is_a_mapping(text):
    with pytest.raises(ValueError, match="is not a mapping"):
        JobResult.from_json(text)
