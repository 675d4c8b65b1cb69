"""The command ``anomalib-dskd check``, with data arguments and configurations of ``anomalib train``."""

import json

import numpy as np
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from PIL import Image

from anomalib_dskd.cli import main


def test_prints_a_table_and_returns_an_exit_code(magnetic_tile_root, capsys):
    assert main(["check", "--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]) == 0
    assert "0 errors, " in capsys.readouterr().out


def test_prints_json_for_a_training_configuration(magnetic_tile_root, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    model = {"class_path": "anomalib_dskd.Dskd", "init_args": {"image_size": 128}}
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"max_epochs": 3}}))
    broken = magnetic_tile_root / "MT_Free" / "Imgs" / "exp1_num_0.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    try:
        assert main(["check", "--config", str(path), "--format", "json"]) == 1
    finally:
        broken.write_bytes(content)
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["error"] == 1
    (error,) = [finding for finding in result["findings"] if finding["severity"] == "error"]
    assert (error["kind"], error["files"]) == ("unreadable", [str(broken)])


def test_narrow_table_shows_full_paths(tmp_path, capsys):
    root = tmp_path / "a_name_that_is_longer_than_a_line_of_the_table_can_be_without_being_folded" / "parts"
    for name in ("good", "bad"):
        (root / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng([index, len(name)]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / "bad" / "1.png").write_bytes(b"")
    folders = ["--data.root", str(root), "--data.normal_dir", "good", "--data.abnormal_dir", "bad"]
    assert main(["check", "--data", "Folder", "--data.name", "parts", *folders]) == 1
    lines = capsys.readouterr().out.splitlines()
    last_column = "".join(line.split("│")[3].strip() for line in lines if line.count("│") == 4)
    assert str(root / "bad" / "1.png") in last_column


def test_many_findings_of_a_kind_are_counted_in_the_table_and_listed_in_json(tmp_path, capsys):
    (tmp_path / "good").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for copy in "ab":
            Image.fromarray(pixels).save(tmp_path / "good" / f"{index}{copy}.png")
    arguments = ["check", "--data", "Folder", "--data.name", "parts", "--data.root", str(tmp_path)]
    arguments += ["--data.normal_dir", "good", "--data.test_split_mode", "none", "--data.val_split_mode", "none"]
    main(arguments)
    table = " ".join(capsys.readouterr().out.split())
    assert table.count("are the same") == 5
    assert "3 more of kind 'same-picture'" in table
    main([*arguments, "--format", "json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert sum(finding["kind"] == "same-picture" for finding in found) == 8


def test_progress_is_shown_only_on_a_terminal(magnetic_tile_root, capsys, monkeypatch):
    arguments = ["check", "--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]
    main(arguments)
    assert "checking images" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(arguments)
    assert "checking images" in capsys.readouterr().err


def test_configuration_that_anomalib_prints_is_accepted(magnetic_tile_root, tmp_path, capsys):
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]
    model = ["--model", "anomalib_dskd.Dskd", "--optimizer", "SGD", "--optimizer.lr", "0.1"]
    with pytest.raises(SystemExit):
        AnomalibCLI(args=["train", *model, *data, "--print_config"], run=False)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert "optimizer" in (tmp_path / "printed.yaml").read_text()
    assert main(["check", "--config", str(tmp_path / "printed.yaml")]) == 0


def test_missing_root_is_reported(tmp_path, capsys):
    assert main(["check", "--data", "anomalib_dskd.MagneticTile", "--data.root", str(tmp_path / "gone")]) == 1
    assert "does not exist" in " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines of a table's cell


def test_unknown_data_module_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--data", "MVTecXD"])
    assert "MVTecXD" in capsys.readouterr().err
