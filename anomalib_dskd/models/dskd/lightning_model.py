"""DSKD as an anomalib model."""

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning import Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_dskd.components.backbone import check_teacher
from anomalib_dskd.components.batch_norm import fresh_statistics
from anomalib_dskd.components.feature_cache import FeatureCache
from anomalib_dskd.data.image_cache import cache_training_images
from anomalib_dskd.data.image_files import check_depths
from anomalib_dskd.errors import ArgumentError, DataError, DivergedError, NotTrainedError
from anomalib_dskd.evaluation import RawScoreEvaluator, keep_raw_scores
from anomalib_dskd.models.dskd.arguments import (
    DEFAULT_IMAGE_SIZE,
    DEFAULT_TEACHER,
    TRAINING_ONLY,
    Schedule,
    check_numbers,
    check_schedule,
    check_trainer,
    meaning,
    number_of_steps,
    resolve_pre_processor,
)
from anomalib_dskd.models.dskd.loss import DskdLoss
from anomalib_dskd.models.dskd.torch_model import DskdModel, Embedding, Losses, MapPair
from anomalib_dskd.pre_processing import create_pre_processor
from anomalib_dskd.weights import find_teacher_weights

__all__ = ["Dskd"]

ONNX_OPSET = 18  # torch's exporter writes it; asked for an older one, as anomalib does, it tries to convert and fails


class Dskd(AnomalibModule):
    """Dual-student knowledge distillation: train on good parts, find and outline defects.

    An encoder student learns a pretrained teacher's features of good images; a decoder student learns to
    reproduce them from the encoder's embedding. Where the decoder fails to, the image is anomalous.

    Args:
        teacher: timm backbone that supports ``features_only``. Default: the paper's ImageNet ResNet18
            (section 4.1.2) with torchvision's weights.
        layers: indices into the backbone's feature levels. Default: conv2_x, conv3_x, conv4_x (section 3.1).
        teacher_weights: file of pretrained weights, safetensors or a PyTorch state dict. Default: the folder in
            the environment variable ``ANOMALIB_DSKD_WEIGHTS``, else the package of the ``lite`` extra, else what
            timm has cached or can download. Read when training starts; a checkpoint brings the teacher with it.
        image_size: height and width that images are resized to, with no crop. Default: 256 (section 4.1.2).
            Not together with a ``pre_processor`` of your own.
        map_pair: networks whose discrepancy is the anomaly map. Default: teacher and decoder student (Table 7).
        losses: students distilled from the teacher. Default: both (Eq. 7).
        map_layers: the ones of ``layers`` that the map adds up. Default: all (Table 9).
        embedding: fuse the encoder's levels (true, section 3.2), or down-sample the deepest alone (Table 8).
        embedding_blocks: residual blocks in the embedding. Default: two, which the paper's parameter count
            fits (Table 6).
        embedding_input: the encoder's features ``raw`` or ``normalized``. Default, our choice: raw; the paper
            can be read either way (Fig. 4 and Algorithm 2, line 7).
        embedding_gradient: let the decoder's loss train the encoder student too. Default, our choice: true; the
            paper can be read either way (section 3.1).
        l2_weight: lambda of Eq. (6). Default: 0.1 (section 4.1.2).
        sigma: standard deviation of the map's blur in pixels, Eq. (9); 0 for none. Default: 4.
        learning_rate: of Adam; with ``one_cycle`` its peak. Default: 0.001 (section 4.1.2).
        schedule: ``constant``, or ``one_cycle``: up to ``learning_rate`` over the first 30 % of the steps, then down to
            nearly nothing. Default: constant (section 4.1.2).
        betas: of Adam. Default: (0.5, 0.999) (section 4.1.2).
        weight_decay: of Adam. Default: 0; the paper gives none.
        batch_norm_images: training images from which the students' batch-norm statistics are estimated anew before
            each evaluation within training; 0 keeps the running averages. Default, our choice: 256, see the
            README's table of deviations.
        teacher_cache: GiB of memory for the teacher's features of the training images, which are the same in each
            epoch; what needs more is kept in a temporary file. 0 computes them in each epoch, as happens with
            random augmentations and on a GPU. Default, our choice: 1.
        image_cache: GiB of memory for decoded, resized training images; those beyond, and all of them with random
            augmentations, are decoded in each epoch. Default, our choice: 1.
        seed: initialise the students, and order the batches, from this number. A training that is resumed orders
            its batches anew. Default, anomalib's: unseeded.
        pre_processor: as in every anomalib model.
        post_processor: as in every anomalib model.
        evaluator: as in every anomalib model. Default: :class:`~anomalib_dskd.evaluation.RawScoreEvaluator`.
        visualizer: as in every anomalib model.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Dskd(image_size=128, map_pair="T-D")
        >>> model.model.smallest_image
        64
    """

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        layers: Sequence[int] = (1, 2, 3),
        teacher_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        map_pair: MapPair = "T-D",
        losses: Losses = "both",
        map_layers: Sequence[int] | None = None,
        embedding: bool = True,
        embedding_blocks: int = 2,
        embedding_input: Embedding = "raw",
        embedding_gradient: bool = True,
        l2_weight: float = 0.1,
        sigma: float = 4.0,
        learning_rate: float = 1e-3,
        schedule: Schedule = "constant",
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        batch_norm_images: int = 256,
        teacher_cache: float = 1.0,
        image_cache: float = 1.0,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_numbers(
            l2_weight=l2_weight,
            sigma=sigma,
            learning_rate=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            batch_norm_images=batch_norm_images,
            teacher_cache=teacher_cache,
            image_cache=image_cache,
        )
        check_schedule(schedule)
        check_teacher(teacher)
        super().__init__(
            pre_processor=resolve_pre_processor(pre_processor, teacher, image_size),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.teacher_weights = teacher_weights
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.betas = betas
        self.weight_decay = weight_decay
        self.batch_norm_images = batch_norm_images
        self.teacher_cache = teacher_cache
        self.image_cache = image_cache
        self.seed = seed
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model: DskdModel = DskdModel(
                teacher,
                layers,
                map_pair=map_pair,
                losses=losses,
                map_layers=map_layers,
                embedding=embedding,
                embedding_blocks=embedding_blocks,
                embedding_input=embedding_input,
                embedding_gradient=embedding_gradient,
                l2_weight=l2_weight,
                sigma=sigma,
            )
        self.loss = DskdLoss(l2_weight=l2_weight)
        if self.input_size is not None:
            self.model.check_size(*self.input_size)

    # --- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Let anomalib's data module, if there is one, decode each training image once."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == TrainerFn.FITTING and isinstance(data, AnomalibDataModule):
            cache_training_images(data, memory=self.image_cache)

    def on_fit_start(self) -> None:
        """Load the teacher's weights, unless a checkpoint has brought them, and seed the order of the batches."""
        self.model.to(memory_format=torch.channels_last)  # faster on CPUs with bfloat16 units
        check_trainer(self.trainer)
        if self.model.teacher.weights_origin is None:
            self.load_teacher_weights()
        if self.seed is not None:
            seed_everything(self.seed, workers=True, verbose=False)

    def on_train_start(self) -> None:
        """Make room for the teacher's features of the training images."""
        if self.teacher_cache > 0:
            images = _images(_training_loader(self.trainer))
            self.model.teacher_cache = FeatureCache(self.model.teacher, images=images, memory=self.teacher_cache)

    def on_train_end(self) -> None:
        """Free the room that the teacher's features took."""
        self.model.teacher_cache = None

    def load_teacher_weights(self) -> None:
        """Find and load the teacher's pretrained weights; training does this by itself.

        Raises:
            TeacherWeightsError: weights missing, unreadable, or of another architecture.
        """
        name = self.model.teacher.backbone.name
        self.model.teacher.load_weights(find_teacher_weights(name, self.teacher_weights))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the students' losses, Eq. (7).

        Raises:
            DivergedError: the loss is not finite.
        """
        check_depths(batch.image_path)
        images = torch.as_tensor(batch.image).contiguous(memory_format=torch.channels_last)
        features = self.model(images)
        losses = self.loss(features.teacher, features.students)
        total = torch.stack(list(losses.values())).sum()
        self._check_finite(total, batch, batch_idx)
        logged = {"train_loss": total, **{f"train_loss_{student}": loss for student, loss in losses.items()}}
        for name, loss in logged.items():
            on_bar = name == "train_loss"
            self.log(name, loss.detach(), on_step=False, on_epoch=True, prog_bar=on_bar, batch_size=len(images))
        return total

    def _check_finite(self, loss: Tensor, batch: ImageBatch, batch_idx: int) -> None:
        if not torch.isfinite(loss):
            files = ", ".join(str(path) for path in batch.image_path or ["of unknown name"])
            msg = (
                f"the loss is {loss.item()} in batch {batch_idx} of epoch {self.current_epoch}: training has diverged, "
                f"and stops before its weights are spoilt further. The batch's images: {files}. The last checkpoint "
                "is kept. Look at the images, lower learning_rate, or train with --trainer.precision 32-true."
            )
            raise DivergedError(msg)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Note that the students have learnt something, so that results may be asked of them."""
        self.model.is_trained = True

    def on_train_epoch_end(self) -> None:
        """Let the cache take stock; without a validation, make the model fit to be saved here."""
        if self.model.teacher_cache is not None:
            self.model.teacher_cache.end_epoch()
        if not self.trainer.enable_validation:
            self._refresh_batch_norm()

    @torch.no_grad()
    def _refresh_batch_norm(self) -> None:
        """Estimate the students' batch-norm statistics from ``batch_norm_images`` training images, in random order."""
        loader = _training_loader(self.trainer)
        order = torch.randperm(_images(loader), generator=torch.Generator().manual_seed(0))
        chosen, size = order[: self.batch_norm_images].tolist(), loader.batch_size or 1
        was_training = self.model.training
        self.model.train()
        with fresh_statistics(self.model), self.trainer.precision_plugin.forward_context():
            for start in range(0, len(chosen), size):
                batch = loader.collate_fn([loader.dataset[index] for index in chosen[start : start + size]])
                batch = self.trainer.strategy.batch_to_device(batch)
                if isinstance(self.pre_processor, PreProcessor):
                    self.pre_processor.on_train_batch_start(self.trainer, self, batch, 0)
                self.model.student_features(batch.image.contiguous(memory_format=torch.channels_last))
        self.model.train(was_training)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam over the students and the embedding (section 4.1.2), not the teacher, and its schedule."""
        students = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            students,
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,  # the same arithmetic in one pass over the weights
        )
        if self.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=number_of_steps(self.trainer),
            cycle_momentum=False,  # beta stays the paper's
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:  # type: ignore[override] # noqa: ARG002
        """Put map ``(B, 1, H, W)`` and score ``(B, 1)`` on the batch."""
        check_depths(batch.image_path)
        predictions: InferenceBatch = self.model(batch.image)
        keep_raw_scores(batch, predictions, largest=self.model.largest_score)
        batch.update(**predictions._asdict())
        return batch

    test_step = predict_step = validation_step  # type: ignore[assignment]

    def on_validation_start(self) -> None:
        """Refuse to validate before training; within training, validate the weights as they are."""
        self._require_training("validate")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._refresh_batch_norm()

    def on_test_start(self) -> None:
        """Refuse to test before training."""
        self._require_training("test")

    def on_predict_start(self) -> None:
        """Refuse to predict before training."""
        self._require_training("predict")

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401 - passed on
        """Export as anomalib does, once trained."""
        self._require_training("export")
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override] # noqa: ANN401 - passed on
        """Export as anomalib does, once trained; OpenVINO goes through here too."""
        self._require_training("export")
        kwargs.setdefault("opset_version", ONNX_OPSET)
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, export_root: Path | str, **kwargs: Any) -> Path:  # type: ignore[override] # noqa: ANN401
        """Export as anomalib does, once trained, and not with quantised activations: those lose the score."""
        compression_type = kwargs.get("compression_type")
        if compression_type in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}:
            msg = (
                f"compression_type {str(compression_type)!r} makes the scores of this model useless, since it "
                "quantises the anomaly map too. Legal are none, 'fp16' and 'int8' (weights alone)."
            )
            raise ArgumentError(msg)
        return super().to_openvino(export_root, **kwargs)

    def _require_training(self, purpose: str) -> None:
        if not self.model.is_trained:
            msg = (
                f"cannot {purpose}: this Dskd has not been trained, its scores would be random. Give a trained "
                f"model with --ckpt_path (`anomalib {purpose} ... --ckpt_path results/.../model.ckpt`), or train first."
            )
            raise NotTrainedError(msg)

    # --- anomalib's contract ------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with other arguments than this model was built with."""
        super().on_load_checkpoint(checkpoint)
        # figures may be measured with other metrics than in training; anomalib's AUPRO leaves a buffer in the state
        trained = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("evaluator.")}
        checkpoint["state_dict"] = {**trained, **own}
        self._refuse_other_arguments(checkpoint.get("hyper_parameters", {}))

    def _refuse_other_arguments(self, trained: Mapping[str, Any]) -> None:
        schedule, goes_on = trained.get("schedule", self.schedule), self._trainer is not None
        if schedule != self.schedule and goes_on and self.trainer.state.fn == TrainerFn.FITTING:
            msg = f"the checkpoint was trained with schedule {schedule!r}: go on with the same one, or start anew."
            raise ArgumentError(msg)
        built = dict(self.hparams)
        names = [name for name in trained if name in built and name not in TRAINING_ONLY]
        changed = [name for name in names if meaning(name, trained) != meaning(name, built)]
        if changed:
            listed = "; ".join(f"{name}: {trained[name]!r} there, {built[name]!r} here" for name in changed)
            msg = (
                f"the checkpoint was trained with other arguments: {listed}. Give the same arguments or --config, "
                "or use Dskd.load_from_checkpoint(path), which takes them from the checkpoint."
            )
            raise ArgumentError(msg)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that this model imposes on Lightning's Trainer."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None, teacher: str = DEFAULT_TEACHER
    ) -> PreProcessor:
        """Return the default pre-processing for a teacher."""
        return create_pre_processor(teacher, image_size or DEFAULT_IMAGE_SIZE)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the paper's figures on unclamped scores."""
        return RawScoreEvaluator()


def _training_loader(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        msg = f"training images come from {type(loader).__name__}. Legal is one torch DataLoader."
        raise DataError(msg)
    return loader


def _images(loader: DataLoader[Any]) -> int:
    return len(cast("Sized", loader.dataset))
