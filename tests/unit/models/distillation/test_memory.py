import ctypes
import platform
import subprocess
import sys
import warnings
from unittest import mock

import pytest

from anomalib_dskd import MagneticTile
from anomalib_dskd.models.distillation.callbacks import memory
from tests.conftest import engine

MIB = 1 << 20
COUNT_MAPPED = """
import ctypes
import torch
from anomalib_dskd.models.distillation.callbacks import ReleaseMemory

class MallInfo(ctypes.Structure):  # struct mallinfo of glibc's malloc.h
    _fields_ = [(name, ctypes.c_int) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde")]

mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = MallInfo

tensors = []  # kept, since the next ones would fill the holes that they leave

def count_mapped(size):
    before = mallinfo().hblks
    tensors.extend(torch.empty(size, dtype=torch.uint8) for _ in range(20))
    return mallinfo().hblks - before

callback = ReleaseMemory()
callback.on_test_end()
print(count_mapped(8 << 20))
callback.on_test_start()
print(count_mapped(8 << 20), count_mapped(1 << 19))
callback.on_test_end()
print(count_mapped(8 << 20))
"""


@pytest.fixture
def thresholds(monkeypatch):
    """Thresholds that are set, in order."""
    seen = []
    monkeypatch.setattr(memory, "_set_mmap_threshold", seen.append)
    return seen


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64", reason="PyTorch uses another allocator"
)
def test_large_tensors_are_mapped_only_in_evaluations():
    command = [sys.executable, "-W", "ignore", "-c", COUNT_MAPPED]
    training, large, small, again = map(int, subprocess.check_output(command, text=True, timeout=200).split())
    assert (training, large, small, again) == (0, 20, 0, 0)


def test_training_runs_and_errors_end_with_the_default(
    tiny_model, magnetic_tile_root, tmp_path, thresholds, monkeypatch
):
    data = MagneticTile(magnetic_tile_root, train_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path, max_epochs=1).fit(tiny_model, datamodule=data)
        assert thresholds == [MIB, 32 * MIB]
        monkeypatch.setattr(tiny_model, "predict_step", mock.Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            engine(tmp_path).predict(tiny_model, datamodule=data)
    assert thresholds == [MIB, 32 * MIB] * 2


@pytest.mark.parametrize("reason", ["another C library", "a threshold of the user's own"])
def test_nothing_is_set(reason, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if reason == "another C library":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    else:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    memory.ReleaseMemory().on_test_start()
