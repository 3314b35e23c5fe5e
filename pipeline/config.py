"""The typed configuration: one value, one name, one owner.

A run is described by one YAML file plus `section.key=value` overrides. Everything is checked here, before torch or Ray
is imported; what the resolved file says is what is saved with the run, logged to MLflow and read back on resume.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.search_space import Search
from pipeline.section import Positive, Section, Share
from pipeline.tracking_tags import check_tags
from pipeline.tracking_uri import check_tracking_uri

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = REPOSITORY / "configs" / "quickstart.yaml"

RopeMethod = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]


class ConfigError(ValueError):
    """A user's mistake: its message is one line that names the key, the value and what would be legal."""


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the run under `run.storage`, and name of its MLflow run. The same name resumes the same run."""
    storage: str = "~/longlora"
    """Local folder (shared by all nodes if there are several) or object-store URI (`s3://…`, `gs://…`)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of the data, and random initialisation."""
    deterministic: bool = False
    """Ask torch for deterministic kernels: bitwise equal repeats on one GPU type, at some cost in speed."""
    allow_config_change: list[str] = []
    """Keys whose change a resumed run accepts, e.g. `[optimization.steps]`."""


class Model(Section):
    base: str | None = None
    """Hugging Face folder or hub name of the base model. Exactly one of `base` and `architecture`."""
    architecture: dict[str, Any] | None = None
    """A transformers config (with `model_type`) to initialise at random, for pre-training."""
    revision: str | None = None
    """Commit or tag of `base` on the hub."""
    tokenizer: str | None = None
    """Hugging Face folder or hub name; `base` if not given."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; masters and moments of what is trained are fp32 anyway."""
    sliding_window: Literal["model"] | None = "model"
    """`model` keeps the base model's window; null removes it (needed where it is shorter than `context.length`)."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: a third more time, memory of one layer instead of all."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if (self.base is None) == (self.architecture is None):
            raise ValueError("set exactly one of model.base (a model to extend) and model.architecture (a random one)")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("model.tokenizer is missing: model.architecture brings no tokenizer")
        return self

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.base or ""


class Context(Section):
    length: Annotated[int, Field(ge=2)]
    """The new context in tokens: sequence length of training and `max_position_embeddings` of what is exported."""
    native_length: Positive | None = None
    """Tokens that `model.base` reads, if not `max_position_embeddings`: some linear-scaled models keep the old one."""
    rope: RopeMethod = "linear"
    """How rotary positions are stretched to `length`: linear is the paper's position interpolation."""


class Attention(Section):
    group_size: Positive | None
    """G of S²-Attn in tokens, even; the paper takes a quarter of `context.length`. null is full attention."""
    full_last: Share = 0.0
    """Share of the last steps that train with full attention; a small model drifts from dense attention without it."""
    backend: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    """Attention operator of S²-Attn; `auto` takes the fastest that the machine has."""

    @model_validator(mode="after")
    def even_group(self) -> Self:
        if self.group_size is not None and self.group_size % 2:
            raise ValueError(
                f"attention.group_size is {self.group_size}: it must be even, since half a group is shifted"
            )
        return self


class Adapter(Section):
    kind: Literal["lora", "full"] = "lora"
    """`lora` trains adapters (and embeddings and norms, below); `full` trains every weight."""
    rank: Positive = 8
    """Rank r of the LoRA matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """LoRA scale: the update is multiplied by alpha ÷ rank (alpha ÷ √rank with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the A matrices, seeded by `run.seed` and the sequence's position in the run."""
    targets: list[str] | Literal["auto"] = "auto"
    """Names of the linear layers that get LoRA; `auto` finds the attention projections."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024)."""
    train_embeddings: bool = True
    """Train the input embeddings too: at long contexts this does most of the work (LongLoRA, table 2)."""
    train_norms: bool = True
    """Train the normalisation weights too (LongLoRA, table 2)."""
    lora_b_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the B matrices over that of the A matrices (Hayou et al. 2024)."""


class Data(Section):
    train: Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs (.txt .md .jsonl .jsonl.gz .jsonl.zst .parquet) of the documents to train on."""
    validation: list[str] = []
    """The same for held-out documents."""
    text_column: str = "text"
    """Column or JSON key that holds the text, in tables and JSON lines."""
    unit_mb: Positive = 64
    """Size of the unit of work of tokenising and packing, in MB of source; part of the packs' fingerprint."""


class Optimization(Section):
    steps: Positive
    """Optimizer steps of the whole run."""
    global_batch: Positive
    """Sequences of `context.length` tokens in a step, whatever the number of workers."""
    micro_batch: Positive = 1
    """Sequences that go through the model at once on one worker."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up; cosine and linear end at `final_lr_ratio`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_ratio: Share = 0.0
    """Last learning rate of cosine and linear over the peak."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices; norms and embeddings are never decayed."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""

    @model_validator(mode="after")
    def warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"optimization.warmup_steps is {self.warmup_steps}: it must be below optimization.steps ({self.steps})"
            )
        return self


class Workers(Section):
    min: Positive = 1
    """Training starts, and goes on, with at least this many workers."""
    max: Positive = 1
    """It grows to this many as nodes come; equal to `min` for a fixed number."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of a worker; also its number of torch threads."""
    gpus: Annotated[int, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """GPUs of a worker; `auto` takes one where the cluster has any."""
    resources: dict[str, float] = {}
    """Further Ray resources of a worker, by name."""
    zero_stage: Literal[2, 3] = 2
    """DeepSpeed ZeRO: 2 shards gradients and optimizer state, 3 the model too (for bases larger than one GPU)."""
    max_failures: Annotated[int, Field(ge=-1)] = 10
    """Failures without notice after which the run gives up; preemptions do not count. -1 never gives up."""
    resize_interval_s: Annotated[float, Field(gt=0)] = 60
    """How often an elastic run looks for more nodes, in seconds."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 120
    """A worker that gives no sign of life for so long, in seconds, counts as lost."""

    @model_validator(mode="after")
    def range_is_one(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers.min is {self.min}: it must not exceed workers.max ({self.max})")
        return self

    @property
    def elastic(self) -> bool:
        return self.min < self.max


class Checkpoint(Section):
    every_steps: Positive = 50
    """Steps between checkpoints; the last step always has one."""
    keep_last: Positive = 3
    """Newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints with the lowest `eval/loss` that are kept beside them."""


class Evaluation(Section):
    every_steps: Positive | None = None
    """Steps between validation losses while training (needs `data.validation`); null measures none."""
    rows: Positive = 8
    """Held-out sequences of that validation loss."""
    lengths: list[Annotated[int, Field(ge=2)]] = []
    """Context lengths of the perplexity table; by default the base model's, doubled up to `context.length`."""
    tokens: Positive = 65536
    """Held-out tokens that each length's perplexity is measured over, at most."""
    context_blocks: Annotated[int, Field(ge=0)] = 0
    """Blocks of 256 tokens on which losses with more and less context are compared; 0 leaves the test out."""


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking server; null keeps runs in `<run.storage>/mlflow.db`. Credentials come from the environment."""
    experiment: str = "longlora"
    """MLflow experiment."""
    tags: dict[str, str] = {}
    """Tags of the MLflow run, by which it is found and compared."""

    @model_validator(mode="after")
    def usable(self) -> Self:
        check_tags(self.tags)
        if self.uri is not None:
            check_tracking_uri(self.uri)
        return self


class Config(Section):
    """All sections; a YAML file gives those that differ from the defaults."""

    run: Run
    model: Model
    context: Context
    attention: Attention
    adapter: Adapter = Adapter()
    data: Data
    optimization: Optimization
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    search: Search = Search()

    @model_validator(mode="after")
    def no_secrets(self) -> Self:
        """What a config says is saved with the run and shown in MLflow."""
        for key in ("run.storage", "data.train", "data.validation", "tracking.tags"):
            if SECRET.search(str(self.flat()[key])):
                raise ValueError(
                    f"{key} has credentials in a URI: put them into the environment (AWS_ACCESS_KEY_ID, …)"
                )
        return self

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        if self.evaluation.every_steps is not None and not self.data.validation:
            raise ValueError(
                "evaluation.every_steps needs data.validation: name the held-out documents, or set it to null"
            )
        if self.adapter.dropout and self.optimization.micro_batch > 1:
            raise ValueError(
                f"adapter.dropout {self.adapter.dropout} needs optimization.micro_batch 1: rows of one micro-batch "
                "would drop out differently at another number of workers"
            )
        too_long = [n for n in self.evaluation.lengths if n > self.context.length]
        if too_long:
            raise ValueError(f"evaluation.lengths has {too_long[0]}: at most context.length ({self.context.length})")
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted keys and JSON values, in the order of the file: what MLflow gets as params."""
        sections = self.model_dump(mode="json", exclude=None if self.search.space else {"search"})
        return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result of a training step, by dotted key: a run is resumed with the same.

        Paths are left out: the packs' and the base weights' fingerprints say what they lead to, on any machine.
        """
        return {
            key: value
            for key, value in self.flat().items()
            if (key.split(".")[0] in DECISIVE_SECTIONS or key == "run.seed") and key not in PATHS
        }

    def training_hash(self) -> str:
        """Hash of the decisive settings."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


SECRET = re.compile(r"://[^/@\s]*:(?!\d+/)[^@\s]*@")  # s3://key:secret@bucket; a secret may hold slashes
DECISIVE_SECTIONS = {"model", "context", "attention", "adapter", "optimization"}
PATHS = {"model.base", "model.tokenizer", "model.revision"}


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The config of a YAML file with `section.key=value` overrides applied, checked.

    Raises ConfigError, one line, for a missing file, broken YAML, an unknown key or an illegal value.
    """
    values = _read_yaml(Path(path) if path is not None else DEFAULT_CONFIG)
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values)


def local_path(text: str) -> str:
    """A path of a config, made absolute: paths that are not absolute are relative to the repository.

    What does not exist there is returned as it is (a hub name, a URI, or a mistake that its reader reports).
    """
    beside = REPOSITORY / text
    return str(beside) if "://" not in text and (beside.exists() or any(c in text for c in "*?[")) else text


def parse_config(values: dict[str, Any]) -> Config:
    """The checked config of nested values (see `load_config`)."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors (`configs/schema.json`)."""
    return Config.model_json_schema()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a YAML file, e.g. {DEFAULT_CONFIG.name}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected sections such as `run:` and `model:`, found {type(values).__name__}"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override!r}: overrides have the form section.key=value, e.g. run.name=my-run")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not a valid YAML value") from None
    target = values.setdefault(section, {})
    for part in name.split(".")[:-1]:
        target = target.setdefault(part, {})
    target[name.split(".")[-1]] = value


def _known_keys() -> list[str]:
    keys = []
    for section, field in Config.model_fields.items():
        fields = field.annotation.model_fields if field.annotation in Section.__subclasses__() else {}
        keys += [section, *(f"{section}.{key}" for key in fields)]
    return keys


def _one_line(error: ValidationError) -> str:
    """The first of pydantic's findings as `key = value: what would be legal`, and how many follow it."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _known_parts())
    if first["type"] == "extra_forbidden":
        key = ".".join(map(str, first["loc"]))
        near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
        text = f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "missing":
        text = f"{key} is missing: it has no default"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        text = f"{key} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    more = len({e["loc"][:2] for e in error.errors()}) - 1
    return text + (f" (and {more} more)" if more else "")


def _known_parts() -> set[str]:
    nested = {name for section in Section.__subclasses__() for name in section.model_fields}
    return {part for key in _known_keys() for part in key.split(".")} | nested
