"""Notes on the head of an on-premise cluster that it is the head, and runs.

    python cluster/local_head.py ~/ray_bootstrap_config.yaml          # on the head, before `ray start`

The provider `local` keeps what runs in a file of each machine. `ray up` writes that of the machine that it is called
on; on the head Ray's first autoscaler did so, and the second one, since Ray 2.50 the default, does not (2.60): it waits
for a head without end, and starts no worker.
"""

import json
import sys
from pathlib import Path

from ray.autoscaler._private.local.node_provider import LocalNodeProvider, record_local_head_state_if_needed

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    record_local_head_state_if_needed(LocalNodeProvider(config["provider"], config["cluster_name"]))
