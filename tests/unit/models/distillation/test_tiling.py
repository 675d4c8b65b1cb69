"""Tiling: which tiles the networks see, and what becomes of their maps."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import ImageBatch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation import tiling
from anomalib_dskd.models.distillation.tiling import create_tiler, map_tiles, random_tiles, tiler_settings
from anomalib_dskd.models.distillation.training_loader import prepare_batch
from tests.conftest import ASSISTANT, RESNET, TEACHER, engine

IMAGE, TILE, STRIDE = (96, 144), 64, 48


def images(count: int = 3, size: tuple[int, int] = IMAGE) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def own_tiles(image: torch.Tensor, tile: int, stride: int) -> list[torch.Tensor]:
    """Tiles of an image ``(3, H, W)`` that is filled up with zeros."""
    height, width = (stride * -(-(extent - tile) // stride) + tile for extent in image.shape[1:])
    whole = torch.zeros(3, height, width)
    whole[:, : image.shape[1], : image.shape[2]] = image
    return [
        whole[:, top : top + tile, left : left + tile]
        for top in range(0, height - tile + 1, stride)
        for left in range(0, width - tile + 1, stride)
    ]


# --- which tiles -----------------------------------------------------------------------------------------------------


def test_training_sees_a_random_tile_of_each_image():
    batch = images()
    expected = [own_tiles(image, TILE, STRIDE) for image in batch]
    assert len(expected[0]) == 2 * 3
    seen: list[set[int]] = [set(), set(), set()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tiles = random_tiles(batch, Tiler(TILE, STRIDE), generator)
        assert tiles.shape == (3, 3, TILE, TILE)
        for index, tile in enumerate(tiles):
            (found,) = [number for number, other in enumerate(expected[index]) if torch.equal(tile, other)]
            seen[index].add(found)
    assert seen == [set(range(6))] * 3


def test_a_batch_without_tiler_keeps_its_images():
    batch = prepare_batch(ImageBatch(image=images()), None)
    assert torch.equal(batch.image, images())
    assert prepare_batch(ImageBatch(image=images()), Tiler(TILE, STRIDE)).image.shape == (3, 3, TILE, TILE)


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [IMAGE, (64, 64), (100, 131)])
@pytest.mark.parametrize("stride", [TILE, STRIDE, 16])
def test_a_map_of_each_pixel_is_that_of_the_whole_image(size, stride):
    batch = images(size=size)
    found = map_tiles(batch, Tiler(TILE, stride), lambda tiles: tiles.square().sum(dim=1, keepdim=True))
    torch.testing.assert_close(found, batch.square().sum(dim=1, keepdim=True))


def test_tiles_that_overlap_are_averaged():
    numbers = iter([torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)])
    found = map_tiles(images(1, (64, 96)), Tiler(64, 32), lambda tiles: next(numbers).expand(len(tiles), 1, 64, 64))
    assert found[0, 0, 5].tolist() == [1.0] * 32 + [2.0] * 32 + [3.0] * 32


@pytest.mark.parametrize("count", [1, 3, 40])
def test_few_tiles_pass_through_the_networks_at_a_time(count):
    sizes = []

    def anomaly_map(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return tiles[:, :1]

    map_tiles(images(count), Tiler(16, 16), anomaly_map)
    assert sum(sizes) == count * 6 * 9
    assert max(sizes) <= max(tiling.TILE_BATCH, count)


def test_the_blur_knows_no_tiles(tiny_model: Dskd):
    """Tiles as large as the image are the image; smaller ones are blurred after they have been joined."""
    model = tiny_model.model.eval()
    batch = images()
    with torch.no_grad():
        expected = model(batch)
        model.tiler = Tiler(IMAGE, IMAGE)
        torch.testing.assert_close(model(batch).anomaly_map, expected.anomaly_map)
        model.tiler = Tiler(64, 64)
        summed = map_tiles(batch, model.tiler, model._summed_map)
        result = model(batch)
    torch.testing.assert_close(result.anomaly_map, model.anomaly_map_generator.blur(summed))
    assert not torch.allclose(result.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(result.pred_score, result.anomaly_map.amax(dim=(2, 3)))


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS: dict = {"tile_size": (64, 48), "stride": (32, 48), "remove_border_count": 2, "mode": "interpolation"}


def test_a_tiler_has_the_settings_of_the_checkpoint():
    tiler = Tiler((64, 48), (32, 48), 2, ImageUpscaleMode.INTERPOLATION)
    assert tiler_settings(tiler) == SETTINGS
    assert tiler_settings(create_tiler(SETTINGS, None)) == SETTINGS
    assert tiler_settings(create_tiler(SETTINGS, tiler)) == SETTINGS
    assert create_tiler(None, None) is tiler_settings(None) is None


@pytest.mark.parametrize(("settings", "given"), [(None, Tiler(64, 64)), (SETTINGS, Tiler((64, 48), 32))])
def test_other_tiles_than_the_checkpoints_are_refused(settings, given):
    with pytest.raises(ArgumentError, match=r"tiling: checkpoint has .* TilerConfigurationCallback has \{'tile_size'"):
        create_tiler(settings, given)


def test_other_tiles_than_the_checkpoints_are_refused_where_arguments_come_from_it(
    magnetic_tile_root, teacher_weights, tmp_path
):
    checkpoint = fit(build(Dskd, teacher_weights), magnetic_tile_root, tmp_path, tile_size=TILE, stride=STRIDE)
    other = engine(tmp_path, callbacks=[TilerConfigurationCallback(enable=True, tile_size=TILE, stride=TILE)])
    with pytest.raises(ArgumentError, match="tiling: checkpoint has"):
        other.test(Dskd(teacher=TEACHER), datamodule=data(magnetic_tile_root), ckpt_path=checkpoint)


def test_removed_borders_are_refused(magnetic_tile_root, teacher_weights, tmp_path):
    with pytest.raises(ArgumentError, match="remove_border_count 2 is not supported"):
        fit(build(Dskd, teacher_weights), magnetic_tile_root, tmp_path, tile_size=TILE, remove_border_count=2)


def test_anomalib_still_needs_a_stride():
    """If this fails, ``prepare_callback`` may no longer be needed."""
    with pytest.raises(AttributeError, match="stride_h"):
        Tiler(64)


@pytest.mark.parametrize(
    ("tile", "message"), [(128, "images of 96x144 .* tiles of 128x128"), (16, "images of 16x16 p")]
)
def test_tiles_of_a_wrong_size_are_refused_before_training(
    tile, message, magnetic_tile_root, teacher_weights, tmp_path
):
    model = build(Dskd, teacher_weights)
    with pytest.raises(ArgumentError, match=message):
        fit(model, magnetic_tile_root, tmp_path, tile_size=tile)


# --- models ----------------------------------------------------------------------------------------------------------


def build(kind: type[AnomalibModule], weights: Path | None, teacher: str = TEACHER) -> AnomalibModule:
    arguments = {"assistant": ASSISTANT} if kind is Tad else {}
    options = {"image_size": IMAGE, "sigma": 2.0, "visualizer": False, "seed": 0}
    return kind(teacher=teacher, teacher_weights=weights, **options, **arguments)


def data(root: Path) -> MagneticTile:
    return MagneticTile(root, train_batch_size=4, eval_batch_size=4, num_workers=0, seed=0)


def fit(model: AnomalibModule, root: Path, folder: Path, **tiles) -> Path:
    callback = TilerConfigurationCallback(enable=True, **tiles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(folder, max_epochs=1, callbacks=[callback]).fit(model, datamodule=data(root))
    return next(folder.rglob("model.ckpt"))


@pytest.mark.parametrize("kind", [Afkd, Dskd, Dtgd, Tad], ids=lambda kind: kind.__name__)
def test_each_model_trains_on_tiles_and_its_checkpoint_knows_them(kind, magnetic_tile_root, teacher_weights, tmp_path):
    model = build(kind, teacher_weights)
    seen = []
    model.model.teacher.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    checkpoint = fit(model, magnetic_tile_root, tmp_path, tile_size=TILE, stride=STRIDE)
    assert {shape[2:] for shape in seen} == {(TILE, TILE)}
    assert max(shape[0] for shape in seen) <= tiling.TILE_BATCH
    received = build(kind, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (metrics,) = engine(tmp_path).test(received, datamodule=data(magnetic_tile_root), ckpt_path=checkpoint)
    assert tiler_settings(received.model.tiler)["stride"] == (STRIDE, STRIDE)
    assert 0 <= metrics["image_AUROC"] <= 1
    model.eval()
    torch.testing.assert_close(received.eval()(images()).anomaly_map, model(images()).anomaly_map)


def test_the_teacher_sees_other_tiles_in_each_epoch(magnetic_tile_root, teacher_weights, tmp_path):
    """Cached features would be those of the first epoch's tiles."""
    model = build(Dskd, teacher_weights)
    caches, at_start = [], model.on_train_start

    def record() -> None:
        at_start()
        caches.append(model.model.teacher_cache)

    model.on_train_start = record  # after the callbacks' own
    fit(model, magnetic_tile_root, tmp_path, tile_size=TILE)
    assert caches == [None]


@pytest.mark.filterwarnings("ignore")  # of torch's exporter and its dependencies
def test_exports_compute_the_map_of_tiles(magnetic_tile_root, teacher_weights, tmp_path, monkeypatch):
    model = build(Dskd, teacher_weights)
    fit(model, magnetic_tile_root, tmp_path, tile_size=TILE, stride=STRIDE)
    onnx = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(onnx)
    monkeypatch.setattr(Dskd, "to_onnx", lambda *_, **__: onnx)  # PyTorch takes long to export a model
    network = openvino.Core().compile_model(model.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.name for output in session.get_outputs()]
    for count in (1, 2, 5):  # the batch has any size
        pixels = images(count, (120, 130))
        expected = model.eval()(pixels)
        results = {port.get_any_name(): value for port, value in network(pixels.numpy()).items()}
        for found in (results, dict(zip(names, session.run(None, {"input": pixels.numpy()}), strict=True))):
            np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map, atol=1e-4)
            np.testing.assert_allclose(found["pred_score"], expected.pred_score, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_networks_that_see_tiles_can_be_quantized(magnetic_tile_root, resnet_weights, tmp_path):
    # TEACHER's features, which have no activation and random weights here, lose most in INT8
    model, parts = build(Dskd, resnet_weights, teacher=RESNET), data(magnetic_tile_root)
    fit(model, magnetic_tile_root, tmp_path, tile_size=TILE)
    arguments = {"compression_type": CompressionType.INT8_PTQ, "datamodule": parts}
    network = openvino.Core().compile_model(model.to_openvino(tmp_path / "int8", **arguments), "CPU")
    found = np.concatenate([network(image.numpy()[None])["anomaly_map"].ravel() for image in images(5)])
    expected = model.eval()(images(5)).anomaly_map.ravel()
    assert np.corrcoef(found, expected)[0, 1] > 0.9
