"""Initial weights of the networks that are trained."""

from torch import nn

__all__ = ["initialize_convolutions"]


def initialize_convolutions(network: nn.Module) -> None:
    """Draw the weights of all convolutions as timm draws those of a ResNet: He et al., normal distribution, fan-out.

    See https://arxiv.org/abs/1502.01852. Reverse Distillation initializes its bottleneck and decoder in this way too.
    PyTorch's default for convolutions is 2.5 to 3 times as small; from it, training is slower.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
