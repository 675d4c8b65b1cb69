import hashlib
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError
from tests.conftest import TEACHER

LAYERS = (1, 2, 3)


@pytest.fixture
def teacher(teacher_weights: Path) -> Teacher:
    teacher = Teacher(TEACHER, LAYERS)
    teacher.load_weights(TeacherWeights(teacher_weights))
    return teacher


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_no_parameter_is_trainable(teacher: Teacher):
    assert len(list(teacher.parameters())) > 0
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_stays_in_evaluation_mode(teacher: Teacher):
    enclosing = nn.Sequential(teacher, nn.BatchNorm2d(1))
    enclosing.train()
    assert enclosing.training
    assert not any(module.training for module in teacher.modules())
    assert teacher.train() is teacher
    assert not any(module.training for module in Teacher(TEACHER, LAYERS).modules())


def test_training_of_the_enclosing_model_changes_nothing(teacher: Teacher):
    before = {key: value.clone() for key, value in teacher.backbone.state_dict().items()}
    teacher.train()
    first, second = teacher(images()), teacher(images())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(dict(teacher.backbone.state_dict()), before, rtol=0, atol=0)


def test_features_have_no_gradient(teacher: Teacher):
    features = teacher(images().requires_grad_())
    assert [tuple(level.shape) for level in features] == [(2, 24, 16, 16), (2, 32, 8, 8), (2, 48, 4, 4)]
    assert not any(level.requires_grad for level in features)


def test_levels_are_the_backbones(teacher: Teacher):
    assert [tuple(level) for level in teacher.levels] == [(24, 4, True), (32, 8, True), (48, 16, True)]


def test_raises_before_weights():
    message = (
        rf"^the teacher {re.escape(repr(TEACHER))} has no pretrained weights yet, and random ones would give "
        r"meaningless scores\. Train the model, load a checkpoint, or call `load_teacher_weights\(\)` first\.$"
    )
    with pytest.raises(TeacherWeightsError, match=message):
        Teacher(TEACHER, LAYERS)(images())


def test_still_raises_after_weights_that_do_not_fit(tmp_path: Path):
    teacher = Teacher(TEACHER, LAYERS)
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match="do not fit the teacher"):
        teacher.load_weights(TeacherWeights(tmp_path / "weights.pth"))
    with pytest.raises(TeacherWeightsError, match="has no pretrained weights yet"):
        teacher(images())


def test_origin_of_the_weights_is_recorded(teacher: Teacher, teacher_weights: Path):
    digest = hashlib.sha256(teacher_weights.read_bytes()).hexdigest()
    assert teacher.weights_origin == {"file": f"{TEACHER}.safetensors", "sha256": digest}


def test_checkpoint_restores_weights_and_origin(teacher: Teacher, tmp_path: Path):
    torch.save(teacher.state_dict(), tmp_path / "checkpoint.pt")
    restored = Teacher(TEACHER, LAYERS)
    restored.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert restored.weights_origin == teacher.weights_origin
    torch.testing.assert_close(restored(images()), teacher(images()), rtol=0, atol=0)


def test_checkpoint_of_a_teacher_without_weights_restores_none(teacher: Teacher):
    teacher.load_state_dict(Teacher(TEACHER, LAYERS).state_dict())
    with pytest.raises(TeacherWeightsError, match="has no pretrained weights yet"):
        teacher(images())
