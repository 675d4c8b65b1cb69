import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import openvino
import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_dskd.data.image_files import read_named_image
from anomalib_dskd.errors import DataError
from tests.integration.conftest import Exported

SCRIPT = Path(__file__).parents[2] / "examples" / "predict_folder.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batches_have_images_of_one_size(script, tmp_path):
    for index, size in enumerate([(8, 9), (8, 9), (8, 9), (7, 9), (8, 9)]):
        Image.new("RGB", size, (index, 0, 255)).save(tmp_path / f"{index}.png")
    found = list(script.batches(sorted(tmp_path.iterdir()), 2))
    assert [[path.stem for path in names] for names, _ in found] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert [images.shape for _, images in found] == [(2, 3, 9, 8), (1, 3, 9, 8), (1, 3, 9, 7), (1, 3, 9, 8)]
    np.testing.assert_allclose(found[0][1][1, :, 0, 0], [1 / 255, 0, 1])


def test_images_of_all_types_that_anomalib_reads_are_scored(script, tmp_path):
    for suffix in IMG_EXTENSIONS:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{suffix[1:]}{suffix}")
    Image.new("RGB", (8, 8)).save(tmp_path / "upper.PNG")
    assert {path.suffix.lower() for path in script.image_files(tmp_path)} == set(IMG_EXTENSIONS)
    assert len(script.image_files(tmp_path)) == len(IMG_EXTENSIONS) + 1


def test_images_behind_a_link_are_not_left_out_in_silence(script, tmp_path):
    for name in ("new", "elsewhere"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "new" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="1 images below .* would be left out"):
        script.image_files(tmp_path / "new")


@pytest.mark.parametrize("batch", [1, 3])
def test_every_image_has_its_own_score(batch, script, exported: Exported, factory):
    paths = sorted((factory / "new").iterdir())
    predictions = script.predict(exported.xml, paths, batch=batch)
    compiled = openvino.Core().compile_model(exported.xml, "CPU")
    expected = {path: compiled(read_named_image(path)[None].numpy()) for path in paths}
    assert sorted(prediction.path for prediction in predictions) == paths
    for path, score, is_defective in predictions:
        assert score == pytest.approx(expected[path]["pred_score"].item(), abs=1e-2)  # BF16 on CPUs that support it
        assert is_defective == expected[path]["pred_label"].item()


def test_command_writes_csv_and_reports_unreadable_files(exported: Exported, factory, tmp_path):
    shutil.copytree(factory / "new", tmp_path / "new")
    (tmp_path / "new" / "00.png").write_bytes(b"nonsense")
    command = [sys.executable, SCRIPT, exported.xml, tmp_path / "new", "--batch", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "00.png' cannot be read" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "path,score,is_defective"
    assert [Path(line.split(",")[0]).name for line in lines[1:]] == [f"{index:02}.png" for index in range(1, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.xml", "."], "model 'absent.xml' does not exist"),
        ([__file__, "absent"], "folder 'absent' contains no images"),
        ([__file__, "{new}", "--batch", "0"], "batch 0 must be 1 or larger"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message, factory, tmp_path):
    command = [sys.executable, SCRIPT, *(argument.format(new=factory / "new") for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
