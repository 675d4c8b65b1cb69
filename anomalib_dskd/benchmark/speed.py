"""Latency, throughput, memory, parameters and multiply-adds of a trained model."""

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

from anomalib_dskd.benchmark.export_accuracy import exported_f1
from anomalib_dskd.benchmark.timing import median_milliseconds
from anomalib_dskd.errors import DskdError

__all__ = ["measure_cost", "measure_openvino", "measure_pytorch", "peak_memory_mib"]

MIB = 2**20


def peak_memory_mib() -> float | None:
    """Return the peak resident memory of this process so far, in MiB; None on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # getrusage would include the memory of the parent at the start of this process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MIB
    import resource  # noqa: PLC0415 - POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def measure_cost(model: AnomalibModule, size: tuple[int, int]) -> dict[str, float | int | None]:
    """Return the number of parameters, and of multiply-adds of one image ``(3, *size)``."""
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model(torch.rand(1, 3, *size))
    return {
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }


def measure_pytorch(model: AnomalibModule, size: tuple[int, int], *, seconds: float) -> float:
    """Return the median time in ms per image on the CPU, from pixels to labels."""
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
    """Export to OpenVINO, and measure the latency of one image and the throughput of the best batch size.

    A model without compression is exported and run in FP32: OpenVINO would otherwise choose 16-bit precision on
    processors that support it. The model runs in a separate process: in a process that has trained, OpenVINO was
    observed to start more threads than there are cores, and to take seven times as long.

    Returns:
        ``milliseconds`` at batch size 1, ``throughput`` in images per second, the ``batch`` size that reached it, and
        the size of the exported model in ``mib``; of a compressed model also ``label_f1``, the F1 score of its labels
        of the test images.

    Raises:
        DskdError: OpenVINO cannot run the exported model.
    """
    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        path = model.to_openvino(Path(folder), input_size=size, compression_type=compression, datamodule=datamodule)
        mib = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / MIB
        arguments = [str(path), *map(str, size), str(seconds), *([] if compression else ["f32"])]
        command = [sys.executable, "-m", "anomalib_dskd.benchmark.timing", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        f1 = exported_f1(path, datamodule, size) if compression and datamodule and not result.returncode else None
    if result.returncode:
        reason = next(reversed(result.stderr.strip().splitlines()), f"exit code {result.returncode}")
        msg = f"OpenVINO cannot run the exported model: {reason}"
        raise DskdError(msg)
    return {**json.loads(result.stdout.splitlines()[-1]), "mib": mib, "label_f1": f1}
