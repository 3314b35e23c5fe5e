"""ASHA as a search needs it: it asks trials to end, and knows those of earlier drivers."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline.config import Config
from pipeline.search_space import LOSS
from pipeline.search_trials import TrialRecord

FellBehind = Callable[[str, dict[str, Any]], None]
"""Called with Tune's id of a trial and the result by which it has fallen behind."""


def scheduler(config: Config, records: Iterable[TrialRecord], fell_behind: FellBehind) -> TrialScheduler:
    """ASHA that knows what earlier drivers' trials were at its rungs; those that go on tell it themselves."""
    asha, optimization = config.search.asha, config.optimization
    if asha is None or config.evaluation.every_steps is None:
        return FIFOScheduler()
    tokens_per_step = optimization.global_batch * config.context.length
    grace = asha.grace_tokens or config.evaluation.every_steps * tokens_per_step
    whole = optimization.steps * tokens_per_step
    asking = AskingAsha(
        fell_behind,
        time_attr="tokens",
        metric=LOSS,
        mode="min",
        grace_period=min(grace, whole),
        reduction_factor=asha.reduction_factor,
        max_t=whole,
        stop_last_trials=False,  # a trial that comes so far has ended
    )
    for record in records:
        if record.status in ("finished", "stopped"):
            asking.learn(record)
    return asking


class AskingAsha(ASHAScheduler):
    """Has trials that fall behind asked to end, where ASHA has Tune stop them: see `search_ends.py`."""

    def __init__(self, fell_behind: FellBehind, **settings: Any) -> None:
        super().__init__(**settings)
        self.fell_behind = fell_behind

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self.fell_behind(trial.trial_id, result)
        return TrialScheduler.CONTINUE

    def learn(self, record: TrialRecord) -> None:
        """What a trial was that has ended; the decisions about it are made."""
        trial = cast(Any, SimpleNamespace(trial_id=record.run))  # ASHA knows trials by their ids
        self.on_trial_add(cast(Any, None), trial)
        for report in record.reports:
            super().on_trial_result(cast(Any, None), trial, {"tokens": report.tokens, LOSS: report.loss})
