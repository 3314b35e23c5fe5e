"""Tags of the MLflow run: which a config may set, and those that every run has. Imports no MLflow."""

import posixpath
import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it checks its tags here
    from pipeline.config import Config

KEY_TAG = "longlora.run"
"""Tag with the key that `run.json` gives a run before the server has heard of it, by which it is found again."""
KEY_LIMIT = 250  # characters
VALUE_LIMIT = 5000  # characters, of the strictest server; MLflow's own takes 8000
LEGAL = re.compile(r"[\w./: -]+")


def check_tags(tags: dict[str, str]) -> None:
    """ValueError, one line, for a key that is not the user's to set, or that MLflow does not take."""
    for key in tags:
        if key.startswith("mlflow.") or key == KEY_TAG:
            raise ValueError(
                f"tracking.tags has {key!r}: MLflow's own tags (mlflow.…) and {KEY_TAG} are set by the run itself; "
                "name it otherwise"
            )
        path = posixpath.normpath(key)
        if len(key) > KEY_LIMIT or not LEGAL.fullmatch(key) or path != key or path[0] in "/.":
            raise ValueError(
                f"tracking.tags has {key[:KEY_LIMIT]!r}: MLflow takes letters, digits, and _ - . / : or spaces between "
                f"them, {KEY_LIMIT} characters at most"
            )


def tags_of(config: "Config") -> dict[str, str]:
    """The tags that a run is compared by, and `tracking.tags`, which may say otherwise; values as long as MLflow takes.

    `longlora.rank` is missing where there are no adapters; `longlora.group_size` is `full` for full attention.
    """
    from pipeline.config import REPOSITORY

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tags = {
        "longlora.version": project["version"],
        "longlora.context_length": str(config.context.length),
        "longlora.group_size": str(config.attention.group_size or "full"),
    }
    if config.adapter.kind == "lora":
        tags["longlora.rank"] = str(config.adapter.rank)
    return {key: value[:VALUE_LIMIT] for key, value in (tags | config.tracking.tags).items()}
