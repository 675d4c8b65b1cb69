import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.afkd.torch_model import AfkdModel
from anomalib_dskd.models.dskd.torch_model import DskdModel
from anomalib_dskd.training.feature_cache import FeatureCache
from tests.conftest import TEACHER


def build(teacher: str = TEACHER, model=AfkdModel, **arguments) -> AfkdModel:
    torch.manual_seed(0)
    built = model(teacher, **arguments)
    built.teacher.weights_origin = {"file": "random, for the test"}
    return built


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def multiply_adds(model) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images(1, 256))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("teacher", ["resnet18.tv_in1k", "tf_efficientnet_lite0"])
def test_computes_less_than_dskd(teacher):
    ours, theirs = (multiply_adds(build(teacher, model)) for model in (AfkdModel, DskdModel))
    assert ours < 0.95 * theirs


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none():
    model = build().train()
    teacher, students = model(images())
    assert list(students) == ["decoder"]
    distillation_loss(teacher, students["decoder"], l2_weight=0.0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"fusion", "embedding", "decoder_student"}
    assert all(parameter.grad is not None for parameter in trained.values())


def test_map_compares_teacher_and_decoder():
    model = build(sigma=2.0).eval()
    with torch.no_grad():
        teacher = model.teacher(images())
        expected = model.anomaly_map_generator(teacher, model.student_features(images(), teacher)["decoder"], (64, 64))
        result = model(images())
    torch.testing.assert_close(result.anomaly_map, expected)
    torch.testing.assert_close(result.pred_score, expected.amax(dim=(-2, -1)))
    assert model.largest_score == pytest.approx(2 * 3)  # without the l2 term of DSKD


def test_reconstruction_does_not_depend_on_the_teachers_norm():
    model = build().eval()
    with torch.no_grad():
        teacher = model.teacher(images())
        expected = model.student_features(images(), teacher)["decoder"]
        scaled = model.student_features(images(), [(2.0 + index) * level for index, level in enumerate(teacher)])[
            "decoder"
        ]
    for mine, theirs in zip(scaled, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_cached_features_give_the_same_reconstruction():
    model = build().eval()
    expected = model.student_features(images(), model.teacher_features(images()))["decoder"]
    model.teacher_cache = FeatureCache(model.teacher, images=2, memory=1.0)
    for _ in range(2):
        cached = model.student_features(images(), model.teacher_features(images()))
        for mine, theirs in zip(cached["decoder"], expected, strict=True):
            assert (mine - theirs).abs().mean() < 1e-2 * theirs.abs().mean()  # kept in 16 bits
    assert len(model.teacher_cache) == 2


def test_teacher_runs_once():
    model = build().eval()
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(images())
    assert calls == [1]


def test_score_does_not_depend_on_the_rest_of_the_batch():
    model = build().eval()
    with torch.no_grad():
        together = model(images(4)).pred_score
        alone = torch.cat([model(image[None]).pred_score for image in images(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "layers"),
    [
        ("resnet18", (1, 2, 3)),
        ("tf_efficientnet_lite0", (1, 2, 3)),
        ("mobilenetv3_small_100", (0, 4)),
        ("convnext_atto", (0, 1, 2)),
        (TEACHER, (3,)),
    ],
)
def test_any_timm_teacher_learns_in_a_step(teacher, layers):
    model = build(teacher, layers=layers).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        teacher, students = model(images(2, 128))
        decoder = students["decoder"]
        assert [level.shape for level in decoder] == [level.shape for level in teacher]
        loss = distillation_loss(teacher, decoder, l2_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "mean"}, "fusion 'mean' is not supported. Supported values: 'learned', 'equal'"),
        ({"embedding_blocks": 0}, "embedding_blocks 0 must be 1 or larger"),
        ({"layers": [1, 9]}, r"layers \[1, 9\] .* has 5 feature levels"),
    ],
)
def test_illegal_arguments_say_what_is_legal(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        AfkdModel(TEACHER, **arguments)
