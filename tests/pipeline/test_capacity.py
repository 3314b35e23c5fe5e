import pytest

from pipeline import capacity
from pipeline.capacity import LargestCluster, lack_of_room
from pipeline.config import load_config

CONFIG = load_config("configs/search-demo.yaml", ["workers.cpus=2", "workers.min=3", "workers.max=3"])


def test_nodes_that_are_away_for_a_moment_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes hold 1 + 2 + 0 workers of two CPUs; then one is left, and others take its place."""
    nodes = [{"CPU": 3.0}, {"CPU": 4.0}, {"CPU": 1.0}]
    monkeypatch.setattr(capacity, "_nodes", lambda: nodes)
    monkeypatch.setattr(capacity, "_autoscaler_bound", lambda: None)
    cluster = LargestCluster()
    cluster.look()
    assert cluster.room_for_workers(CONFIG) == 3 and lack_of_room(CONFIG, 3) == ""
    nodes = [{"CPU": 3.0}]
    assert capacity.room_for_workers(CONFIG) == 1 and cluster.room_for_workers(CONFIG) == 3
    nodes = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert cluster.room_for_workers(CONFIG) == 8, "what there is now counts too"
    assert "the cluster has room for 2 such workers; lower it, or add nodes" in lack_of_room(CONFIG, 2)
