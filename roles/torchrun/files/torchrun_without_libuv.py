# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""python -m torch.distributed.run, with the same arguments, for a torch that may have been built without libuv.

Distributions build torch so (Debian 13: 2.6.0). Since torch 2.4 a TCPStore takes libuv unless its caller says otherwise,
and the callers in torch.distributed.run do not: USE_LIBUV reaches neither the static rendezvous nor workers that share the
store of their agent. So the agents meet in a store that does without, and the workers in one of their own, which obeys
USE_LIBUV. Where torch has libuv, this is torch.distributed.run and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import typing as t

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.utils.distributed import get_free_port

BACKEND = "static-without-libuv"
# As torch's static rendezvous has it.
TIMEOUT_SECONDS = 600


def has_libuv() -> bool:
    """Return whether a TCPStore works as torch.distributed.run makes it; torch has no other way to ask."""
    try:
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        return "libuv" not in str(error)
    return True


class StaticRendezvous(rendezvous.RendezvousHandler):
    """The rendezvous of torch.distributed.run with --node-rank, without libuv."""

    def __init__(self, parameters: rendezvous.RendezvousParameters) -> None:
        self.address, _colon, port = parameters.endpoint.rpartition(":")
        self.port = int(port)
        self.rank = int(parameters.config["rank"])
        self.nodes = parameters.max_nodes
        self.run_id = parameters.run_id
        self.store: t.Optional[dist.Store] = None

    # Else the workers would open the agent's store, with libuv.
    use_agent_store = False

    def get_backend(self) -> str:
        """Return the name of this rendezvous."""
        return BACKEND

    def next_rendezvous(self) -> rendezvous.RendezvousInfo:
        """Meet the other nodes, and agree on a port for the store of the workers, which rank 0 opens."""
        if self.store is None:
            tcp = dist.TCPStore(
                self.address,
                self.port,
                self.nodes,
                self.rank == 0,
                datetime.timedelta(seconds=TIMEOUT_SECONDS),
                multi_tenant=True,
                use_libuv=False,
            )
            self.store = dist.PrefixStore(self.run_id, tcp)
            if self.rank == 0:
                self.store.set("workers_port", str(get_free_port()))
        workers = rendezvous.api.RendezvousStoreInfo(self.address.strip("[]"), int(self.store.get("workers_port")))
        return rendezvous.RendezvousInfo(self.store, self.rank, self.nodes, workers)

    def is_closed(self) -> bool:
        """Return False: nodes neither come nor go."""
        return False

    def set_closed(self) -> None:
        """Do nothing, as nobody could join."""

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody can join."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of the run."""
        return self.run_id

    def shutdown(self) -> bool:
        """Return that there is nothing to end."""
        return True


def redirected(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of torch.distributed.run with this rendezvous in place of the static one."""
    settings = [arguments.rdzv_conf, f"rank={arguments.node_rank}"]
    arguments.rdzv_conf = ",".join(setting for setting in settings if setting)
    arguments.rdzv_endpoint = f"{arguments.master_addr}:{arguments.master_port}"
    arguments.rdzv_backend = BACKEND
    return arguments


@record
def main(words: t.Sequence[str]) -> None:
    """Run torch.distributed.run."""
    arguments = torchrun.parse_args(words)
    if arguments.rdzv_backend == "static" and not has_libuv():
        os.environ["USE_LIBUV"] = "0"
        rendezvous.rendezvous_handler_registry.register(BACKEND, StaticRendezvous)
        arguments = redirected(arguments)
    torchrun.run(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
