"""The command ``anomalib-dskd check``, with the same data arguments and configurations as ``anomalib train``."""

import json

import pytest
import yaml

from anomalib_dskd.cli import main


def test_a_table_for_people_and_an_exit_code(magnetic_tile_root, capsys):
    assert main(["check", "--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]) == 0
    assert "0 errors, " in capsys.readouterr().out


def test_json_for_machines_with_the_configuration_of_a_training(magnetic_tile_root, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    model = {"class_path": "anomalib_dskd.Dskd", "init_args": {"image_size": 128}}
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"max_epochs": 3}}))
    broken = magnetic_tile_root / "MT_Free" / "Imgs" / "exp1_num_0.jpg"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:100])
    try:
        assert main(["check", "--config", str(path), "--format", "json"]) == 1
    finally:
        broken.write_bytes(sound)
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["error"] == 1
    (error,) = [finding for finding in result["findings"] if finding["severity"] == "error"]
    assert (error["kind"], error["files"]) == ("unreadable", [str(broken)])


def test_a_missing_root_is_told(tmp_path, capsys):
    assert main(["check", "--data", "anomalib_dskd.MagneticTile", "--data.root", str(tmp_path / "gone")]) == 1
    assert "does not exist" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_data_module_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--data", "MVTecXD"])
    assert "MVTecXD" in capsys.readouterr().err
