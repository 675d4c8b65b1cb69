"""How long a run takes, and how many images a second an exported model does.

As a command, for a process that does nothing else: ``python -m anomalib_dskd.benchmark.timing XML HEIGHT WIDTH SECONDS
[PRECISION]`` prints what :func:`measure_file` returns, as JSON.
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

WARM_UP = 5  # runs that are left out
FEWEST = 10  # runs
BATCHES = (1, 4, 16)


def median_milliseconds(run: Callable[[], object], *, seconds: float) -> float:
    """Return the median time of ``run`` over about ``seconds``, and at least ten runs after five to warm up."""
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
        precision: of what is computed in floating point, such as ``f32``, or None for OpenVINO's choice.
        seconds: how long the latency is measured; half of it for the throughput of each batch.

    Returns:
        ``milliseconds`` at batch 1, ``throughput`` in images a second, and the ``batch`` it was reached with.
    """
    import openvino  # noqa: PLC0415 - an extra

    core = openvino.Core()
    network = core.read_model(path)
    settings = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    latency = _latency(core, network, size, settings, seconds)
    throughput, batch = max(_throughput(core, network, size, settings, seconds / 2, batch) for batch in BATCHES)
    return {"milliseconds": latency, "throughput": throughput, "batch": batch}


def _images(batch: int, size: tuple[int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((batch, 3, *size), dtype=np.float32)


def _latency(core: Any, network: Any, size: tuple[int, int], settings: dict[str, str], seconds: float) -> float:  # noqa: ANN401
    network.reshape([1, 3, *size])
    request = core.compile_model(network, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    image = _images(1, size)
    return median_milliseconds(lambda: request.infer([image]), seconds=seconds)


def _throughput(
    core: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    size: tuple[int, int],
    settings: dict[str, str],
    seconds: float,
    batch: int,
) -> tuple[float, int]:
    """Return images a second at the best number of requests, and the batch."""
    network.reshape([batch, 3, *size])
    compiled = core.compile_model(network, "CPU", {**settings, "PERFORMANCE_HINT": "THROUGHPUT"})
    return images_per_second(compiled, _images(batch, size), seconds=seconds), batch


def images_per_second(compiled: Any, images: NDArray[np.float32], *, seconds: float) -> float:  # noqa: ANN401
    """Return how many images a compiled model does in a second, with as many requests at a time as it finds best.

    Args:
        compiled: OpenVINO model.
        images: a batch ``(B, 3, H, W)``, given again and again.
        seconds: how long to measure.
    """
    import openvino  # noqa: PLC0415 - an extra

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
