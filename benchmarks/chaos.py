"""Does a run that is disturbed again and again train the same data in the same order, with the same losses?

    python benchmarks/chaos.py --save                     # 100 disturbances in three scenarios, over an hour
    python benchmarks/chaos.py --disturbances 4           # so many in each scenario
    python benchmarks/chaos.py --scenarios elastic

Each scenario is one run, started by the command line as a user does, and what befalls it, drawn from a seed:

    fixed     two workers in a Ray of their own, where a killed driver takes the head with it
    elastic   one to three workers on a cluster whose nodes come and go
    s3        two workers; checkpoints, ledger and lease on an S3 server that fails now and then

It is compared with undisturbed runs of the same config. Bounds: no sequence lost or doubled, no token changed, metrics
of each step once in MLflow; at a fixed number of workers the same losses and weights to the last bit; across numbers
losses within 1e-5 relative, weights within twice the deviation between undisturbed runs at those numbers of workers; a
goodput of at least 90 % at one disturbance an hour, by what the disturbances of the run cost.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from chaos_report import Reference, disturbance_table, examine, facts_of
from chaos_stage import STEPS_EACH, Stage, play, settings, undisturbed
from figures import as_table, save

SCENARIOS = {"fixed": ([2], 46), "elastic": ([1, 2, 3], 42), "s3": ([2], 12)}
"""Numbers of workers, and disturbances."""


def scenario(name: str, count: int, seed: int, scratch: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Plays a scenario and its undisturbed runs; returns the report's facts, and a row for each kind of disturbance."""
    sizes, _ = SCENARIOS[name]
    steps = STEPS_EACH * (count + 1)
    references = []
    for size in sizes:
        started = time.monotonic()
        run = undisturbed(scratch, steps, size)
        references.append(Reference(size, run.folder))
        print(f"{name}: undisturbed on {size} workers, {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    with Stage(name, scratch, settings(scratch, f"{name}-disturbed", steps, sizes)) as stage:
        disturbances = play(stage, count, seed)
        findings = examine(stage.run, references)
    return facts_of(name, disturbances, findings), disturbance_table(disturbances)


def main() -> int:
    """0 if every bound holds in every scenario."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--disturbances", type=int, help="in each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-chaos-<scenario>.*")
    options = parser.parse_args()
    # Ignored where a script has put this into the background, and then by the drivers too, which are to get it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    held = True
    for name in options.scenarios:
        with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
            facts, rows = scenario(name, options.disturbances or SCENARIOS[name][1], options.seed, Path(scratch))
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        print(as_table(rows), flush=True)
        if options.save:
            print(f"written to {save(f'chaos-{name}', f'Chaos: {name}', facts, rows)}", flush=True)
        held = held and facts["verdict"] == "PASS"
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
