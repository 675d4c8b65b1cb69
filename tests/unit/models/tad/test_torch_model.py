import functools

import pytest
import timm
import torch
from anomalib.models.image.stfpm.torch_model import STFPMModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.models.tad.torch_model import TadModel
from tests.conftest import TEACHER


def build(teacher: str = TEACHER, **arguments) -> TadModel:
    torch.manual_seed(0)
    built = TadModel(teacher, **arguments)
    built.teacher.weights_origin = {"file": "random, for the test"}
    return built


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def operations(network: torch.nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(images(1, 256))
    return counter.get_total_flops()


def test_inference_costs_what_the_pair_of_stfpm_does(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", functools.partial(_without_weights, create))
    stfpm = STFPMModel(layers=["layer1", "layer2", "layer3"], backbone="resnet18")
    ours = build("resnet18.tv_in1k", sigma=0.0)
    assert operations(ours) == operations(stfpm) > 0
    assert _parameters(ours) == _parameters(stfpm)


def _without_weights(create, *arguments, pretrained: bool = False, **others):  # noqa: ARG001
    return create(*arguments, pretrained=False, **others)


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_student_has_the_teachers_architecture_and_weights_of_its_own():
    model = build()
    student, teacher = model.student.state_dict(), model.teacher.backbone.state_dict()
    assert {name: value.shape for name, value in student.items()} == {n: v.shape for n, v in teacher.items()}
    name = next(name for name, value in student.items() if value.dim() == 4)
    assert not torch.equal(student[name], teacher[name])


def test_student_gets_a_gradient_and_the_teacher_none():
    model = build().train()
    teacher, students = model(images())
    distillation_loss(teacher, students["student"], l2_weight=0.0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_map_compares_teacher_and_student():
    model = build(sigma=2.0).eval()
    with torch.no_grad():
        expected = model.anomaly_map_generator(model.teacher(images()), model.student(images()), (64, 64))
        result = model(images())
    torch.testing.assert_close(result.anomaly_map, expected)
    torch.testing.assert_close(result.pred_score, expected.amax(dim=(-2, -1)))


@pytest.mark.parametrize(("layers", "smallest"), [((1, 2, 3), 32), ((1, 2), 16)])
def test_smallest_image_is_two_cells_of_the_deepest_level(layers, smallest):
    model = build(layers=layers, sigma=0.0).eval()
    assert model.smallest_image == smallest
    with torch.no_grad():
        assert model(images(1, smallest)).anomaly_map.isfinite().all()
