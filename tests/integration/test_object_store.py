"""A whole run on an object store: documents, packs, ledger, lease, checkpoints; killed, damaged, cut off, audited."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from object_store import ObjectStore
from upath import UPath

from pipeline import checkpoints
from pipeline.audit import audit_run
from pipeline.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 200
EVERY = 10
OUTAGE_S = 6


def test_a_run_survives_kill_damage_and_outage(
    make_run: Callable, store: ObjectStore, bucket: UPath, tmp_path: Path
) -> None:
    run = make_run(
        "run",
        run={"storage": str(bucket / "runs")},
        data={"train": [str(bucket / "books")]},
        optimization={"steps": STEPS, "learning_rate": 1e-3},
        checkpoint={"every_steps": EVERY},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )
    (bucket / "books" / "book.txt").write_bytes((tmp_path / "book.txt").read_bytes())
    run.folder = bucket / "runs" / "run"
    run.kill_after_step(2 * EVERY, "train")

    damaged = checkpoints.steps(run.folder)[-1]
    weights = checkpoints.step_folder(run.folder, damaged) / "adapter_model.safetensors"
    weights.unlink()
    assert checkpoints.newest(run.folder) == checkpoints.step_folder(run.folder, damaged - EVERY)

    before = len(run.records())
    process = run.start("train")
    until = time.monotonic() + 300
    while len(run.records()) <= before:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.1)
    assert run.records()[before].step == damaged - EVERY
    store.pause()
    with suppress(subprocess.TimeoutExpired):
        process.wait(OUTAGE_S)
    store.resume()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output

    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.committed == STEPS
    assert result.sequences == STEPS * 5
    objects = [path.path for path in bucket.glob("**/*") if not path.is_dir()]
    assert not [path for path in objects if ".tmp" in path or ".probe" in path]
    secrets = run.environment | store.environment
    for path in ("config.yaml", "run.json"):
        assert secrets["AWS_SECRET_ACCESS_KEY"] not in (run.folder / path).read_text()
