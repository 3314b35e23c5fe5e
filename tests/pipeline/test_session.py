import os
import tempfile
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.session import private_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_private_folder_is_closed_to_others_even_if_it_was_open(temporary: Path) -> None:
    folder = private_folder()
    assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: me)
    (temporary / f"longlora-{me}").mkdir()
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_folder()
