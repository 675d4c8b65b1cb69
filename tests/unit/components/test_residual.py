import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.residual import ResidualBlock, conv_block, match_size


def image(values: list[list[float]]) -> Tensor:
    return torch.tensor(values)[None, None]  # (1, 1, H, W)


def settle(module: nn.Module) -> nn.Module:
    """Make batch norms the identity and convolutions zero, so that a test can set the weights that it needs."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-30  # lost in rounding; older versions of PyTorch refuse 0
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.zeros_(part.weight)
    return module.eval()


def set_center(conv: nn.Module, value: float = 1.0) -> None:
    conv.weight.data[0, 0, conv.weight.shape[-2] // 2, conv.weight.shape[-1] // 2] = value


# --- match_size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2, 3), [[1, 2, 3], [4, 5, 6]]),
        ((1, 2), [[1, 2]]),
        ((3, 4), [[1, 2, 3, 3], [4, 5, 6, 6], [4, 5, 6, 6]]),
        ((4, 2), [[1, 2], [4, 5], [4, 5], [4, 5]]),
        ((1, 5), [[1, 2, 3, 3, 3]]),
    ],
)
def test_last_rows_and_columns_are_cropped_or_repeated(size: tuple[int, int], expected: list[list[float]]):
    features = image([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).repeat(2, 3, 1, 1)
    actual = match_size(features, *size)
    assert actual.shape == (2, 3, *size)
    assert actual[1, 2].tolist() == expected


# --- conv_block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "size", "expected"), [(1, 7, 7), (2, 8, 4), (2, 7, 4), (2, 1, 1)])
def test_conv_block_rounds_odd_sizes_up(stride: int, size: int, expected: int):
    assert conv_block(2, 5, stride=stride)(torch.randn(2, 2, size, size)).shape == (2, 5, expected, expected)


def test_conv_block_is_convolution_then_norm_then_relu():
    block = settle(conv_block(1, 1, stride=2))
    set_center(block[0])
    block[1].running_mean.fill_(4.0)
    block[1].running_var.fill_(4.0)
    features = image([[1.0, 2.0, 8.0], [3.0, 4.0, 5.0], [6.0, 7.0, 4.0]])
    assert block(features)[0, 0].tolist() == [[0.0, 2.0], [1.0, 0.0]]  # (x - 4) / 2 at every second pixel


# --- residual blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        (False, [[0.0, 2.0], [0.0, 0.0]]),
        (True, [[-1.0, 2.0], [-3.0, 0.0]]),
    ],
)
def test_identity_is_added_and_only_an_unsigned_block_clips_it(signed: bool, expected: list[list[float]]):
    block = settle(ResidualBlock.same(1, signed=signed))
    assert block(image([[-1.0, 2.0], [-3.0, 0.0]]))[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        (False, [[0.0, 0.0], [0.0, 0.0]]),
        (True, [[-1.0, -4.0], [-3.0, 0.0]]),
    ],
)
def test_main_path_has_a_relu_between_its_convolutions(signed: bool, expected: list[list[float]]):
    block = settle(ResidualBlock.same(1, signed=signed))
    set_center(block.main[0])
    set_center(block.main[3], -3.0)
    # x - 3 relu(x)
    assert block(image([[-1.0, 2.0], [-3.0, 0.0]]))[0, 0].tolist() == expected


def test_down_adds_every_second_pixel_of_main_path_and_shortcut():
    block = settle(ResidualBlock.down(1, 1))
    set_center(block.main[0])
    set_center(block.main[3], 10.0)
    set_center(block.shortcut[0], 100.0)
    features = image([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, -9.0]])
    assert block(features)[0, 0].tolist() == [[110.0, 330.0], [770.0, 0.0]]


def test_down_of_stride_1_keeps_the_size():
    block = settle(ResidualBlock.down(1, 1, stride=1))
    set_center(block.main[0])
    set_center(block.main[3], 10.0)
    set_center(block.shortcut[0], 100.0)
    assert block(image([[1.0, 2.0], [-3.0, 4.0]]))[0, 0].tolist() == [[110.0, 220.0], [0.0, 440.0]]


def test_down_reads_three_by_three_pixels_in_the_main_path_and_one_in_the_shortcut():
    block = settle(ResidualBlock.down(1, 1))
    nn.init.ones_(block.main[0].weight)
    set_center(block.main[3])
    nn.init.constant_(block.shortcut[0].weight, 100.0)
    features = image([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert block(features)[0, 0].tolist() == [[112.0, 316.0], [724.0, 928.0]]


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_up_repeats_each_pixel_under_equal_weights(factor: int):
    block = settle(ResidualBlock.up(1, 1, factor=factor))
    nn.init.ones_(block.main[0].weight)
    set_center(block.main[3], 2.0)
    nn.init.ones_(block.shortcut[0].weight)
    features = image([[1.0, -2.0], [3.0, 4.0]])
    expected = torch.tensor([[3.0, 0.0], [9.0, 12.0]]).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    torch.testing.assert_close(block(features)[0, 0], expected, rtol=0, atol=0)


def test_up_spreads_a_pixel_by_its_kernel():
    block = settle(ResidualBlock.up(1, 1, factor=2))
    block.shortcut[0].weight.data[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert block(image([[1.0, 10.0]]))[0, 0].tolist() == [[1.0, 2.0, 10.0, 20.0], [3.0, 4.0, 30.0, 40.0]]


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        (ResidualBlock.same(64), 2 * 9 * 64 * 64 + 2 * 2 * 64),
        (ResidualBlock.same(64, signed=True), 2 * 9 * 64 * 64 + 2 * 2 * 64),
        (ResidualBlock.down(48, 64), 9 * 48 * 64 + 9 * 64 * 64 + 48 * 64 + 3 * 2 * 64),
        (ResidualBlock.up(128, 64, factor=2), 4 * 128 * 64 + 9 * 64 * 64 + 4 * 128 * 64 + 3 * 2 * 64),
    ],
)
def test_parameter_count(block: ResidualBlock, parameters: int):
    assert sum(parameter.numel() for parameter in block.parameters()) == parameters


@pytest.mark.parametrize(
    "block", [ResidualBlock.same(2), ResidualBlock.same(2, signed=True), ResidualBlock.down(2, 2), conv_block(2, 2)]
)
def test_input_is_not_modified(block: nn.Module):
    features = torch.randn(2, 2, 4, 4)
    before = features.clone()
    block(features)
    torch.testing.assert_close(features, before, rtol=0, atol=0)
