import copy

import pytest
import torch
from torch import nn

from anomalib_dskd.components import convolution
from anomalib_dskd.components.convolution import WideConv2d

SHAPES = [  # in, out, size, kernel, stride, padding, batch; all with more than twice as many values per patch as pixels
    (40, 6, (4, 4), 3, 1, 1, 2),
    (40, 6, (4, 6), 3, 2, 1, 2),
    (40, 6, (5, 7), 3, 2, 1, 1),
    (64, 3, (4, 4), 1, 2, 0, 2),
    (64, 3, (3, 5), 1, 1, 0, 1),
]


def pair(shape) -> tuple[WideConv2d, nn.Conv2d, torch.Tensor]:
    in_channels, out_channels, size, kernel, stride, padding, batch = shape
    torch.manual_seed(0)
    ours = WideConv2d(in_channels, out_channels, kernel_size=kernel, stride=stride, padding=padding).double()
    theirs = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(batch, in_channels, *size, dtype=torch.float64)


@pytest.fixture
def matrix_products(monkeypatch):
    """Record each use of the matrix product."""
    calls, original = [], convolution._patches
    monkeypatch.setattr(convolution, "_patches", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_conv2d(shape, matrix_products):
    ours, theirs, images = pair(shape)
    our_input, their_input = images.clone().requires_grad_(), images.clone().requires_grad_()
    result, expected = ours(our_input), theirs(their_input)
    torch.testing.assert_close(result, expected)
    weighting = torch.randn_like(expected)
    (result * weighting).sum().backward()
    (expected * weighting).sum().backward()
    torch.testing.assert_close(our_input.grad, their_input.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert matrix_products


def test_gradient_agrees_with_finite_differences(matrix_products):
    ours, _, images = pair((12, 2, (2, 3), 3, 1, 1, 1))
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(ours, {"weight": w}, x),
        (
            images.requires_grad_(),
            ours.weight.detach().clone().requires_grad_(),
        ),
    )
    assert matrix_products


def test_many_pixels_use_conv2ds_gradient(matrix_products):
    ours, _, images = pair((4, 6, (16, 16), 3, 1, 1, 2))
    ours(images).sum().backward()
    assert not matrix_products


def test_without_gradients_no_graph_is_built():
    ours, theirs, images = pair(SHAPES[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    ours.requires_grad_(False)
    assert not ours(images).requires_grad


def test_bf16_training_has_fp32_gradients(matrix_products):
    ours, theirs, images = pair(SHAPES[0])
    ours, theirs, images = ours.float(), theirs.float(), images.float()
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            result = module(images)
        assert result.dtype == torch.bfloat16
        result.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    error = (ours.weight.grad - theirs.weight.grad).norm() / theirs.weight.grad.norm()
    assert error < 1e-2  # BF16 has 8 bits of precision
    assert matrix_products


def test_copies_and_has_the_state_dict_of_conv2d():
    ours, theirs, _ = pair(SHAPES[0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(copy.deepcopy(ours), WideConv2d)


def test_evaluation_is_conv2d_and_can_be_exported(matrix_products):
    ours, theirs, images = pair(SHAPES[0])
    exported = torch.export.export(ours.eval(), (images,)).module()
    torch.testing.assert_close(exported(images), theirs(images))
    ours(images).sum().backward()
    assert not matrix_products
