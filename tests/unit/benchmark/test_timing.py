import time
from types import SimpleNamespace

import numpy as np
import openvino
import pytest

from anomalib_dskd.benchmark.timing import images_per_second, measure_file, median_milliseconds


def test_median_excludes_the_warm_up(monkeypatch):
    now = [0.0]
    durations = iter([9.0] * 5 + [0.010] * 4 + [0.020] * 3 + [5.0] * 3 + [0.020] * 100)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(durations)

    assert median_milliseconds(run, seconds=0.001) == pytest.approx(20.0)  # of ten


def test_throughput_counts_whole_batches(monkeypatch):
    now, done = [0.0], []

    class Queue:
        def __init__(self, compiled):
            self.compiled = compiled

        def __len__(self):
            return 2

        def start_async(self, inputs):
            now[0] += 0.1
            done.append(inputs[0].shape)

        def wait_all(self):
            now[0] += 0.1

    monkeypatch.setattr(openvino, "AsyncInferQueue", Queue)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    result = images_per_second(SimpleNamespace(), np.zeros((4, 3, 8, 8), dtype=np.float32), seconds=0.95)
    assert set(done) == {(4, 3, 8, 8)}
    assert len(done) == 2 + 10  # the first two fill the queue
    assert result == pytest.approx(10 * 4 / 1.1)


@pytest.mark.parametrize("precision", ["f32", None])
def test_an_exported_model_is_measured_at_the_given_size(precision, tmp_path, monkeypatch):
    image = openvino.opset13.parameter([-1, 3, -1, -1], np.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(image)], [image]), tmp_path / "model.xml")
    compiled, original = [], openvino.Core.compile_model

    def compile_model(core, network, device, settings):
        compiled.append((network.input(0).shape, settings))
        return original(core, network, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    measured = measure_file(tmp_path / "model.xml", (16, 24), precision=precision, seconds=0.01)
    assert [tuple(shape) for shape, _ in compiled] == [(batch, 3, 16, 24) for batch in (1, 1, 4, 16)]
    assert [settings["PERFORMANCE_HINT"] for _, settings in compiled] == ["LATENCY"] + 3 * ["THROUGHPUT"]
    assert {settings.get("INFERENCE_PRECISION_HINT") for _, settings in compiled} == {precision}
    assert measured["milliseconds"] > 0
    assert measured["throughput"] > 0
    assert measured["batch"] in {1, 4, 16}
