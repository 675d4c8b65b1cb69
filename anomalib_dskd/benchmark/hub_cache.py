"""Local weights for models that know no other source than the model hub.

anomalib's models ask timm for pretrained weights by architecture and take no file. timm asks
``huggingface_hub``, which looks into its cache first: a folder that an environment variable names. So weights
for all models are laid out as such a cache, and each job runs with the variable set and the hub switched off.
"""

import hashlib
from pathlib import Path

import timm
from safetensors.torch import save_file

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.weights import find_teacher_weights, hub_repository

__all__ = ["describe_weights", "environment", "write_hub_cache"]

REVISION = "0" * 40  # the cache's name for a snapshot; any will do


def write_hub_cache(weights: dict[str, str], folder: Path) -> None:
    """Lay out weights as a cache of the model hub, for every pretrained tag of their architecture.

    A file may hold only the layers that are used. What it lacks is filled up with NaN: a model that reads it
    shows it at once.

    Args:
        weights: files by architecture (without tag).
        folder: where the cache is made.

    Raises:
        ArgumentError: timm does not know the architecture, or it has no pretrained weights on the hub.
        TeacherWeightsError: a file is missing, unreadable, or of another architecture.
    """
    for architecture, path in weights.items():
        repositories = _repositories(architecture)
        state = find_teacher_weights(architecture, path).completed(architecture)
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        for repository in repositories:
            snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / REVISION
            snapshot.mkdir(parents=True, exist_ok=True)
            save_file(contiguous, snapshot / "model.safetensors")
            references = snapshot.parent.parent / "refs"
            references.mkdir(exist_ok=True)
            (references / "main").write_text(REVISION)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables under which that cache, and nothing else, is read."""
    return {"HF_HUB_CACHE": str(folder.absolute()), "HF_HUB_OFFLINE": "1"}


def describe_weights(weights: dict[str, str]) -> list[dict[str, str]]:
    """Return name and SHA-256 of each file, for the report."""
    return [
        {"name": name, "file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        for name, path in sorted(weights.items())
    ]


def _repositories(architecture: str) -> list[str]:
    if "." in architecture or not timm.is_model(architecture):
        msg = f"weights for {architecture!r}: give the name of a timm architecture without tag, such as 'resnet18'."
        raise ArgumentError(msg)
    found = {hub_repository(name) for name in timm.list_pretrained(f"{architecture}.*")}
    repositories = sorted(repository for repository in found if repository)
    if not repositories:
        msg = f"weights for {architecture!r}: timm has no pretrained weights of it on the model hub."
        raise ArgumentError(msg)
    return repositories
