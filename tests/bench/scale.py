# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plan and rendering for hosts that are only simulated, beside a bare task over the same hosts.

The facts are what node_info tells of a GPU node; the plan, the unit's template and the firewall's arguments are the real ones.

usage: tests/bench/scale.py [HOSTS...]
"""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
AIM = 2.2

BARE = """
- hosts: train
  gather_facts: false
  tasks:
    - name: A bare task
      ansible.builtin.set_fact:
        bare: "{{ inventory_hostname }}"
"""

PLAN = """
- hosts: train
  gather_facts: false
  tasks:
    - name: Plan
      onprem.torch.plan:
        group: train
        nodes_variable: simulated
      run_once: true
      register: cluster_plan
"""

RENDER = PLAN + """
    - name: Render what the roles render
      ansible.builtin.assert:
        that:
          - unit | length > 0
          - torch | length > 0
          - peers | length > 0
        quiet: true
      vars:
        unit: "{{ lookup('onprem.torch.rendered', unit_template, using={'_torchrun_job': _torchrun_job, '_torchrun_node': _torchrun_node}) }}"
        torch: "{{ cluster_plan.nodes[inventory_hostname].pytorch }}"
        peers: "{{ cluster_plan.peers.ipv4 + cluster_plan.peers.ipv6 }}"
        unit_template: "%s/roles/torchrun/templates/torchrun.service.j2"
        _torchrun_job: "{{ cluster_plan.job }}"
        _torchrun_node: "{{ cluster_plan.nodes[inventory_hostname] }}"
""" % ROOT


def node(number, gpus=8):
    """What node_info tells of a node with GPUs."""
    gpu = {"name": "NVIDIA H100 80GB HBM3", "generation": "hopper", "nvlink": True, "memory_bytes": 85520809984}
    cards = [{**gpu, "index": index, "uuid": f"GPU-{number:08x}-{index}", "pci": f"0000:{16 + index:02x}:00.0"} for index in range(gpus)]
    return {
        "error": "", "uid": 0, "architecture": "x86_64", "kernel": "6.1.0", "machine_id": f"{number + 1:032x}", "hostname": f"n{number}",
        "distribution": {"id": "debian", "version": "12", "codename": "bookworm", "name": "Debian GNU/Linux 12 (bookworm)"},
        "hostname_addresses": ["127.0.1.1"], "systemd": True, "python": {"path": "/usr/bin/python3", "version": "3.11.2"},
        "interfaces": [
            {"name": "lo", "up": True, "loopback": True, "mtu": 65536, "addresses": ["127.0.0.1/8"]},
            {"name": "eth0", "up": True, "loopback": False, "mtu": 9000, "addresses": [f"198.18.{number // 250}.{number % 250 + 2}/16"]}],
        "ephemeral_ports": [32768, 60999], "disk": {"/opt/onprem.torch": 1 << 40, "/var/lib/torchrun": 1 << 40}, "paths": {}, "torch": {},
        "listening": [{"address": "0.0.0.0", "port": 22, "pid": 100, "command": "sshd", "unit": "ssh.service"}], "jobs": [],
        "glibc": "2.36", "clock_offset_seconds": 0.0, "cpus": 64, "memory_bytes": 1 << 40,
        "hardware": {"gpus": cards, "usable_gpus": cards, "nvswitches": 4, "nics": [], "settings": {},
                     "driver": {"installed": "", "loaded": "", "version": "", "mismatch": False, "nouveau": False, "open": None, "peermem": False},
                     "fabric": {"required": True, "manager_installed": False, "manager_running": False, "nvlink_bridges": 0, "nvswitches": 4}},
    }


def measure(folder, play):
    """Wall and CPU seconds of ansible-playbook over an inventory."""
    (folder / "play.yml").write_text(play)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ansible", "playbook", folder / "play.yml", "-i", folder / "hosts.json"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_NOCOLOR": "1"})
    output = process.stdout.read()
    _pid, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(output[-3000:])
    return {"wall_seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def main(counts):
    rows = []
    for hosts in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "train.py").write_text("print('step 1')\n")
            group = {"ansible_connection": "local", "torchrun_source": str(folder / "train.py")}
            inventory = {"train": {"hosts": {f"n{number}": {"simulated": {"node": node(number)}} for number in range(hosts)}, "vars": group}}
            (folder / "hosts.json").write_text(json.dumps(inventory))
            row = {"hosts": hosts}
            for kind, play in (("bare", BARE), ("plan", PLAN), ("plan_and_rendering", RENDER)):
                row[kind] = measure(folder, play)
            rows.append(row)
            print(f"{hosts:4} simulated hosts: bare task {row['bare']['wall_seconds']:5.1f} s, plan {row['plan']['wall_seconds']:5.1f} s, "
                  f"plan and rendering {row['plan_and_rendering']['wall_seconds']:5.1f} s "
                  f"(CPU {row['bare']['cpu_seconds']:.1f}, {row['plan']['cpu_seconds']:.1f}, {row['plan_and_rendering']['cpu_seconds']:.1f} s)", flush=True)
    result = {"rows": rows}
    if len(rows) > 1:
        result["ratio"] = round(rows[-1]["plan_and_rendering"]["wall_seconds"] / rows[0]["plan_and_rendering"]["wall_seconds"], 2)
        print(f"{counts[-1]} hosts take {result['ratio']} times what {counts[0]} take (aim: {AIM})")
        if result["ratio"] > AIM:
            parts = ", ".join(f"{kind.replace('_', ' ')} {rows[-1][kind]['wall_seconds'] / rows[0][kind]['wall_seconds']:.2f} times"
                              for kind in ("bare", "plan"))
            each = [f"{1000 * (row['plan_and_rendering']['cpu_seconds'] - row['plan']['cpu_seconds']) / row['hosts']:.0f} ms" for row in rows]
            print(f"    of it: {parts}; rendering takes {' and '.join((each[0], each[-1]))} of CPU a host, "
                  "in Ansible's process for each host, which starts with a copy of all variables and loads the template plugins")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [256, 512])
