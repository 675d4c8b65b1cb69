import ast
import inspect
from pathlib import Path

import pytest

import anomalib_dskd

PACKAGE = Path(anomalib_dskd.__file__).parent
ALLOWED = {  # what may import what; `errors` and `arguments` may be imported by all
    "components": {"components", "weights"},
    "data": {"data"},
    "arguments": set(),
    "weights": {"components"},
    "evaluation": set(),
    "post_processing": set(),
    "pre_processing": set(),
    "quantization": {"components"},
    "models": {
        "components",
        "data",
        "evaluation",
        "models",
        "post_processing",
        "pre_processing",
        "quantization",
        "weights",
    },
    "cli": {"benchmark", "data"},
    "benchmark": {"benchmark", "data", "evaluation", "weights"},  # models by their names in a configuration
}


def test_public_names_are_those_promised():
    assert anomalib_dskd.__all__ == ["Afkd", "Dskd", "Dtgd", "MagneticTile", "Tad", "TextureDefects"]
    assert all(inspect.isclass(getattr(anomalib_dskd, name)) for name in anomalib_dskd.__all__)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    files = [*PACKAGE.glob(f"{room}.py"), *(PACKAGE / room).rglob("*.py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anomalib_dskd."):
                assert node.module.split(".")[1] in ALLOWED[room] | {"arguments", "errors"}, f"{file}: {node.module}"


def test_type_information_is_shipped():
    assert (PACKAGE / "py.typed").is_file()
