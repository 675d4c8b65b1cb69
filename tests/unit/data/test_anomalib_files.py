"""anomalib's listing and reading of files with this package's workarounds, and whether these are still needed."""

import gc
import importlib.util
import multiprocessing
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import openvino
import pytest
import tifffile
from anomalib.data import PredictDataset
from anomalib.data.utils import image as image_module
from anomalib.data.utils import path as path_module
from anomalib.data.utils import read_depth_image, read_image, read_mask
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine.engine import create_versioned_dir as create_in_engine
from anomalib.utils.path import create_versioned_dir
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_dskd import Dskd
from anomalib_dskd.check.check_data import check_data
from anomalib_dskd.data.anomalib_files import name_files_in_workers
from anomalib_dskd.errors import DataError, UnreadableImageError, UnsafeImageError
from tests.conftest import engine
from tests.unit.data.conftest import parts, write


def unchanged(module: ModuleType) -> ModuleType:
    """A copy of anomalib's module without the workarounds."""
    spec = importlib.util.spec_from_file_location("unchanged", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("good", "bad", "good_test"):
        write(tmp_path / "parts" / name)
    return tmp_path / "parts"


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# --- are they needed? ------------------------------------------------------------------------------------------------


def test_anomalib_still_refuses_all_but_ascii():
    assert unchanged(path_module).contains_non_printable_characters("Müller")


@pytest.mark.filterwarnings("ignore")  # it does not close them either
def test_anomalib_still_does_not_name_truncated_files(tmp_path):
    copy, path = unchanged(image_module), truncate(write(tmp_path) / "0.png")
    for read in (copy.read_image, copy.read_mask):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the message is what is tested
            read(path)
        assert "0.png" not in str(caught.value)
    del caught
    gc.collect()  # while the warnings of its open files are ignored


def test_anomalib_still_leaves_linked_images_out(tmp_path):
    (write(tmp_path / "new") / "linked").symlink_to(write(tmp_path / "elsewhere"))
    assert len(unchanged(image_module).get_image_filenames_from_dir(tmp_path / "new")) == 3


def test_anomalib_still_cannot_replace_a_folder_by_a_link(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(OSError, match="latest"):
        create_versioned_dir(tmp_path)


# --- names of folders ------------------------------------------------------------------------------------------------

NAMES = ["Müller", "Mu\u0308ller", "検査", "Детали", "قطع", "pièces d'essai", "C'è 50% & più"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_may_have_names_in_any_language(name, root, tmp_path):
    named = root.rename(tmp_path / name)
    data = parts(named)
    data.setup()
    assert len(data.train_data) == 3
    assert len(PredictDataset(named / "bad")) == 3
    assert "setup" not in {finding.kind for finding in check_data(parts(named))}


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\0b", "a\udcffb"])
def test_control_characters_are_still_refused(name):
    with pytest.raises(ValueError, match="non-printable characters"):
        PredictDataset(name)


def test_a_model_is_trained_tested_and_exported_below_such_a_folder(root, teacher_weights, tmp_path):
    home = tmp_path / "Müller 検査"
    home.mkdir()
    root, weights = root.rename(home / "parts"), home / "weights.safetensors"
    weights.write_bytes(teacher_weights.read_bytes())
    model = Dskd(teacher="test_efficientnet.r160_in1k", teacher_weights=weights, image_size=64, sigma=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = engine(home / "results", max_epochs=1)
        trainer.train(model, datamodule=parts(root))
        (checkpoint,) = home.rglob("model.ckpt")
        batches = engine(home / "later").predict(model, data_path=root / "bad", ckpt_path=checkpoint)
        xml = trainer.export(model, "openvino")
    assert sum(len(batch) for batch in batches) == 3
    assert len(list((home / "later").rglob("images/**/*.png"))) == 3
    result = OpenVINOInferencer(xml).predict(root / "bad" / "0.png")
    assert 0 <= result.pred_score.item() <= 1


# --- files that cannot be read ---------------------------------------------------------------------------------------

NAMED = r"image '.*{}' cannot be read: .*\. Replace the file, or remove it from the data set\."


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp", "ppm"])
def test_readers_name_truncated_files(suffix, read, tmp_path):
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    assert read(path).shape[:2] == (64, 64)
    with pytest.raises(OSError, match=rf"part.{suffix}'"):
        read(truncate(path))


def test_readers_refuse_what_is_not_safe_to_decode(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "program.png", "EPS")
    with pytest.raises(UnsafeImageError, match=r"program.png' is a PostScript program"):
        read_image(tmp_path / "program.png")


def test_depth_images_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "depth.tiff", np.ones((64, 64), dtype=np.float32))
    assert read_depth_image(tmp_path / "depth.tiff").shape == (64, 64)
    (tmp_path / "depth.tiff").write_bytes(b"II*\0")
    with pytest.raises(UnreadableImageError, match=NAMED.format("depth.tiff")):
        read_depth_image(tmp_path / "depth.tiff")
    with pytest.raises(FileNotFoundError, match=r"gone.tiff"):
        read_depth_image(tmp_path / "gone.tiff")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", ["good", "bad"])
def test_training_names_a_truncated_file(folder, workers, root, tiny_model, tmp_path):
    truncate(root / folder / "1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=NAMED.format(f"{folder}/1.png")):
            engine(tmp_path, max_epochs=1).fit(tiny_model, datamodule=parts(root, num_workers=workers))


def test_training_names_a_truncated_source_of_synthetic_defects(root, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (root / "good").iterdir():
        truncate(path)
    data = parts(root, val_split_mode="synthetic", val_split_ratio=0.5)
    with pytest.raises(DataError, match=NAMED.format(r"good/\d.png")):
        engine(tmp_path, max_epochs=1).fit(tiny_model, datamodule=data)


def test_predict_and_inferencers_name_a_truncated_file(root, tiny_model, tmp_path):
    truncate(root / "bad" / "1.png")
    tiny_model.model.is_trained = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=NAMED.format("bad/1.png")):
            engine(tmp_path).predict(tiny_model, data_path=root / "bad")
    image = openvino.opset13.parameter([1, 3, 64, 64], np.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(image)], [image]), tmp_path / "model.xml")
    with pytest.raises(DataError, match=NAMED.format("bad/1.png")):
        OpenVINOInferencer(tmp_path / "model.xml").predict(root / "bad" / "1.png")


@pytest.mark.slow
def test_spawned_workers_name_a_truncated_file(root):
    truncate(root / "bad" / "1.png")
    dataset = PredictDataset(root / "bad")
    name_files_in_workers(dataset)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(dataset, num_workers=1, collate_fn=dataset.collate_fn, multiprocessing_context=context)
    with pytest.raises(DataError, match=NAMED.format("bad/1.png")):
        list(loader)


# --- the folder `latest` ---------------------------------------------------------------------------------------------


def test_training_follows_a_test_in_the_same_folder(root, tiny_model, tmp_path):
    """A received checkpoint is tested before a model has been trained here."""
    tiny_model.model.is_trained = True
    results = tmp_path / "results"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(results).test(tiny_model, datamodule=parts(root))
        (latest,) = results.rglob("latest")
        tested = {path.name for path in latest.rglob("*.png")}
        engine(results, max_epochs=1).train(tiny_model, datamodule=parts(root))
        engine(results, max_epochs=1).train(tiny_model, datamodule=parts(root))
    assert {path.name for path in latest.with_name("v0").rglob("*.png")} == tested
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "v0", "v1", "v2"]
    assert latest.resolve().name == "v2"


@pytest.mark.parametrize(("before", "after"), [([], ["v0"]), (["v0", "v3"], ["v0", "v3", "v4"])])
def test_a_folder_becomes_the_next_version(before, after, tmp_path):
    for name in (*before, "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest" / "file").touch()
    new = create_in_engine(tmp_path)
    assert (tmp_path / after[-1] / "file").exists()
    assert new.name == f"v{int(after[-1][1:]) + 1}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *after, new.name]


def test_a_link_stays_a_link(tmp_path):
    assert [create_in_engine(tmp_path).name for _ in range(3)] == ["v0", "v1", "v2"]
    assert (tmp_path / "latest").resolve().name == "v2"
