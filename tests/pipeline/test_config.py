import subprocess
import sys
from typing import Any

import pytest

from pipeline.config import REPOSITORY, Config, ConfigError, load_config, parse_config

MINIMAL: dict[str, Any] = {
    "run": {"name": "a"},
    "model": {"base": "some/model"},
    "context": {"length": 4096},
    "attention": {"group_size": 1024},
    "data": {"train": ["books"]},
    "optimization": {"steps": 40, "global_batch": 8},
}


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, name = key.split(".")
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}}


def test_a_minimal_config_has_the_papers_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.train_embeddings) == (8, 16, True)
    assert config.optimization.betas == (0.9, 0.95)
    assert config.context.rope == "linear"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.group_sze", 2, "attention.group_sze: unknown key; did you mean attention.group_size?"),
        ("attention.group_size", 7, "attention.group_size is 7: it must be even"),
        ("attention.group_size", 0, "attention.group_size = 0: "),
        ("optimization.steps", "many", "optimization.steps = 'many': "),
        ("optimization.global_batch", 0, "optimization.global_batch = 0: "),
        ("optimization.warmup_steps", 40, "optimization.warmup_steps is 40: it must be below optimization.steps (40)"),
        ("workers.min", 3, "workers.min is 3: it must not exceed workers.max (1)"),
        ("workers.gpus", 4, "workers.gpus = 4: "),
        ("workers.resources", {"GPU": 2}, "workers.resources has GPU: set workers.gpus instead"),
        ("workers.resources", {"slot": 0}, "workers.resources.slot is 0: it must be a number above 0"),
        ("optimization.betas", [0.9, 1.0], "optimization.betas.1 = 1.0: "),
        ("optimization.learning_rate", float("inf"), "optimization.learning_rate = inf: "),
        ("adapter.kind", "qlora", "adapter.kind = 'qlora': "),
        ("evaluation.lengths", [8192], "evaluation.lengths has 8192: at most context.length (4096)"),
        ("evaluation.every_steps", 5, "evaluation.every_steps needs data.validation"),
        ("model.architecture", {"model_type": "llama"}, "set exactly one of model.base"),
        ("run.name", "../up", "run.name = '../up': "),
        ("run.storage", "s3://KEY:s3/cr+t@bucket/runs", "run.storage has credentials in a URI"),
        ("data.train", ["books", "s3://KEY:secret@bucket/books"], "data.train has credentials in a URI"),
        ("data.train", ["https://secret@host/books.txt"], "data.train has credentials in a URI"),
        ("data.train", ["https://h/b.txt?X-Amz-Date=1&X-Amz-Signature=secret"], "data.train has credentials in a URI"),
        ("data.train", ["https://account/b.parquet?sv=1&sig=secret"], "data.train has credentials in a URI"),
        ("data.validation", ["https://h/b.txt?access_token=secret"], "data.validation has credentials in a URI"),
        ("tracking.experiment", "https://me:secret@host", "tracking.experiment has credentials in a URI"),
        (
            "search.space",
            {"model.base": {"choice": ["x", "s3://KEY:secret@b"]}},
            "search.space has credentials in a URI",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(with_value(key, value))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_uris_without_secrets_are_none() -> None:
    for uri in (
        "https://host/design.txt?page=2&signed=no",
        "s3://bucket/a:b@c",
        "https://host:8080/books/@new.txt",
        "gs://bucket/me@home",
    ):
        parse_config(with_value("data.train", [uri]))


def test_an_unknown_section_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="atention: unknown key; did you mean attention"):
        parse_config({**MINIMAL, "atention": {}})


def test_overrides_replace_values_and_keep_their_types(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(parse_config(MINIMAL).to_yaml())
    config = load_config(path, ["optimization.learning_rate=1e-3", "attention.group_size=null", "data.train=[x, y]"])
    assert config.optimization.learning_rate == 1e-3
    assert config.attention.group_size is None
    assert config.data.train == ["x", "y"]


@pytest.mark.parametrize("override", ["steps=3", "optimization.steps", "=3", "optimization.=3"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(REPOSITORY / "configs" / "quickstart.yaml", [override])


def test_an_override_reaches_into_an_empty_section_and_not_into_a_value(tmp_path: Any) -> None:
    written = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(line for line in written.splitlines() if "tracking" not in line) + "\ntracking:\n")
    assert load_config(path, ["tracking.experiment=mine"]).tracking.experiment == "mine"
    with pytest.raises(ConfigError, match=r"^run\.name\.x: name is a value, and has no settings of its own"):
        load_config(REPOSITORY / "configs" / "quickstart.yaml", ["run.name.x=1"])


def test_missing_and_broken_files_are_one_line(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)


def test_the_resolved_file_loads_to_the_same_config(tmp_path: Any) -> None:
    config = parse_config(MINIMAL)
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("key", "value", "decides"),
    [
        ("optimization.learning_rate", 1e-3, True),
        ("attention.group_size", 512, True),
        ("run.seed", 1, True),
        ("workers.max", 4, False),
        ("checkpoint.every_steps", 7, False),
        ("run.storage", "/elsewhere", False),
        ("model.base", "/copy/of/the/model", False),
        ("model.revision", "another", True),
    ],
)
def test_only_what_decides_a_step_is_in_the_training_hash(key: str, value: Any, decides: bool) -> None:
    changed = parse_config(with_value(key, value)).training_hash() != parse_config(MINIMAL).training_hash()
    assert changed == decides


def test_every_setting_is_documented() -> None:
    for section in Config.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {})
        assert fields and all(field.description for field in fields.values())


CHECKED_COMMAND_LINE = """
import sys
from pipeline.main import main
status = main(sys.argv[1:])
assert not {"ray", "torch"} & set(sys.modules), "started before the config was checked"
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "no-such.yaml"], "no-such.yaml"),
        (["attention.group_sze=3"], "did you mean attention.group_size?"),
        (["train", "attention.group_size=7"], "must be even"),
    ],
)
def test_the_command_line_reports_mistakes_in_one_line_before_anything_starts(
    arguments: list[str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECKED_COMMAND_LINE, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
