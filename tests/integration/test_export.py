"""Exports of other teachers and variants, and anomalib's inferencers, give what PyTorch gives, in 32-bit floats."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import openvino
import pytest
import skimage.data
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.visualization import ImageVisualizer
from PIL import Image

from anomalib_dskd import Afkd, Dskd, Dtgd, Tad
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.distillation.quantization import map_operations
from tests.conftest import ASSISTANT, TEACHER

TOLERANCE = 1e-4
F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # OpenVINO would run in bfloat16 where the processor has it
# PyTorch takes long to export a model: each is another teacher and another variant
DSKDS = [
    {"teacher": "resnet18"},
    {
        "teacher": "wide_resnet50_2",
        "layers": (1, 2),
        "encoder": "teacher",
        "embedding_input": "normalized",
        "context_weight": 4.0,
    },
    {"teacher": "tf_efficientnet_lite0"},
    {
        "teacher": "mobilenetv3_small_100",
        "embedding": False,
        "embedding_input": "normalized",
        "map_layers": (2,),
        "sigma": 0.0,
    },
    {"teacher": "convnext_atto", "layers": (0, 1, 2), "image_size": (75, 100), "map_pair": "E-D"},
    {"image_size": (96, 64), "map_pair": "T-E", "losses": "encoder"},
]
SIBLINGS = [
    (Afkd, {}),
    (Dtgd, {}),
    (Tad, {"assistant": ASSISTANT}),
]
ODD_CONVNEXT = {"teacher": "convnext_atto", "layers": (0, 1, 2), "image_size": (75, 100)}
VARIANTS = [
    *((Dskd, arguments) for arguments in DSKDS),
    (Afkd, {**ODD_CONVNEXT, "fusion": "equal"}),
    (Afkd, {"teacher": "tf_efficientnet_lite0"}),
    (Dtgd, {**ODD_CONVNEXT, "gate": False, "sigma": 0.0}),
    (Dtgd, {"teacher": "tf_efficientnet_lite0"}),
    (Tad, {**ODD_CONVNEXT, "assistant": None}),
]
pytestmark = [
    # of torch's exporter and its dependencies
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def untrained(kind: type = Dskd, **arguments) -> DistillationModule:
    """A model that passes for trained: what it has learned does not matter to the export."""
    model = kind(**{"teacher": TEACHER, "image_size": 64, "sigma": 2.0, "seed": 0, **arguments})
    model.model.teacher.weights_origin = {"file": "random, for the test"}
    model.model.is_trained = True
    post_processor = model.post_processor
    for name in ("image", "pixel"):
        getattr(post_processor, f"{name}_min").fill_(0.0)
        getattr(post_processor, f"{name}_max").fill_(model.model.largest_score)
        getattr(post_processor, f"_{name}_threshold").fill_(1.0)
    return model.eval()


def photographs(batch: int, height: int = 90, width: int = 120) -> torch.Tensor:
    random = np.random.default_rng(0)
    crops = []
    for _ in range(batch):
        top, left = random.integers(0, 250, size=2)
        crops.append(skimage.data.astronaut()[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)


def run_openvino(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    compiled = openvino.Core().compile_model(path, "CPU", F32)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    result = compiled(images.numpy())
    return {port.get_any_name(): value for port, value in result.items()}


def run_onnx(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images.numpy()}), strict=True))


def export_both(model: DistillationModule, folder: Path) -> tuple[Path, Path]:
    """Export to OpenVINO, and keep the ONNX model that it is converted from: PyTorch takes long to export one."""
    export, kept = type(model).to_onnx, folder / "onnx"

    def export_and_keep(*args, **kwargs) -> Path:
        path = export(*args, **kwargs)
        shutil.copytree(path.parent, kept)
        return path

    with mock.patch.object(type(model), "to_onnx", export_and_keep):
        xml = model.to_openvino(folder)
    return next(kept.glob("*.onnx")), xml


def check_all_agree(model: DistillationModule, folder: Path, batches: list[torch.Tensor]) -> Path:
    """Compare PyTorch with the ONNX model in ONNX Runtime, and with the OpenVINO model, whose path is returned."""
    onnx, xml = export_both(model, folder)
    for images in batches:
        with torch.no_grad():
            expected = model(images)
        assert torch.isfinite(expected.anomaly_map).all()
        assert expected.anomaly_map.std() > 10 * TOLERANCE  # else agreement would say little
        for result in (run_onnx(onnx, images), run_openvino(xml, images)):
            np.testing.assert_allclose(result["anomaly_map"], expected.anomaly_map, atol=TOLERANCE)
            np.testing.assert_allclose(result["pred_score"], expected.pred_score, atol=TOLERANCE)
    return xml


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "arguments"), VARIANTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_exports_agree_with_pytorch(kind, arguments, tmp_path):
    check_all_agree(untrained(kind, **arguments), tmp_path, [photographs(1), photographs(4)])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "arguments"), SIBLINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_exports_of_the_siblings_agree_with_pytorch_and_hold_no_more_than_they_need(kind, arguments, tmp_path):
    model = untrained(kind, **arguments)
    exported = openvino.Core().read_model(check_all_agree(model, tmp_path, [photographs(1), photographs(4)]))
    numbers = [op for op in exported.get_ops() if op.get_type_name() == "Constant"]
    held = sum(int(np.prod(op.get_output_shape(0))) for op in numbers if op.get_element_type() == openvino.Type.f32)
    # batch norms are folded into convolutions, or have two numbers a channel
    weights = [parameter for parameter in model.model.parameters() if parameter.dim() > 1]
    rest = sum(parameter.numel() for parameter in model.model.parameters() if parameter.dim() == 1)
    assert (
        sum(weight.numel() for weight in weights) <= held <= sum(weight.numel() for weight in weights) + 2 * rest + 200
    )
    check_map_starts_behind_the_networks(exported, levels=3)


def check_map_starts_behind_the_networks(exported: openvino.Model, *, levels: int) -> None:
    in_map = set(map_operations(exported))
    types = {op.get_friendly_name(): op.get_type_name() for op in exported.get_ops()}
    norms = [name for name in in_map if types[name] == "ReduceL2"]
    assert len(norms) == 2 * levels  # of each network's levels
    convolutions = [name for name in types if types[name] in {"Convolution", "GroupConvolution"}]
    assert len([name for name in convolutions if name in in_map]) == 2  # the blur's


def test_inferencers_give_the_models_score(tmp_path, monkeypatch):
    model = untrained()
    image = photographs(1)
    path = tmp_path / "part.png"
    Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
    with torch.no_grad():
        expected = model(image)
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer leaves a cache there
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencers = [
        OpenVINOInferencer(model.to_openvino(tmp_path), config=F32),
        TorchInferencer(model.to_torch(tmp_path), device="cpu"),
    ]
    for inferencer in inferencers:
        result = inferencer.predict(path)
        score, anomaly_map = (torch.as_tensor(value) for value in (result.pred_score, result.anomaly_map))
        assert score.item() == pytest.approx(expected.pred_score.item(), abs=TOLERANCE)
        assert torch.allclose(anomaly_map.squeeze(), expected.anomaly_map.squeeze(), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "arguments"), [(Dskd, {}), *SIBLINGS], ids=lambda value: getattr(value, "__name__", "")
)
def test_results_outside_of_a_trainer_have_no_gradient(kind, arguments, tmp_path, monkeypatch):
    model = untrained(kind, **arguments)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    image = photographs(1)
    for result in (model(image), inferencer.predict(image)):
        assert not any(value.requires_grad for value in (result.pred_score, result.anomaly_map))
        result.anomaly_map.numpy()
    shown = ImageVisualizer().visualize(result)
    assert shown.size[0] > shown.size[1]  # image and map, side by side
    assert not any(parameter.requires_grad for parameter in inferencer.model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == learning != []


@pytest.mark.slow
def test_real_tiles_with_the_real_teacher(tmp_path, magnetic_tiles, resnet18_weights):
    model = untrained(teacher="resnet18.tv_in1k", image_size=128, sigma=4.0, teacher_weights=resnet18_weights)
    model.load_teacher_weights()
    files = sorted(magnetic_tiles.glob("MT_*/Imgs/*.jpg"))[::130]
    tiles = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None] / 255 for file in files]
    square = [torch.nn.functional.interpolate(tile, (200, 200)) for tile in tiles[:4]]
    check_all_agree(model, tmp_path, [*tiles, torch.cat(square)])
