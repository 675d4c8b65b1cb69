"""The antialiased resize in exported models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_dskd.pre_processing import create_pre_processor
from tests.conftest import TEACHER

openvino = pytest.importorskip("openvino")

from anomalib_dskd.models.distillation.openvino_files import replace_antialiased_resize, rewrite_file  # noqa: E402

DYNAMIC = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
SIZES = [(90, 120), (31, 200), (20, 24), (32, 48)]  # smaller in both, in one, larger in both, equal


@pytest.fixture(scope="module")
def resize() -> nn.Module:
    return create_pre_processor(TEACHER, (32, 48)).eval()


@pytest.fixture
def exported(resize: nn.Module, tmp_path: Path) -> Path:
    onnx, xml = tmp_path / "resize.onnx", tmp_path / "resize.xml"
    torch.onnx.export(
        resize, (torch.rand(2, 3, 90, 120),), onnx, dynamo=True, opset_version=18, dynamic_shapes=(DYNAMIC,)
    )
    openvino.save_model(openvino.convert_model(onnx), xml, compress_to_fp16=False)
    return xml


def largest_error(resize: nn.Module, xml: Path, size: tuple[int, int]) -> float:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    compiled = openvino.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return float(np.abs(compiled(images.numpy())[0] - resize(images).numpy()).max())


@pytest.mark.parametrize("size", SIZES)
def test_openvino_resizes_as_pytorch(resize: nn.Module, exported: Path, size: tuple[int, int]):
    rewrite_file(exported, replace_antialiased_resize)
    assert largest_error(resize, exported, size) < 1e-5


def test_openvino_still_ignores_antialiasing_of_onnx(resize: nn.Module, exported: Path):
    # once this fails, replace_antialiased_resize is not needed
    assert largest_error(resize, exported, (90, 120)) > 0.1
