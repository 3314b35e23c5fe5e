"""Which settings are tried next. A sampler is a function of the trials so far: it can be made anew at any time.

Optuna does the sampling. Choices are given to it by their numbers, so that they may be of any type, lists included.
"""

from collections.abc import Iterable
from math import isfinite
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from pipeline.search_space import LOSS, THROUGHPUT, Parameter, Search, Settings
from pipeline.search_trials import TrialRecord

MOST_TRIES = 100
"""Draws of settings that have been tried already, after which the space counts as exhausted."""
STARTUP_TRIALS = 8
"""Trials at random before those from which TPE learns."""


def next_settings(search: Search, seed: int, records: Iterable[TrialRecord]) -> Settings | None:
    """Settings that no trial has tried yet; None if there are none left.

    The same trials give the same settings: what is drawn for the n-th trial depends on `seed` and n, not on what the
    process has drawn before.
    """
    known = list(records)
    tried = [record.settings for record in known]
    if search.sampler == "grid":
        return next((point for point in search.grid() if point not in tried), None)
    study = _study(search, known)
    for draw in range(MOST_TRIES):
        study.sampler = _sampler(search, [seed, len(known), draw])
        settings = _ask(study, search.space)
        if settings not in tried:
            return settings
    return None


def _study(search: Search, records: list[TrialRecord]) -> optuna.Study:
    """A study of all trials: ended ones with what they came to, the others as running."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = [
        StudyDirection.MINIMIZE if objective == LOSS else StudyDirection.MAXIMIZE for objective in search.objectives
    ]
    study = optuna.create_study(directions=directions)
    for record in records:
        values = _values(record, search)
        state = TrialState.RUNNING if record.status == "running" else TrialState.COMPLETE if values else TrialState.FAIL
        study.add_trial(
            create_trial(
                state=state,
                params={key: _number(search.space[key], value) for key, value in record.settings.items()},
                distributions={key: _distribution(search.space[key]) for key in record.settings},
                values=values if state == TrialState.COMPLETE else None,
            )
        )
    return study


def _sampler(search: Search, seed: list[int]) -> BaseSampler:
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    if search.sampler == "random":
        return RandomSampler(seed=number)
    startup = min(STARTUP_TRIALS, max(1, search.trials // 2))
    return TPESampler(seed=number, n_startup_trials=startup, constant_liar=len(search.objectives) == 1)


def _ask(study: optuna.Study, space: dict[str, Parameter]) -> Settings:
    """One draw: keys in the order of the space, those whose condition does not hold left out."""
    trial = study.ask()
    settings: Settings = {}
    for key, parameter in space.items():
        if parameter.applies(settings):
            settings[key] = _draw(trial, key, parameter)
    study.tell(trial, state=TrialState.FAIL)  # it counts once it is a trial of the search
    return settings


def _draw(trial: optuna.Trial, key: str, parameter: Parameter) -> Any:
    if parameter.choice is not None:
        return parameter.choice[trial.suggest_categorical(key, range(len(parameter.choice)))]
    low, high = parameter.uniform or parameter.log_uniform or (0.0, 0.0)
    return trial.suggest_float(key, low, high, log=parameter.log_uniform is not None)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choice is not None:
        return CategoricalDistribution(tuple(range(len(parameter.choice))))
    low, high = parameter.uniform or parameter.log_uniform or (0.0, 0.0)
    return FloatDistribution(low, high, log=parameter.log_uniform is not None)


def _number(parameter: Parameter, value: Any) -> float | int:
    return value if parameter.choice is None else parameter.choice.index(value)


def _values(record: TrialRecord, search: Search) -> list[float] | None:
    """What the objectives came to; None where one is missing, or the trial failed."""
    if record.status == "failed" or not isfinite(record.loss):
        return None
    known = {LOSS: record.loss, THROUGHPUT: record.throughput}
    values = [known[objective] for objective in search.objectives]
    return None if None in values else [value for value in values if value is not None]
