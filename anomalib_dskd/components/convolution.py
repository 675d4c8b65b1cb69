"""Convolution with a faster weight gradient on CPUs, for many channels and few pixels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv2d_input

__all__ = ["WideConv2d"]


class WideConv2d(nn.Conv2d):
    """A convolution without bias, groups or dilation that computes its weight gradient in the faster of two ways.

    Parameters and output are those of :class:`torch.nn.Conv2d`; the gradient is the same up to rounding. The gradient
    of a weight ``(C_out, C_in, k, k)`` is the product of the output's gradient, ``(B h w, C_out)``, and the patches
    under the kernel, ``(B h w, k k C_in)``. Computed as one matrix product on a CPU, it is three to six times
    faster (in BF16; up to two times in FP32) than PyTorch's kernel for many channels and few pixels, as in an
    embedding, and slower for few channels and many pixels. The product is therefore used if a patch has more than
    twice as many values as there are patches.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, h, w)``."""
        if self.training and self.weight.requires_grad and torch.is_grad_enabled() and features.device.type == "cpu":
            pixels = features.shape[0] * features.shape[2] * features.shape[3] // (self.stride[0] * self.stride[1])
            if 2 * pixels < self.weight[0].numel():
                convolved: Tensor = _MatrixGradient.apply(features, self.weight, self.stride, self.padding)
                return convolved
        return super().forward(features)


class _MatrixGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - untyped in torch
        features: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        convolved = F.conv2d(features, weight, stride=stride, padding=padding)
        ctx.save_for_backward(features, weight)
        ctx.stride, ctx.padding = stride, padding
        return convolved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        features, weight = ctx.saved_tensors
        feature_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            feature_gradient = conv2d_input(  # type: ignore[no-untyped-call]
                features.shape, weight.to(gradient.dtype), gradient, stride=ctx.stride, padding=ctx.padding
            ).to(features.dtype)
        if ctx.needs_input_grad[1]:
            patches = _patches(features.to(gradient.dtype), weight.shape[2:], ctx.stride, ctx.padding)
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C_out)
            flat = rows.t() @ patches  # (C_out, k k C_in)
            height, width = weight.shape[2:]
            weight_gradient = flat.view(len(flat), height, width, -1).permute(0, 3, 1, 2).to(weight.dtype)
        return feature_gradient, weight_gradient, None, None


def _patches(features: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Return the values under the kernel at each output pixel: ``(B, C_in, H, W)`` to ``(B h w, k k C_in)``."""
    channels_last = F.pad(features.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = channels_last.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (B, h, w, C_in, k, k)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
