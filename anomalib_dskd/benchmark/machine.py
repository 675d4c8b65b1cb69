"""The processor, the GPU and the software versions that a measurement depends on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import anomalib_dskd
from anomalib_dskd.benchmark.job_result import Machine

__all__ = ["describe_machine"]

PACKAGES = ("anomalib", "torch", "openvino", "timm", "anomalib_dskd")


def describe_machine(accelerator: str) -> Machine:
    """Return the processor, its cores and threads, the platform, and the versions of Python and the packages.

    Args:
        accelerator: as in Lightning's Trainer; unless it is ``cpu``, the GPU is described too, if there is one.
    """
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if accelerator != "cpu" and torch.cuda.is_available() else None,
        platform=platform.platform(),
        python=platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        commit=_commit(),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of a source checkout, marked ``-dirty`` if it was changed; None for an installed package."""
    folder = Path(anomalib_dskd.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
