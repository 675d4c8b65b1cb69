import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.components.embedding import DeepFeatureEmbedding, DirectEmbedding, embedding_channels

RESNET18 = [FeatureLevel(64, 4, False), FeatureLevel(128, 8, False), FeatureLevel(256, 16, False)]
ONE_CHANNEL = [FeatureLevel(1, 4, False), FeatureLevel(1, 8, False), FeatureLevel(1, 16, False)]


def levels(*channels_and_strides: tuple[int, int]) -> list[FeatureLevel]:
    return [FeatureLevel(channels, stride, signed=False) for channels, stride in channels_and_strides]


def settle(module: nn.Module) -> nn.Module:
    """Make batch norms the identity and convolutions zero, so that a test can set the weights that it needs."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-30  # lost in rounding; older versions of PyTorch refuse 0
        elif isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)
    return module.eval()


def set_center(conv: nn.Conv2d, matrix: list[list[float]]) -> None:
    """Mix channels by ``matrix``, with one row per output channel, at the center of the kernel."""
    conv.weight.data[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = torch.tensor(matrix)


def ramp(size: int) -> Tensor:
    return torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_width_is_twice_that_of_the_deepest_level():
    assert embedding_channels(RESNET18) == 512
    assert embedding_channels(RESNET18[:1]) == 128


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, 11_680_000 - 2 * 9 * 512 * 512 - 4 * 512),
        (2, 11_680_000),
        (3, 11_680_000 + 2 * 9 * 512 * 512 + 4 * 512),
    ],
)
def test_parameter_count_for_resnet18(blocks: int, expected: int):
    assert parameters(DeepFeatureEmbedding(RESNET18, blocks)) == expected
    if blocks == 2:
        assert parameters(DeepFeatureEmbedding(RESNET18)) == expected


def test_parameter_count_of_the_direct_embedding_for_resnet18():
    assert parameters(DirectEmbedding(RESNET18)) == 9 * 256 * 512 + 2 * 512


def test_levels_are_reduced_by_one_convolution_per_deeper_level():
    chains = [[block[0] for block in reduction] for reduction in DeepFeatureEmbedding(RESNET18).reductions]
    assert [[(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in chain] for chain in chains] == [
        [(64, 128, (3, 3), (2, 2)), (128, 256, (3, 3), (2, 2))],
        [(128, 256, (3, 3), (2, 2))],
        [],
    ]


def test_levels_are_concatenated_in_order_at_the_deepest_levels_pixels():
    embedding = settle(DeepFeatureEmbedding(ONE_CHANNEL, blocks=2))
    for reduction in embedding.reductions:
        for block in reduction:
            set_center(block[0], [[1.0]])
    set_center(embedding.residual[0].shortcut[0], [[1.0, 0.0, 1000.0], [0.0, 1.0, -1.0]])
    first, second, third = ramp(16), ramp(8), ramp(4)
    actual = embedding([first, second, third])
    expected = [
        first[0, 0, ::8, ::8] + 1000 * third[0, 0, ::2, ::2],
        second[0, 0, ::4, ::4] - third[0, 0, ::2, ::2],
    ]
    assert expected[0].tolist() == [[0.0, 2008.0], [8128.0, 10136.0]]
    assert expected[1].tolist() == [[0.0, 2.0], [24.0, 26.0]]
    torch.testing.assert_close(actual, torch.stack(expected)[None], rtol=0, atol=0)


def test_residual_stage_adds_its_main_path():
    embedding = settle(DeepFeatureEmbedding(ONE_CHANNEL[-1:], blocks=2))
    first, second = embedding.residual
    set_center(first.shortcut[0], [[1.0], [2.0]])
    set_center(first.main[0], [[1.0], [1.0]])
    set_center(first.main[3], [[10.0, 0.0], [0.0, 20.0]])  # 11 x and 22 x
    set_center(second.main[0], [[1.0, 0.0], [0.0, 1.0]])
    set_center(second.main[3], [[0.0, 1.0], [0.0, -1.0]])  # 33 x and 0
    features = torch.tensor([[[[1.0, 5.0], [5.0, 5.0]]]])
    assert embedding([features])[0, :, 0, 0].tolist() == [33.0, 0.0]


def test_direct_embedding_reads_only_the_deepest_level():
    embedding = settle(DirectEmbedding(ONE_CHANNEL))
    set_center(embedding.reduction[0], [[1.0], [-1.0]])
    actual = embedding([torch.full((1, 1, 16, 16), torch.nan), torch.full((1, 1, 8, 8), torch.nan), ramp(4) - 5])
    assert actual[0].tolist() == [[[0.0, 0.0], [3.0, 5.0]], [[5.0, 3.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("pair", "strides", "widths"),
    [
        (levels((2, 16), (3, 16)), [1], [2, 3]),
        (levels((2, 8), (3, 16)), [2], [2, 3]),
        (levels((2, 4), (3, 16)), [2, 2], [2, 3, 3]),
        (levels((2, 2), (3, 16)), [2, 2, 2], [2, 3, 3, 3]),
    ],
)
def test_ratio_of_strides_determines_the_reductions(pair: list[FeatureLevel], strides: list[int], widths: list[int]):
    embedding = settle(DeepFeatureEmbedding(pair, blocks=1))
    chain = [block[0] for block in embedding.reductions[0]]
    assert [conv.stride for conv in chain] == [(stride, stride) for stride in strides]
    assert [chain[0].in_channels, *(conv.out_channels for conv in chain)] == widths
    ratio = pair[1].stride // pair[0].stride
    for conv in chain:
        conv.weight.data[0, 0, 1, 1] = 1.0
    embedding.residual[0].shortcut[0].weight.data[0, 0] = 1.0
    features = ramp(4 * ratio).repeat(1, 2, 1, 1)
    actual = embedding([features, torch.zeros(1, 3, 4, 4)])
    assert actual.shape == (1, 6, 2, 2)
    torch.testing.assert_close(actual[0, 0], features[0, 0, :: 2 * ratio, :: 2 * ratio], rtol=0, atol=0)
    assert not actual[0, 1:].any()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(16, 16), (8, 8), (4, 4)], (2, 2)),
        ([(17, 21), (9, 11), (5, 6)], (3, 3)),  # sizes rounded up, as ResNet does
        ([(17, 23), (8, 11), (4, 5)], (2, 3)),  # and down, as ConvNeXt does
        ([(4, 4), (2, 2), (1, 1)], (1, 1)),
    ],
)
@pytest.mark.parametrize("embedding", [DeepFeatureEmbedding, DirectEmbedding])
def test_odd_sizes_are_matched(embedding: type, sizes: list[tuple[int, int]], expected: tuple[int, int]):
    model = embedding(levels((2, 4), (3, 8), (4, 16))).eval()
    features = [torch.randn(2, channels, *size) for channels, size in zip((2, 3, 4), sizes, strict=True)]
    actual = model(features)
    assert actual.shape == (2, 8, *expected)
    assert actual.isfinite().all()


def test_extra_columns_are_cropped():
    embedding = settle(DeepFeatureEmbedding(ONE_CHANNEL[1:], blocks=1))
    set_center(embedding.reductions[0][0][0], [[1.0]])
    set_center(embedding.residual[0].shortcut[0], [[1.0, 0.0], [0.0, 1.0]])
    actual = embedding([ramp(9), ramp(4)])  # 9 is reduced to 5, which is cropped to the 4 of the deeper level
    assert actual[0].tolist() == [[[0.0, 4.0], [36.0, 40.0]], [[0.0, 2.0], [8.0, 10.0]]]
