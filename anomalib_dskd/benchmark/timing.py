"""Median latency of a function, and latency and throughput of a model exported to OpenVINO.

``python -m anomalib_dskd.benchmark.timing XML HEIGHT WIDTH SECONDS [PRECISION]`` measures in a process of its own, and
prints the result of :func:`measure_file` as JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["images_per_second", "measure_file", "median_milliseconds"]

WARM_UP = 5  # runs that are not timed
FEWEST = 10  # timed runs
BATCHES = (1, 4, 16)


def median_milliseconds(run: Callable[[], object], *, seconds: float) -> float:
    """Return the median time of ``run`` over about ``seconds``, and at least ten runs after five warm-up runs."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure_file(
    path: Path, size: tuple[int, int], *, precision: str | None, seconds: float
) -> dict[str, float | int | None]:
    """Measure an exported model on the CPU.

    Args:
        path: the ``.xml`` file.
        size: height and width of the images.
        precision: inference precision of floating-point layers, such as ``f32``, or None for OpenVINO's choice.
        seconds: how long to measure the latency; half of it for the throughput of each batch size.

    Returns:
        ``milliseconds`` at batch size 1, ``throughput`` in images per second, and the ``batch`` size that reached it.
    """
    import openvino  # noqa: PLC0415 - optional dependency

    core = openvino.Core()
    network = core.read_model(path)
    settings = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}

    def compile_model(batch: int, hint: str) -> tuple[Any, NDArray[np.float32]]:
        network.reshape([batch, 3, *size])
        images = np.random.default_rng(0).random((batch, 3, *size), dtype=np.float32)
        return core.compile_model(network, "CPU", {**settings, "PERFORMANCE_HINT": hint}), images

    compiled, image = compile_model(1, "LATENCY")
    request = compiled.create_infer_request()
    latency = median_milliseconds(lambda: request.infer([image]), seconds=seconds)
    throughputs = {
        batch: images_per_second(*compile_model(batch, "THROUGHPUT"), seconds=seconds / 2) for batch in BATCHES
    }
    best = max(throughputs, key=lambda batch: throughputs[batch])
    return {"milliseconds": latency, "throughput": throughputs[best], "batch": best}


def images_per_second(compiled: Any, images: NDArray[np.float32], *, seconds: float) -> float:  # noqa: ANN401
    """Return the throughput of a compiled model, with as many parallel requests as OpenVINO chooses.

    Args:
        compiled: OpenVINO model.
        images: a batch ``(B, 3, H, W)``, used for every request.
        seconds: how long to measure.
    """
    import openvino  # noqa: PLC0415 - optional dependency

    queue = openvino.AsyncInferQueue(compiled)
    for _ in range(len(queue)):
        queue.start_async([images])
    queue.wait_all()
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        queue.start_async([images])  # waits for a free request
        done += 1
    queue.wait_all()
    return done * len(images) / (time.perf_counter() - start)


if __name__ == "__main__":
    file, height, width, duration, *rest = sys.argv[1:]
    precision_hint = rest[0] if rest else None
    image_size = (int(height), int(width))
    print(json.dumps(measure_file(Path(file), image_size, precision=precision_hint, seconds=float(duration))))
