"""Export of trained models to torch, ONNX and OpenVINO, without their training-only components."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components.base.export_mixin.utils import create_export_root
from anomalib.post_processing import PostProcessor

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.evaluation import EvaluationMixin
from anomalib_dskd.models.distillation.openvino_files import replace_antialiased_resize, rewrite_file
from anomalib_dskd.models.distillation.quantization import calibration_images, quantize_networks
from anomalib_dskd.models.distillation.recalibration import recalibration

if TYPE_CHECKING:
    import openvino

__all__ = ["ExportMixin"]

ONNX_OPSET = 18  # torch's exporter writes it; asked for an older one, as anomalib does, it tries to convert and fails


class ExportMixin(EvaluationMixin):
    """anomalib's exports, refused before training, and with INT8 quantization of the networks only."""

    training_components: ClassVar[tuple[str, ...]] = ()
    """Attributes other than :attr:`model` that only training needs: exports do not contain them."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does.

        Raises:
            ArgumentError: the file exists.
            NotTrainedError: the model has not been trained.
        """
        _check_new(export_root, ExportType.TORCH, f"{model_file_name}.pt")
        with self._ready_for_export():
            return super().to_torch(export_root, model_file_name)

    def to_onnx(self, export_root: Path | str, model_file_name: str = "model", *args: Any, **kwargs: Any) -> Path:  # type: ignore[override] # noqa: ANN401 - passed on
        """Export as anomalib does; the OpenVINO export calls this too.

        Raises:
            ArgumentError: the file exists.
            NotTrainedError: the model has not been trained.
        """
        _check_new(export_root, ExportType.ONNX, f"{model_file_name}.onnx")
        kwargs.setdefault("opset_version", ONNX_OPSET)
        with self._ready_for_export():
            return super().to_onnx(export_root, model_file_name, *args, **kwargs)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        *,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> Path:
        """Export as anomalib does; ``int8_ptq`` quantizes the networks and not the anomaly map.

        Args:
            export_root: folder of the results.
            model_file_name: name of the files, without suffix.
            compression_type: none, ``fp16`` and ``int8`` (weights only), or ``int8_ptq`` (activations too).
            datamodule: training images for ``int8_ptq``, to quantize with, and the validation images of training, from
                which the quantized model gets its own thresholds and normalization.
            **kwargs: anomalib's, such as ``input_size``.

        Returns:
            The model's ``.xml`` file.

        Raises:
            ArgumentError: the file exists, or the compression is not supported or has no images to calibrate or
                validate on.
            NotTrainedError: the model has not been trained.
        """
        _check_new(export_root, ExportType.OPENVINO, f"{model_file_name}.xml")
        kwargs["model_file_name"] = model_file_name
        if compression_type == CompressionType.INT8_ACQ:
            msg = (
                "compression_type 'int8_acq' needs defects to check the accuracy on, and quantizes the anomaly map "
                "too. Supported values: none, 'fp16', 'int8' (weights only) and 'int8_ptq' (activations too)."
            )
            raise ArgumentError(msg)
        quantize = compression_type == CompressionType.INT8_PTQ
        if quantize and datamodule is None:
            msg = "compression_type 'int8_ptq' needs training images: give --data and its arguments, or a datamodule."
            raise ArgumentError(msg)
        changes: list[Callable[[openvino.Model], openvino.Model]] = [replace_antialiased_resize]
        replaced = []
        if datamodule is not None and quantize:
            size = kwargs.get("input_size")
            changes.append(partial(quantize_networks, images=calibration_images(datamodule, size or self.input_size)))
            if isinstance(self.post_processor, PostProcessor):  # with thresholds, which quantization changes
                changes.append(recalibration(datamodule, self.pre_processor, self.post_processor, size))
                replaced = ["post_processor"]
        with self._without(*replaced):
            path = super().to_openvino(export_root, compression_type=None if quantize else compression_type, **kwargs)
        try:
            rewrite_file(path, lambda network: reduce(lambda changed, change: change(changed), changes, network))
        except BaseException:  # the file has another resize, and of INT8 no thresholds
            for suffix in (".xml", ".bin"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            raise
        return path

    @contextmanager
    def _ready_for_export(self) -> Iterator[None]:
        """Check that the model is trained; within the context it has no training-only components, and is frozen."""
        self.require_training("export")
        self.warn_without_thresholds()
        with self._without(*self.training_components):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            try:
                self.requires_grad_(False)
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    @contextmanager
    def _without(self, *names: str) -> Iterator[None]:
        """Set attributes to None within the context."""
        components = {name: getattr(self, name) for name in names}
        try:
            for name in components:
                setattr(self, name, None)
            yield
        finally:
            for name, component in components.items():
                setattr(self, name, component)


def _check_new(export_root: Path | str, export_type: ExportType, name: str) -> None:
    """Raise if an export would replace an earlier one, which may be of another model."""
    path = create_export_root(export_root, export_type) / name
    if path.exists():
        msg = (
            f"{str(path)!r} exists, and may be the export of another model. Give another folder or name "
            "(--export_root, --model_file_name), or delete the file."
        )
        raise ArgumentError(msg)
