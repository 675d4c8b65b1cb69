"""What a trained model costs: time, memory and arithmetic."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "images_per_second",
    "measure_cost",
    "measure_openvino",
    "measure_pytorch",
    "median_milliseconds",
    "peak_memory_mib",
]

WARM_UP = 5  # runs that are left out
FEWEST = 10  # runs
BATCHES = (1, 4, 16)
MIB = 2**20


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


def peak_memory_mib() -> float | None:
    """Return the largest resident memory that this process has had so far, in MiB; none on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # getrusage would count what the parent had when it started this process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MIB
    import resource  # noqa: PLC0415 - POSIX alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def measure_cost(model: AnomalibModule, size: tuple[int, int], trained: int) -> dict[str, float | int | None]:
    """Return parameters (all, and those that were trained) and multiply-adds of one image ``(3, *size)``."""
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model(torch.rand(1, 3, *size))
    return {
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "trained_parameters": trained,
        "macs": counter.get_total_flops() // 2,
    }


def measure_pytorch(model: AnomalibModule, size: tuple[int, int], *, seconds: float) -> float:
    """Return the median milliseconds of one image from pixels to labels, on the CPU."""
    model.eval()
    image = torch.rand(1, 3, *size)
    with torch.inference_mode():
        return median_milliseconds(lambda: model(image), seconds=seconds)


def measure_openvino(
    model: AnomalibModule,
    size: tuple[int, int],
    *,
    seconds: float,
    compression: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
) -> dict[str, float | int | None]:
    """Export to OpenVINO and measure one image at a time, and the batch that brings most images a second.

    Without compression the model is run in 32-bit floating point, which is what it was exported in; OpenVINO
    would otherwise choose 16 bits on processors that have them.

    Returns:
        ``milliseconds`` at batch 1, ``throughput`` in images a second, the ``batch`` it was reached with, and the
        exported model's size in ``mib``.
    """
    import openvino  # noqa: PLC0415 - an extra

    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        path = model.to_openvino(Path(folder), input_size=size, compression_type=compression, datamodule=datamodule)
        mib = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / MIB
        core = openvino.Core()
        network = core.read_model(path)
        precision = {} if compression else {"INFERENCE_PRECISION_HINT": "f32"}
        latency = _latency(core, network, size, precision, seconds)
        throughput, batch = max(_throughput(core, network, size, precision, seconds / 2, batch) for batch in BATCHES)
        del network  # Windows deletes no file that is mapped
    return {"milliseconds": latency, "throughput": throughput, "batch": batch, "mib": mib}


def _images(batch: int, size: tuple[int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((batch, 3, *size), dtype=np.float32)


def _latency(core: Any, network: Any, size: tuple[int, int], precision: dict[str, str], seconds: float) -> float:  # noqa: ANN401
    network.reshape([1, 3, *size])
    request = core.compile_model(network, "CPU", {**precision, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    image = _images(1, size)
    return median_milliseconds(lambda: request.infer([image]), seconds=seconds)


def _throughput(
    core: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    size: tuple[int, int],
    precision: dict[str, str],
    seconds: float,
    batch: int,
) -> tuple[float, int]:
    """Return images a second at the best number of requests, and the batch."""
    network.reshape([batch, 3, *size])
    compiled = core.compile_model(network, "CPU", {**precision, "PERFORMANCE_HINT": "THROUGHPUT"})
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
