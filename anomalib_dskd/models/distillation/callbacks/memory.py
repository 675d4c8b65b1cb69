"""Callback that sets glibc's mmap threshold during validations, tests and predictions."""

import ctypes
import os
import platform
from typing import Any

from lightning import Callback

__all__ = ["ReleaseMemory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
EVALUATION_THRESHOLD = 1 << 20  # bytes
DEFAULT_MAX_THRESHOLD = 32 << 20  # bytes; glibc's own adjustment of the threshold ends there


class ReleaseMemory(Callback):
    """Lets glibc return the memory of large tensors to the system as soon as they are freed, except in training.

    By default glibc keeps freed blocks of up to 32 MiB for reuse. Small results of a batch are allocated in them, the
    next batch's tensors no longer fit, and the heap grows. The setting applies to the whole process. It has no effect
    with another C library, where PyTorch uses another allocator (on AArch64), or where the environment sets
    ``MALLOC_MMAP_THRESHOLD_``.
    """

    def on_validation_start(self, *_: Any) -> None:  # noqa: ANN401
        """Return freed blocks from now on."""
        _set_mmap_threshold(EVALUATION_THRESHOLD)

    def on_validation_end(self, *_: Any) -> None:  # noqa: ANN401
        """Keep freed blocks again: training reuses them in each step."""
        _set_mmap_threshold(DEFAULT_MAX_THRESHOLD)

    # mypy: Lightning's hooks name these arguments differently
    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]
    on_test_end = on_predict_end = on_exception = on_validation_end  # type: ignore[assignment]


def _set_mmap_threshold(size: int) -> None:
    """Return freed blocks of at least this many bytes to the system, and free memory of twice as many."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)  # as glibc's own adjustment does
