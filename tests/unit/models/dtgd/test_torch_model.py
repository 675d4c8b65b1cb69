import pytest
import torch
from torch import Tensor

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.dtgd.loss import DtgdLoss
from anomalib_dskd.models.dtgd.torch_model import DtgdModel
from tests.conftest import TEACHER


def build(teacher: str = TEACHER, **arguments) -> DtgdModel:
    torch.manual_seed(0)
    built = DtgdModel(teacher, **arguments)
    built.teacher.weights_origin = {"file": "random, for the test"}
    return built


def images(batch: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def losses_of(model: DtgdModel, clean: Tensor, damaged: Tensor) -> dict[str, Tensor]:
    anomaly_teacher = model.teacher(damaged)
    students = model.student_features(damaged, anomaly_teacher)
    loss = DtgdLoss(margin=0.0, dissimilarity_weight=0.1)
    return loss(model.teacher_features(clean), students, anomaly_teacher, torch.ones(len(clean), 1, 64, 64))


@pytest.mark.parametrize("gate", [True, False])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(gate):
    model = build(gate=gate).train()
    sum(losses_of(model, images(), images(seed=1)).values()).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"encoder_student", "embedding", "decoder_student"}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(".gates." in name for name in trained) == gate


def test_encoder_loss_does_not_reach_embedding_or_decoder():
    model = build().train()
    losses_of(model, images(), images(seed=1))["encoder"].backward()
    later = [*model.embedding.parameters(), *model.decoder_student.parameters()]
    assert all(parameter.grad is None for parameter in later)
    assert all(parameter.grad is not None for parameter in model.encoder_student.parameters())


@pytest.mark.parametrize("gate", [True, False])
def test_teacher_runs_once_for_gates_and_map(gate):
    model = build(gate=gate, sigma=2.0).eval()
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        result = model(images())
        assert calls == [1]
        teacher = model.teacher(images())
        expected = model.anomaly_map_generator(teacher, model.student_features(images(), teacher)["decoder"], (64, 64))
    torch.testing.assert_close(result.anomaly_map, expected)
    assert model.largest_score == pytest.approx(2 * 3)


def test_features_in_training_are_those_of_both_students():
    model = build()
    teacher, students = model(images())
    assert list(students) == ["encoder", "decoder"]
    for pyramid in students.values():
        assert [level.shape for level in pyramid] == [level.shape for level in teacher]


@pytest.mark.parametrize("size", [(64, 96), (100, 75), (97, 64)])
@pytest.mark.parametrize("teacher", [TEACHER, "test_convnext.r160_in1k"])
def test_odd_sizes_fit_whether_the_teacher_rounds_up_or_down(teacher, size):
    model = build(teacher, sigma=2.0, layers=(0, 1, 2)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).anomaly_map.shape == (1, 1, *size)


@pytest.mark.parametrize(
    ("teacher", "layers"),
    [("resnet18", (1, 2, 3)), ("tf_efficientnet_lite0", (1, 3)), ("convnext_atto", (0, 1, 2)), (TEACHER, (2,))],
)
def test_any_timm_teacher_learns_in_a_step(teacher, layers):
    model = build(teacher, layers=layers).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        parts = losses_of(model, images(), images(seed=1))
        loss = parts["encoder"] + parts["decoder"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_no_embedding_is_refused():
    with pytest.raises(ArgumentError, match="embedding_blocks 0 must be 1 or larger"):
        build(embedding_blocks=0)
