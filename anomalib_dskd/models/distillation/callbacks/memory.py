"""Memory of validations, tests and predictions of many images."""

import ctypes
import os
import platform
from typing import Any

from lightning import Callback

__all__ = ["ReturnLargeBlocks"]

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 1 << 20  # bytes
LARGEST = 32 << 20  # bytes; glibc's own adjustment of the threshold ends there


class ReturnLargeBlocks(Callback):
    """Lets glibc return the memory of large tensors to the system as soon as they are freed, except in training.

    It would keep freed blocks of up to 32 MiB for later. Scores and other small results of a batch are stored in them,
    the next batch no longer fits, and memory grows with every batch. Does nothing with another C library, or where
    the environment variable ``MALLOC_MMAP_THRESHOLD_`` is set.
    """

    def on_validation_start(self, *_: Any) -> None:  # noqa: ANN401
        """Return freed blocks from now on."""
        _return_blocks_of(LARGE)

    def on_validation_end(self, *_: Any) -> None:  # noqa: ANN401
        """Keep freed blocks again: training reuses them in each step."""
        _return_blocks_of(LARGEST)

    # arguments that are not read have other names in Lightning
    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]
    on_test_end = on_predict_end = on_exception = on_validation_end  # type: ignore[assignment]


def _return_blocks_of(size: int) -> None:
    """Return freed blocks of at least this many bytes to the system."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)
