"""The launcher's YAML files, as they are and as Ray makes them complete."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

CLUSTER = Path(__file__).parent.parent.parent / "cluster"


@pytest.fixture
def launcher(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """launcher("aws-spot") is that file's content; an SSH key that it names is there."""

    def read(name: str) -> dict[str, Any]:
        config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
        if "ssh_private_key" in config["auth"]:
            key = tmp_path / "key"
            key.touch(0o600)
            config["auth"]["ssh_private_key"] = str(key)
        return config

    return read


@pytest.fixture
def autoscaling(launcher: Callable[[str], dict[str, Any]]) -> Callable[[str], AutoscalingConfig]:
    """autoscaling("aws-spot") is what the autoscaler makes of it: with Ray's defaults, validated by its schema."""
    return lambda name: AutoscalingConfig(launcher(name), skip_content_hash=True)
