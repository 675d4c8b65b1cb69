"""8-bit exports of a small model that has learned a little: what they score, and what computes in 8 bits."""

import copy
from pathlib import Path
from types import SimpleNamespace

import nncf
import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from sklearn.metrics import f1_score, precision_recall_curve

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.distillation.quantization import (
    calibration_images,
    first_convolutions,
    map_operations,
    quantize_networks,
)
from anomalib_dskd.models.distillation.recalibration import append_post_processor, recalibrated, validation_images
from tests.conftest import RESNET, TEACHER, engine

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, in training and export
SIZE = (64, 64)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def data(magnetic_tile_root) -> MagneticTile:
    return MagneticTile(magnetic_tile_root, train_batch_size=4)


def trained(kind: type, data: MagneticTile, teacher_weights: Path, root: Path, **arguments) -> DistillationModule:
    model = kind(
        teacher=RESNET,
        teacher_weights=teacher_weights,
        image_size=64,
        sigma=2.0,
        seed=0,
        visualizer=False,
        **arguments,
    )
    engine(root, max_epochs=10, check_val_every_n_epoch=10).fit(model, datamodule=data)
    model.post_processor.enable_normalization = False  # it clamps what is compared here
    return model


@pytest.fixture(scope="module")
def model(data, resnet_weights, tmp_path_factory) -> Dskd:
    return trained(Dskd, data, resnet_weights, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def f32(model, tmp_path_factory) -> openvino.Model:
    return openvino.Core().read_model(model.to_openvino(tmp_path_factory.mktemp("f32"), input_size=SIZE))


@pytest.fixture(scope="module")
def exported_network(model, tmp_path_factory) -> Path:
    """The ONNX model without post-processor, which INT8 exports convert: PyTorch takes long to export one."""
    given = copy.deepcopy(model)
    given.post_processor = None
    return given.to_onnx(tmp_path_factory.mktemp("onnx"), input_size=SIZE)


@pytest.fixture
def exported_once(exported_network, monkeypatch) -> None:
    monkeypatch.setattr(Dskd, "to_onnx", lambda *_, **__: exported_network)


@pytest.fixture(scope="module")
def int8(model, exported_network, data, tmp_path_factory) -> openvino.Model:
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dskd, "to_onnx", lambda *_, **__: exported_network)
        path = model.to_openvino(folder, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    return openvino.Core().read_model(path)


@pytest.fixture
def in_fp32(monkeypatch) -> None:
    """Let OpenVINO compile for FP32 by default: it would run in BF16 where the processor has units for it."""
    create = openvino.Core

    def create_for_fp32() -> openvino.Core:
        core = create()
        core.set_property("CPU", F32)
        return core

    monkeypatch.setattr(openvino, "Core", create_for_fp32)


def predict(network: openvino.Model, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    compiled = openvino.Core().compile_model(network, "CPU", F32)
    results = [compiled(image) for image in images]
    scores = np.array([result["pred_score"].item() for result in results])
    return scores, np.concatenate([result["anomaly_map"] for result in results])


def resized_test_images(data: MagneticTile) -> tuple[list[np.ndarray], np.ndarray]:
    """Images ``(1, 3, H, W)``, and which of them are good."""
    data.setup("test")
    images = [
        torch.nn.functional.interpolate(torch.as_tensor(item.image)[None], SIZE).numpy() for item in data.test_data
    ]
    return images, np.array([not item.gt_label for item in data.test_data])


def test_scores_of_good_images_in_8_bits_are_those_in_32(f32, int8, data):
    images, is_good = resized_test_images(data)
    (expected, _), (scores, _) = predict(f32, images), predict(int8, images)
    assert len(set(scores.round(6))) == len(images)  # not one score for all
    assert is_good.sum() == 2
    np.testing.assert_allclose(scores[is_good], expected[is_good], rtol=0.1)


def test_networks_are_quantized_and_the_map_is_not(int8):
    assert_networks_are_quantized_and_the_map_is_not(int8)


def assert_networks_are_quantized_and_the_map_is_not(int8: openvino.Model) -> None:
    in_map = set(map_operations(int8))
    kinds = {operation.get_friendly_name(): operation.get_type_name() for operation in int8.get_ops()}
    assert {kinds[name] for name in in_map} >= {"ReduceL2", "Divide", "Interpolate"}
    assert "FakeQuantize" not in {kinds[name] for name in in_map}
    convolutions = [operation for operation in int8.get_ops() if operation.get_type_name() == "Convolution"]
    first = set(first_convolutions(int8))
    of_networks = [operation for operation in convolutions if operation.get_friendly_name() not in in_map | first]
    assert len(of_networks) > 18
    sources = {operation.input_value(0).get_node().get_type_name() for operation in of_networks}
    assert "FakeQuantize" in sources
    assert sources <= {"FakeQuantize", "MaxPool", "Concat"}  # the last two pass on what is quantized before them
    readers = [operation for operation in convolutions if operation.get_friendly_name() in first]
    inputs = [operation.input_value(index).get_node().get_type_name() for operation in readers for index in (0, 1)]
    assert "Constant" in inputs
    assert "FakeQuantize" not in inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Afkd, {}), (Dtgd, {}), (Tad, {"assistant": TEACHER})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_siblings_networks_are_quantized_and_good_images_score_alike(kind, arguments, data, resnet_weights, tmp_path):
    model = trained(kind, data, resnet_weights, tmp_path, **arguments)
    path = model.to_openvino(tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    int8 = openvino.Core().read_model(path)
    assert_networks_are_quantized_and_the_map_is_not(int8)
    images, is_good = resized_test_images(data)
    f32 = model.eval()(torch.from_numpy(np.concatenate(images)))
    expected, expected_maps = f32.pred_score.flatten().numpy(), f32.anomaly_map.numpy()
    scores, maps = predict(int8, images)
    assert len(set(scores.round(6))) == len(images)
    # defects lie outside of what eight good images have calibrated, and how far is the processor's rounding: with AMX
    # the maximum of one normal image differs by 16 %
    np.testing.assert_allclose(scores[is_good], expected[is_good], rtol=0.2)
    assert np.corrcoef(maps[is_good].ravel(), expected_maps[is_good].ravel())[0, 1] > 0.85


def map_error(network: openvino.Model, f32: openvino.Model, images: list[np.ndarray]) -> float:
    """Mean difference of the maps, as a share of those in 32 bits."""
    (_, maps), (_, expected) = predict(network, images), predict(f32, images)
    return float(np.abs(maps - expected).mean() / expected.mean())


def test_plain_quantization_still_spoils_the_map(f32, int8, data):
    """Fails when the map can be quantized as well, and ``map_operations`` is no longer needed."""
    images, is_good = resized_test_images(data)
    good = [image for image, good in zip(images, is_good, strict=True) if good]
    plain = nncf.quantize(f32.clone(), nncf.Dataset(list(calibration_images(data, SIZE))))
    assert map_error(plain, f32, good) > 2 * map_error(int8, f32, good)


def test_calibration_sees_training_images_alone_every_second_one_damaged(data):
    data.setup("fit")
    images, again = (list(calibration_images(data, SIZE)) for _ in range(2))
    np.testing.assert_array_equal(images, again)
    assert len(images) == len(data.train_data) == 8
    assert {image.shape for image in images} == {(1, 3, *SIZE)}
    clean = [
        torch.nn.functional.interpolate(torch.as_tensor(item.image)[None], SIZE, mode="bilinear").numpy()
        for item in data.train_data
    ]
    changed = [min((np.abs(image - original) > 1e-6).mean() for original in clean) for image in images]
    assert changed[::2] == [0.0] * 4
    assert all(0.01 < share < 0.9 for share in changed[1::2])  # each is one of them but for a part
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)


def test_one_odd_image_does_not_coarsen_the_steps_of_the_others(f32, data):
    """Why ranges are medians: NNCF's own mean follows the image that activates most."""
    images, is_good = resized_test_images(data)
    good = [image for image, good in zip(images, is_good, strict=True) if good]
    usual = list(calibration_images(data, SIZE))
    odd = [np.random.default_rng(0).random((1, 3, *SIZE), dtype=np.float32) * 30]
    errors = [map_error(quantize_networks(f32.clone(), seen), f32, good) for seen in (usual, usual + odd)]
    assert errors[1] < 1.5 * errors[0] < 0.1


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels.ravel(), scores.ravel())
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-9)).max())


@pytest.mark.usefixtures("exported_once", "in_fp32")
def test_thresholds_are_those_of_the_quantized_scores(model, int8, data, tmp_path):
    wrong = copy.deepcopy(model)
    wrong.post_processor.enable_normalization = True
    for name, value in wrong.post_processor.named_buffers():
        if name in {"_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"}:
            value.fill_(100.0)  # nothing of the floating-point model may remain
    path = wrong.to_openvino(tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert wrong.post_processor.image_threshold == 100
    compiled, raw = (openvino.Core().compile_model(network, "CPU") for network in (path, int8))
    results = []
    for image, batch in validation_images(data, wrong.pre_processor, SIZE):
        found = {port.get_any_name(): value for port, value in compiled(image.numpy()).items()}
        assert list(found) == ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
        results.append({**found, "raw": raw(image.numpy()), "label": batch.gt_label.numpy(), "mask": batch.gt_mask})
    assert len(results) == 12
    for predicted, score, truth in (("pred_label", "pred_score", "label"), ("pred_mask", "anomaly_map", "mask")):
        labels = np.concatenate([np.asarray(result[truth]).ravel() for result in results]).astype(bool)
        scores = np.concatenate([result["raw"][score].ravel() for result in results])
        found = np.concatenate([result[predicted].ravel() for result in results])
        assert f1_score(labels, found) == pytest.approx(best_f1(labels, scores), abs=1e-3)
        lowest = scores[found].min()
        threshold = (lowest + scores[scores < lowest].max(initial=0)) / 2
        normalized = np.concatenate([result[score].ravel() for result in results])
        expected = (scores - threshold) / (scores.max() - scores.min()) + 0.5
        np.testing.assert_allclose(normalized, expected.clip(0, 1), atol=1e-3)


@pytest.mark.usefixtures("exported_once")
def test_a_failed_export_leaves_no_file(model, data, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nncf.quantize", fail)
    with pytest.raises(KeyboardInterrupt):
        model.to_openvino(tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".xml", ".bin"}]


@pytest.mark.usefixtures("in_fp32")
def test_the_floating_point_models_own_thresholds_are_found_again(model, data, tmp_path):
    given = copy.deepcopy(model)
    given.post_processor.enable_normalization = True
    whole = openvino.Core().read_model(given.to_openvino(tmp_path / "whole"))
    trained_with, given.post_processor = given.post_processor, None
    network = openvino.Core().read_model(given.to_openvino(tmp_path / "network"))
    found = recalibrated(trained_with, network, validation_images(data, given.pre_processor, None))
    for name in ("image_threshold", "pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert getattr(found, name).item() == pytest.approx(getattr(trained_with, name).item(), rel=1e-4), name
    images = np.random.default_rng(0).random((3, 3, 70, 80), dtype=np.float32)
    again = append_post_processor(network, trained_with)
    shapes = [[str(port.get_partial_shape()) for port in each.outputs] for each in (whole, again)]
    assert shapes[0] == shapes[1]
    expected, result = (openvino.Core().compile_model(each, "CPU", F32)(images) for each in (whole, again))
    for port in whole.outputs:
        name = port.get_any_name()
        assert result[name].dtype == expected[name].dtype
        np.testing.assert_allclose(result[name], expected[name], atol=1e-5)


@pytest.mark.usefixtures("exported_once")
def test_without_a_post_processor_scores_are_raw_and_no_validation_is_needed(model, data, tmp_path):
    given = copy.deepcopy(model)
    given.post_processor = None
    without = SimpleNamespace(setup=data.setup, train_data=data.train_data)
    ptq = CompressionType.INT8_PTQ
    path = given.to_openvino(tmp_path, input_size=SIZE, compression_type=ptq, datamodule=without)
    assert [port.get_any_name() for port in openvino.Core().read_model(path).outputs] == ["pred_score", "anomaly_map"]


def test_quantization_without_validation_images_is_refused(model, magnetic_tile_root, tmp_path):
    folder = Folder(
        "tiles", root=magnetic_tile_root, normal_dir="MT_Free/Imgs", extensions=[".jpg"], val_split_mode="none"
    )
    with pytest.raises(ArgumentError, match="val_split_mode 'none' gives no validation images, which thresholds need"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=folder)


def test_quantization_without_images_is_refused(model, tmp_path):
    with pytest.raises(ArgumentError, match="'int8_ptq' needs training images: give --data"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_accuracy_control_is_refused(model, data, tmp_path):
    with pytest.raises(ArgumentError, match="'int8_acq' needs defects .* Supported values: none, 'fp16', 'int8'"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_ACQ, datamodule=data)


def test_a_network_without_cosines_is_refused():
    parameter = openvino.opset13.parameter([1, 3, 8, 8], np.float32)
    network = openvino.Model([openvino.opset13.relu(parameter)], [parameter])
    with pytest.raises(ArgumentError, match="has no cosine between features"):
        map_operations(network)
