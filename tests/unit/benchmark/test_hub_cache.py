import hashlib
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from anomalib_dskd.benchmark import hub_cache
from anomalib_dskd.benchmark.hub_cache import describe_weights, environment, write_hub_cache
from anomalib_dskd.errors import ArgumentError, DataError, TeacherWeightsError

ARCHITECTURE = "test_resnet"


@pytest.fixture(scope="module")
def partial_weights(tmp_path_factory):
    """A file without the last stage and the classifier."""
    state = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    random = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in state.items()}
    partial = {name: tensor for name, tensor in random.items() if not name.startswith(("layer4", "fc"))}
    path = tmp_path_factory.mktemp("weights") / "partial.safetensors"
    save_file(partial, path)
    return path


def test_timm_finds_the_weights_in_another_process_without_a_network(partial_weights, tmp_path):
    write_hub_cache({ARCHITECTURE: str(partial_weights)}, tmp_path)
    program = (
        "import timm, torch; "
        f"m = timm.create_model('{ARCHITECTURE}', pretrained=True, features_only=True, out_indices=(1, 2, 3)); "
        "print(sum(p.double().sum().item() for n, p in m.named_parameters() if n.startswith(('conv1', 'layer3')))); "
        "print(m(torch.zeros(1, 3, 64, 64))[-1].isfinite().all().item())"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**environment(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    total, finite = result.stdout.split()
    given = load_file(partial_weights)
    names = [name for name, _ in timm.create_model(ARCHITECTURE, pretrained=False).named_parameters()]
    expected = sum(given[n].double().sum().item() for n in names if n.startswith(("conv1", "layer3")))
    assert float(total) == pytest.approx(expected, rel=1e-9)
    assert finite == "True"


def test_missing_layers_are_nan_in_the_files_of_every_tag(partial_weights, tmp_path):
    write_hub_cache({ARCHITECTURE: str(partial_weights)}, tmp_path)
    files = list(tmp_path.rglob("model.safetensors"))
    assert len(files) == len(timm.list_pretrained(f"{ARCHITECTURE}.*"))
    state = load_file(files[0])
    assert state["fc.weight"].isnan().all()
    assert torch.equal(state["conv1.0.weight"], load_file(partial_weights)["conv1.0.weight"])


def test_a_classifier_of_another_width_counts_as_missing(tmp_path):
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=3)
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    write_hub_cache({ARCHITECTURE: str(tmp_path / "tuned.safetensors")}, tmp_path / "cache")
    state = load_file(next((tmp_path / "cache").rglob("model.safetensors")))
    assert state["fc.weight"].shape[0] == 1000
    assert state["fc.weight"].isnan().all()
    assert torch.equal(state["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_weights_of_another_shape_are_an_error(partial_weights, tmp_path):
    state = load_file(partial_weights)
    state["layer3.0.conv1.weight"] = state["layer3.0.conv1.weight"].repeat(2, 1, 1, 1)
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(TeacherWeightsError, match="1 of another shape: layer3.0.conv1.weight"):
        write_hub_cache({ARCHITECTURE: str(tmp_path / "wide.safetensors")}, tmp_path)


def test_weights_are_described_by_their_hash(partial_weights):
    (described,) = describe_weights({ARCHITECTURE: str(partial_weights)})
    assert described["name"] == ARCHITECTURE
    assert described["file"] == "partial.safetensors"
    assert described["sha256"] == hashlib.sha256(partial_weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("resnet_18", "'resnet_18': give the name of a timm architecture"), ("resnet18.tv_in1k", "without tag")],
)
def test_unknown_architectures_are_an_error(architecture, message, partial_weights, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        write_hub_cache({architecture: str(partial_weights)}, tmp_path)


def test_weights_of_another_architecture_are_an_error(partial_weights, tmp_path):
    with pytest.raises(
        TeacherWeightsError, match="partial.safetensors' do not fit the teacher 'test_vit': 72 unexpected: bn1"
    ):
        write_hub_cache({"test_vit": str(partial_weights)}, tmp_path)
    with pytest.raises(TeacherWeightsError, match="'gone.pth' does not exist"):
        write_hub_cache({ARCHITECTURE: "gone.pth"}, tmp_path)


def test_without_hard_links_the_files_are_copied(partial_weights, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(hub_cache.os, "link", refuse)
    write_hub_cache({ARCHITECTURE: str(partial_weights)}, tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) > 2
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1


def test_a_full_disk_is_an_error(partial_weights, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_cache, "write_file", refuse)
    with pytest.raises(
        DataError, match="weights of 'test_resnet' cannot be written to .*No space left.* Free disk space"
    ):
        write_hub_cache({ARCHITECTURE: str(partial_weights)}, tmp_path)
