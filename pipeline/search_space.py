"""The section `search` of the config: which settings are tried, how, and at what expense."""

from itertools import product
from math import pi
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.section import Positive, Section

LOSS: Literal["eval/loss"] = "eval/loss"
THROUGHPUT: Literal["train/tokens_per_second"] = "train/tokens_per_second"
Objective = Literal["eval/loss", "train/tokens_per_second"]
Settings = dict[str, Any]
"""Values of config keys, `section.key`."""
SHARED = (
    *("run.", "tracking.", "search.", "data.", "evaluation.", "context.length", "model.tokenizer", "workers.max"),
    *("optimization.steps", "optimization.global_batch"),
)
"""Keys that are the same in all trials: names, packs, what they are compared on, and the tokens of a trial."""


class Parameter(Section):
    """The values that a key may take: exactly one of `choice`, `uniform` and `log_uniform`."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    log_uniform: tuple[float, float] | None = None
    """A number between these two, its logarithm evenly spread: for learning rates."""
    when: dict[str, list[Any]] = {}
    """Only where keys above it in the space have one of these values; elsewhere the config's own value stands."""

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.choice, self.uniform, self.log_uniform)) != 1:
            raise ValueError("search.space: give each key exactly one of choice, uniform and log_uniform")
        for low, high in filter(None, (self.uniform, self.log_uniform)):
            if low >= high or (self.log_uniform and low <= 0):
                raise ValueError(
                    f"search.space: [{low:g}, {high:g}] is no range: give the lower end first"
                    + (", above 0" if self.log_uniform else "")
                )
        return self

    def applies(self, settings: Settings) -> bool:
        """Whether the key is tried beside these settings."""
        return all(key in settings and settings[key] in values for key, values in self.when.items())

    def extremes(self) -> list[Any]:
        """Values whose legality speaks for all: every choice, or both ends and a number between that is not whole."""
        if self.choice is not None:
            return self.choice
        low, high = self.uniform or self.log_uniform or (0.0, 0.0)
        return [low, low + (high - low) / pi, high]


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020), on validation losses, with trained tokens as its clock."""

    grace_tokens: Positive | None = None
    """No trial is stopped before it has trained on so many tokens; null: before its first validation loss."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the trials that reach a rung one in so many goes on; the next rung is so many times as far."""


class Search(Section):
    """What `search` tries: a space of config keys. Everything else of the config is the same in all trials."""

    space: dict[str, Parameter] = {}
    """Config key → the values to try, e.g. `adapter.rank: {choice: [4, 8, 16]}`."""
    sampler: Literal["random", "grid", "optuna"] = "optuna"
    """`optuna` learns from finished trials (TPE); `grid` tries every combination of choices once."""
    objectives: Annotated[list[Objective], Field(min_length=1)] = [LOSS]
    """What is sought: a low `eval/loss`, a high `train/tokens_per_second`, or both."""
    trials: Positive = 16
    """Trials at most."""
    concurrent: Positive | None = None
    """Trials at once; null: as many as the cluster has room for."""
    asha: Asha | None = Asha()
    """Stops trials that fall behind; null trains all to the last step."""
    max_tokens: Positive | None = None
    """No more tokens than these are trained on, over all trials."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """The search ends after so many hours, restarts not counted."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """The search ends when its workers have cost so much, in the currency of `worker_hour_price`."""
    worker_hour_price: Annotated[float, Field(gt=0)] | None = None
    """Price of one worker for an hour."""

    @model_validator(mode="after")
    def consistent(self) -> Self:
        keys = list(self.space)
        for number, (key, parameter) in enumerate(self.space.items()):
            if key.startswith(SHARED):
                raise ValueError(
                    f"search.space has {key}: all trials share it; search over another key, or start two searches"
                )
            for condition in parameter.when:
                if condition not in keys[:number]:
                    raise ValueError(f"search.space: {key} has a condition on {condition}: name that key above it")
            if self.sampler == "grid" and parameter.choice is None:
                raise ValueError(f"search.sampler grid: {key} has a range; give it choices, or take another sampler")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"search.objectives names {self.objectives[0]} twice")
        if self.max_cost is not None and self.worker_hour_price is None:
            raise ValueError("search.max_cost needs search.worker_hour_price, the price of one worker for an hour")
        return self

    def grid(self) -> list[Settings]:
        """Every combination of choices once; keys whose condition does not hold are left out of it."""
        points: list[Settings] = []
        for values in product(*(parameter.choice or [] for parameter in self.space.values())):
            point: Settings = {}
            for (key, parameter), value in zip(self.space.items(), values, strict=True):
                if parameter.applies(point):
                    point[key] = value
            if point not in points:
                points.append(point)
        return points
