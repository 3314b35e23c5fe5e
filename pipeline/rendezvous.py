"""Where the workers of a group find each other: torch's store, on the address of its node instead of all of them.

The store takes anybody's word and knows no password. torch has it listen on every interface; Ray tells the workers one
address, which on a machine of its own is loopback. The hook is an internal interface of Ray, and torch's call is put in
its place by name; a test looks at what listens.
"""

import importlib
import socket
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore


class OneAddressTorchConfig(TorchConfig):
    """A TorchConfig whose process group listens on the address of the first worker's node alone."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OneAddressBackend


class _OneAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_listen_on_one_address)
        super().on_start(worker_group, backend_config)


def _listen_on_one_address() -> None:
    """Runs in a worker, before it joins the group."""
    module: Any = importlib.import_module("torch.distributed.rendezvous")  # an attribute of that name is a function
    module.TCPStore = store_on_one_address


def store_on_one_address(host_name: str, port: int, *, is_master: bool, **settings: Any) -> TCPStore:
    """A store, or a client of it. OSError if this machine does not have the address `host_name`."""
    if is_master:
        family = socket.getaddrinfo(host_name, port)[0][0]
        listener = socket.create_server((host_name, port), family=family)
        settings["master_listen_fd"] = listener.detach()  # the store closes it
    return TCPStore(host_name, port, is_master=is_master, **settings)
