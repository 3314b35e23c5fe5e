from typing import Any

import pytest

from pipeline.config import Config, ConfigError, parse_config
from pipeline.tracking_tags import tags_of


def config(tags: dict[str, str], **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "a"},
        "model": {"base": "m"},
        "context": {"length": 64},
        "attention": {"group_size": 16},
        "data": {"train": ["x"]},
        "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        "tracking": {"tags": tags},
    }
    return parse_config(values | sections)


def test_every_run_has_these_and_the_configs_own_come_first() -> None:
    version = tags_of(config({})).pop("longlora.version")
    assert tags_of(config({"team": "long", "longlora.rank": "eight"})) == {
        "longlora.version": version,
        "longlora.context_length": "64",
        "longlora.group_size": "16",
        "longlora.rank": "eight",
        "team": "long",
    }


def test_what_a_run_does_not_have_is_not_said() -> None:
    tags = tags_of(config({}, attention={"group_size": None}, adapter={"kind": "full"}))
    assert tags["longlora.group_size"] == "full" and "longlora.rank" not in tags


def test_a_long_value_is_cut() -> None:
    assert len(tags_of(config({"note": "x" * 9000}))["note"]) == 5000


@pytest.mark.parametrize("key", ["mlflow.parentRunId", "longlora.run", "a,b", "", "/a", "a/../b", ".", "x" * 251])
def test_a_key_that_cannot_be_is_refused_in_one_line(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^tracking.tags has ") as caught:
        config({key: "value"})
    assert "\n" not in str(caught.value)


def test_credentials_in_a_tag_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^tracking.tags has credentials") as caught:
        config({"source": "s3://key:hunter2@bucket/data"})
    assert "hunter2" not in str(caught.value)
