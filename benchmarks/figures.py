"""What the benchmarks share: the machine that the figures are of, tables, and dated files of them."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


def machine(device: str, **facts: Any) -> dict[str, Any]:
    """What a reader needs to judge the figures; `facts` are the benchmark's own."""
    arguments = [argument.replace(str(Path.home()), "~") for argument in sys.argv[1:]]
    processor = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__}
    if device == "cuda":
        versions |= {
            name: version(name) for name in ("transformers", "peft", "liger-kernel", "flash-attn") if is_installed(name)
        }
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "processor": processor,
        "load average": f"{os.getloadavg()[0]:.1f}",
        **versions,
        "python": platform.python_version(),
        **facts,
    }


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def documents_of(tokens: int, document: int | None) -> list[int]:
    """Lengths of the documents that a row of so many tokens holds."""
    document = document or tokens
    rest = tokens % document
    return [document] * (tokens // document) + [rest] * (rest > 0)


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])


def verdict(ratio: float, goal: float, spread: float) -> str:
    """PASS if `ratio` ≥ `goal`; NOISE if it misses by less than `spread` (both relative), FAIL if by more."""
    if ratio >= goal:
        return "PASS"
    return "NOISE" if ratio >= goal * (1 - spread) else "FAIL"


def save(name: str, title: str, facts: Row, rows: Sequence[Row]) -> Path:
    """Writes `results/<date>-<name>.json`, and the same as Markdown; returns the path of the latter."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{facts['date']}-{name}.json"
    path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    path = path.with_suffix(".md")
    path.write_text(f"# {title}\n\n" + "\n".join(lines) + f"\n\n{as_table(rows)}\n", encoding="utf-8")
    return path


def _cpu() -> str:
    """The processor's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'processor'} ({platform.machine()})"
