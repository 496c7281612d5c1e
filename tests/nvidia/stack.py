"""The plan of booted nodes as if they were GPU nodes: their own system, and the hardware of a fixture.

Only what no container can have is made up: GPUs, NVSwitches, adapters. All decisions are the collection's own.
As a program it prints the plan as JSON: stack.py VARIABLES, where VARIABLES is JSON by host.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import typing as t
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {
    "debian-12": {"id": "debian", "version": "12", "name": "Debian GNU/Linux 12 (bookworm)"},
    "debian-13": {"id": "debian", "version": "13", "name": "Debian GNU/Linux 13 (trixie)"},
    "ubuntu-22.04": {"id": "ubuntu", "version": "22.04", "name": "Ubuntu 22.04 LTS"},
    "ubuntu-24.04": {"id": "ubuntu", "version": "24.04", "name": "Ubuntu 24.04 LTS"},
}


def plan(variables: t.Mapping[str, t.Mapping[str, t.Any]], machine: str = "8x H100", **changes: t.Any) -> dict[str, t.Any]:
    """Return what the roles read of the plan.

    Args:
        variables: the hosts' variables, C(lab_distribution) among them.
        machine: name of the machine whose hardware the nodes have.
        changes: of what node_info tells.
    """
    # Imported here, so that Ansible's finder of collections is set up first where this is a program.
    import hardware_trees  # pylint: disable=import-outside-toplevel
    from ansible_collections.onprem.torch.plugins.module_utils import hardware, nvidia  # pylint: disable=import-outside-toplevel
    from builders import MANIFEST, host, node  # pylint: disable=import-outside-toplevel

    entries = []
    for number, (name, chosen) in enumerate(variables.items(), start=1):
        own = {key: value for key, value in chosen.items() if not key.startswith("lab_")}
        found = node(number, distribution=DISTRIBUTIONS[chosen["lab_distribution"]], architecture="x86_64", kernel=platform.release(), **changes)
        with tempfile.TemporaryDirectory() as folder:
            found["hardware"] = hardware.collect(str(hardware_trees.machine(Path(folder), **hardware_trees.MACHINES[machine])))
        entries.append((name, host(name, found=found, **own).variables, found))
    line, decisions, problems = nvidia.decide_all(entries, MANIFEST, dict.fromkeys(variables, "host0"))
    assert not problems, [problem.sentence() for problem in problems]
    return {"cuda_version": line["name"], "order": list(variables), "nodes": {name: {"nvidia": decision} for name, decision in decisions.items()}}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

    _AnsibleCollectionFinder(paths=[str(ROOT / ".collections")])._install()
    print(json.dumps(plan(json.loads(sys.argv[1]))))
