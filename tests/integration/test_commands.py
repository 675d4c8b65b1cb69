"""anomalib's commands as a user types them, in processes of their own, on small real data."""

import sys
from pathlib import Path

import pytest
import skimage.data
from anomalib.cli.cli import AnomalibCLI
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_dskd import Afkd, Dskd, Dtgd, Tad, TextureDefects
from anomalib_dskd.errors import DskdError
from anomalib_dskd.models.distillation.resuming import canonical_value, constructor_defaults
from tests.commands import QUIET
from tests.commands import run as anomalib
from tests.conftest import ASSISTANT, TEACHER

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def model_arguments(teacher_weights: Path) -> list[str]:
    arguments = {"teacher": TEACHER, "teacher_weights": teacher_weights, "image_size": 64, "sigma": 2}
    named = [part for name, value in arguments.items() for part in (f"--model.{name}", str(value))]
    return ["--model", "anomalib_dskd.Dskd", *named]


@pytest.fixture(scope="module")
def run(model_arguments: list[str], magnetic_tile_root: Path, tmp_path_factory) -> tuple[Path, str]:
    """The folder in which a model was trained, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", magnetic_tile_root]
    output = anomalib("train", *model_arguments, *data, "--trainer.max_epochs", "1", *QUIET, folder=folder)
    return folder, output


@pytest.fixture(scope="module")
def checkpoint(run: tuple[Path, str]) -> Path:
    return next(run[0].rglob("model.ckpt"))


def test_train_prints_the_metrics_and_leaves_pictures(run):
    folder, output = run
    assert all(figure in output for figure in ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO"))
    pictures = list((folder / "results").rglob("images/**/*.jpg"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert picture.width > 3 * picture.height  # image, mask, heatmap, outline side by side


def test_train_prints_no_message_twice_and_none_that_is_not_for_users(run):
    """What anomalib prints before it builds the model is not this package's to leave out."""
    _, output = run
    assert "Scores: " in output  # the messages that are for users are there
    for noise in ("Initializing", "Loading the callbacks", "Training took", "litlogger", "in eval mode at", "treespec"):
        assert noise not in output
    assert "will override existing callbacks" not in output


def call_it_something_else() -> None:
    sys.argv[0] = "other"


def test_lightning_still_prints_what_the_command_leaves_out(model_arguments, magnetic_tile_root, tmp_path):
    """If this fails, an entry of ``anomalib_dskd.models.distillation.command`` may no longer be needed."""
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", magnetic_tile_root]
    command = ["train", *model_arguments, *data, "--trainer.max_epochs", "1", *QUIET]
    output = anomalib(*command, folder=tmp_path, prepare=call_it_something_else)
    expected = ("Initializing", "Loading the callbacks", "Training took", "litlogger", "in eval mode at")
    missing = [noise for noise in (*expected, "will override existing callbacks", "LeafSpec") if noise not in output]
    assert not missing
    assert output.count("Initializing") == 2


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(skimage.data.brick()[:200, 100 * index :][:, :150]).save(folder / f"{index}.png")
    return folder


def scores(folder: Path) -> dict[str, float]:
    (file,) = folder.rglob("predictions.csv")
    lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
    return {Path(name).name: float(score) for name, score, *_ in lines}


def test_a_checkpoint_or_its_configuration_is_enough(checkpoint, run, pictures, tmp_path):
    config = next(run[0].rglob("config.yaml"))
    before = config.read_text()
    results = {}
    for name, model in (("alone", ["--model", "anomalib_dskd.Dskd"]), ("config", ["--config", config])):
        folder = tmp_path / name
        folder.mkdir()
        output = anomalib("predict", *model, "--ckpt_path", checkpoint, "--data", pictures, *QUIET, folder=folder)
        assert all(f"{index}.png" in output for index in range(3))
        results[name] = scores(folder)
    loaded = Dskd.load_from_checkpoint(checkpoint).eval()
    expected = {
        path.name: loaded(read_image(path, as_tensor=True)[None]).pred_score.item() for path in pictures.iterdir()
    }
    assert results["alone"] == results["config"] == pytest.approx(expected, abs=1e-5)
    anomalib("test", "--config", config, "--ckpt_path", checkpoint, *QUIET, folder=run[0])
    assert config.read_text() == before


def test_a_given_argument_that_differs_is_refused_even_if_it_is_the_default(checkpoint, pictures, tmp_path):
    model = ["--model", "anomalib_dskd.Dskd", "--model.sigma", "4"]
    output = anomalib(
        "predict", *model, "--ckpt_path", checkpoint, "--data", pictures, *QUIET, folder=tmp_path, fails=True
    )
    assert "other arguments: sigma: checkpoint has 2.0, model has 4.0" in " ".join(output.split())


def test_predict_needs_neither_weights_file_nor_network(checkpoint, tmp_path):
    for index in range(3):
        Image.fromarray(skimage.data.brick()[:200, 100 * index :][:, :150]).save(tmp_path / f"{index}.png")
    model = ["--model", "anomalib_dskd.Dskd", "--model.teacher", TEACHER, "--model.image_size", "64"]
    anomalib(
        "predict", *model, "--model.sigma", "2", "--data", tmp_path, "--ckpt_path", checkpoint, *QUIET, folder=tmp_path
    )
    assert len(list((tmp_path / "results").rglob("images/**/*.png"))) == 3


def test_export_to_openvino(checkpoint, model_arguments, tmp_path):
    anomalib("export", *model_arguments, "--export_type", "openvino", "--ckpt_path", checkpoint, folder=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.xml")] == ["model.xml"]


@pytest.mark.slow
@pytest.mark.parametrize(("export_type", "name"), [("torch", "model.pt"), ("onnx", "model.onnx")])
def test_export_to_other_types(export_type, name, checkpoint, model_arguments, tmp_path):
    anomalib("export", *model_arguments, "--export_type", export_type, "--ckpt_path", checkpoint, folder=tmp_path)
    assert list(tmp_path.rglob(name))


def test_anomalibs_own_data_module_trains_too(model_arguments, tmp_path):
    TextureDefects(tmp_path / "data", train_images=4, test_images=6).prepare_data()
    data = [
        "--data",
        "MVTecAD",
        "--data.root",
        tmp_path / "data",
        "--data.category",
        "brick",
        "--data.num_workers",
        "0",
    ]
    output = anomalib("train", *model_arguments, *data, "--trainer.max_epochs", "1", *QUIET, folder=tmp_path)
    assert "pixel_AUPRO" in output


def test_quick_start_runs_offline_with_the_lite_teacher(tmp_path):
    short = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--data.train_images", "16"]
    short += ["--data.test_images", "6"]
    output = anomalib("train", "--config", CONFIGS / "quickstart.yaml", *short, *QUIET, folder=tmp_path)
    assert "pixel_AUPRO" in output
    assert (tmp_path / "datasets" / "TextureDefects" / "brick" / "ground_truth").is_dir()
    assert list((tmp_path / "results").rglob("images/**/*.png"))


@pytest.mark.parametrize(
    ("config", "size"),
    [("quickstart", 128), ("magnetic_tile", 128), ("mvtec_ad", 256), ("mvtec_3d_ad", 256)],
)
def test_every_config_builds_its_model_and_data(config, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = AnomalibCLI(args=["train", "--config", str(CONFIGS / f"{config}.yaml")], run=False)
    assert isinstance(cli.model, Dskd)
    assert tuple(cli.model.input_size) == (size, size)
    if config != "quickstart":  # the paper's settings, section 4.1.2
        adam = cli.model.configure_optimizers().param_groups[0]
        assert (adam["lr"], adam["betas"]) == (1e-3, (0.5, 0.999))
        assert (cli.datamodule.train_batch_size, cli.config.train.trainer.max_epochs) == (16, 200)


@pytest.mark.parametrize("kind", [Afkd, Dskd, Dtgd, Tad], ids=lambda kind: kind.__name__)
def test_every_models_config_builds_it_with_any_data(kind, magnetic_tile_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CONFIGS / "model" / f"{kind.__name__.lower()}.yaml"
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]
    cli = AnomalibCLI(args=["train", "--config", str(config), *data, "--model.image_size", "128"], run=False)
    assert type(cli.model) is kind
    assert tuple(cli.model.input_size) == (128, 128)
    built = dict(cli.model.hparams)  # what the file says is what the constructor would take anyway
    defaults = constructor_defaults(kind)
    given = set(built) & set(defaults)
    assert {"teacher", "sigma", "learning_rate"} <= given
    differ = {name for name in given if canonical_value(kind, name, built) != canonical_value(kind, name, defaults)}
    assert differ == {"image_size", "seed"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Afkd, Dtgd, Tad], ids=lambda kind: kind.__name__)
def test_siblings_are_trained_tested_predicted_with_and_exported(kind, model_arguments, magnetic_tile_root, tmp_path):
    more = ["--model.assistant", ASSISTANT] if kind is Tad else []
    model = ["--model", f"anomalib_dskd.{kind.__name__}", *model_arguments[2:], *more]
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", magnetic_tile_root]
    trained = anomalib("train", *model, *data, "--trainer.max_epochs", "2", *QUIET, folder=tmp_path)
    checkpoint = ["--ckpt_path", next(tmp_path.rglob("model.ckpt"))]
    tested = anomalib("test", *model, *data, *checkpoint, *QUIET, folder=tmp_path)
    assert all("pixel_AUPRO" in output for output in (trained, tested))
    pictures = ["--data", magnetic_tile_root / "MT_Crack" / "Imgs" / "exp1_num_0.jpg"]
    anomalib("predict", *model, *pictures, *checkpoint, *QUIET, folder=tmp_path)
    anomalib("export", *model, "--export_type", "openvino", *checkpoint, folder=tmp_path)
    assert len(list(tmp_path.rglob("model.xml"))) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data.root", "nowhere"], "data root 'nowhere' does not exist"),
        (["--model.teacher", "resnet19"], "teacher 'resnet19' is not a timm model"),
        (["--model.teacher_weights", "none.safetensors"], "teacher_weights 'none.safetensors' does not exist"),
    ],
)
def test_bad_input_ends_in_an_error_that_says_what_is_wrong(
    extra, message, model_arguments, magnetic_tile_root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "anomalib_dskd.MagneticTile", "--data.root", str(magnetic_tile_root)]
    # jsonargparse passes an error of a constructor on as a ValueError that quotes it
    with pytest.raises((DskdError, ValueError), match=message):
        AnomalibCLI(args=["train", *model_arguments, *data, *extra, "--trainer.max_epochs", "1", *QUIET])


def test_predict_before_training_exits_with_an_error(model_arguments, tmp_path):
    Image.fromarray(skimage.data.brick()).save(tmp_path / "part.png")
    output = anomalib("predict", *model_arguments, "--data", tmp_path, *QUIET, folder=tmp_path, fails=True)
    assert "NotTrainedError: cannot predict" in output
