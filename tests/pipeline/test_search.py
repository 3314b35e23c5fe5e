"""What a search asks of the cluster before its first trial."""

import pytest

from pipeline import search
from pipeline.config import ConfigError, load_config

TWO_WORKERS = ["workers.min=2", "workers.max=2"]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with room for one worker."""
    monkeypatch.setattr(search, "check_resources", lambda config: None)
    monkeypatch.setattr(search, "room_for_workers", lambda config: 1)


@pytest.mark.usefixtures("room")
def test_a_cluster_too_small_for_every_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^workers.min is 2: the cluster has room for 1 such workers"):
        search._check_room(load_config("configs/search-demo.yaml", TWO_WORKERS))


@pytest.mark.usefixtures("room")
def test_where_trials_differ_in_workers_each_is_looked_at_by_itself() -> None:
    space = "search.space={workers.min: {choice: [1, 2]}}"
    config = load_config("configs/search-demo.yaml", [*TWO_WORKERS, space])
    search._check_room(config)
    assert search._concurrent(config) == 1
