"""PyTorch, ONNX Runtime and OpenVINO give the same scores, maps and labels in FP32 for any image from production."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import openvino
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import to_dtype_image

from anomalib_dskd import Dskd
from tests.integration.conftest import IMAGE_SENSITIVITY, Exported
from tests.integration.conftest import MODEL_SIZE as SIZE

TOLERANCE = 1e-4
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
pytestmark = [
    # of torch's exporter and its dependencies
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
Outputs = dict[str, np.ndarray]
Runtime = Callable[[torch.Tensor], Outputs]

# --- images like those of a camera, (3, height, width) -----------------------------------------------------------

KINDS = {
    "black": lambda shape, _: np.zeros(shape, dtype=np.uint8),
    "white": lambda shape, _: np.full(shape, 255, dtype=np.uint8),
    "constant gray": lambda shape, random: np.full(shape, random.integers(256), dtype=np.uint8),
    "constant color": lambda shape, random: (
        np.zeros(shape, np.uint8) + random.integers(256, size=(3, 1, 1), dtype="u1")
    ),
    "gray noise": lambda shape, random: np.repeat(
        random.integers(256, size=(1, *shape[1:]), dtype=np.uint8), 3, axis=0
    ),
    "color noise": lambda shape, random: random.integers(256, size=shape, dtype=np.uint8),
    "black and white noise": lambda shape, random: random.choice(np.array([0, 255], dtype=np.uint8), size=shape),
    "nearly black": lambda shape, random: random.poisson(0.3, size=shape).astype(np.uint8),
    "color photograph": lambda shape, random: photograph(shape, random, skimage.data.astronaut()),
    "gray photograph": lambda shape, random: photograph(shape, random, np.dstack([skimage.data.brick()] * 3)),
}


def photograph(shape: tuple[int, ...], random: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    top, left = (random.integers(512 - extent + 1) for extent in shape[1:])
    return pixels[top : top + shape[1], left : left + shape[2]].transpose(2, 0, 1)


@st.composite
def batches(draw: st.DrawFn, most: int = 5) -> torch.Tensor:
    """Images of one size: 8-bit images converted by anomalib, or floats between the 8-bit levels."""
    shape = (3, draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=most))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = torch.from_numpy(np.stack([KINDS[kind](shape, random) for kind in kinds]))
    if draw(st.booleans()):
        return to_dtype_image(images, torch.float32, scale=True)
    return ((images + random.random(images.shape, dtype=np.float32)) / 256).float()


# --- one model, exported once ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A model in all runtimes."""

    model: Dskd
    runtimes: dict[str, Runtime]


@pytest.fixture(scope="module")
def compiled(exported: Exported) -> Compiled:
    session = onnxruntime.InferenceSession(exported.onnx, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    openvino_model = openvino.Core().compile_model(exported.xml, "CPU", F32)

    def run_pytorch(images: torch.Tensor) -> Outputs:
        with torch.no_grad():
            return {
                name: value.numpy() for name, value in exported.model(images)._asdict().items() if value is not None
            }

    def run_onnx(images: torch.Tensor) -> Outputs:
        return dict(zip(names, session.run(names, {"input": images.numpy()}), strict=True))

    def run_openvino(images: torch.Tensor) -> Outputs:
        return {port.get_any_name(): value for port, value in openvino_model(images.numpy()).items()}

    runtimes = {"PyTorch": run_pytorch, "ONNX Runtime": run_onnx, "OpenVINO": run_openvino}
    return Compiled(exported.model, runtimes)


def assert_same(result: Outputs, expected: Outputs) -> None:
    assert set(result) == {"pred_score", "pred_label", "anomaly_map", "pred_mask"}
    for values, decisions, decision in (
        ("pred_score", "pred_label", 1 - IMAGE_SENSITIVITY),
        ("anomaly_map", "pred_mask", 0.5),
    ):
        np.testing.assert_allclose(result[values], expected[values], rtol=0, atol=TOLERANCE)
        clear = abs(expected[values] - decision) > TOLERANCE  # at the threshold, rounding determines the label
        np.testing.assert_array_equal(expected[decisions][clear], expected[values][clear] > decision)
        np.testing.assert_array_equal(result[decisions][clear], expected[decisions][clear])


# --- the properties ----------------------------------------------------------------------------------------------


@examples(max_examples=60)
@given(images=batches())
def test_all_runtimes_agree(compiled: Compiled, images: torch.Tensor):
    expected = compiled.runtimes["PyTorch"](images)
    for name in ("ONNX Runtime", "OpenVINO"):
        assert_same(compiled.runtimes[name](images), expected)


@pytest.mark.parametrize("runtime", ["PyTorch", "ONNX Runtime", "OpenVINO"])
@examples(max_examples=25)
@given(images=batches())
def test_results_are_finite_and_have_the_models_size(compiled: Compiled, runtime: str, images: torch.Tensor):
    result = compiled.runtimes[runtime](images)
    assert result["anomaly_map"].shape == result["pred_mask"].shape == (len(images), 1, *SIZE)
    assert result["pred_score"].shape == result["pred_label"].shape == (len(images), 1)
    for name in ("anomaly_map", "pred_score"):
        assert result[name].dtype == np.float32
        assert ((result[name] >= 0) & (result[name] <= 1)).all()  # false for NaN
    np.testing.assert_allclose(result["anomaly_map"].max(axis=(2, 3)), result["pred_score"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("runtime", ["PyTorch", "ONNX Runtime", "OpenVINO"])
@examples(max_examples=25)
@given(images=batches())
def test_results_do_not_depend_on_the_rest_of_the_batch(compiled: Compiled, runtime: str, images: torch.Tensor):
    run = compiled.runtimes[runtime]
    batched = run(images)
    for index in range(len(images)):
        single = run(images[index : index + 1])
        assert_same(single, {name: value[index : index + 1] for name, value in batched.items()})


def test_both_labels_occur_among_the_drawn_images(compiled: Compiled):
    """Otherwise equal labels would prove nothing."""
    random = np.random.default_rng(2)
    kinds = [*KINDS, *["gray photograph"] * 40]  # mostly of the texture that the model was trained on
    images = [KINDS[kind]((3, *SIZE), random) for kind in kinds]
    result = compiled.runtimes["OpenVINO"](torch.from_numpy(np.stack(images)).float() / 255)
    assert 0.05 < result["pred_label"].mean() < 0.95
    assert 0.01 < result["pred_mask"].mean() < 0.9
    assert result["pred_score"].std() > 100 * TOLERANCE
    assert (result["anomaly_map"] < 1).mean() > 0.5
    assert compiled.model.post_processor.image_max == 2 * compiled.model.post_processor.image_threshold
