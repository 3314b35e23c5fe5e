"""One rank that loads a base under ZeRO-3, run by test_engine.py: prints the bytes of host memory that it took.

zero3_rank.py RANK WORLD_SIZE FOLDER        (of the base; the ranks meet at FOLDER/rendezvous)
"""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import parse_config
from pipeline.engine import partitioned_loading
from pipeline.models import build_model


def anonymous_bytes() -> int:
    """This process's own memory; pages of mapped files are the system's, and can be dropped at any time."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def watch(ended: threading.Event, peak: list[int]) -> None:
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous_bytes())


rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
torch.set_num_threads(1)
config = parse_config(
    {
        "run": {"name": "zero3"},
        "model": {"base": str(folder), "dtype": "float32"},
        "context": {"length": 1024},
        "attention": {"group_size": 256},
        "data": {"train": ["nothing"]},
        "optimization": {"steps": 1, "global_batch": 1, "warmup_steps": 0},
        "workers": {"zero_stage": 3},
    }
)
before = anonymous_bytes()
ended, peak = threading.Event(), [before]
thread = threading.Thread(target=watch, args=(ended, peak))
thread.start()
partitioning = partitioned_loading(config)
model = build_model(config)
ended.set()
thread.join()
print(peak[0] - before, flush=True)
dist.barrier()
