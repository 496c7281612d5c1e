"""Nodes and hosts as node_info and the inventory would give them, for the tests of the plan."""

from __future__ import annotations

import copy
import functools
import typing as t

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host, Release
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog

GIB = 1024**3
with open(catalog.MANIFEST, encoding="utf-8") as _stream:
    MANIFEST = yaml.safe_load(_stream)
RELEASE = Release("ab" * 32, "train.py", "/home/me/project", "cd" * 32)


def interface(name: str, *addresses: str, up: bool = True) -> dict[str, t.Any]:
    return {"name": name, "up": up, "loopback": name == "lo", "mtu": 1500, "addresses": list(addresses)}


def gpu(index: int) -> dict[str, t.Any]:
    return {"index": index, "uuid": f"GPU-{index}", "name": "NVIDIA H100", "generation": "Hopper"}


def node(number: int = 1, gpus: int = 0, **changes: t.Any) -> dict[str, t.Any]:
    """Return what node_info tells of a healthy Debian node; ``number`` makes its address and machine id."""
    found = {
        "error": "",
        "distribution": {"id": "debian", "version": "12", "codename": "bookworm", "name": "Debian GNU/Linux 12 (bookworm)"},
        "architecture": "x86_64",
        "kernel": "6.1.0",
        "machine_id": f"{number:032x}",
        "hostname": f"n{number}",
        "hostname_addresses": ["127.0.1.1"],
        "systemd": True,
        "system_bus": True,
        "uid": 0,
        "python": {"path": "/usr/bin/python3", "version": "3.11.2"},
        "interfaces": [
            interface("lo", "127.0.0.1/8"),
            interface("eth0", f"198.18.{number // 250}.{number % 250 + 2}/16"),
        ],
        "ephemeral_ports": [32768, 60999],
        "listening": [{"address": "0.0.0.0", "port": 22, "pid": 100, "command": "sshd", "unit": "ssh.service"}],
        "firewalls": {"installed": [], "active": []},
        "disk": {"/opt/onprem.torch": 500 * GIB, "/var/lib/torchrun": 500 * GIB},
        "file_systems": {"/opt/onprem.torch": 1, "/var/lib/torchrun": 1},
        "paths": {},
        "access": [],
        "torch": {},
        "torch_builds": {},
        "packages": {},
        "own_pins": [],
        "boot_id": f"{number:08x}-0000-4000-8000-000000000000",
        "control_node": False,
        "jobs": [],
        "secret_ids": {},
        "past": {},
        "glibc": "2.36",
        "clock_offset_seconds": 0.0,
        "cpus": 8,
        "memory_bytes": 64 * GIB,
        "hardware": {"gpus": [gpu(i) for i in range(gpus)], "usable_gpus": [gpu(i) for i in range(gpus)]},
    }
    unknown = set(changes) - set(found)
    assert not unknown, f"node_info does not tell {unknown}"
    return {**found, **changes}


@functools.lru_cache(maxsize=1)
def specification() -> catalog.Catalog:
    """Return the catalog of the roles in the checkout."""
    return catalog.load(DataLoader())


class HostVars:
    """The part of Ansible's hostvars that the reader uses."""

    def __init__(self, variables: dict[str, dict[str, t.Any]]) -> None:
        self.variables = variables

    def raw_get(self, host: str) -> dict[str, t.Any]:
        return self.variables[host]


def template(text: str) -> str:
    """Return a text that Ansible treats as a template, as it does with those of an inventory."""
    return trust_as_template(text)


def reader(variables: dict[str, dict[str, t.Any]]) -> catalog.Reader:
    """Return a reader over inventory variables: host → name → value."""
    return catalog.Reader(specification(), Templar(loader=DataLoader()), HostVars(variables))


def host(name: str = "n1", number: int = 1, found: t.Optional[dict[str, t.Any]] = None, **variables: t.Any) -> Host:
    """Return a host whose variables are the roles' defaults, changed by ``variables``."""
    made, problems = reader({name: {"torchrun_source": "/home/me/project", **variables}}).host(name)
    assert not problems, problems
    made.node = copy.deepcopy(node(number) if found is None else found)
    return made
