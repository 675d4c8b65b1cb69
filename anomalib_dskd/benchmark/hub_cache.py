"""A cache in the layout of the Hugging Face hub, made of local weights files.

anomalib's models ask timm for pretrained weights by architecture and accept no file. timm asks ``huggingface_hub``,
which first searches its cache: a folder set by an environment variable. The weights of all models are therefore written
in this layout, and each job runs with the variable set and the hub offline.
"""

import os
import shutil
from pathlib import Path

import timm
from safetensors.torch import save

from anomalib_dskd.components.find_weights import WEIGHTS_FOLDER_VARIABLE, find_teacher_weights, hub_repository
from anomalib_dskd.errors import ArgumentError, DataError
from anomalib_dskd.file_writing import write_file

__all__ = ["describe_weights", "environment", "write_hub_cache"]

BY_NAME = "by_name"
REVISION = "0" * 40  # name of a snapshot in the cache; any commit hash works


def write_hub_cache(weights: dict[str, str], folder: Path) -> None:
    """Write weights as a cache of the hub, for every pretrained tag of their architecture.

    A file may hold only the layers that are used. Missing layers are filled with NaN: a model that uses them has
    non-finite scores, which is an error. The subfolder ``by_name`` has the same files by timm's names, for our models.

    Args:
        weights: files by architecture (without tag).
        folder: the cache to create.

    Raises:
        ArgumentError: timm does not know the architecture, or it has no pretrained weights on the hub.
        TeacherWeightsError: a file is missing, unreadable, or of another architecture.
        DataError: the folder cannot be written.
    """
    for architecture, path in weights.items():
        repositories = _repositories(architecture)
        state = find_teacher_weights(architecture, path).full_state_dict(architecture)
        file = folder / BY_NAME / f"{architecture}.safetensors"
        try:
            write_file(file, save({name: tensor.contiguous() for name, tensor in state.items()}))
            for tag, repository in repositories.items():
                repository_folder = folder / f"models--{repository.replace('/', '--')}"
                _link(file, file.with_name(f"{tag}.safetensors"))
                _link(file, repository_folder / "snapshots" / REVISION / "model.safetensors")
                write_file(repository_folder / "refs" / "main", REVISION)
        except OSError as error:
            msg = (
                f"the weights of {architecture!r} cannot be written to {str(file)!r}: {error}. Free disk space, or "
                "change the permissions."
            )
            raise DataError(msg) from error


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:  # a file system without hard links, as on many USB drives and network shares
        shutil.copyfile(file, link)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables that make this cache the only source of weights."""
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


def _repositories(architecture: str) -> dict[str, str]:
    """Return the hub repository of each pretrained tag."""
    if "." in architecture or not timm.is_model(architecture):
        msg = f"weights for {architecture!r}: give the name of a timm architecture without tag, such as 'resnet18'."
        raise ArgumentError(msg)
    found = {tag: hub_repository(tag) for tag in timm.list_pretrained(f"{architecture}.*")}
    repositories = {tag: repository for tag, repository in found.items() if repository}
    if not repositories:
        msg = f"weights for {architecture!r}: timm has no pretrained weights for it on the hub."
        raise ArgumentError(msg)
    return repositories
