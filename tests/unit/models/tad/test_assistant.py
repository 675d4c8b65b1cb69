import math

import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.tad.assistant import Assistant, GuidanceAttention
from tests.conftest import ASSISTANT

LEVELS = [FeatureLevel(4, 4, False), FeatureLevel(6, 8, False)]


def pyramid(seed: int, *, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, level.channels, 32 // level.stride, 32 // level.stride, generator=generator).requires_grad_(
            requires_grad
        )
        for level in LEVELS
    ]


def test_assistant_has_the_teachers_channels_and_grid():
    assistant = Assistant(ASSISTANT, (1, 2), LEVELS)
    images = torch.randn(2, 3, 64, 96)
    own = [level.shape[-2:] for level in assistant.backbone(images)]
    assert own == [(16, 24), (8, 12)]
    for sizes in (own, [(15, 20), (30, 7)]):
        features = assistant(images, sizes)
        assert [level.shape for level in features] == [(2, 4, *sizes[0]), (2, 6, *sizes[1])]


def test_assistant_is_adapted_then_resized_bilinearly():
    assistant = Assistant(ASSISTANT, (1, 2), LEVELS).eval()
    images = torch.randn(1, 3, 64, 64)
    shallow, deep = assistant(images, [(16, 16), (20, 20)])
    own = assistant.backbone(images)
    torch.testing.assert_close(shallow, assistant.adapters[0](own[0]))
    expected = nn.functional.interpolate(assistant.adapters[1](own[1]), (20, 20), mode="bilinear")
    torch.testing.assert_close(deep, expected)


def test_every_parameter_of_the_assistant_gets_a_gradient():
    assistant = Assistant(ASSISTANT, (1, 2), LEVELS).train()
    sum(level.square().mean() for level in assistant(torch.randn(2, 3, 64, 64), [(16, 16), (8, 8)])).backward()
    assert all(parameter.grad is not None for parameter in assistant.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        (ASSISTANT, (1, 2, 3), r"assistant_layers \[1, 2, 3\] must be as many as the teacher's layers, 2"),
        (ASSISTANT, (1, 9), rf"layers \[1, 9\] do not fit assistant '{ASSISTANT}'"),
        ("efficientnet_light", (1, 2), "assistant 'efficientnet_light' is not a timm model"),
    ],
)
def test_what_does_not_fit_is_refused(name, layers, message):
    with pytest.raises(ArgumentError, match=message):
        Assistant(name, layers, LEVELS)


def test_weights_start_equal():
    attention = GuidanceAttention(LEVELS)
    weights = attention(pyramid(0), [pyramid(1), pyramid(2)])
    assert weights.shape == (3, 2, 2)
    torch.testing.assert_close(weights, torch.full((3, 2, 2), 0.5))


def test_weights_sum_to_one_for_each_image_and_level():
    torch.manual_seed(0)
    attention = GuidanceAttention(LEVELS)
    for query in attention.queries:
        nn.init.normal_(query.weight, std=5.0)
    weights = attention(pyramid(0), [pyramid(1), pyramid(2)])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2))
    assert weights.std(dim=0).min() > 1e-3  # of its own for each image


def test_attention_by_hand():
    attention = GuidanceAttention([FeatureLevel(2, 4, False)])
    attention.queries[0].weight.data = 3 * torch.eye(2)
    attention.keys[0].weight.data = torch.eye(2)
    student = [torch.tensor([[[[7.0, 0.0]], [[0.0, 2.0]]]])]  # unit vectors right and up: mean (0.5, 0.5)
    teacher = [torch.tensor([[[[4.0, 4.0]], [[3.0, 3.0]]]])]  # (0.8, 0.6)
    assistant = [torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]])]  # right and left: (0, 0)
    weights = attention(student, [teacher, assistant])
    expected = 1 / (1 + math.exp(-3 * 0.5 * 1.4 / math.sqrt(2)))
    assert weights.flatten().tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)


def test_gradient_of_the_weights_reaches_the_attention_alone():
    attention = GuidanceAttention(LEVELS)
    for query in attention.queries:
        nn.init.normal_(query.weight)
    pyramids = [pyramid(seed, requires_grad=True) for seed in range(3)]
    attention(pyramids[0], pyramids[1:])[..., 0].sum().backward()
    assert all(level.grad is None for features in pyramids for level in features)
    assert all(parameter.grad.abs().sum() > 0 for parameter in attention.parameters())
