# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role nccl does on a node: the library, /etc/nccl.conf and the system's limits that NCCL meets."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import Manifest, Node, Variables, gpus_of

NCCL_CONF = "/etc/nccl.conf"
LIMITS = "/etc/security/limits.d/onprem-torch.conf"
LOGIND = "/etc/systemd/logind.conf.d/onprem-torch.conf"
SHM_UNIT = "onprem-torch-shm.service"
# The job's unit has its own limits; these are for what people start by hand, and for their shared memory when they log out.
LIMITS_TEXT = "# RDMA locks memory (onprem.torch.nccl).\n* - memlock unlimited\nroot - memlock unlimited\n"
LOGIND_TEXT = "# Logging out must not remove a running job's shared memory (onprem.torch.nccl).\n[Login]\nRemoveIPC=no\n"
SHM_TEXT = """\
[Unit]
Description=Size of /dev/shm (onprem.torch.nccl)
DefaultDependencies=no
After=local-fs.target
Before=basic.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/mount -o remount,size={size}g /dev/shm

[Install]
WantedBy=basic.target
"""


def configuration(name: str, variables: Variables, node: Node, interface: str) -> dict[str, str]:
    """Return the content of /etc/nccl.conf: what the user sets, and the training interface on nodes with GPUs."""
    chosen = {str(key): str(value) for key, value in (variables.get("nccl_configuration") or {}).items()}
    if gpus_of(node) and name != "cpu" and interface:
        # The equals sign asks for this very name; ib1 alone would match ib10 too (NCCL, "NCCL_SOCKET_IFNAME").
        chosen = {"NCCL_SOCKET_IFNAME": f"={interface}", **chosen}
    return chosen


def files_of(name: str, variables: Variables, node: Node, interface: str) -> dict[str, str]:
    """Return text by path."""
    found = {}
    chosen = configuration(name, variables, node, interface)
    if chosen:
        lines = "".join(f"{key}={value}\n" for key, value in sorted(chosen.items()))
        found[NCCL_CONF] = f"# Managed by onprem.torch.nccl; variables of a process win over this file.\n{lines}"
    if variables.get("nccl_limits") and gpus_of(node) and name != "cpu":
        found.update({LIMITS: LIMITS_TEXT, LOGIND: LOGIND_TEXT})
    if variables.get("nccl_shm_gib"):
        found[f"/etc/systemd/system/{SHM_UNIT}"] = SHM_TEXT.format(size=variables["nccl_shm_gib"])
    return found


def decide(
    name: str, variables: Variables, node: Node, interface: str, source: t.Mapping[str, t.Any], manifest: Manifest
) -> dict[str, t.Any]:
    """Return what the role nccl does on a node.

    Args:
        name: the cluster's line.
        variables: the host's variables.
        node: what node_info found.
        interface: the training interface.
        source: the repository.
        manifest: what fits together.
    """
    files = files_of(name, variables, node, interface)
    library = bool(variables.get("nccl_library")) and name != "cpu"
    if not files and not library:
        return {"wanted": False}
    settings: dict[str, t.Any] = {"name": "nccl", "packages": [], "pins": [], "files": files}
    settings["absent_files"] = [path for path in (LIMITS, LOGIND) if path not in files]
    settings["services"] = [SHM_UNIT] if variables.get("nccl_shm_gib") else []
    settings["sizes"] = {SHM_UNIT: {"path": "/dev/shm", "gib": variables["nccl_shm_gib"]}} if variables.get("nccl_shm_gib") else {}
    if library:
        version = str(variables.get("nccl_version") or manifest["lines"][name]["nccl_version"])
        settings["repository"] = dict(source)
        settings["packages"] = [{"name": package, "version": version} for package in ("libnccl2", "libnccl-dev")]
        settings["pins"] = [{"packages": ["libnccl2", "libnccl-dev"], "version": version}]
    return {"wanted": True, "settings": settings}
