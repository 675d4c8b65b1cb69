"""Changes to the files of exported OpenVINO models, such as to their antialiased resize.

OpenVINO converts ONNX's antialiased ``Resize`` to an ``Interpolate`` whose ``antialias`` its CPU plugin ignores. The
mode ``bilinear_pillow`` is the same operation, and the plugin supports it. ``tests/integration/test_antialiasing.py``
tells when the replacement is no longer needed.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

__all__ = ["replace_antialiased_resize", "rewrite_file"]

HEIGHT_AND_WIDTH = [2, 3]  # axes of (B, C, H, W)


def rewrite_file(path: Path, change: Callable[["openvino.Model"], "openvino.Model"]) -> None:
    """Replace an exported model by a changed one.

    Args:
        path: ``.xml`` file, with the weights in a ``.bin`` file of the same name.
        change: returns the model to be saved.
    """
    import openvino  # noqa: PLC0415 - an extra

    with TemporaryDirectory(dir=path.parent) as folder:
        model = change(openvino.Core().read_model(path))
        openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)  # FP16 weights stay FP16
        del model  # it may still read the weights file that is replaced
        for suffix in (".bin", ".xml"):
            (Path(folder) / path.with_suffix(suffix).name).replace(path.with_suffix(suffix))


def replace_antialiased_resize(model: "openvino.Model") -> "openvino.Model":
    """Replace each antialiased ``Interpolate`` by one of mode ``bilinear_pillow``, which computes the same.

    Args:
        model: it is modified.

    Returns:
        The same model.
    """
    from openvino import opset11  # noqa: PLC0415 - an extra

    for operation in model.get_ops():
        if operation.get_type_name() == "Interpolate" and operation.get_attributes()["antialias"]:
            images, shape = operation.input_value(0), operation.input_value(1)
            size = opset11.gather(shape, HEIGHT_AND_WIDTH, 0)  # (B, C, H, W) -> (H, W)
            resize = opset11.interpolate(images, size, "bilinear_pillow", "sizes", axes=HEIGHT_AND_WIDTH)
            operation.output(0).replace(resize.output(0))
            resize.set_friendly_name(operation.get_friendly_name())
    return model
