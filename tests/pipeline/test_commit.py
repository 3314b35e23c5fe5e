"""Saves that are killed, damaged, overtaken or out of space: what is restored is what was saved, and nothing older.

Two ranks save through their CheckpointWriters; every element says of which step and attempt it is, so that a mixture is
found. `test_commit.py kill|loop|fill FOLDER` are the processes that the kills and the full disk happen to: such a
process forks for each of them, so that torch is imported once, and not out of pytest with its threads.
"""

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from upath import UPath

from pipeline import checkpoint_writer, checkpoints, storage
from pipeline.checkpoint_writer import CheckpointWriter, parts
from pipeline.checkpoints import RunState
from pipeline.config import REPOSITORY
from pipeline.optimizer import Fragment, ParameterState
from pipeline.sections import Checkpoint

WORLD = 2
KEEP = Checkpoint(keep_last=1, keep_best=0)  # each commit deletes what was committed before it
NETWORK = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
)
RANDOM_KILLS = 40
SEED = 12
CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
"""Audit events of calls that change a folder; an `open` counts if it is for writing."""


def tensors(step: int, attempt: int) -> dict[str, ParameterState]:
    draw = torch.Generator().manual_seed(1000 * attempt + step)
    return {
        name: ParameterState(*(torch.randn(parameter.shape, generator=draw) for _ in range(3)))
        for name, parameter in NETWORK.named_parameters()
    }


def pieces(rank: int, step: int, attempt: int) -> Iterator[tuple[str, Fragment]]:
    """This rank's half of every parameter."""
    for name, whole in tensors(step, attempt).items():
        count = whole.master.numel()
        start, stop = rank * count // WORLD, (rank + 1) * count // WORLD
        yield name, Fragment(start, ParameterState(*(part.flatten()[start:stop] for part in parts(whole))))


class Log:
    """The part of RunLog that the writers of one save use. `meanwhile` happens between its word and the manifest."""

    def __init__(self, meanwhile: Callable[[], object] | None) -> None:
        self.parts: dict[int, Any] = {}
        self.meanwhile = meanwhile

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"do_{name}"))

    def do_offer(self, save: object, rank: int, files: Any, masters: Any) -> None:
        self.parts[rank] = (files, masters)

    def do_offers(self, save: object) -> dict[int, Any]:
        return self.parts

    def do_sync(self, attempt: int) -> None:
        if self.meanwhile:
            self.meanwhile()

    def do_checkpointed(self, *_: object) -> None:
        if self.meanwhile:
            raise RuntimeError("the workers have been replaced")


def save(run: Path, step: int, attempt: int = 1, meanwhile: Callable[[], object] | None = None) -> None:
    """Both ranks save a step, rank 1 first, for it waits for nobody: the calls always come in the same order."""
    log = Log(meanwhile)
    with mock.patch.object(checkpoint_writer, "ray", SimpleNamespace(get=lambda value: value, put=lambda value: value)):
        for rank in reversed(range(WORLD)):
            writer = CheckpointWriter(UPath(run), NETWORK, log, KEEP, rank, WORLD)
            state = RunState(step, 4 * step, "packs", "base", "training", attempt, eval_loss=None)
            writer.save(state, pieces(rank, step, attempt), 0)
            writer.wait()


def restored(run: Path) -> int:
    """The step that a restart goes on from, 0 if none; fails if one bit of its tensors is not of that step."""
    folder = checkpoints.newest(UPath(run))
    if folder is None:
        return 0
    state = checkpoints.read_state(folder)
    found, expected = checkpoints.read_parameters(folder, NETWORK), tensors(state.step, state.attempt)
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        assert all(map(torch.equal, parts(found[name]), parts(whole))), f"{folder}: {name} is not what was saved"
    return state.step


def clear_away(run: Path) -> list[int]:
    """What workers do before they go on; the steps that were dropped."""
    return checkpoints.discard_uncommitted(UPath(run), checkpoints.newest(UPath(run)))


def goes_on(run: Path, at_least: int) -> int:
    """What was restored; fails if that is too old, or if training cannot save the step after it."""
    step = restored(run)
    assert step >= at_least, f"restored step {step}, though {at_least} had been committed"
    clear_away(run)
    assert restored(run) == step
    save(run, step + 1, attempt=9)
    assert restored(run) == step + 1
    return step


# The processes that are killed, or run out of space.

Tell = Callable[[object], None]


def forked(child: Callable[[Tell], None], killed_after_s: float | None = None) -> tuple[list[str], bool]:
    """The lines that a forked child told before it ended, and whether it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            child(lambda line: os.write(writer, f"{line}\n".encode()))
        finally:
            os._exit(0)
    os.close(writer)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    return lines, os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def restart(run: Path, tell: Tell) -> None:
    """What workers do that start again: clear away, and save. Tells each step whose save has returned."""
    clear_away(run)
    for step in (3, 4):
        save(run, step)
        tell(step)


class Calls:
    """Counts the calls with which this process changes what is below `run`, and kills it before the last one.

    A write is seen when it is done, at its fsync: it is cut in half for its kill.
    """

    def __init__(self, run: Path, last: int, tell: Tell) -> None:
        self.run, self.left, self.tell = str(run), last, tell
        self.fsync, os.fsync = os.fsync, self._fsync
        sys.addaudithook(self._hook)

    def _before(self, call: str) -> None:
        self.left -= 1
        if not self.left:
            self.tell(call)
            os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.run):
            self._before(event)

    def _fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            if self.left == 1:
                os.ftruncate(descriptor, status.st_size // 2)
            self._before("write")
        self._before("fsync")
        self.fsync(descriptor)


def kill(folder: Path) -> None:
    """Both ways of killing, in one process. Prints where or when, and what was restored."""
    (folder / "calls").mkdir()
    kill_at_each_call(folder / "calls")
    (folder / "times").mkdir()
    kill_at_random_times(folder / "times")


def kill_at_each_call(folder: Path) -> None:
    """A restart, again and again, killed before each of its calls."""
    before, run = folder / "before", folder / "run"
    save(before, 1)
    save(before, 2)
    left_uncommitted(before, 3)
    for last in itertools.count(1):
        shutil.copytree(before, run)

        def child(tell: Tell, last: int = last) -> None:
            Calls(run, last, tell)
            restart(run, tell)

        told, killed = forked(child)
        if not killed:
            assert told == ["3", "4"], told
            return
        *returned, call = told
        print(call, goes_on(run, at_least=max([2, *map(int, returned)])))
        shutil.rmtree(run)


def kill_at_random_times(folder: Path) -> None:
    """One run that saves step after step, and is killed and started again."""
    draw = random.Random(SEED)
    step = 0

    def child(tell: Tell) -> None:
        clear_away(folder)
        for after in itertools.count(step + 1):
            save(folder, after)
            tell(after)

    for _ in range(RANDOM_KILLS):
        told, killed = forked(child, killed_after_s=draw.uniform(0, 0.3))
        assert killed, told
        step = restored(folder)
        assert step >= int([0, *told][-1])
        print("time", step)
    goes_on(folder, at_least=step)


def fill(folder: Path) -> None:
    """A save with 0, 4, 8 … KiB left, until it succeeds. Prints what was restored after each."""
    run, filler = folder / "run", folder / "filler"
    save(run, 1)
    for free in itertools.count(0, 4096):
        step = restored(run)
        disk = os.statvfs(folder)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - free))
        try:
            save(run, step + 1)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            assert restored(run) == step + 1
            return
        finally:
            filler.unlink()
        print("full", goes_on(run, at_least=step))


def output_of(process: str, folder: Path, *before: str) -> list[tuple[str, int]]:
    """What one of the processes above printed: (what happened, step restored after it)."""
    command = [*before, sys.executable, __file__, process, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = (line.rpartition(" ") for line in finished.stdout.splitlines())
    return [(what, int(step)) for what, _, step in lines]


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    return output_of("kill", tmp_path_factory.mktemp("kills"))


def test_killed_before_any_call_of_a_save_it_goes_on_from_the_last_commit(kills: list[tuple[str, int]]) -> None:
    at_calls = [(call, step) for call, step in kills if call != "time"]
    assert len(at_calls) >= 30
    assert {"open", "write", "fsync", "os.link", "os.remove", "os.mkdir", "os.rmdir"} <= {call for call, _ in at_calls}
    steps = [step for _, step in at_calls]
    assert steps == sorted(steps) and set(steps) == {2, 3, 4}, "a later kill leaves no earlier step"


def test_killed_at_random_times_it_goes_on_from_the_last_commit(kills: list[tuple[str, int]]) -> None:
    steps = [step for when, step in kills if when == "time"]
    assert len(steps) == RANDOM_KILLS and steps == sorted(steps)
    assert steps[-1] > RANDOM_KILLS, "it was killed while it saved, not before"


def test_on_a_full_disk_it_goes_on_from_the_last_commit(tmp_path: Path) -> None:
    disk = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    disk += ['mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"', "sh", str(tmp_path)]
    try:
        subprocess.run([*disk, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs `unshare --mount`, for a disk of its own that it can fill")
    assert len(output_of("fill", tmp_path, *disk)) >= 10


# Damage.


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps 1 and 2 are committed."""
    run = tmp_path_factory.mktemp("two")
    save(run, 1)
    shutil.copytree(run / "checkpoints" / "step-1", run / "kept")
    save(run, 2)
    shutil.move(run / "kept", run / "checkpoints" / "step-1")
    return run


FILES = [
    "optimizer-1-of-2.safetensors",
    "optimizer-2-of-2.safetensors",
    "model.safetensors",
    "config.json",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_never_restored(tmp_path: Path, two_checkpoints: Path, name: str) -> None:
    """Cut at 16 places, one bit flipped at 200, or gone: the checkpoint before is restored, and step 2 saved again."""
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints, run)
    file = run / "checkpoints" / "step-2" / name
    assert restored(run) == 2
    data, draw = file.read_bytes(), random.Random(SEED)
    for size in [0, len(data) - 2, *draw.sample(range(len(data)), 14)]:
        file.write_bytes(data[:size])
        assert restored(run) == 1, f"{name} of {size} bytes"
    for bit in draw.sample(range(8 * len(data)), 200):
        file.write_bytes(flipped(data, bit))
        assert restored(run) == 1, f"{name} with bit {bit} flipped"
    file.unlink()
    assert restored(run) == 1
    assert clear_away(run) == [2]
    save(run, 2)
    assert restored(run) == 2


def test_a_manifest_that_names_another_version_by_a_flipped_bit_is_damaged(
    tmp_path: Path, two_checkpoints: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints, run)
    file = run / "checkpoints" / "step-2" / "manifest.json"
    data = file.read_bytes()
    digit = data.index(b'"format": ') + len(b'"format": ')
    for bit in range(8 * digit, 8 * digit + 8):
        file.write_bytes(flipped(data, bit))
        assert restored(run) == 1, flipped(data, bit)[: digit + 2]


def flipped(data: bytes, bit: int) -> bytes:
    byte = bit // 8
    return data[:byte] + bytes([data[byte] ^ 1 << bit % 8]) + data[byte + 1 :]


# What others leave behind, or do late.


def left_uncommitted(run: Path, step: int, attempt: int = 1) -> None:
    """What a writer that dies just before its commit leaves behind."""

    def dies() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        save(run, step, attempt, meanwhile=dies)


def test_temporary_files_of_a_dead_writer_are_never_restored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left_uncommitted(tmp_path, 2)
    manifest = tmp_path / "checkpoints" / "step-1" / "manifest.json"
    shutil.copy(manifest, tmp_path / "checkpoints" / "step-2" / "manifest.json.tmp-1-2")
    (manifest.parent / "state.json.tmp-1-2").write_bytes(b"half a st")
    assert goes_on(tmp_path, at_least=1) == 1


def test_a_temporary_name_is_not_used_twice(tmp_path: Path) -> None:
    """Killed between link and unlink, a writer leaves a second name of its file: who writes to it changes the file."""
    names = []

    def keep(name: str) -> None:
        names.append(name)

    with mock.patch.object(os, "unlink", keep):
        assert storage.create_once(UPath(tmp_path) / "first", b"committed")
        os.replace(names[0], names[0].replace("first", "second"))
        assert storage.create_once(UPath(tmp_path) / "second", b"later")
    assert (tmp_path / "first").read_bytes() == b"committed"


@pytest.mark.parametrize("late", [2, 3, 4, 7], ids="step {}".format)
def test_a_zombie_that_commits_late_changes_nothing(tmp_path: Path, late: int) -> None:
    """A writer of attempt 1 stops just before its commit, and wakes when attempt 2 has gone on from step 1 to 3."""
    save(tmp_path, 1)

    def meanwhile() -> None:
        clear_away(tmp_path)
        save(tmp_path, 2, attempt=2)
        save(tmp_path, 3, attempt=2)

    with pytest.raises(RuntimeError, match=r"another writer|been replaced"):
        save(tmp_path, late, attempt=1, meanwhile=meanwhile)
    assert restored(tmp_path) == 3
    assert checkpoints.read_state(checkpoints.step_folder(UPath(tmp_path), 3)).attempt == 2
    save(tmp_path, 5, attempt=2)
    assert goes_on(tmp_path, at_least=5) == 5


def test_a_zombie_that_commits_the_files_of_another_changes_nothing(tmp_path: Path) -> None:
    """Attempt 2 has written its files of step 2 when attempt 1 wakes and commits them: its manifest does not fit."""
    save(tmp_path, 1)

    def meanwhile() -> None:
        clear_away(tmp_path)
        left_uncommitted(tmp_path, 2, attempt=2)

    with pytest.raises(RuntimeError, match="been replaced"):
        save(tmp_path, 2, attempt=1, meanwhile=meanwhile)
    assert goes_on(tmp_path, at_least=1) == 1


def test_files_that_a_zombie_writes_late_are_not_part_of_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = checkpoints.step_folder(UPath(tmp_path), 2)
    checkpoints.write_fragments(folder, NETWORK, dict(pieces(1, 2, attempt=1)), rank=1, world_size=3)
    save(tmp_path, 2, attempt=2)
    checkpoints.write_fragments(folder, NETWORK, dict(pieces(1, 2, attempt=1)), rank=2, world_size=3)
    with pytest.raises(RuntimeError, match="written by another writer"):
        checkpoints.write_fragments(folder, NETWORK, dict(pieces(1, 2, attempt=1)), rank=1, world_size=2)
    assert goes_on(tmp_path, at_least=2) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
