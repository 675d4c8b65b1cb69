"""What a trained model costs: time, memory and arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from torch.utils.flop_counter import FlopCounterMode

from anomalib_dskd.benchmark.timing import median_milliseconds
from anomalib_dskd.errors import DskdError

__all__ = ["measure_cost", "measure_openvino", "measure_pytorch", "peak_memory_mib"]

MIB = 2**20


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
    would otherwise choose 16 bits on processors that have them. It is run in a process of its own: in one that has
    trained, OpenVINO has been seen to start more threads than there are cores, and to take seven times as long.

    Returns:
        ``milliseconds`` at batch 1, ``throughput`` in images a second, the ``batch`` it was reached with, and the
        exported model's size in ``mib``.
    """
    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        path = model.to_openvino(Path(folder), input_size=size, compression_type=compression, datamodule=datamodule)
        mib = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / MIB
        measured = _measure_apart(path, size, precision=None if compression else "f32", seconds=seconds)
    return {**measured, "mib": mib}


def _measure_apart(
    path: Path, size: tuple[int, int], *, precision: str | None, seconds: float
) -> dict[str, float | int | None]:
    arguments = [str(path), *map(str, size), str(seconds), *([precision] if precision else [])]
    command = [sys.executable, "-m", "anomalib_dskd.benchmark.timing", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next(reversed(result.stderr.strip().splitlines()), f"exit code {result.returncode}")
        msg = f"OpenVINO cannot run the exported model: {reason}"
        raise DskdError(msg)
    measured: dict[str, float | int | None] = json.loads(result.stdout.splitlines()[-1])
    return measured
