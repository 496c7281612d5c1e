# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the unit of a node runs: the command of torch.distributed.run, the supervisor before it, and their environment."""

from __future__ import annotations

import re
import shlex
import typing as t

# Exit codes of the supervisor that systemd must not restart (docs/supervisor.md).
FINAL_EXIT_CODES = (2, 10)
# That of a supervisor that leaves for a while; systemd starts it again, unless it has ended the unit itself.
AGAIN_EXIT_CODE = 75
MIB = 1024**2
# Where units and their secrets lie.
SETTINGS = "/etc/torchrun"
# Roots that are the product's own by their names, so that their modes are put right.
OWN_ROOTS = ("/var/lib/torchrun", "/var/log/torchrun", "/opt/onprem.torch")
# Stands in for torch.distributed.run where torch may have been built without libuv; it finds that out when it starts.
WITHOUT_LIBUV = "torchrun_without_libuv.py"
# What every process of a job lives under (systemd.exec(5)), and what a measurement for the job must live under too.
# The unit's template tells which directives training cannot bear.
SERVICE_PROPERTIES = (
    "OOMPolicy=continue",
    "LogRateLimitIntervalSec=0",
    "LimitMEMLOCK=infinity",
    "LimitNOFILE=1048576",
    "TasksMax=infinity",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectHostname=yes",
    "RestrictSUIDSGID=yes",
    "RestrictRealtime=yes",
    "RestrictNamespaces=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "LockPersonality=yes",
    "KeyringMode=private",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "SystemCallArchitectures=native",
    "SystemCallFilter=~@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap",
)
# Variables of a user that change how ranks talk to each other; a measurement for the job takes them over.
COMMUNICATION = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_", "UCX_", "FI_")


def job_paths(job: t.Mapping[str, t.Any], data_paths: t.Sequence[str]) -> dict[str, t.Any]:
    """Return the folders and files of a job, and which of them the unit may write to."""
    root = job["root"]
    writable = [f"{root}/work", f"{root}/state", f"{root}/cache", job["log_dir"], job["checkpoint_dir"], *data_paths]
    mounts = [root, job["checkpoint_dir"], *data_paths]
    in_home = any(path == "/root" or path.startswith(("/root/", "/home/")) for path in [*mounts, job["python"]])
    return {
        "environment_file": f"{SETTINGS}/{job['name']}.env",
        "secret_file": f"{SETTINGS}/{job['name']}.secret",
        "folders": [f"{root}/work", f"{root}/state", f"{root}/cache", job["log_dir"], job["checkpoint_dir"]],
        "writable": list(dict.fromkeys(writable)),
        "mounts": list(dict.fromkeys(mounts)),
        "protect_home": not in_home,
        "final_exit_codes": list(FINAL_EXIT_CODES),
        "again_exit_code": AGAIN_EXIT_CODE,
        "service_properties": [*SERVICE_PROPERTIES, *([f"MemoryMax={job['memory_max']}"] if job.get("memory_max") else [])],
    }


def network_environment(node: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Return the variables that choose a node's interface and GPUs."""
    # Names of interfaces are matched exactly with '=', else as prefixes (NCCL user guide, NCCL_SOCKET_IFNAME).
    values = {"NCCL_SOCKET_IFNAME": f"={node['interface']}", "GLOO_SOCKET_IFNAME": node["interface"]}
    return {**values, **visible_devices(str(node.get("devices") or ""))}


def visible_devices(devices: str) -> dict[str, str]:
    """Return the variables that show CUDA some GPUs only, with the indices of nvidia-smi; CUDA's own put the fastest first."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": devices} if devices else {}


def communication_environment(variables: t.Mapping[str, str]) -> dict[str, str]:
    """Return those of a user's variables that change how ranks talk to each other."""
    return {name: value for name, value in variables.items() if name.startswith(COMMUNICATION)}


def environment(job: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Return the environment of a node's unit: the variables that Lightning's page sets by hand, and torch's own."""
    root = job["root"]
    return {
        "MASTER_ADDR": job["master_addr"],
        "MASTER_PORT": str(job["master_port"]),
        "NODE_RANK": str(node["rank"]),
        **network_environment(node),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        "PYTHONUNBUFFERED": "1",
        # Release and environment are read-only, so home and caches are folders of the job's.
        "HOME": f"{root}/work",
        "XDG_CACHE_HOME": f"{root}/cache",
        "TORCHRUN_JOB": job["name"],
        "TORCHRUN_CHECKPOINT_DIR": job["checkpoint_dir"],
    }


def place(unit: str) -> dict[str, str]:
    """Return a unit's place in the cluster: the options of torchrun that say which node it is, of how many, and whose."""
    found = re.findall(r"--(nnodes|node-rank|master-addr|master-port)=(\S+)", unit.partition(" -- ")[2])
    return dict(reversed(found))  # the script's own arguments come after torchrun's


def supervisor_options(unit: str) -> dict[str, str]:
    """Return the options of the supervisor in a unit's ExecStart, by name; empty where there are none to be read."""
    command = unit.partition("\nExecStart=")[2].partition(" -- ")[0].partition("\n")[0]
    try:
        words = shlex.split(command)
    except ValueError:
        return {}
    values = (word.replace("%%", "%").replace("$$", "$") for word in words[1:])
    return {name[2:]: value for name, value in zip(words, values) if name.startswith("--")}


def torchrun_program(node: t.Mapping[str, t.Any], folder: str) -> list[str]:
    """Return how a node starts torch.distributed.run: by itself, or where torch is the distribution's by a program of ours.

    Args:
        node: its entry of the plan.
        folder: where our programs lie on the node.
    """
    distributions_own = node["pytorch"]["environment"].rstrip("/") == "/usr"
    return [node["python"], *([f"{folder}/{WITHOUT_LIBUV}"] if distributions_own else ["-m", "torch.distributed.run"])]


def torchrun_command(job: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any]) -> list[str]:
    """Return the command that one would type by hand on a node. Static rendezvous, since c10d ignores --node-rank."""
    return [
        *torchrun_program(node, f"{job['root']}/current"),
        f"--nnodes={job['nnodes']}",
        f"--node-rank={node['rank']}",
        f"--nproc-per-node={node['nproc']}",
        f"--master-addr={job['master_addr']}",
        f"--master-port={job['master_port']}",
        "--max-restarts=0",
        "--tee=3",
        f"--log-dir={job['log_dir']}",
        f"{job['root']}/current/source/{job['script']}",
        *job["args"],
    ]


def supervisor_command(job: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any]) -> list[str]:
    """Return the supervisor's command up to, and without, the secret and the command to run."""
    root = job["root"]
    words: list[t.Any] = ["/usr/bin/python3", f"{root}/current/torchrun_supervisor.py"]
    options: dict[str, t.Any] = {
        "job": job["name"],
        "host": node["host"],
        "node-rank": node["rank"],
        "nnodes": job["nnodes"],
        "coordinator": f"{job['master_addr']}:{job['supervisor_port']}",
        "bind": node["address"],
        "state-dir": f"{root}/state",
        "log-dir": job["log_dir"],
        "checkpoint-dir": job["checkpoint_dir"],
        "checkpoint-glob": job["checkpoint_glob"],
        "max-restarts": job["max_restarts"],
        "hang-timeout": job["hang_timeout"],
        "grace": job["stop_timeout"],
        "release": job["release"],
    }
    for name, value in options.items():
        words += [f"--{name}", value]
    for check in checks(job, node):
        words += ["--check", check]
    return [str(word) for word in words]


def checks(job: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any]) -> list[str]:
    """Return what the supervisor looks at before every start of torchrun. It compares the clocks by itself."""
    usable = len((node.get("hardware") or {}).get("usable_gpus") or [])
    gpus = len(node["devices"].split(",")) if node.get("devices") else usable
    wanted = [f"release={job['root']}/current:{job['release']}"]
    if gpus:
        wanted.append(f"gpus={gpus}")
    if job["shm_free_mib"]:
        wanted.append(f"shm={job['shm_free_mib'] * MIB}")
    if job["disk_free_mib"]:
        wanted.append(f"disk={job['checkpoint_dir']}:{job['disk_free_mib'] * MIB}")
    return wanted
