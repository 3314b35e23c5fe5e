import pytest

from pipeline import capacity
from pipeline.capacity import LargestCluster, check_resources, lack_of_room, room_for_workers
from pipeline.config import ConfigError, load_config

CONFIG = load_config("configs/search-demo.yaml", ["workers.cpus=2", "workers.min=3", "workers.max=3"])


def test_nodes_that_are_away_for_a_moment_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes hold 1 + 2 + 0 workers of two CPUs; then one is left, and others take its place."""
    nodes = [{"CPU": 3.0}, {"CPU": 4.0}, {"CPU": 1.0}]
    monkeypatch.setattr(capacity, "_nodes", lambda: nodes)
    monkeypatch.setattr(capacity, "_autoscaler_bound", lambda: None)
    monkeypatch.setattr(capacity, "_may_grow", lambda: False)
    cluster = LargestCluster()
    cluster.look()
    assert cluster.room_for_workers(CONFIG) == 3 and lack_of_room(CONFIG, 3) == ""
    nodes = [{"CPU": 3.0}]
    assert capacity.room_for_workers(CONFIG) == 1 and cluster.room_for_workers(CONFIG) == 3
    nodes = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert cluster.room_for_workers(CONFIG) == 8, "what there is now counts too"
    assert "the cluster has room for 2 such workers; lower it, or add nodes" in lack_of_room(CONFIG, 2)


def test_a_cluster_that_grows_from_nothing_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has no CPUs, and the autoscaler does not tell what it may bring."""
    monkeypatch.setattr(capacity, "_nodes", lambda: [{"memory": 1.0}])
    monkeypatch.setattr(capacity, "_autoscaler_bound", lambda: None)
    monkeypatch.setattr(capacity, "uses_gpu", lambda config: config.workers.gpus == 1)
    for gpus in (0, 1):
        config = load_config("configs/search-demo.yaml", [f"workers.gpus={gpus}", "search.concurrent=4"])
        monkeypatch.setattr(capacity, "_may_grow", lambda: True)
        check_resources(config)
        assert room_for_workers(config) == 4 * config.workers.min
        monkeypatch.setattr(capacity, "_may_grow", lambda: False)
        with pytest.raises(ConfigError, match="the largest node has 0"):
            check_resources(config)
        assert room_for_workers(config) == 0
    monkeypatch.setattr(capacity, "_may_grow", lambda: True)
    with pytest.raises(ConfigError, match=r"workers\.gpus = 'auto': nodes may come"):
        check_resources(load_config("configs/search-demo.yaml", ["workers.gpus=auto"]))
