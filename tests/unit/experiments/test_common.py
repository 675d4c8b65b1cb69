import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("common")


def test_a_parser_has_the_chosen_options_and_replaced_defaults(common: ModuleType):
    parser = common.option_parser("what it does", "--root", "--size", "--rounds", size=256)
    assert vars(parser.parse_args(["--root", "data"])) == {"root": Path("data"), "size": 256, "rounds": 10}
    assert parser.parse_args(["--root", "data", "--size", "64"]).size == 64


def test_a_table_is_markdown(common: ModuleType, capsys: pytest.CaptureFixture[str]):
    common.print_header("model", "image AUROC", "AUPRO")
    common.print_row("DSKD", common.percent(0.9512, digits=2), common.percent(None))
    assert capsys.readouterr().out == "| model | image AUROC | AUPRO |\n|---|---|---|\n| DSKD | 95.12 | n/a |\n"
