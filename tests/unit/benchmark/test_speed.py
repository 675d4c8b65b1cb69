import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from sklearn.metrics import f1_score

from anomalib_dskd import Dskd
from anomalib_dskd.benchmark.export_accuracy import exported_f1
from anomalib_dskd.benchmark.speed import measure_cost, measure_openvino, peak_memory_mib
from anomalib_dskd.errors import DskdError


def test_parameters_and_multiply_adds_are_those_of_the_paper():
    model = Dskd()
    model.model.teacher.weights_origin = {"file": "none", "sha256": ""}  # required for a forward pass
    cost = measure_cost(model, (256, 256))
    assert cost["parameters"] == 20_948_736
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 20_948_736 - 2_782_784  # without the teacher's
    assert cost["macs"] == pytest.approx(6.16e9, rel=2e-3)  # Table 6, and the blur


def test_without_encoder_student_cost_is_that_of_reverse_distillation():
    model = Dskd(encoder="teacher", embedding_input="normalized")
    model.model.teacher.weights_origin = {"file": "none", "sha256": ""}
    cost = measure_cost(model, (256, 256))
    assert cost["macs"] == pytest.approx(4.33e9, rel=2e-3)
    assert cost["parameters"] == 20_948_736 - 2_782_784  # without the encoder student's


def test_openvino_is_measured_in_a_separate_process(monkeypatch):
    image = openvino.opset13.parameter([-1, 3, -1, -1], np.float32)
    network = openvino.Model([openvino.opset13.relu(image)], [image])

    def to_openvino(folder, *, input_size, compression_type, datamodule):
        assert (input_size, compression_type, datamodule) == ((16, 24), None, "data")
        openvino.save_model(network, folder / "model.xml")
        return folder / "model.xml"

    monkeypatch.setattr(openvino.Core, "compile_model", None)  # of this process
    model = SimpleNamespace(to_openvino=to_openvino)
    measured = measure_openvino(model, (16, 24), seconds=0.01, datamodule="data")
    assert measured["milliseconds"] > 0
    assert measured["throughput"] > 0
    assert 0 < measured["mib"] < 1
    assert measured["label_f1"] is None


def bright_images(folder: Path, *, name: str) -> Path:
    """An exported model that labels images of a mean above 0.5."""
    image = openvino.opset13.parameter([-1, 3, 16, 24], np.float32)
    mean = openvino.opset13.reduce_mean(image, np.array([1, 2, 3]))
    network = openvino.Model([openvino.opset13.greater(mean, np.float32(0.5))], [image])
    network.outputs[0].get_tensor().set_names({name})
    openvino.save_model(network, folder / "model.xml")
    return folder / "model.xml"


def test_f1_of_an_export_is_that_of_its_labels(tmp_path):
    brightness = [0.1, 0.8, 0.6, 0.3, 0.9]
    truth = [False, True, False, True, True]
    items = [
        SimpleNamespace(image=torch.full((3, 20, 20), mean), gt_label=torch.tensor(label))
        for mean, label in zip(brightness, truth, strict=True)
    ]
    data = SimpleNamespace(test_data=items)
    expected = f1_score(truth, np.array(brightness) > 0.5)
    assert exported_f1(bright_images(tmp_path, name="pred_label"), data, (16, 24)) == pytest.approx(expected)
    assert exported_f1(bright_images(tmp_path, name="pred_score"), data, (16, 24)) is None
    data.test_data = items[:1]
    assert exported_f1(bright_images(tmp_path, name="pred_label"), data, (16, 24)) is None


def test_a_model_that_openvino_cannot_run_is_an_error():
    def to_openvino(folder, **_):
        for suffix in (".xml", ".bin"):
            (folder / f"model{suffix}").write_text("nonsense")
        return folder / "model.xml"

    with pytest.raises(DskdError, match="OpenVINO cannot run the exported model: .*[Uu]nable to read the model"):
        measure_openvino(SimpleNamespace(to_openvino=to_openvino), (16, 24), seconds=0.01)


def test_peak_memory_is_in_mib():
    block = torch.ones(64, 2**20)  # 256 MiB
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert block.numel() == 64 * 2**20
    del block
    assert 256 < held <= peak_memory_mib() + 1
    assert peak_memory_mib() < 100_000
