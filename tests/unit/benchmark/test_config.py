import dataclasses
import pickle
from pathlib import Path

import pytest
import yaml

from anomalib_dskd.benchmark.build_job import check_job
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, Measurements, ModelSpec, expand
from anomalib_dskd.cli import _parsers
from anomalib_dskd.errors import ArgumentError

CONFIGS = Path(__file__).parents[3] / "configs" / "benchmark"

TILES = DatasetSpec({"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": "tiles"}}, image_size=128)
MVTEC = DatasetSpec({"class_path": "anomalib.data.MVTecAD"}, categories=["screw", "wood"])
PARTS = DatasetSpec({"class_path": "anomalib.data.Folder", "init_args": {"name": "parts", "normal_dir": "good"}})
DSKD = ModelSpec({"class_path": "anomalib_dskd.Dskd"}, name="DSKD")
STFPM = ModelSpec({"class_path": "anomalib.models.Stfpm"})
PADIM = ModelSpec({"class_path": "anomalib.models.Padim"}, epochs=7)


def config(**changes) -> BenchmarkConfig:
    return BenchmarkConfig(**{"models": [DSKD, STFPM, PADIM], "datasets": [TILES, MVTEC], "seeds": [0, 1], **changes})


def test_jobs_are_all_combinations_with_seeds_outermost():
    jobs = expand(config())
    assert len(jobs) == 3 * (1 + 2) * 2
    assert [(job.model, job.data, job.category, job.seed) for job in jobs[:4]] == [
        ("DSKD", "MagneticTile", None, 0),
        ("Stfpm", "MagneticTile", None, 0),
        ("Padim", "MagneticTile", None, 0),
        ("DSKD", "MVTecAD", "screw", 0),
    ]
    assert {job.seed for job in jobs[:9]} == {0}
    assert [job.image_size for job in jobs[2:4]] == [(128, 128), (256, 256)]
    assert jobs[0].data_init_args == {"root": "tiles"}


def test_a_model_with_its_own_seeds_is_trained_once_for_each_of_them():
    models = [dataclasses.replace(DSKD, seeds=[2, 0]), STFPM, dataclasses.replace(PADIM, seeds=[0])]
    jobs = expand(config(models=models, datasets=[TILES], seeds=[0, 1]))
    assert [(job.model, job.seed) for job in jobs] == [
        ("DSKD", 2),
        ("DSKD", 0),
        ("Stfpm", 0),
        ("Padim", 0),
        ("Stfpm", 1),
    ]


def test_data_sets_of_one_class_have_the_names_of_their_arguments():
    folders = [DatasetSpec({"class_path": "anomalib.data.Folder", "init_args": {"name": name}}) for name in "ab"]
    jobs = expand(config(models=[PADIM], datasets=[*folders, dataclasses.replace(PARTS, name="screws"), TILES]))
    assert [job.data for job in jobs[:4]] == ["a", "b", "screws", "MagneticTile"]


def test_epochs_have_a_source():
    dskd, stfpm, padim = expand(config(datasets=[TILES], seeds=[0]))
    assert (dskd.epochs, dskd.epochs_source) == (200, "the paper")
    assert stfpm.epochs == 100
    assert "anomalib's example configuration" in stfpm.epochs_source
    assert (padim.epochs, padim.epochs_source) == (None, "the model's own")
    own = dataclasses.replace(STFPM, epochs=5)
    dskd, stfpm = expand(config(models=[DSKD, own], datasets=[TILES], seeds=[0], epochs=30))
    assert [(job.epochs, job.epochs_source) for job in (dskd, stfpm)] == [
        (30, "this configuration"),
        (5, "this configuration"),
    ]


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", ["magnetic_tile", "kolektorsdd"])
def test_benchmarks_compare_the_recommended_configuration_with_the_papers(name):
    recommended = read_yaml(CONFIGS.parent / "recommended.yaml")
    arguments = recommended["model"]["init_args"]
    settings = {key: arguments[key] for key in arguments if key not in {"teacher", "image_size", "seed"}}
    described = read_yaml(CONFIGS / f"{name}.yaml")
    models = {model["name"]: model for model in described["models"]}
    assert models["DSKD (recommended)"]["model"]["init_args"] == settings
    assert models["DSKD (paper)"]["model"] == {"class_path": "anomalib_dskd.Dskd"}
    shared = {key: settings[key] for key in settings if key not in {"encoder", "embedding_input"}}  # of DSKD only
    epochs = recommended["trainer"]["max_epochs"]
    for title, model in models.items():
        if "recommended" in title:
            assert model["model"]["init_args"].items() >= shared.items()
            assert model["epochs"] == epochs


def test_the_quick_start_has_the_recommended_settings():
    recommended, quick_start = (read_yaml(CONFIGS.parent / f"{name}.yaml") for name in ("recommended", "quickstart"))
    arguments = recommended["model"]["init_args"] | {"teacher": "tf_efficientnet_lite0", "image_size": 128}
    assert quick_start["model"]["init_args"] == arguments


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_jobs_of_every_configuration_can_be_built(path):
    _, subcommands = _parsers()
    options = subcommands["benchmark"].parse_args(["--config", str(path)])
    values = vars(subcommands["benchmark"].instantiate_classes(options))
    jobs = expand(BenchmarkConfig(**{name: value for name, value in values.items() if name != "config"}))
    assert jobs
    for job in {job.model: job for job in jobs}.values():
        check_job(job)


def test_the_id_of_a_job_depends_on_all_its_values():
    job = expand(config())[0]
    assert dataclasses.replace(job).id == job.id
    assert pickle.loads(pickle.dumps(job)).id == job.id  # as it is sent to another process
    for name, value in {
        "seed": 5,
        "epochs": 3,
        "init_args": {"sigma": 2.0},
        "category": "screw",
        "image_size": (64, 64),
        "weights": [{"name": "resnet18", "file": "same.pth", "sha256": "other"}],
        "precision": "bf16-mixed",
    }.items():
        assert dataclasses.replace(job, **{name: value}).id != job.id, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"datasets": []}, "datasets is empty"),
        ({"models": [STFPM, STFPM]}, "models Stfpm given more than once. Give each entry .* same level as `model`"),
        ({"datasets": [PARTS, PARTS]}, "datasets parts given more than once. Give each entry .* same level as `data`"),
        ({"seeds": []}, r"seeds \[\] must be one or more different"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\]"),
        ({"models": [dataclasses.replace(STFPM, seeds=[])]}, r"seeds of Stfpm \[\] must be one or more different"),
        ({"models": [dataclasses.replace(STFPM, seeds=[0, -1])]}, r"seeds of Stfpm \[0, -1\] must be"),
        ({"epochs": 0}, "epochs 0 must be 1 or larger"),
        ({"image_size": -1}, "image_size -1 must be 1 or larger"),
        ({"models": [dataclasses.replace(STFPM, epochs=0)]}, "epochs of Stfpm 0 must be"),
        (
            {"models": [ModelSpec({"class_path": "mine.Model"})]},
            "model 'Model' has no default number of epochs. Give `epochs`",
        ),
        ({"models": [ModelSpec({"class": "mine.Model"})]}, "describes no class. Give `class_path`"),
        ({"models": [ModelSpec({"class_path": "Dskd"})]}, "describes no class"),
        ({"datasets": [DatasetSpec({"class_path": "a.B", "init_arg": {}})]}, "describes no class"),
        ({"datasets": [dataclasses.replace(MVTEC, categories=["wood", "wood"])]}, "categories .* must be different"),
        (
            {"models": [ModelSpec({"class_path": "a.Dskd", "init_args": {"image_size": 64}})]},
            "'Dskd' has image_size among its init_args, which must be the same .* the benchmark's `image_size`",
        ),
        (
            {"models": [ModelSpec({"class_path": "a.Dskd", "init_args": {"seed": 0, "pre_processor": False}})]},
            "'Dskd' has pre_processor and seed among its init_args, .* the benchmark's `image_size` and `seeds`",
        ),
        (
            {
                "models": [ModelSpec({"class_path": "a.Dskd", "init_args": {"teacher_weights": "mine.pth"}})],
                "weights": {"resnet18": "theirs.pth"},
            },
            "'Dskd' has teacher_weights among its init_args, .* the benchmark's `weights`",
        ),
        ({"measure": Measurements(seconds=0)}, "measure.seconds 0 must be a finite number larger than 0"),
        ({"measure": Measurements(seconds=float("inf"))}, "measure.seconds inf must be a finite"),
    ],
)
def test_faulty_configurations_are_an_error(changes, message):
    with pytest.raises(ArgumentError, match=message):
        expand(config(**changes))
