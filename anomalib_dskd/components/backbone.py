"""Feature pyramids from timm backbones, pruned to the modules that the chosen levels need."""

import copy
import difflib
from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from anomalib_dskd.errors import ArgumentError

__all__ = ["Backbone", "FeatureLevel", "check_teacher", "full_name"]

PROBE_SIZE = 64  # pixels; enough for a stride of 32, small enough to run within milliseconds


class FeatureLevel(NamedTuple):
    """Channels, stride and sign of one level of a feature pyramid."""

    channels: int
    stride: int
    signed: bool
    """Whether the features take negative values: a student that ends in a ReLU could not match them."""


def check_teacher(teacher: str, *, role: str = "teacher") -> None:
    """Raise an error with the nearest supported names unless timm knows ``teacher``, and its tag if it has one.

    Args:
        teacher: timm model name, with or without a pretrained tag.
        role: what error messages call the model.

    Raises:
        ArgumentError: unknown architecture or unknown pretrained tag.
    """
    architecture, _, tag = str(teacher).partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        msg = (
            f"{role} {teacher!r} is not a timm model.{hint} "
            "Supported: the backbones that `timm.list_models()` lists, such as 'resnet18.tv_in1k'."
        )
        raise ArgumentError(msg)
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        msg = f"{role} {teacher!r}: timm has no pretrained tag {tag!r} for {architecture!r}. Supported tags: {tags}."
        raise ArgumentError(msg)


def full_name(teacher: str) -> str:
    """Return the timm name with its pretrained tag.

    >>> full_name("resnet18.tv_in1k"), full_name("tf_efficientnet_lite0")
    ('resnet18.tv_in1k', 'tf_efficientnet_lite0.in1k')
    """
    cfg = get_pretrained_cfg(teacher)
    return f"{cfg.architecture}.{cfg.tag}" if cfg is not None and cfg.tag and cfg.has_weights else teacher


class Backbone(nn.Module):
    """A timm backbone with random weights that returns the features of chosen levels.

    Modules that no chosen level depends on (such as ``layer4`` of a ResNet that is read up to ``layer3``) are
    removed: they would cost parameters and time, and would get no gradient.

    Args:
        name: timm model that supports ``features_only``.
        layers: indices into timm's feature levels (``out_indices``), increasing.
        role: what error messages call the network.

    Raises:
        ArgumentError: unknown model, model without ``features_only``, or layers that are no indices or out of range.
    """

    def __init__(self, name: str, layers: Sequence[int], *, role: str = "teacher") -> None:
        super().__init__()
        check_teacher(name, role=role)
        if not isinstance(layers, (list, tuple)) or not all(isinstance(index, int) for index in layers):
            msg = f"layers {layers!r} must be a list of integers, indices into the feature levels of the {role}."
            raise ArgumentError(msg)
        self.name = name
        self.role = role
        self.layers = tuple(layers)
        cfg = get_pretrained_cfg(name)
        self.fixed_size: tuple[int, int] | None = (
            cfg.input_size[1:] if cfg is not None and cfg.fixed_input_size else None
        )
        with torch.inference_mode(False), torch.enable_grad():  # the probe needs gradients whatever the caller's mode
            self.network = _create_features(name, self.layers, role)
            self.channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            self.levels = self._probe_and_prune()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images ``(B, 3, H, W)`` to one ``(B, C_k, H / stride_k, W / stride_k)`` tensor per level."""
        features: list[Tensor] = self.network(images)
        return [level.permute(0, 3, 1, 2) for level in features] if self.channels_last else features

    def check_size(self, height: int, width: int) -> None:
        """Raise unless the network supports images of this size.

        Raises:
            ArgumentError: another size than the only one.
        """
        if self.fixed_size not in {None, (height, width)}:
            msg = (
                f"images of {height}x{width} pixels: the {self.role} {self.name!r} supports only {self.fixed_size}. "
                f"Give this image_size, or another {self.role}."
            )
            raise ArgumentError(msg)

    def _probe_and_prune(self) -> tuple[FeatureLevel, ...]:
        """Run one random image: remove the modules that get no gradient, and detect the sign of each level."""
        probe = torch.randn(
            1, 3, *(self.fixed_size or (PROBE_SIZE, PROBE_SIZE)), generator=torch.Generator().manual_seed(0)
        )
        self.network.eval()
        features = self(probe)
        torch.stack([level.sum() for level in features]).sum().backward()  # type: ignore[no-untyped-call]
        unpruned = self.network
        self.network = copy.deepcopy(unpruned)
        _remove_without_gradient(self.network, unpruned)
        if not self._reproduces(features, probe):
            self.network = unpruned
        self.network.zero_grad(set_to_none=True)
        self.network.train()
        info = self.network.feature_info
        return tuple(
            FeatureLevel(channels=channels, stride=stride, signed=bool(level.min() < 0))
            for channels, stride, level in zip(info.channels(), info.reduction(), features, strict=True)  # type: ignore[operator, union-attr]
        )

    @torch.no_grad()
    def _reproduces(self, features: list[Tensor], probe: Tensor) -> bool:
        """Whether the pruned network gives the same features; one whose branches merge, such as HRNet, may not run."""
        try:
            return all(torch.equal(a, b) for a, b in zip(self(probe), features, strict=True))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False


def _create_features(name: str, layers: tuple[int, ...], role: str) -> nn.Module:
    try:
        levels = len(timm.create_model(name, pretrained=False, features_only=True).feature_info)  # type: ignore[arg-type]
    except (AttributeError, RuntimeError) as error:
        msg = f"{role} {name!r} does not support timm's `features_only`: {error}. Choose another backbone."
        raise ArgumentError(msg) from error
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= levels:
        msg = (
            f"layers {list(layers)} do not fit {role} {name!r}: it has {levels} feature levels. "
            f"Give one or more increasing indices from 0 to {levels - 1}, such as [1, 2, 3]."
        )
        raise ArgumentError(msg)
    network: nn.Module = timm.create_model(name, pretrained=False, features_only=True, out_indices=layers)
    return network


def _remove_without_gradient(module: nn.Module, probed: nn.Module) -> None:
    """Replace the submodules of ``module`` that got no gradient in ``probed``, the network that it is a copy of."""
    for name, child in probed.named_children():
        parameters = list(child.parameters())
        if parameters and all(parameter.grad is None for parameter in parameters):
            # timm iterates over containers, and calls other modules
            setattr(module, name, type(child)() if type(child) in {nn.Sequential, nn.ModuleList} else nn.Identity())
        else:
            _remove_without_gradient(getattr(module, name), child)
