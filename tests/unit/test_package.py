import ast
import inspect
from pathlib import Path

import pytest

import anomalib_dskd

PACKAGE = Path(anomalib_dskd.__file__).parent
BASE = {"argument_checks", "errors", "file_writing"}  # may be imported by all, and import nothing of the package
ALLOWED = {  # what may import what
    "components": {"components"},
    "training": {"training"},
    "data": {"data"},
    "check": {"check", "data"},
    "pixel_metrics": set(),
    "evaluation": {"pixel_metrics"},
    "post_processing": {"pixel_metrics"},
    "pre_processing": set(),
    "visualization": {"data"},
    "models": {
        "components",
        "data",
        "evaluation",
        "models",
        "post_processing",
        "pre_processing",
        "training",
        "visualization",
    },
    # models by their names in a configuration
    "benchmark": {"benchmark", "components", "data", "evaluation", "pixel_metrics"},
    "cli": {"benchmark", "check"},
}


def test_public_names_are_those_promised():
    assert anomalib_dskd.__all__ == ["Afkd", "Dskd", "Dtgd", "MagneticTile", "Tad", "TextureDefects"]
    assert all(inspect.isclass(getattr(anomalib_dskd, name)) for name in anomalib_dskd.__all__)


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_they_may(layer):
    files = [*PACKAGE.glob(f"{layer}.py"), *(PACKAGE / layer).rglob("*.py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anomalib_dskd."):
                assert node.module.split(".")[1] in ALLOWED[layer] | BASE, f"{file}: {node.module}"


def test_type_information_is_shipped():
    assert (PACKAGE / "py.typed").is_file()
