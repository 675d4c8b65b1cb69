import importlib.util
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage.data
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.components.find_weights import find_teacher_weights
from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError
from anomalib_dskd.pre_processing import create_pre_processor
from tests.conftest import RESNET, write_weights
from tests.unit.components.conftest import LITE, LITE_PACKAGE

LAYERS = (1, 2, 3)
ESPRESSO = 967  # ImageNet's class
RESNET18_VARIABLE = "ANOMALIB_DSKD_TEST_RESNET18"


@pytest.fixture
def state(resnet_weights: Path) -> dict[str, Tensor]:
    return load_file(resnet_weights)


def images(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def load(path: Path, teacher: str = RESNET, layers: tuple[int, ...] = LAYERS) -> Backbone:
    backbone = Backbone(teacher, layers).eval()
    TeacherWeights(path).load_into(backbone)
    return backbone


def features_by_hand(state: dict[str, Tensor], x: Tensor, teacher: str = RESNET, layers: tuple[int, ...] = LAYERS):
    """Features of timm's own, unpruned model."""
    model = timm.create_model(teacher, pretrained=False, features_only=True, out_indices=layers)
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [key for key in missing if "num_batches_tracked" not in key]
    with torch.no_grad():
        return model.eval()(x)


def assert_same_features(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# --- supported files --------------------------------------------------------------------------------------------


def save_zip(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_wrapped(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"epoch": 90, "state_dict": state}, path)


def save_without_counters(state: dict[str, Tensor], path: Path) -> None:
    torch.save({key: tensor for key, tensor in state.items() if "num_batches_tracked" not in key}, path)


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_wrapped, save_without_counters])
def test_pickled_state_dict_gives_timms_features(tmp_path: Path, state: dict[str, Tensor], save: Callable[..., None]):
    save(state, tmp_path / "weights.pth")
    backbone = load(tmp_path / "weights.pth")
    with torch.no_grad():
        assert_same_features(backbone(images()), features_by_hand(state, images()))


@pytest.mark.parametrize("layers", [(1, 2, 3), (0,), (1, 4)])
def test_safetensors_give_timms_features(resnet_weights: Path, state: dict[str, Tensor], layers: tuple[int, ...]):
    backbone = load(resnet_weights, layers=layers)
    with torch.no_grad():
        assert_same_features(backbone(images()), features_by_hand(state, images(), layers=layers))


@pytest.mark.parametrize(("teacher", "layers"), [("test_convnext", (0, 1)), ("test_vit", (0, 1))])
def test_names_changed_by_timms_feature_wrappers_are_matched(tmp_path: Path, teacher: str, layers: tuple[int, ...]):
    path = write_weights(tmp_path / "weights.safetensors", teacher)
    backbone = load(path, teacher, layers)
    loaded, own = load_file(path), backbone.network.state_dict()
    stem, wrapped = {
        "test_convnext": ("stem.0.weight", "stem_0.weight"),
        "test_vit": ("patch_embed.proj.weight", "model.patch_embed.proj.weight"),
    }[teacher]
    assert stem not in own
    torch.testing.assert_close(own[wrapped], loaded[stem], rtol=0, atol=0)
    expected = timm.create_model(teacher, pretrained=False)
    expected.load_state_dict(loaded)
    with torch.no_grad():
        x = images(160)
        assert_same_features(backbone(x), expected.eval().forward_intermediates(x, layers, intermediates_only=True))


@pytest.mark.parametrize("teacher", [RESNET, "test_convnext"])
def test_layers_in_use_are_sufficient(tmp_path: Path, teacher: str):
    full = load_file(write_weights(tmp_path / "full.safetensors", teacher))
    in_use = {key: full[key] for key in full if not key.startswith(("layer3", "layer4", "fc", "stages.2", "head"))}
    in_use = {key: tensor for key, tensor in in_use.items() if not key.startswith("stages.3")}
    assert len(in_use) < len(full)
    save_file(in_use, tmp_path / "pruned.safetensors")
    layers = (1, 2) if teacher == RESNET else (0, 1)
    pruned_backbone, full_backbone = (
        load(tmp_path / f"{name}.safetensors", teacher, layers) for name in ("pruned", "full")
    )
    with torch.no_grad():
        assert_same_features(pruned_backbone(images()), full_backbone(images()))


@pytest.mark.parametrize("teacher", [RESNET, "test_convnext"])
def test_file_saved_from_a_features_only_model_is_sufficient(tmp_path: Path, teacher: str):
    torch.manual_seed(1)
    model = timm.create_model(teacher, pretrained=False, features_only=True, out_indices=(0, 1)).eval()
    save_file(model.state_dict(), tmp_path / "pruned.safetensors")
    backbone = load(tmp_path / "pruned.safetensors", teacher, (0, 1))
    with torch.no_grad():
        assert_same_features(backbone(images()), model(images()))


def test_classifier_of_any_width_is_accepted(tmp_path: Path):
    model = timm.create_model(RESNET, pretrained=False, num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    backbone = load(tmp_path / "tuned.safetensors", RESNET, (1, 2))
    assert torch.equal(backbone.network.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_origin_is_name_and_digest(tmp_path: Path):
    (tmp_path / "weights.pth").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # example of FIPS 180
    assert TeacherWeights(tmp_path / "weights.pth").origin == {"file": "weights.pth", "sha256": digest}


# --- unreadable files -------------------------------------------------------------------------------------------


def write_empty(_: dict[str, Tensor], path: Path) -> None:
    path.touch()


def write_text(_: dict[str, Tensor], path: Path) -> None:
    path.write_text("hello world, not weights")


def write_half(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


def write_half_legacy(state: dict[str, Tensor], path: Path) -> None:
    save_legacy(state, path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (write_half, "weights.safetensors", "incomplete metadata|header"),
        (write_half, "weights.pth", "RuntimeError"),
        (write_half_legacy, "weights.pth", "RuntimeError|UnpicklingError|EOFError"),
        (write_empty, "weights.safetensors", "header too small"),
        (write_empty, "weights.pth", "EOFError"),
        (write_text, "weights.safetensors", "header too large"),
        (write_text, "weights.pth", ""),
    ],
)
def test_unreadable_file_is_reported(
    tmp_path: Path, state: dict[str, Tensor], write: Callable[..., None], name: str, reason: str
):
    path = tmp_path / name
    write(state, path)
    message = rf"^teacher weights {re.escape(repr(str(path)))} cannot be read: .*({reason}).* The file may be truncated"
    with pytest.raises(TeacherWeightsError, match=message):
        load(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs.github.com\n"])
def test_file_of_another_format_is_not_reported_as_code(tmp_path: Path, content: bytes):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(TeacherWeightsError, match="cannot be read") as caught:
        load(tmp_path / "weights.pth")
    assert "were not run" not in str(caught.value)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path):
    path, trace = tmp_path / "weights.pth", tmp_path / "it_ran"
    torch.save({"conv1.weight": Malicious(trace)}, path)
    with pytest.raises(TeacherWeightsError, match=r"hold more than tensors \(\w+\.mkdir\), and were not run") as caught:
        load(path)
    assert "torch.save(model.state_dict(), path)" in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # proof that the pickle would have run code
    assert trace.exists()


def test_error_for_a_pickle_does_not_repeat_torchs_advice_to_run_it(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "weights.pth")
    torch.save({"conv1.weight": Malicious(tmp_path)}, tmp_path / "malicious.pth")
    for name in ("weights.pth", "malicious.pth"):
        with pytest.raises(TeacherWeightsError, match="hold more than tensors") as caught:
            load(tmp_path / name)
        assert "can still be loaded" not in str(caught.value)
        assert "likely succeed" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({"epoch": 3}, "dict"),
        ({"state_dict": {"epoch": 3}}, "dict"),
        ({0: torch.ones(1)}, "dict"),
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, kind: str):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match=f"hold a {kind}, not a state dict of named tensors"):
        load(tmp_path / "weights.pth")


# --- files of another architecture ------------------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]):
    for key in ("conv1.0.weight", "layer2.0.bn1.running_var"):
        del state[key]
    save_file(state, tmp_path / "weights.safetensors")
    message = (
        rf"do not fit the teacher '{RESNET}' with layers \[1, 2, 3\]: "
        r"2 missing: conv1\.0\.weight, layer2\.0\.bn1\.running_var\. "
        "Give the file that belongs to this teacher, or the teacher that belongs to this file"
    )
    with pytest.raises(TeacherWeightsError, match=message):
        load(tmp_path / "weights.safetensors")


def test_up_to_five_unexpected_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]):
    extra = {f"extra.{index}": torch.ones(1) for index in range(7)}
    save_file(state | extra, tmp_path / "weights.safetensors")
    message = r": 7 unexpected: extra\.0, extra\.1, extra\.2, extra\.3, extra\.4 and 2 more\. Give"
    with pytest.raises(TeacherWeightsError, match=message):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("layers", [(0,), (1, 2, 3)])
def test_wider_tensors_are_named_even_in_unused_layers(
    tmp_path: Path, state: dict[str, Tensor], layers: tuple[int, ...]
):
    before = list(state["layer3.0.conv1.weight"].shape)
    state["layer3.0.conv1.weight"] = state["layer3.0.conv1.weight"].repeat(2, 1, 1, 1)
    after = [2 * before[0], *before[1:]]
    save_file(state, tmp_path / "weights.safetensors")
    message = re.escape(f": 1 of another shape: layer3.0.conv1.weight {after} instead of {before}. Give")
    with pytest.raises(TeacherWeightsError, match=message):
        load(tmp_path / "weights.safetensors", layers=layers)


def test_resnet34_is_not_a_resnet18(tmp_path: Path):
    with torch.device("meta"):
        model = timm.create_model("resnet34", pretrained=False)
    state = {
        key: torch.zeros(t.shape, dtype=torch.half) for key, t in model.state_dict().items() if "layer4" not in key
    }
    with torch.device("meta"):
        resnet18 = timm.create_model("resnet18", pretrained=False).state_dict()
    assert all(state[key].shape == resnet18[key].shape for key in resnet18 if "layer4" not in key)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(TeacherWeightsError, match=r": \d\d unexpected: layer1\.2\..* more\. Give"):
        load(tmp_path / "weights.safetensors", "resnet18")


def test_refused_weights_leave_the_network_unchanged(tmp_path: Path, state: dict[str, Tensor]):
    del state["layer3.0.conv1.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    backbone = Backbone(RESNET, LAYERS)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(TeacherWeightsError):
        TeacherWeights(tmp_path / "weights.safetensors").load_into(backbone)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


def test_tensors_can_be_matched_by_order(tmp_path: Path, state: dict[str, Tensor]):
    names = timm.create_model(RESNET, pretrained=False).state_dict()
    torch.save({f"tensor{index}": state[key] for index, key in enumerate(names)}, tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match="unexpected: tensor0"):
        load(tmp_path / "weights.pth")
    # batch counters do not count in the order: name them as the package of the `lite` extra does
    ordered = {f"{index}.{key.rpartition('.')[2]}": state[key] for index, key in enumerate(names)}
    torch.save(ordered, tmp_path / "weights.pth")
    backbone = Backbone(RESNET, LAYERS).eval()
    TeacherWeights(tmp_path / "weights.pth", by_order=True).load_into(backbone)
    with torch.no_grad():
        assert_same_features(backbone(images()), features_by_hand(state, images()))


def test_shapes_check_the_order(tmp_path: Path, state: dict[str, Tensor]):
    torch.save(dict(reversed(state.items())), tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match="do not correspond to timm's .* tensor by tensor"):
        TeacherWeights(tmp_path / "weights.pth", by_order=True).load_into(Backbone(RESNET, LAYERS))


# --- real weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite_state() -> dict[str, Tensor]:
    """The package's tensors by timm's names: the n-th tensor has the n-th name."""
    spec = importlib.util.find_spec(LITE_PACKAGE)
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    tensors = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    names = [key for key in timm.create_model(LITE).state_dict() if not key.endswith("num_batches_tracked")]
    return dict(zip(names, tensors.values(), strict=True))


@pytest.fixture(scope="module")
def coffee() -> Tensor:
    photograph = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None] / 255  # (1, 3, 400, 600)
    return create_pre_processor(LITE, (224, 224))(photograph)


def test_lite_weights_in_this_order_classify_an_espresso(lite_state: dict[str, Tensor], coffee: Tensor):
    model = timm.create_model(LITE, pretrained=False).eval()
    missing, unexpected = model.load_state_dict(lite_state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        probabilities = model(coffee).softmax(dim=1)[0]
    assert probabilities.argmax() == ESPRESSO
    assert probabilities[ESPRESSO].item() == pytest.approx(0.882, abs=0.01)


@pytest.mark.usefixtures("no_weights_elsewhere")
def test_lite_teacher_has_the_features_of_that_model(lite_state: dict[str, Tensor], coffee: Tensor):
    teacher = Teacher(LITE, LAYERS)
    teacher.load_weights(find_teacher_weights(LITE))
    assert_same_features(teacher(coffee), features_by_hand(lite_state, coffee, LITE))


@pytest.mark.skipif(
    RESNET18_VARIABLE not in os.environ,
    reason=f"{RESNET18_VARIABLE} does not name a file with the weights of resnet18.tv_in1k",
)
def test_real_resnet18_has_timms_features():
    path = Path(os.environ[RESNET18_VARIABLE])
    teacher = Teacher("resnet18.tv_in1k", LAYERS)
    teacher.load_weights(find_teacher_weights("resnet18.tv_in1k", path))
    expected = features_by_hand(load_file(path), images(128), "resnet18.tv_in1k")
    assert max(level.max() for level in expected) > 1  # pretrained weights, not zeros
    assert_same_features(teacher(images(128)), expected)


def test_non_finite_weights_are_named(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "non_finite.safetensors"
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, path)
    with pytest.raises(
        TeacherWeightsError, match=r"not finite in 1 of the tensors .* the first 'layer2.0.conv1.weight'"
    ):
        load(path)
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = 0
    state["fc.weight"].fill_(torch.nan)  # the classifier is pruned
    save_file(state, path)
    load(path)
