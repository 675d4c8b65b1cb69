"""One compiled model under load from several threads, by the experiment that measures long runs."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import openvino
import pytest

from tests.integration.conftest import MODEL_SIZE, Exported

SCRIPT = Path(__file__).parents[2] / "experiments" / "openvino_load.py"
IMAGES = [np.random.default_rng(seed).random((1, 3, *MODEL_SIZE), dtype=np.float32) for seed in range(7)]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # where it finds what the scripts share
        yield importlib.import_module("openvino_load")


def test_every_prediction_from_four_threads_is_right_and_memory_stays(script: ModuleType, exported: Exported):
    compiled = openvino.Core().compile_model(exported.xml, "CPU", script.FP32)
    load = script.run_under_load(compiled, IMAGES, predictions=800, threads=4)
    assert (load.predictions, load.wrong) == (800, 0)
    assert load.growth < 0.05


class Broken:
    """Stands for a model whose answers to some of its requests are mixed up."""

    def __init__(self, error: Exception | None = None) -> None:
        self.requests, self.error = 0, error

    def create_infer_request(self) -> SimpleNamespace:
        self.requests += 1
        number = self.requests

        def infer(inputs: list[np.ndarray]) -> SimpleNamespace:
            if number == 3 and self.error is not None:
                raise self.error
            wrong = number == 3 and inputs[0] is IMAGES[0]
            return SimpleNamespace(to_tuple=lambda: (inputs[0].sum(), inputs[0].mean() + 1e-3 * wrong))

        return SimpleNamespace(infer=infer)


def test_wrong_predictions_are_counted(script: ModuleType):
    load = script.run_under_load(Broken(), IMAGES, predictions=280, threads=4)
    assert load.wrong == 280 / 4 / len(IMAGES)  # one image in seven, of one thread in four


def test_an_error_in_a_thread_ends_the_run(script: ModuleType):
    with pytest.raises(RuntimeError, match="^out of memory$"):
        script.run_under_load(Broken(RuntimeError("out of memory")), IMAGES, predictions=280, threads=4)
