import re

import pytest
import timm
import torch
from timm.models import _registry
from torch import Tensor, nn

from anomalib_dskd.components.backbone import Backbone, FeatureLevel, check_teacher, full_name
from anomalib_dskd.errors import ArgumentError
from tests.conftest import RESNET

NAMES_AND_LAYERS = [
    ("resnet18", (1, 2, 3)),
    ("tf_efficientnet_lite0", (1, 2, 3)),
    ("mobilenetv3_small_100", (1, 2, 3)),
    (RESNET, (0,)),
    (RESNET, (1, 4)),
    ("test_convnext", (0, 1)),
    ("test_efficientnet", (1, 2)),
]


def images(batch: int = 1, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_random_norms(model: nn.Module) -> nn.Module:
    """Initial batch norms are nearly the identity, and timm initializes some to zero: make all change their input."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return model


@pytest.mark.parametrize(("name", "layers"), NAMES_AND_LAYERS)
def test_every_parameter_gets_a_gradient(name: str, layers: tuple[int, ...]):
    backbone = Backbone(name, layers)
    assert backbone.training
    torch.stack([level.square().sum() for level in backbone(images(batch=2))]).sum().backward()
    assert not [key for key, parameter in backbone.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(("name", "layers"), NAMES_AND_LAYERS)
def test_features_are_those_of_the_unpruned_model(name: str, layers: tuple[int, ...]):
    unpruned = with_random_norms(timm.create_model(name, pretrained=False, features_only=True)).eval()
    backbone = Backbone(name, layers).eval()
    tensors, own = unpruned.state_dict(), backbone.network.state_dict()
    backbone.network.load_state_dict({key: tensors[key] for key in own})
    with torch.no_grad():
        expected = unpruned(images())
        actual = backbone(images())
    assert len(actual) == len(layers)
    for layer, level in zip(layers, actual, strict=True):
        torch.testing.assert_close(level, expected[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512 - 8_393_728 - 513_000),  # without layer4 and fc
        (RESNET, 104_848),
    ],
)
def test_size_is_that_of_the_layers_in_use(name: str, parameters: int):
    assert sum(parameter.numel() for parameter in Backbone(name, (1, 2, 3)).parameters()) == parameters


@pytest.mark.parametrize(("name", "layers"), [*NAMES_AND_LAYERS, ("test_vit3", (0, 2))])
def test_levels_are_those_that_timm_reports(name: str, layers: tuple[int, ...]):
    info = timm.create_model(name, pretrained=False, features_only=True, out_indices=layers).feature_info
    levels = Backbone(name, layers).levels
    assert [level.channels for level in levels] == info.channels()
    assert [level.stride for level in levels] == info.reduction()


def test_levels_of_resnet18():
    assert Backbone("resnet18", [1, 2, 3]).levels == (
        FeatureLevel(channels=64, stride=4, signed=False),
        FeatureLevel(channels=128, stride=8, signed=False),
        FeatureLevel(channels=256, stride=16, signed=False),
    )


@pytest.mark.parametrize(
    ("name", "signed"),
    [
        (RESNET, False),  # ends each stage in a ReLU
        ("tf_efficientnet_lite0", True),  # in a linear bottleneck
        ("mobilenetv3_small_100", True),
        ("test_convnext", True),
        ("test_vit", True),
    ],
)
def test_sign_is_that_of_the_last_activation(name: str, signed: bool):
    assert [level.signed for level in Backbone(name, (0, 1)).levels] == [signed, signed]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (RESNET, (0, 1, 2)),
        ("test_convnext", (0, 1, 2)),
        ("test_mambaout", (0, 1, 2)),  # timm returns its channels last
        ("mobilenetv3_small_100", (0,)),  # uses no block
    ],
)
def test_features_have_channels_and_size_of_their_level(name: str, layers: tuple[int, ...]):
    backbone = Backbone(name, layers)
    shapes = [tuple(level.shape) for level in backbone(images(batch=2, size=96))]
    assert shapes == [(2, level.channels, 96 // level.stride, 96 // level.stride) for level in backbone.levels]


def test_probe_leaves_no_gradients_or_statistics():
    backbone = Backbone(RESNET, (1, 2, 3))
    assert all(parameter.grad is None for parameter in backbone.parameters())
    for key, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, torch.ones_like(buffer) if "var" in key else torch.zeros_like(buffer))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_can_be_created_while_gradients_are_disabled(context: type):
    with context():
        backbone = Backbone(RESNET, (1, 2))
    assert backbone.levels == Backbone(RESNET, (1, 2)).levels
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 62_416


# --- names and layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_teacher, lambda name: Backbone(name, (1, 2, 3))])
@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet118", "resnet18"), ("reznet18.tv_in1k", "resnet18"), ("wideresnet50_2", "wide_resnet50_2")],
)
def test_error_for_an_unknown_teacher_lists_the_nearest_names(check, name: str, near: str):
    message = rf"^teacher '{re.escape(name)}' is not a timm model\. Did you mean (?:.*, )?'{near}'.*\? Supported: the"
    with pytest.raises(ArgumentError, match=message):
        check(name)


def test_error_for_an_unknown_teacher_without_a_near_name():
    with pytest.raises(ArgumentError, match=r"^teacher '\?' is not a timm model\. Supported: the backbones"):
        check_teacher("?")


@pytest.mark.parametrize("check", [check_teacher, lambda name: Backbone(name, (1, 2, 3))])
def test_error_for_an_unknown_tag_lists_the_supported_ones(check):
    message = re.escape(f"teacher '{RESNET}x': timm has no pretrained tag 'r160_in1kx' for 'test_resnet'.")
    with pytest.raises(ArgumentError, match=rf"^{message} Supported tags: \['r160_in1k'\]\.$"):
        check(f"{RESNET}x")


@pytest.mark.parametrize("name", [RESNET, "test_resnet", "resnet18.tv_in1k", "darknet17"])
def test_known_teacher_passes(name: str):
    check_teacher(name)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        (RESNET, RESNET),
        ("test_resnet", RESNET),
        ("resnet18.tv_in1k", "resnet18.tv_in1k"),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"),
    ],
)
def test_full_name_has_the_tag(name: str, full: str):
    assert full_name(name) == full


@pytest.mark.parametrize("layers", [[], [5], [1, 2, 5], [-1], [2, 1], [1, 1, 2]])
def test_layers_that_do_not_fit_are_refused(layers: list[int]):
    message = re.escape(
        f"layers {layers} do not fit teacher '{RESNET}': it has 5 feature levels. "
        "Give one or more increasing indices from 0 to 4, such as [1, 2, 3]."
    )
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        Backbone(RESNET, layers)


def test_error_names_the_teachers_number_of_levels():
    with pytest.raises(ArgumentError, match="it has 4 feature levels.*from 0 to 3"):
        Backbone("test_convnext", (1, 2, 4))


def test_model_without_features_only_is_refused(monkeypatch: pytest.MonkeyPatch):
    def flat(*, features_only: bool = False, **_: object) -> nn.Module:
        if features_only:
            msg = "features_only not implemented for flat models"
            raise RuntimeError(msg)
        return nn.Flatten()

    monkeypatch.setitem(_registry._model_entrypoints, "flat", flat)  # all of timm's own models support it
    message = r"^teacher 'flat' does not support timm's `features_only`: features_only not implemented.* Choose another"
    with pytest.raises(ArgumentError, match=message):
        Backbone("flat", (0, 1))
