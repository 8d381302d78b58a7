"""Checkpoints that the engine's tests share."""

from pathlib import Path

import pytest

from tests.engine.checkpoints import write_text_checkpoint, write_vl_checkpoint


@pytest.fixture(scope="session")
def vl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vl_checkpoint(tmp_path_factory.mktemp("vl"), tie=True, seed=7)


@pytest.fixture(scope="session")
def vl_untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vl_checkpoint(tmp_path_factory.mktemp("vl-untied"), tie=False, seed=8)


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("text"), tie=False, seed=9)


@pytest.fixture(scope="session")
def text_tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("text-tied"), tie=True, seed=10)
