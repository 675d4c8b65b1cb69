import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.decoder import DecoderStudent

RESNET18 = [FeatureLevel(64, 4, False), FeatureLevel(128, 8, False), FeatureLevel(256, 16, False)]


def levels(*strides: int, signed: bool = False) -> list[FeatureLevel]:
    return [FeatureLevel(1, stride, signed) for stride in strides]


def repeating(decoder: DecoderStudent) -> DecoderStudent:
    """Make each stage repeat the pixels of its first channel: shortcuts of ones, main paths of zeros, no batch norm."""
    for part in decoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-30  # lost in rounding; older versions of PyTorch refuse 0
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.zeros_(part.weight)
    for stage in decoder.stages:
        stage[0].shortcut[0].weight.data[0, 0] = 1.0
    return decoder.eval()


def repeat(pixels: Tensor, factor: int) -> Tensor:
    return pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def test_parameter_count_for_resnet18():
    decoder = DecoderStudent(RESNET18)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 3_703_168


def test_features_of_resnet18_are_ordered_from_shallow_to_deep():
    features = DecoderStudent(RESNET18).eval()(torch.randn(1, 512, 4, 4), [(32, 32), (16, 16), (8, 8)])
    assert [tuple(level.shape) for level in features] == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]


@pytest.mark.parametrize("strides", [(4, 8, 16), (4, 16), (8, 8, 16), (16, 16), (16,), (2, 8, 8, 32)])
def test_each_level_is_up_sampled_by_the_ratio_of_strides(strides: tuple[int, ...]):
    decoder = repeating(DecoderStudent(levels(*strides)))
    embedding = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]]])  # (1, 2, 2, 2)
    factors = [2 * strides[-1] // stride for stride in strides]
    features = decoder(embedding, [(2 * factor, 2 * factor) for factor in factors])
    for level, factor in zip(features, factors, strict=True):
        torch.testing.assert_close(level, repeat(embedding[:, :1], factor), rtol=0, atol=0)


def test_level_is_decoded_from_the_next_deeper_one():
    decoder = repeating(DecoderStudent(levels(4, 8)))
    decoder.stages[0][0].shortcut[0].weight.data.mul_(3.0)  # the deeper level
    decoder.stages[1][0].shortcut[0].weight.data.mul_(5.0)
    shallow, deep = decoder(torch.ones(1, 2, 1, 1), [(4, 4), (2, 2)])
    assert deep.unique().tolist() == [3.0]
    assert shallow.unique().tolist() == [15.0]


@pytest.mark.parametrize("sizes", [[(17, 21), (9, 11), (5, 6)], [(17, 23), (8, 11), (4, 5)], [(5, 4), (3, 2), (2, 1)]])
def test_odd_sizes_are_matched(sizes: list[tuple[int, int]]):
    decoder = repeating(DecoderStudent(levels(4, 8, 16)))
    height, width = ((size + 1) // 2 for size in sizes[-1])
    embedding = torch.arange(2.0 * height * width).reshape(1, 2, height, width)
    expected, features = embedding[:, :1], decoder(embedding, sizes)
    for level, (rows, columns) in zip(reversed(features), reversed(sizes), strict=True):
        doubled = repeat(expected, 2)
        row = torch.arange(rows).clamp(max=doubled.shape[-2] - 1)
        column = torch.arange(columns).clamp(max=doubled.shape[-1] - 1)
        expected = doubled[..., row[:, None], column]
        torch.testing.assert_close(level, expected, rtol=0, atol=0)


def test_signed_levels_can_be_negative_and_others_cannot():
    signs = [True, False, True]
    decoder = repeating(DecoderStudent([FeatureLevel(1, 4 * 2**i, sign) for i, sign in enumerate(signs)]))
    for stage in decoder.stages:
        stage[1].main[0].weight.data[0, 0, 1, 1] = 1.0
        stage[1].main[3].weight.data[0, 0, 1, 1] = -3.0  # x - 3 relu(x) = -2 x
    # the first block of each stage ends in a ReLU: make the input of the last two stages positive
    for stage in decoder.stages[1:]:
        stage[0].shortcut[1].bias.data.fill_(7.0)
    features = decoder(torch.ones(1, 2, 1, 1), [(8, 8), (4, 4), (2, 2)])
    # deepest: -2; then relu(-2 + 7) = 5, -2 * 5 = -10, clipped to 0; then relu(0 + 7) = 7, -2 * 7 = -14
    assert [level.unique().tolist() for level in features] == [[-14.0], [0.0], [-2.0]]


@pytest.mark.parametrize("signed", [False, True])
def test_sign_of_an_untrained_decoders_features(signed: bool):
    torch.manual_seed(0)
    decoder = DecoderStudent([FeatureLevel(8, 4, signed), FeatureLevel(8, 8, signed)]).train()
    features = decoder(torch.randn(4, 16, 4, 4), [(16, 16), (8, 8)])
    assert [bool(level.min() < 0) for level in features] == [signed, signed]
