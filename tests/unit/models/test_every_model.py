"""What holds for each model that learns from a frozen teacher, whatever its networks are."""

import copy
import inspect
import itertools
import logging
import warnings
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import get_model, list_models
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torchvision.transforms.v2 import RandomHorizontalFlip, Transform

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad
from anomalib_dskd.components import discrepancy
from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.errors import ArgumentError, NotTrainedError
from anomalib_dskd.models.distillation import lightning_model
from anomalib_dskd.models.distillation.callbacks import EvaluationWeights
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.distillation.resuming import constructor_defaults
from anomalib_dskd.models.tad.lightning_model import assistant_steps
from tests.conftest import ASSISTANT, RESNET, TEACHER, at_step, differing, engine

ARGUMENTS = {Afkd: {}, Dskd: {}, Dtgd: {}, Tad: {"assistant": ASSISTANT}}
STUDENTS = {
    Afkd: {"fusion", "embedding", "decoder_student"},
    Dskd: {"encoder_student", "embedding", "decoder_student"},
    Dtgd: {"encoder_student", "embedding", "decoder_student"},
    Tad: {"student"},
}
LOSSES = {
    Afkd: {"decoder"},
    Dskd: {"encoder", "decoder"},
    Dtgd: {"encoder", "decoder", "dissimilarity"},
    Tad: {"from_teacher", "from_assistant", "entropy", "inverse"},
}
every_model = pytest.mark.parametrize("kind", list(ARGUMENTS), ids=lambda kind: kind.__name__)


def build(kind: type[AnomalibModule], weights: Path | str | None, **arguments) -> AnomalibModule:
    common = {"teacher": TEACHER, "image_size": 64, "sigma": 2.0, "seed": 0, "visualizer": False}
    return kind(**{**common, **ARGUMENTS.get(kind, {}), "teacher_weights": weights, **arguments})


def fit(
    model: AnomalibModule,
    root: Path,
    folder: Path,
    *,
    num_workers: int = 0,
    augmentations: Transform | None = None,
    checkpoint: Path | None = None,
    **trainer,
) -> AnomalibModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(root, train_batch_size=4, num_workers=num_workers, train_augmentations=augmentations)
        engine(folder, **{"max_epochs": 2, **trainer}).fit(model, datamodule=data, ckpt_path=checkpoint)
    return model


@pytest.fixture(scope="module", params=list(ARGUMENTS), ids=lambda kind: kind.__name__)
def trained(request, magnetic_tile_root, teacher_weights, tmp_path_factory) -> tuple[AnomalibModule, Path]:
    """A model trained for two epochs of two steps (Tad: the first step trains its assistant), and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    model = fit(build(request.param, teacher_weights), magnetic_tile_root, folder)
    return model, next(folder.rglob("model.ckpt"))


@every_model
def test_anomalib_finds_the_model_by_name(kind):
    assert kind.__name__.lower() in list_models()
    assert type(get_model(kind.__name__.lower())) is kind


@every_model
def test_every_argument_is_documented(kind):
    own, shared = (set(inspect.signature(each).parameters) - {"kwargs"} for each in (kind, DistillationModule))
    for documented, arguments in ((inspect.getdoc(kind), own), (inspect.getdoc(DistillationModule), shared)):
        assert arguments
        assert all(f"\n    {name}: " in documented for name in arguments)
    assert "lightning_model.DistillationModule` documents" in inspect.getdoc(kind)
    assert own | shared == set(constructor_defaults(kind))
    assert not own & shared


@every_model
def test_help_of_the_command_shows_every_argument(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "model")
    told = parser.format_help()
    for name, default in constructor_defaults(kind).items():
        assert f"--model.{name}" in told
        assert parser.get_defaults()[f"model.{name}"] == default
    for text in ("timm backbone that supports", "standard deviation of the anomaly map's", "decay of an exponential"):
        assert text in told


@every_model
def test_misspelled_argument_is_refused(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmas'"):
        kind(sigmas=3.0)


@pytest.mark.parametrize("kind", [Afkd, Dtgd, Tad], ids=lambda kind: kind.__name__)
def test_siblings_say_where_they_come_from(kind):
    documented = " ".join(inspect.getdoc(kind).split())
    assert "Reimplemented from the abstract of " in documented
    assert "the authors' code and text were not seen; their results are not claimed." in documented


@every_model
def test_arguments_of_the_map_and_of_the_training_are_arguments(kind):
    arguments = set(constructor_defaults(kind))
    assert {"sigma"} <= kind.map_only <= arguments
    assert DistillationModule.training_only <= kind.training_only <= arguments
    assert not kind.map_only & kind.training_only


@every_model
def test_one_epoch_of_two_steps_is_a_training(kind, magnetic_tile_root, teacher_weights, tmp_path):
    model = fit(build(kind, teacher_weights, ema_decay=0.9), magnetic_tile_root, tmp_path, max_epochs=1)
    assert model.trainer.global_step == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (metrics,) = engine(tmp_path / "test").test(
            kind.load_from_checkpoint(next(tmp_path.rglob("model.ckpt"))),
            datamodule=MagneticTile(magnetic_tile_root),
            verbose=False,
        )
    assert 0 <= metrics["image_AUROC"] <= 1
    assert model.post_processor.image_threshold > 0


def test_training_changes_the_students_and_not_the_teacher(trained, teacher_weights):
    model, _ = trained
    fresh = build(type(model), teacher_weights)
    fresh.load_teacher_weights()
    before, after = fresh.model.state_dict(), model.model.state_dict()
    tensors = [name for name in before if "_extra_state" not in name and "kernel" not in name]
    changed = {name.split(".")[0] for name in tensors if not torch.equal(before[name], after[name])}
    assert changed == STUDENTS[type(model)]
    assert not model.model.teacher.training


def test_losses_are_logged_by_name(trained):
    model, _ = trained
    logged = model.trainer.callback_metrics
    losses = {name.removeprefix("train_loss_"): float(value) for name, value in logged.items() if "train_loss_" in name}
    losses.pop("assistant", None)  # of Tad's first phase
    assert set(losses) == LOSSES[type(model)]
    assert float(logged["train_loss"]) == pytest.approx(sum(losses.values()), rel=1e-5)


def test_checkpoint_brings_teacher_and_result(trained):
    model, checkpoint = trained
    loaded = type(model).load_from_checkpoint(checkpoint, teacher_weights="gone.safetensors").eval()
    image = torch.rand(2, 3, 80, 100)
    with torch.no_grad():
        expected, result = model.eval()(image), loaded(image)
    assert torch.allclose(result.anomaly_map, expected.anomaly_map, atol=1e-4)  # another memory format
    assert not any(parameter.requires_grad for parameter in loaded.model.teacher.parameters())


def test_test_predict_and_resume_without_weights_file(trained, magnetic_tile_root, tmp_path):
    model, checkpoint = trained
    data = MagneticTile(magnetic_tile_root, train_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tested, predicting, resumed = (build(type(model), "gone.safetensors") for _ in range(3))
        (metrics,) = engine(tmp_path / "test").test(tested, datamodule=data, ckpt_path=checkpoint)
        predictions = engine(tmp_path / "predict").predict(predicting, datamodule=data, ckpt_path=checkpoint)
        if not resumed.schedule_arguments:
            engine(tmp_path / "resume", max_epochs=3).fit(resumed, datamodule=data, ckpt_path=checkpoint)
    assert set(metrics) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"}
    maps, scores = (torch.cat([getattr(b, name) for b in predictions]) for name in ("anomaly_map", "pred_score"))
    assert len(maps) == len(scores) == 12
    assert maps.isfinite().all()
    assert scores.isfinite().all()
    assert len(maps.flatten(1).mean(1).unique()) > 1
    assert resumed.schedule_arguments or resumed.current_epoch == 3


class StopInThirdEpoch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
        if (trainer.current_epoch, batch_idx) == (2, 1):
            raise InterruptedError


@every_model
@pytest.mark.parametrize(
    ("augmentations", "ema_decay"),
    [(None, 0.0), (RandomHorizontalFlip(), 0.0), (None, 0.9)],
    ids=["plain", "random", "averaged"],
)
def test_a_resumed_training_ends_with_the_same_weights(
    kind, augmentations, ema_decay, magnetic_tile_root, teacher_weights, tmp_path
):
    common = {"max_epochs": 3, "augmentations": augmentations}
    through = build(kind, teacher_weights, ema_decay=ema_decay)
    fit(through, magnetic_tile_root, tmp_path / "through", **common)
    stopping = {**common, "callbacks": [StopInThirdEpoch()]}
    stopped = build(kind, teacher_weights, ema_decay=ema_decay)
    with pytest.raises(InterruptedError):
        fit(stopped, magnetic_tile_root, tmp_path / "stopped", **stopping)
    (checkpoint,) = (tmp_path / "stopped").rglob("v0/**/model.ckpt")
    resumed = build(kind, "gone.safetensors", ema_decay=ema_decay)
    fit(resumed, magnetic_tile_root, tmp_path / "resumed", checkpoint=checkpoint, **common)
    learned = tuple(f"{part}." for part in ("model", *kind.training_components))
    first, second = (
        {name: value for name, value in model.state_dict().items() if name.startswith(learned)}
        for model in (through, resumed)
    )
    assert len(first) > 100
    assert not differing(first, second)


class RecordWeights(Callback):
    """Notes the trained weights after each of the optimizer's steps."""

    def __init__(self) -> None:
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        if trainer.global_step > len(self.steps):
            learned = {name: weight for name, weight in pl_module.model.named_parameters() if weight.requires_grad}
            self.steps.append({name: weight.detach().clone() for name, weight in learned.items()})


def averaged(steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """What the weights after each step come to."""
    average = steps[0]
    for number, learned in enumerate(steps[1:], start=1):
        share = min(decay, number / (number + 9))
        average = {name: share * average[name] + (1 - share) * learned[name] for name in learned}
    return average


@every_model
@pytest.mark.parametrize(
    "trainer",
    [{}, {"accumulate_grad_batches": 2, "val_check_interval": 1}, {"limit_val_batches": 0}],
    ids=["validated", "validated between accumulated batches", "not validated"],
)
def test_images_are_scored_with_averaged_weights_and_training_does_not_notice(
    kind, trainer, magnetic_tile_root, teacher_weights, tmp_path
):
    with_, without, more = RecordWeights(), RecordWeights(), {"max_epochs": 4, **trainer}
    model, plain = build(kind, teacher_weights, ema_decay=0.2), build(kind, teacher_weights)
    fit(model, magnetic_tile_root, tmp_path / "with", callbacks=[with_], **more)
    fit(plain, magnetic_tile_root, tmp_path / "without", callbacks=[without], **more)
    assert len(with_.steps) == 8 // trainer.get("accumulate_grad_batches", 1)
    for mine, theirs in zip(with_.steps, without.steps, strict=True):
        assert not differing(mine, theirs)
    first = assistant_steps(len(with_.steps), 0.3) if kind is Tad else 0
    expected = averaged(with_.steps[first:], 0.2)
    saved = torch.load(next((tmp_path / "with").rglob("model.ckpt")), weights_only=False)["state_dict"]
    for name, weights in expected.items():
        torch.testing.assert_close(model.model.get_parameter(name).detach(), weights, msg=name)
        assert torch.equal(saved[f"model.{name}"], model.model.get_parameter(name)), name
    assert [part.average for part in model.trainer.callbacks if isinstance(part, EvaluationWeights)] == [None]


class SaveAndStop(Callback):
    """Saves after the third step, between two validations, and lets the training end there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_averaged_weights_are_scored_with_where_no_validation_is_the_last(
    magnetic_tile_root, teacher_weights, tmp_path
):
    record = RecordWeights()
    model = build(Dskd, teacher_weights, ema_decay=0.2)
    callbacks = [record, SaveAndStop(tmp_path / "between.ckpt")]
    trainer = {"max_epochs": 4, "check_val_every_n_epoch": 4, "min_epochs": 1, "callbacks": callbacks}
    fit(model, magnetic_tile_root, tmp_path, **trainer)
    between = Dskd.load_from_checkpoint(tmp_path / "between.ckpt")
    for name, weights in averaged(record.steps[:3], 0.2).items():
        torch.testing.assert_close(between.model.get_parameter(name).detach(), weights, msg=name)
    assert len(record.steps) < 8
    for name, weights in averaged(record.steps, 0.2).items():
        torch.testing.assert_close(model.model.get_parameter(name).detach(), weights, msg=name)
    assert model.model.decoder_student.stages[0][0].main[1].num_batches_tracked == 2  # estimated anew: all 8 images


def test_batch_norm_and_thresholds_are_those_of_the_averaged_weights(magnetic_tile_root, resnet_weights, tmp_path):
    model = fit(build(Dskd, resnet_weights, teacher=RESNET, ema_decay=0.5), magnetic_tile_root, tmp_path / "fit")
    data = MagneticTile(magnetic_tile_root, train_batch_size=4)
    data.setup()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))  # as for the estimate
    images = [model.pre_processor.transform(data.train_data[int(index)].image[None]) for index in order]
    seen, saved = [], model.model.decoder_student.stages[0][0].main[1]
    net = copy.deepcopy(model.model).train()
    norm = net.decoder_student.stages[0][0].main[1]
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in torch.cat(images).split(4):
            net.student_features(batch, [])
    torch.testing.assert_close(saved.running_mean, torch.stack(seen).mean(0), atol=1e-4, rtol=1e-3)
    plain = fit(build(Dskd, resnet_weights, teacher=RESNET), magnetic_tile_root, tmp_path / "plain").model
    others = plain.decoder_student.stages[0][0].main[1].running_mean
    assert (saved.running_mean - others).abs().max() > 0.01  # those of the last step's weights would not do
    again = Dskd.load_from_checkpoint(next((tmp_path / "fit").rglob("model.ckpt")))
    threshold = again.post_processor.image_threshold.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path / "validate").validate(again, datamodule=MagneticTile(magnetic_tile_root), verbose=False)
    torch.testing.assert_close(again.post_processor.image_threshold, threshold, atol=1e-4, rtol=1e-3)


@every_model
@pytest.mark.parametrize(
    "callback",
    [EMAWeightAveraging(), WeightAveraging(), StochasticWeightAveraging(swa_lrs=0.001)],
    ids=lambda callback: type(callback).__name__,
)
def test_lightnings_averages_are_refused(kind, callback, magnetic_tile_root, tmp_path):
    message = f"callback {type(callback).__name__} is not supported: .* Give --model.ema_decay 0.99 instead"
    with pytest.raises(ArgumentError, match=message):
        fit(build(kind, None), magnetic_tile_root, tmp_path, callbacks=[callback])


@every_model
@pytest.mark.parametrize(
    ("callback", "advice"),
    [
        (LearningRateFinder(num_training_steps=4), "Give --model.learning_rate"),
        (BatchSizeFinder(max_trials=2), "Give the batch sizes, such as --data.train_batch_size 16"),
        (BatchSizeFinder(batch_arg_name="train_batch_size"), "Give the batch sizes"),
    ],
    ids=["learning rate", "batch size", "named batch size"],
)
def test_lightnings_finders_are_refused(kind, callback, advice, magnetic_tile_root, tmp_path):
    message = f"callback {type(callback).__name__} is not supported: .* {advice}"
    with pytest.raises(ArgumentError, match=message):
        fit(build(kind, None), magnetic_tile_root, tmp_path, callbacks=[callback])


@every_model
def test_a_plain_trainer_trains_the_same_model_as_anomalibs_engine(kind, magnetic_tile_root, teacher_weights, tmp_path):
    expected = fit(build(kind, teacher_weights), magnetic_tile_root, tmp_path / "engine").state_dict()
    model = build(kind, teacher_weights)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path / "plain", **quiet)
        trainer.fit(model, datamodule=MagneticTile(magnetic_tile_root, train_batch_size=4))
    assert not differing(expected, model.state_dict())


def test_lightnings_average_still_has_no_thresholds(magnetic_tile_root, teacher_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_model, "check_callbacks", lambda _: None)
    fit(build(Dskd, teacher_weights), magnetic_tile_root, tmp_path, callbacks=[EMAWeightAveraging()])
    saved = torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=False)["state_dict"]
    assert saved["post_processor._image_threshold"].isnan()  # else the refusal is no longer needed
    assert not saved["model._extra_state"]["is_trained"]


def test_a_training_that_was_broken_off_leaves_averaged_weights(magnetic_tile_root, teacher_weights, tmp_path):
    record, model = RecordWeights(), build(Dskd, teacher_weights, ema_decay=0.2)
    with pytest.raises(InterruptedError):
        fit(model, magnetic_tile_root, tmp_path, max_epochs=3, callbacks=[record, StopInThirdEpoch()])
    assert len(record.steps) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to_onnx(tmp_path)
    for name, weights in averaged(record.steps, 0.2).items():
        torch.testing.assert_close(model.model.get_parameter(name).detach(), weights, msg=name)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    with pytest.raises(InterruptedError):
        fit(model, magnetic_tile_root, tmp_path / "again", max_epochs=3, callbacks=[StopInThirdEpoch()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tester = engine(tmp_path / "test")
        tester.test(model, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint, verbose=False)
        tester.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"]
    assert not [name for name in differing(saved, again) if name.startswith("model.") and "extra" not in name]


def test_a_training_goes_on_with_or_without_averaged_weights(magnetic_tile_root, teacher_weights, tmp_path):
    last, decays = {}, {"off": 0.0, "on": 0.5}
    for start, end in itertools.product(decays, decays):
        before, record = RecordWeights(), RecordWeights()
        folder = tmp_path / f"{start} {end}"
        fit(build(Dskd, teacher_weights, ema_decay=decays[start]), magnetic_tile_root, folder / "1", callbacks=[before])
        (checkpoint,) = (folder / "1").rglob("model.ckpt")
        record.steps = before.steps  # goes on with their number
        resumed = build(Dskd, teacher_weights, ema_decay=decays[end])
        more = {"max_epochs": 3, "callbacks": [record]}
        fit(resumed, magnetic_tile_root, folder / "2", checkpoint=checkpoint, **more)
        assert len(record.steps) == 6
        last[start, end] = record.steps[-1]
        scored = {name: weight.detach() for name, weight in resumed.model.named_parameters() if weight.requires_grad}
        if end == "off":
            assert not differing(scored, last[start, end])
        else:  # of all steps, or of those from which on it was asked for
            expected = averaged(record.steps[0 if start == "on" else 4 :], 0.5)
            assert set(scored) == set(expected)
            for name, weights in expected.items():
                torch.testing.assert_close(scored[name], weights, msg=name)
    assert all(not differing(last["off", "off"], learned) for learned in last.values())


def test_checkpoint_of_other_arguments_is_refused(trained, magnetic_tile_root, tmp_path):
    model, checkpoint = trained
    other = build(type(model), None, sigma=3.0)
    with pytest.raises(ArgumentError, match="trained with other arguments: sigma: checkpoint has 2.0, model has 3.0"):
        engine(tmp_path).test(other, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)


def test_arguments_that_are_not_given_come_from_the_checkpoint(trained, magnetic_tile_root, tmp_path, caplog):
    model, checkpoint = trained
    other = type(model)(visualizer=False)
    assert other.model.teacher.backbone.name != TEACHER
    caplog.set_level(logging.INFO, logger="anomalib_dskd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path).test(other, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)
    assert "From the checkpoint: " in caplog.text
    assert f"teacher '{TEACHER}'" in caplog.text
    assert not differing(other.model.state_dict(), model.model.state_dict())
    assert tuple(other.input_size) == (64, 64)
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    results = [each.eval()(images) for each in (model, other)]
    # the other memory format of weights that come from training changes the order of sums
    torch.testing.assert_close(results[1].anomaly_map, results[0].anomaly_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(results[1].pred_score, results[0].pred_score, atol=1e-5, rtol=0)
    changed = {"teacher", "image_size", "sigma"}
    assert all(other.hparams[name] == model.hparams[name] for name in changed)


def test_a_training_run_is_not_resumed_with_arguments_of_the_checkpoint(trained, magnetic_tile_root, tmp_path):
    model, checkpoint = trained
    other = build(type(model), None, sigma=4.0)  # the default: it counts as not given in a test
    with pytest.raises(ArgumentError, match="other arguments: sigma: checkpoint has 2.0, model has 4.0"):
        engine(tmp_path, max_epochs=9).fit(other, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)


@every_model
def test_no_result_before_training(kind, magnetic_tile_root, teacher_weights, tmp_path):
    model = build(kind, teacher_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for purpose in ("test", "validate"):
            with pytest.raises(
                NotTrainedError,
                match=f"cannot {purpose}: the networks of this {kind.__name__} that score images have not been trained",
            ):
                getattr(engine(tmp_path), purpose)(model, datamodule=MagneticTile(magnetic_tile_root))
    with pytest.raises(NotTrainedError, match="cannot export"):
        model.to_onnx(tmp_path)


@every_model
@pytest.mark.parametrize(("kind_of_export", "suffix"), [("torch", "pt"), ("onnx", "onnx"), ("openvino", "xml")])
def test_an_export_does_not_replace_another(kind_of_export, suffix, kind, tmp_path):
    model = build(kind, None)
    model.model.is_trained = True
    for name in ("model", "line_2"):
        (tmp_path / "weights" / kind_of_export).mkdir(parents=True, exist_ok=True)
        earlier = tmp_path / "weights" / kind_of_export / f"{name}.{suffix}"
        earlier.write_text("earlier")
        with pytest.raises(ArgumentError, match=rf"{name}.{suffix}' exists, and may be the export of another model"):
            engine(tmp_path).export(model, kind_of_export, export_root=tmp_path, model_file_name=name)
        assert earlier.read_text() == "earlier"


@pytest.mark.parametrize(
    ("kind", "cached", "uncached"),
    [(Afkd, 8, 24), (Dskd, 8, 24), (Dtgd, 8 + 24, 24 + 24), (Tad, 8, 24)],  # Dtgd: damaged ones besides
    ids=["Afkd", "Dskd", "Dtgd", "Tad"],
)
def test_teacher_sees_each_clean_image_once_with_the_cache(
    kind, cached, uncached, magnetic_tile_root, teacher_weights, tmp_path, monkeypatch
):
    images, original = [], Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, batch: images.append(len(batch)) or original(self, batch))
    losses = []
    for memory, expected in ((1.0, cached), (0.0, uncached)):
        images.clear()
        model = build(kind, teacher_weights, teacher_cache=memory, batch_norm_images=0)
        trainer = {"max_epochs": 3, "limit_val_batches": 0}
        fit(model, magnetic_tile_root, tmp_path / str(memory), **trainer)
        assert sum(images) == expected
        losses.append(float(model.trainer.callback_metrics["train_loss"]))
        assert model.model.teacher_cache is None
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)  # Adam makes more of the rounding to 16 bits


@pytest.mark.parametrize("kind", [Dtgd, Tad], ids=lambda kind: kind.__name__)
def test_number_of_workers_changes_nothing(kind, magnetic_tile_root, teacher_weights, tmp_path):
    states = []
    for num_workers in (0, 2):
        model = build(kind, teacher_weights, batch_norm_images=0)
        trainer = {"limit_val_batches": 0, "num_workers": num_workers}
        states.append(fit(model, magnetic_tile_root, tmp_path / str(num_workers), **trainer).model.state_dict())
    for name, value in states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, states[1][name]), name


@every_model
def test_two_trainings_with_one_seed_give_the_same_weights(kind, magnetic_tile_root, teacher_weights, tmp_path):
    states = []
    for run in (1, 2):
        torch.manual_seed(run)  # what happened before does not matter
        model = fit(build(kind, teacher_weights), magnetic_tile_root, tmp_path / str(run), limit_val_batches=0)
        state = model.state_dict()  # without the thresholds, which are NaN without a validation
        states.append({name: value for name, value in state.items() if not name.startswith("post_processor.")})
    for name, value in states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("kind", [Afkd, Dtgd, Tad], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "resnet_18"}, "teacher 'resnet_18' is not a timm model. Did you mean .*'resnet18'"),
        ({"layers": [3, 4, 5]}, r"layers \[3, 4, 5\] do not fit teacher .* indices from 0 to 4"),
        ({"sigma": -1.0}, "sigma -1.0 must be a finite number, 0 or larger"),
        ({"sigma": "4"}, "sigma '4' must be a finite number, 0 or larger"),
        ({"teacher": 18}, "teacher 18 is not a timm model"),
        ({"layers": 2}, "layers 2 must be a list of integers"),
        ({"layers": [1.0, 2]}, r"layers \[1.0, 2\] must be a list of integers"),
        ({"learning_rate": "0.1"}, "learning_rate '0.1' must be a finite number larger than 0"),
        ({"betas": 0.5}, "betas 0.5 must be two numbers"),
        ({"ema_decay": None}, "ema_decay None must be a number from 0"),
        ({"seed": True}, "seed True must be an integer"),
        ({"batch_norm_images": True}, "batch_norm_images True must be a positive integer"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be a finite number larger than 0"),
        ({"betas": (0.5, 1.0)}, r"betas \(0.5, 1.0\) must be two numbers"),
        ({"schedule": "cosine"}, "schedule 'cosine' is not supported. Supported values: 'constant', 'one_cycle'"),
        ({"batch_norm_images": -1}, "batch_norm_images -1 must be a positive integer"),
        ({"ema_decay": 1.0}, "ema_decay 1.0 must be a number from 0, for no average, up to, not including, 1"),
        ({"ema_decay": -0.5}, "ema_decay -0.5 must be a number from 0"),
        ({"ema_decay": float("nan")}, "ema_decay nan must be a number from 0"),
        ({"ema_decay": 0.9, "batch_norm_images": 0}, "ema_decay 0.9 with batch_norm_images 0: .* such as 256"),
        ({"image_size": 16}, "images of 16x16 pixels are too small"),
        (
            {"image_size": 64.0},
            "image_size 64.0 must be one number of pixels, or height and width, each an integer",
        ),
        ({"image_size": "64"}, "image_size '64' must be one number of pixels"),
        ({"image_size": (64, 64.0)}, r"image_size \(64, 64.0\) must be one number of pixels"),
        ({"image_size": True}, "image_size True must be one number of pixels"),
        ({"image_size": (64, 0)}, r"image_size \(64, 0\) must be one number of pixels, or height and width"),
        ({"pre_processor": False}, "image_size and pre_processor exclude each other"),
    ],
)
def test_illegal_arguments_of_all_say_what_is_legal(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        build(kind, None, **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Afkd, {"fusion": "mean"}, "fusion 'mean' is not supported. Supported values: 'learned', 'equal'"),
        (Dtgd, {"embedding_blocks": 1.5}, "embedding_blocks 1.5 must be 1 or larger"),
        (Afkd, {"embedding_blocks": 0}, "embedding_blocks 0 must be 1 or larger"),
        (Dtgd, {"embedding_blocks": 0}, "embedding_blocks 0 must be 1 or larger"),
        (Dtgd, {"margin": 1.0}, "margin 1.0 must be a cosine from -1 up to, not including, 1"),
        (Dtgd, {"margin": float("nan")}, "margin nan must be a cosine"),
        (Dtgd, {"dissimilarity_weight": -0.1}, "dissimilarity_weight -0.1 must be a finite number, 0 or larger"),
        (Dtgd, {"defect_probability": 0.0}, "defect_probability 0.0 must be larger than 0, and 1 at most"),
        (Tad, {"defect_probability": 2.0}, "defect_probability 2.0 must be larger than 0, and 1 at most"),
        (Tad, {"entropy_weight": -1.0}, "entropy_weight -1.0 must be a finite number, 0 or larger"),
        (Tad, {"inverse_weight": float("inf")}, "inverse_weight inf must be a finite number"),
        (Tad, {"assistant_share": 0.0}, "assistant_share 0.0 must be a share of the steps larger than 0 and smaller"),
        (Tad, {"assistant_share": 1.0}, "assistant_share 1.0 must be a share"),
        (Tad, {"guidance": "none"}, "guidance 'none' is not supported. Supported values: 'learned', 'equal'"),
        (Tad, {"assistant": TEACHER}, "has the teacher's architecture, and would teach nothing else. Give a backbone"),
        (Tad, {"assistant": "efficientnet_light"}, "assistant 'efficientnet_light' is not a timm model. Did you mean"),
        (Tad, {"assistant_layers": [1, 2]}, r"assistant_layers \[1, 2\] must be as many as the teacher's layers, 3"),
        (Tad, {"assistant_layers": []}, r"assistant_layers \[\] must be as many as the teacher's layers, 3"),
        (Tad, {"assistant_layers": [1, 2, 9]}, rf"layers \[1, 2, 9\] do not fit assistant '{ASSISTANT}'"),
        (
            Tad,
            {"assistant": "test_vit3", "assistant_layers": [0, 1, 2]},
            r"64x64 pixels: the assistant 'test_vit3' supports only \(160, 160\)",
        ),
    ],
)
def test_illegal_arguments_of_one_say_what_is_legal(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        build(kind, None, **arguments)


# --- hard mining -------------------------------------------------------------------------------------------------


def gradient_norm(loss: torch.Tensor, model: AnomalibModule) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm())


@pytest.mark.parametrize(("kind", "step"), [(Afkd, 1), (Dskd, 1), (Dtgd, 1), (Tad, 1), (Tad, 4)])
def test_hard_mining_keeps_the_losses_and_reduces_their_gradients(kind, step, teacher_weights):
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = ImageBatch(image=2 * pixels - 1, image_path=[f"good/{index}.png" for index in range(4)])
    plain, mined = (at_step(build(kind, teacher_weights, hard_mining=share), step) for share in (0.0, 0.9))
    losses, same = plain.compute_losses(batch), mined.compute_losses(batch)
    assert {name: loss.item() for name, loss in losses.items()} == {name: loss.item() for name, loss in same.items()}
    for name, loss in losses.items():
        full, reduced = gradient_norm(loss, plain), gradient_norm(same[name], mined)
        if name in {"dissimilarity", "entropy"}:  # which compare no student with a teacher to imitate
            assert reduced == pytest.approx(full)
        else:
            assert 0.1 * full < reduced < 0.7 * full, name


def test_the_mined_share_increases_over_the_first_tenth_of_the_planned_steps(teacher_weights):
    shares = []
    for step in (0, 1, 5, 9):
        model = at_step(build(Dskd, teacher_weights, hard_mining=0.8), step)
        model.planned_steps = 50
        shares.append(model.mined_share)
    assert shares == pytest.approx([0.0, 0.16, 0.8, 0.8])
    assert build(Dskd, teacher_weights, hard_mining=0.8).mined_share == 0.8  # without a Trainer


def test_each_phase_of_tad_has_an_increase_of_its_own(teacher_weights):
    shares = []
    for step in (0, 1, 30, 33, 37):
        model = at_step(build(Tad, teacher_weights, hard_mining=0.8), step)
        model.planned_steps = 100  # 30 of the assistant
        shares.append(model.mined_share)
    assert shares == pytest.approx([0.0, 0.8 / 3, 0.0, 0.8 * 3 / 7, 0.8])


def test_a_resumed_training_mines_as_one_that_was_never_interrupted(
    magnetic_tile_root, teacher_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(discrepancy, "MINING_RAMP", 1.0)

    def build_mining(share: float) -> AnomalibModule:
        return build(Dskd, teacher_weights, encoder="teacher", embedding_input="normalized", hard_mining=share)

    whole = fit(build_mining(0.8), magnetic_tile_root, tmp_path / "whole", max_epochs=4)
    assert whole.planned_steps == 8
    with pytest.raises(InterruptedError):
        fit(build_mining(0.8), magnetic_tile_root, tmp_path / "part", max_epochs=4, callbacks=[StopInThirdEpoch()])
    (checkpoint,) = (tmp_path / "part").rglob("v0/**/model.ckpt")
    resumed = fit(build_mining(0.8), magnetic_tile_root, tmp_path / "on", max_epochs=4, checkpoint=checkpoint)
    assert resumed.global_step == 8
    assert not differing(whole.model.state_dict(), resumed.model.state_dict())
    for share in (0.0, 0.5):
        with pytest.raises(ArgumentError, match=f"hard_mining: checkpoint has 0.8, model has {share}"):
            fit(build_mining(share), magnetic_tile_root, tmp_path / "other", max_epochs=4, checkpoint=checkpoint)


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_training_of_a_version_without_mining_is_not_resumed_with_it(
    schedule, magnetic_tile_root, teacher_weights, tmp_path
):
    fit(build(Dskd, teacher_weights, schedule=schedule), magnetic_tile_root, tmp_path / "old")
    checkpoint = next((tmp_path / "old").rglob("model.ckpt"))
    contents = torch.load(checkpoint, weights_only=False)
    del contents["hyper_parameters"]["hard_mining"]
    torch.save(contents, checkpoint)
    mining = build(Dskd, teacher_weights, schedule=schedule, hard_mining=0.7)
    with pytest.raises(ArgumentError, match="hard_mining: checkpoint has 0.0, model has 0.7"):
        fit(mining, magnetic_tile_root, tmp_path / "new", checkpoint=checkpoint)


def test_mining_needs_an_end_of_training(magnetic_tile_root, teacher_weights, tmp_path):
    model = build(Dskd, teacher_weights, hard_mining=0.7)
    with pytest.raises(ArgumentError, match="no end, which its .* or hard mining depend on: give"):
        fit(model, magnetic_tile_root, tmp_path, max_epochs=-1, max_time={"seconds": 1})
