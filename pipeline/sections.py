"""The sections of a config: every setting, typed and documented."""

from math import inf
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.section import Decay, Positive, Section, Share
from pipeline.tracking_tags import check_tags
from pipeline.tracking_uri import check_tracking_uri

RopeMethod = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]


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
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps of which the first worker writes a torch profiler trace into the run's folder `profile/`."""


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
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """For the backward pass: `keep` all, `recompute` each layer (a third more time), `auto` keeps what fits."""
    fused: Literal["auto", "off"] = "auto"
    """Liger's kernels and fused LoRA on a GPU: faster, and they keep less; `off` runs the model's own operators."""

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
    backend: Literal["auto", "sdpa", "varlen", "cudnn", "flash"] = "auto"
    """Attention operator of S²-Attn; `auto` times those that the machine has once, and takes the fastest."""

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
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up; cosine and linear end at `final_lr_ratio`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_ratio: Share = 0.0
    """Last learning rate of cosine and linear over the peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
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
    """Further Ray resources of a worker, by name; CPUs and GPUs have settings of their own."""
    zero_stage: Literal[2, 3] = 2
    """DeepSpeed ZeRO: 2 shards gradients and optimizer state, 3 the model too (for bases larger than one GPU)."""
    max_failures: Annotated[int, Field(ge=-1)] = 10
    """Failures without notice after which the run gives up; preemptions do not count. -1 never gives up."""
    resize_interval_s: Annotated[float, Field(gt=0)] = 60
    """How often an elastic run looks for more nodes, in seconds."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 120
    """A worker whose process gives no sign of life for so long, in seconds, counts as lost. One whose training hangs
    while its process answers is not: its peers' exchange ends after torch's half hour."""

    @field_validator("resources")
    @classmethod
    def resources_are_further(cls, resources: dict[str, float]) -> dict[str, float]:
        if taken := sorted(resources.keys() & {"CPU", "GPU"}):
            raise ValueError(f"workers.resources has {taken[0]}: set workers.{taken[0].lower()}s instead")
        for name, amount in resources.items():
            if not 0 < amount < inf:
                raise ValueError(f"workers.resources.{name} is {amount:g}: it must be a number above 0")
        return resources

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
    """MLflow tracking server; null keeps runs in `mlflow.db` in `run.storage`, or, where that is an object store, in
    ~/longlora of the driver's machine. Credentials come from the environment."""
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
