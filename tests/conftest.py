"""Small real inputs that need no network: a tiny timm teacher, crops of scikit-image's photographs."""

import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # anomalib's and timm's own deprecations, at import
    import anomalib.models  # noqa: F401

import numpy as np
import openvino
import pytest
import skimage.data
import timm
import torch
from anomalib.engine import Engine
from hypothesis import settings
from lightning import Trainer
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import label as connected_regions

from anomalib_dskd import Dskd
from anomalib_dskd.models.distillation.lightning_model import DistillationModule

torch.set_num_threads(1)  # the networks are tiny: threads would cost more than they bring

# the same examples each time, on machines of any speed
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("repeatable")

TEACHER = "test_efficientnet.r160_in1k"  # students of 0.5 M parameters; RESNET's have 8 M
RESNET = "test_resnet.r160_in1k"
ASSISTANT = "test_resnet"


def write_weights(path: Path, teacher: str = TEACHER) -> Path:
    """Random numbers in the shape of pretrained weights: what the teacher knows does not matter to the tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_file(timm.create_model(teacher, pretrained=False).state_dict(), path)
    return path


def differing(first: dict, second: dict) -> list[str]:
    """Names of what two states do not have in common, bit for bit."""
    names = set(first) ^ set(second)
    for name in set(first) & set(second):
        mine, theirs = first[name], second[name]
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        if not same:
            names.add(name)
    return sorted(names)


def engine(folder: Path, **arguments) -> Engine:
    """anomalib's engine on one CPU, without a word."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(**{"default_root_dir": folder, "accelerator": "cpu", "devices": 1, **quiet, **arguments})


def at_step(model: DistillationModule, step: int) -> DistillationModule:
    """Let a model believe that it has been trained for that many of ten steps."""
    model.load_teacher_weights()
    model.trainer = Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    model.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    model.planned_steps = 10
    assert model.global_step == step
    return model.train()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path: Path, width: int, height: int) -> Path:
    """Write a valid black PNG of one bit a pixel: a few kilobytes that unpack to gigabytes."""

    compressor = zlib.compressobj(1)
    rows = min(height, 1000)
    block = bytes(1 + (width + 7) // 8) * rows
    packed = b"".join(compressor.compress(block) for _ in range(height // rows)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    )
    return path


def plain_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Area under mean region overlap over false positive rate, threshold by threshold, up to ``limit``."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = connected_regions(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == number + 1) for number in range(count)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        rates.append(hit[masks == 0].mean())
        overlaps.append(np.mean([hit[index][region].mean() for index, region in regions]))
    at_limit = np.interp(limit, rates, overlaps)
    kept = [(r, o) for r, o in zip(rates, overlaps, strict=True) if r < limit] + [(limit, at_limit)]
    return float(np.trapezoid([o for _, o in kept], [r for r, _ in kept]) / limit)


@pytest.fixture(scope="session", autouse=True)
def export_without_coverage():
    """Let torch's exporter run without a tracer, with which Python 3.11 takes three times as long."""
    export = torch.onnx.export

    def untraced(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return export(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    with mock.patch("torch.onnx.export", untraced):
        yield


@pytest.fixture(scope="session", autouse=True)
def keep_openvino_cores():
    """Keep every ``openvino.Core``; ``tests/integration/test_signal_stack.py`` tells when that is no longer needed.

    One that has compiled for the CPU has replaced the signal stack of the thread. Cores that are destroyed in the order
    of their creation leave a stack that no longer exists, and the next signal, such as that of a data-loader worker
    that ends, kills the process.
    """
    cores, create = [], openvino.Core.__init__

    def create_and_keep(core: openvino.Core, *args: object) -> None:
        create(core, *args)
        cores.append(core)

    with mock.patch.object(openvino.Core, "__init__", create_and_keep):
        yield


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / f"{TEACHER}.safetensors")


@pytest.fixture(scope="session")
def resnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / f"{RESNET}.safetensors", RESNET)


@pytest.fixture(scope="session")
def magnetic_tile_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout in small: 10 good tiles, 2 of each defect, gray JPEGs, masks with values between."""
    root = tmp_path_factory.mktemp("magnetic_tile")
    photograph, random = skimage.data.brick(), np.random.default_rng(0)
    for label, count in {"Free": 10, "Blowhole": 2, "Break": 2, "Crack": 2, "Fray": 2, "Uneven": 2}.items():
        folder = root / f"MT_{label}" / "Imgs"
        folder.mkdir(parents=True)
        for index in range(count):
            height, width = random.integers(100, 160, size=2)
            top, left = random.integers(0, 300, size=2)
            image = photograph[top : top + height, left : left + width].copy()
            mask = np.zeros_like(image)
            if label != "Free":
                image[30:60, 40:80] = 20
                mask[30:60, 40:80] = 250
                mask[60:62, 40:80] = 120  # the published masks have such values at their edges
            Image.fromarray(image).save(folder / f"exp1_num_{index}.jpg")
            Image.fromarray(mask).save(folder / f"exp1_num_{index}.png")
    return root


@pytest.fixture
def tiny_model(teacher_weights: Path) -> Dskd:
    """An untrained model with a tiny teacher, whose weights are loaded."""
    model = Dskd(teacher=TEACHER, teacher_weights=teacher_weights, image_size=64, sigma=2.0, seed=0)
    model.load_teacher_weights()
    return model


def from_environment(variable: str) -> Path:
    """A path that only some machines have, or a skip that says which variable names it."""
    if variable not in os.environ:
        pytest.skip(f"needs {variable}, a path to real data")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def magnetic_tiles() -> Path:
    """The published Magnetic Tile Defects data."""
    return from_environment("ANOMALIB_DSKD_TEST_MAGNETIC_TILE")


@pytest.fixture(scope="session")
def resnet18_weights() -> Path:
    """ImageNet weights of ``resnet18.tv_in1k``."""
    return from_environment("ANOMALIB_DSKD_TEST_RESNET18")
