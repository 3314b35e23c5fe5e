"""Saving in the background by several ranks, played by threads; Ray's object store and actor are played by hand."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from upath import UPath

from pipeline import checkpoint_writer, checkpoints
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.checkpoints import RunState
from pipeline.optimizer import Fragment, ParameterState
from pipeline.sections import Checkpoint

SETTINGS = Checkpoint(keep_last=2, keep_best=0)


class Log:
    """The part of RunLog that writers use, as an actor: its methods are called by `.remote`."""

    def __init__(self) -> None:
        self.parts: dict[int, Any] = {}
        self.told: list[tuple[int, int]] = []
        self.held_up: list[float] = []
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"do_{name}"))

    def do_offer(self, save: tuple[int, int], rank: int, files: Any, masters: list[Any]) -> None:
        with self.lock:
            self.parts[rank] = (files, masters)

    def do_offers(self, save: tuple[int, int]) -> dict[int, Any]:
        with self.lock:
            return dict(self.parts)

    def do_sync(self, attempt: int) -> None:
        pass

    def do_checkpointed(self, save: tuple[int, int], request: int, details: dict[str, Any]) -> None:
        self.parts = {}
        self.told.append((save[1], request))
        self.held_up.append(details["seconds"])


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "put", lambda value: value)


def network() -> LlamaForCausalLM:
    shapes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=False, **shapes))


def whole_state(model: LlamaForCausalLM, seed: int) -> dict[str, ParameterState]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ParameterState(*(torch.randn(parameter.shape, generator=generator) for _ in range(3)))
        for name, parameter in model.named_parameters()
    }


def held_by(rank: int, world_size: int, state: dict[str, ParameterState]) -> list[tuple[str, Fragment]]:
    """This rank's part of the state as ZeRO cuts it: all parameters in one row, in equal pieces."""
    total = sum(whole.master.numel() for whole in state.values())
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    held, begin = [], 0
    for name, whole in state.items():
        end = begin + whole.master.numel()
        start, stop = max(first, begin) - begin, min(last, end) - begin
        if start < stop:
            parts = (part.flatten()[start:stop] for part in checkpoint_writer.parts(whole))
            held.append((name, Fragment(start, ParameterState(*parts))))
        begin = end
    return held


def run_state(step: int) -> RunState:
    return RunState(step, 4 * step, "p", "b", "t", attempt=1, eval_loss=None)


def writers(folder: Path, log: Any, world_size: int, model: LlamaForCausalLM) -> list[CheckpointWriter]:
    return [CheckpointWriter(UPath(folder), model, log, SETTINGS, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_what_the_ranks_hold_is_restored_bit_by_bit(tmp_path: Path, world_size: int) -> None:
    model, log = network(), Log()
    state = whole_state(model, seed=0)
    ranks = writers(tmp_path, log, world_size, model)
    for rank, writer in enumerate(ranks):
        writer.save(run_state(5), held_by(rank, world_size, state), request=3)
    for writer in ranks:
        writer.wait()
    folder = checkpoints.newest(UPath(tmp_path))
    assert folder is not None and checkpoints.read_state(folder) == run_state(5)
    restored = checkpoints.read_parameters(folder, model)
    for name, whole in state.items():
        for part, original in zip(checkpoint_writer.parts(restored[name]), checkpoint_writer.parts(whole), strict=True):
            assert torch.equal(part, original), name
    assert log.told == [(5, 3)]


def test_training_may_change_the_state_while_it_is_written(tmp_path: Path) -> None:
    model, log = network(), Log()
    state = whole_state(model, seed=0)
    expected = {name: whole.master.clone() for name, whole in state.items()}
    writer, other = writers(tmp_path, log, 2, model)
    writer.save(run_state(5), held_by(0, 2, state), 0)
    other.save(run_state(5), held_by(1, 2, state), 0)
    for whole in state.values():
        whole.master.zero_()
    writer.wait(), other.wait()
    restored = checkpoints.read_parameters(UPath(tmp_path) / "checkpoints" / "step-5", model)
    assert all(torch.equal(restored[name].master, expected[name]) for name in expected)


def test_a_snapshot_uses_the_memory_that_was_reserved(tmp_path: Path) -> None:
    model = network()
    [writer] = writers(tmp_path, Log(), 1, model)
    held = held_by(0, 1, whole_state(model, 0))
    writer.reserve(held)
    writer.wait()
    reserved = {name: fragment.state.master.data_ptr() for name, fragment in writer._host.items()}
    assert reserved.keys() == dict(held).keys()
    writer.save(run_state(1), held, 0)
    writer.wait()
    assert {name: fragment.state.master.data_ptr() for name, fragment in writer._host.items()} == reserved


def test_nothing_is_committed_until_every_rank_has_written(tmp_path: Path) -> None:
    model, log = network(), Log()
    state = whole_state(model, seed=0)
    writer, other = writers(tmp_path, log, 2, model)
    writer.save(run_state(5), held_by(0, 2, state), 0)
    assert writer._thread is not None
    writer._thread.join(0.5)
    assert writer._thread.is_alive() and checkpoints.newest(UPath(tmp_path)) is None
    other.save(run_state(5), held_by(1, 2, state), 0)
    writer.wait(), other.wait()
    assert checkpoints.newest(UPath(tmp_path)) is not None


def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "OFFER_TIMEOUT_S", 0.3)
    model = network()
    writer, _, _ = writers(tmp_path, Log(), 3, model)
    writer.save(run_state(5), held_by(0, 3, whole_state(model, 0)), 0)
    with pytest.raises(TimeoutError, match=r"step 5: ranks \[1, 2\] have not written"):
        writer.wait()
    assert checkpoints.newest(UPath(tmp_path)) is None


def test_an_error_in_the_background_reaches_the_training_thread_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    [writer] = writers(tmp_path, Log(), 1, model)
    state = whole_state(model, 0)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", fails)
        writer.save(run_state(5), held_by(0, 1, state), 0)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    writer.check()
    assert checkpoints.newest(UPath(tmp_path)) is None
    writer.save(run_state(6), held_by(0, 1, state), 0)
    writer.wait()
    assert checkpoints.steps(UPath(tmp_path)) == [6]


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = network(), Log()
    [writer] = writers(tmp_path, log, 1, model)
    commit: Callable[..., None] = checkpoints.commit
    released = threading.Event()

    def slow(*arguments: Any) -> None:
        released.wait(10)
        commit(*arguments)

    monkeypatch.setattr(checkpoints, "commit", slow)
    state = whole_state(model, 0)
    writer.save(run_state(1), held_by(0, 1, state), 0)
    second = threading.Thread(target=writer.save, args=(run_state(2), held_by(0, 1, state), 0))
    second.start()
    second.join(0.3)
    assert second.is_alive() and log.told == []
    released.set()
    second.join()
    writer.wait()
    assert log.told == [(1, 0), (2, 0)]
    assert log.held_up[1] > 0.2, "the seconds of waiting are counted"


def test_bytes_are_those_of_masters_and_moments(tmp_path: Path) -> None:
    shapes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, log = LlamaForCausalLM(LlamaConfig(vocab_size=1000, tie_word_embeddings=False, **shapes)), Log()
    state = whole_state(model, seed=0)
    ranks = writers(tmp_path, log, 2, model)
    for rank, writer in enumerate(ranks):
        writer.save(run_state(1), held_by(rank, 2, state), 0)
    for writer in ranks:
        writer.wait()
    written = sum(os.path.getsize(file) for file in (tmp_path / "checkpoints" / "step-1").iterdir())
    assert written <= 1.02 * sum(3 * whole.master.nbytes for whole in state.values())


def test_masters_with_a_gap_are_not_committed() -> None:
    shares = [{"w": (0, np.ones(3, np.float32))}, {"w": (4, np.ones(2, np.float32))}]
    with pytest.raises(RuntimeError, match=r"w is incomplete: 5 of 6 elements, in pieces that begin at \[0, 4\]"):
        checkpoint_writer.joined(shares, {"w": 6})
