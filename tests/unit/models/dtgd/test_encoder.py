import math

import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.models.dtgd.encoder import DenoisingEncoder, NoiseRemoval


def levels(*strides: int, signed: bool = False) -> list[FeatureLevel]:
    return [FeatureLevel(4 + 2 * index, stride, signed) for index, stride in enumerate(strides)]


def pyramid(of: list[FeatureLevel], size: int = 64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, level.channels, size // level.stride, size // level.stride, generator=generator) for level in of
    ]


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(*strides: int, gate: bool = True, signed: bool = False) -> tuple[DenoisingEncoder, list[FeatureLevel]]:
    torch.manual_seed(0)
    of = levels(*strides, signed=signed)
    return DenoisingEncoder(of, gate=gate).eval(), of


# --- the gate ----------------------------------------------------------------------------------------------------


def gate_of_one_channel(student_weight: float, teacher_weight: float, scale: float, bias: float) -> NoiseRemoval:
    gate = NoiseRemoval(1).eval()
    first, norm, _, last = gate.scores
    first.weight.data = torch.tensor([[[[student_weight]], [[teacher_weight]]]])
    norm.eps = 1e-30  # lost in rounding; older versions of PyTorch refuse 0
    last.weight.data.fill_(scale)
    last.bias.data.fill_(bias)
    return gate


def test_gate_by_hand():
    student, teacher = torch.tensor([[[[2.0, -3.0]]]]), torch.tensor([[[[1.0, 5.0]]]])
    gate = gate_of_one_channel(1.0, 2.0, scale=-1.0, bias=0.5)
    # relu of 2 + 2 and of -3 + 10; then 0.5 minus that
    expected = [2.0 / (1 + math.exp(3.5)), -3.0 / (1 + math.exp(6.5))]
    assert gate(student, teacher).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("bias", "passed"), [(-1e4, 0.0), (0.0, 0.5), (1e4, 1.0)])
def test_gate_lets_through_nothing_half_or_all(bias, passed):
    gate = gate_of_one_channel(0.0, 0.0, scale=0.0, bias=bias)
    student = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(gate(student, torch.randn(2, 1, 3, 3)), passed * student)


def test_gate_learns_from_student_and_teacher():
    gate = NoiseRemoval(3).train()
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    gate(student, teacher).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate.parameters())
    assert teacher.grad.abs().sum() > 0


# --- the encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(4, 8, 16), (4, 16), (8, 8, 16), (16, 16), (32,), (1, 2), (2, 8, 8, 32)])
@pytest.mark.parametrize("gate", [True, False])
def test_features_have_the_teachers_shapes(strides, gate):
    encoder, of = build(*strides, gate=gate)
    guides = pyramid(of)
    assert [level.shape for level in encoder(images(), guides)] == [level.shape for level in guides]


@pytest.mark.parametrize("sizes", [[(17, 21), (9, 11), (5, 6)], [(16, 20), (8, 10), (4, 5)]])
def test_odd_sizes_are_met_whether_the_teacher_rounds_up_or_down(sizes):
    encoder, of = build(4, 8, 16)
    guides = [torch.randn(1, level.channels, *size) for level, size in zip(of, sizes, strict=True)]
    assert [level.shape[-2:] for level in encoder(torch.randn(1, 3, 67, 83), guides)] == [torch.Size(s) for s in sizes]


def test_stem_doubles_its_channels_up_to_the_first_level():
    stem = DenoisingEncoder([FeatureLevel(64, 8, False)], gate=False).stem
    assert [part.out_channels for part in stem.modules() if isinstance(part, nn.Conv2d)] == [16, 32, 64]


def test_each_stage_has_two_residual_blocks():
    encoder, _ = build(4, 8, 16)
    assert [len(stage) for stage in encoder.stages] == [2, 2, 2]
    assert len(encoder.gates) == 3


def test_gates_act_before_the_features_go_on():
    encoder, of = build(4, 8, 16)
    open_features = encoder(images(), pyramid(of))
    nn.init.zeros_(encoder.gates[0].scores[3].weight)
    nn.init.constant_(encoder.gates[0].scores[3].bias, -1e4)
    closed = encoder(images(), pyramid(of))
    assert closed[0].abs().max() == 0
    assert not torch.equal(closed[1], open_features[1])
    # behind a closed gate nothing of the image is left
    torch.testing.assert_close(closed[2], encoder(torch.zeros_like(images()), pyramid(of))[2])


def test_teacher_matters_to_its_own_and_deeper_levels_alone():
    encoder, of = build(4, 8, 16)
    guides, others = pyramid(of), pyramid(of, seed=2)
    expected = encoder(images(), guides)
    for changed in range(3):
        mixed = [others[index] if index == changed else guide for index, guide in enumerate(guides)]
        result = encoder(images(), mixed)
        same = [torch.equal(a, b) for a, b in zip(result, expected, strict=True)]
        assert same == [index < changed for index in range(3)]


def test_without_gates_the_teacher_does_not_matter():
    encoder, of = build(4, 8, 16, gate=False)
    first, second = encoder(images(), pyramid(of)), encoder(images(), pyramid(of, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_features_are_negative_only_where_the_teachers_are(signed):
    encoder, of = build(4, 8, signed=signed)
    assert [bool(level.min() < 0) for level in encoder(images(), pyramid(of))] == [signed, signed]
