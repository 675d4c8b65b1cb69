import time

import pytest
import torch

from anomalib_dskd import Dskd
from anomalib_dskd.benchmark.speed import measure_cost, median_milliseconds, peak_memory_mib


def test_median_leaves_the_warm_up_out(monkeypatch):
    now = [0.0]
    durations = iter([9.0] * 5 + [0.010] * 4 + [0.020] * 3 + [5.0] * 3 + [0.020] * 100)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(durations)

    assert median_milliseconds(run, seconds=0.001) == pytest.approx(20.0)  # of ten


def test_parameters_and_multiply_adds_are_those_of_the_paper():
    model = Dskd()
    model.model.teacher.weights_origin = {"file": "none", "sha256": ""}  # a forward pass wants some
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cost = measure_cost(model, (256, 256), trained)
    assert cost["parameters"] == 20_948_736
    assert cost["trained_parameters"] == 20_948_736 - 2_782_784  # without the teacher's
    assert cost["macs"] == pytest.approx(6.16e9, rel=2e-3)  # Table 6, and the blur


def test_peak_memory_is_in_mib():
    more = int(peak_memory_mib()) + 256  # than this process has ever had
    block = torch.ones(more, 2**18)  # 1 MiB a row
    assert more <= peak_memory_mib() < 2 * more
    assert block.numel() == more * 2**18
