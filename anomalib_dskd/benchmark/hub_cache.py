"""Local weights for models that know no other source than the model hub.

anomalib's models ask timm for pretrained weights by architecture and take no file. timm asks
``huggingface_hub``, which looks into its cache first: a folder that an environment variable names. So weights
for all models are laid out as such a cache, and each job runs with the variable set and the hub switched off.
"""

import os
import shutil
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file

from anomalib_dskd.components.find_weights import WEIGHTS_FOLDER_VARIABLE, find_teacher_weights, hub_repository
from anomalib_dskd.errors import ArgumentError, DataError

__all__ = ["describe_weights", "environment", "write_hub_cache"]

BY_NAME = "by_name"
REVISION = "0" * 40  # the cache's name for a snapshot; any will do


def write_hub_cache(weights: dict[str, str], folder: Path) -> None:
    """Lay out weights as a cache of the model hub, for every pretrained tag of their architecture.

    A file may hold only the layers that are used. What it lacks is filled up with NaN: a model that reads it
    shows it at once. Beside the cache lies a folder with the same files by timm's names, which DSKD looks into.

    Args:
        weights: files by architecture (without tag).
        folder: where the cache is made.

    Raises:
        ArgumentError: timm does not know the architecture, or it has no pretrained weights on the hub.
        TeacherWeightsError: a file is missing, unreadable, or of another architecture.
        DataError: the folder cannot be written.
    """
    for architecture, path in weights.items():
        tags = _tags(architecture)
        state = find_teacher_weights(architecture, path).completed(architecture)
        whole = folder / BY_NAME / f"{architecture}.safetensors"
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.unlink(missing_ok=True)  # not written through: other tags are links to it
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, whole)
        except SafetensorError as error:  # such as a full disk
            msg = f"the weights of {architecture!r} cannot be written to {str(whole)!r}: {error}. Make room there."
            raise DataError(msg) from error
        for tag, repository in tags.items():
            snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / REVISION
            for link in (whole.with_name(f"{tag}.safetensors"), snapshot / "model.safetensors"):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                _link(whole, link)
            references = snapshot.parent.parent / "refs"
            references.mkdir(exist_ok=True)
            (references / "main").write_text(REVISION)


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without links, as on many memory sticks and shares
        shutil.copyfile(file, link)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables under which that cache, and nothing else, is read."""
    return {
        "HF_HUB_CACHE": str(folder.absolute()),
        "HF_HUB_OFFLINE": "1",
        WEIGHTS_FOLDER_VARIABLE: str(folder.absolute() / BY_NAME),
    }


def describe_weights(weights: dict[str, str]) -> list[dict[str, str]]:
    """Return name, file and SHA-256 of each architecture's weights, for the report.

    Raises:
        TeacherWeightsError: a file is missing.
    """
    return [{"name": name, **find_teacher_weights(name, path).origin} for name, path in sorted(weights.items())]


def _tags(architecture: str) -> dict[str, str]:
    """Return the model hub's repository of each pretrained tag."""
    if "." in architecture or not timm.is_model(architecture):
        msg = f"weights for {architecture!r}: give the name of a timm architecture without tag, such as 'resnet18'."
        raise ArgumentError(msg)
    found = {tag: hub_repository(tag) for tag in timm.list_pretrained(f"{architecture}.*")}
    tags = {tag: repository for tag, repository in found.items() if repository}
    if not tags:
        msg = f"weights for {architecture!r}: timm has no pretrained weights of it on the model hub."
        raise ArgumentError(msg)
    return tags
