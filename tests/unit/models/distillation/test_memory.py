"""Memory of large tensors, by the count of separately mapped blocks that glibc keeps."""

import ctypes
import platform

import pytest
import torch

from anomalib_dskd.models.distillation.callbacks import ReturnLargeBlocks

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")


class MallInfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def number_of_mapped_tensors(size: int, number: int = 50) -> int:
    """Create tensors of ``size`` bytes, and return how many have been mapped, not put on the heap."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    before = mallinfo2().hblks
    tensors = [torch.empty(size, dtype=torch.uint8) for _ in range(number)]
    mapped = mallinfo2().hblks - before
    del tensors
    return int(mapped)


@pytest.fixture
def callback(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    yield ReturnLargeBlocks()
    ReturnLargeBlocks().on_test_end()


@pytest.mark.parametrize("purpose", ["validation", "test", "predict"])
def test_large_tensors_are_mapped_only_in_evaluations(purpose, callback):
    getattr(callback, f"on_{purpose}_start")(None, None)
    assert number_of_mapped_tensors(size=8 << 20) > 30  # the others fill holes of the heap
    assert number_of_mapped_tensors(size=1 << 19) == 0
    getattr(callback, f"on_{purpose}_end")(None, None)
    assert number_of_mapped_tensors(size=8 << 20) == 0


def test_an_error_ends_the_evaluation(callback):
    callback.on_test_start(None, None)
    callback.on_exception(None, None, KeyboardInterrupt())
    assert number_of_mapped_tensors(size=8 << 20) == 0


def test_the_users_own_threshold_is_left_alone(callback, monkeypatch):
    callback.on_test_end(None, None)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    callback.on_test_start(None, None)
    assert number_of_mapped_tensors(size=8 << 20) == 0


def test_every_model_has_the_callback(tiny_model):
    assert any(isinstance(each, ReturnLargeBlocks) for each in tiny_model.configure_callbacks())
