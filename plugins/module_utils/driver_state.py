# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the running kernel has the driver that is installed, or needs a reboot for it."""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text


class Kernel(t.NamedTuple):
    """What a kernel runs.

    Attributes:
        container: the node is a container, whose kernel is its host's; its own packages change nothing in it.
        version: version of the module, empty where it is not loaded.
        is_open: whether the open modules are loaded; None where nothing tells.
        nouveau: whether nouveau is loaded.
    """

    container: bool
    version: str
    is_open: t.Optional[bool]
    nouveau: bool


def kernel(name: str, root: str = "/") -> Kernel:
    """Return what the kernel runs of a module."""
    text = read_text(os.path.join(root, "proc/driver", name, "version"))
    return Kernel(
        any(os.path.exists(os.path.join(root, path)) for path in ("run/systemd/container", "run/host/container-manager")),
        read_text(os.path.join(root, "sys/module", name, "version")).strip(),
        "Open Kernel Module" in text if text else None,
        os.path.isdir(os.path.join(root, "sys/module/nouveau")),
    )


def asking(root: str = "/") -> list[str]:
    """Return the packages that ask for a reboot, in the file that Debian's and Ubuntu's packages write for that."""
    return sorted(set(read_text(os.path.join(root, "run/reboot-required.pkgs")).split()))


def reboot_reason(name: str, version: str, flavour: str, found: Kernel, asked: t.Sequence[str]) -> str:
    """Return why a reboot is needed, as part of a sentence; empty where none is, or where loading the module may do.

    Args:
        name: kernel module.
        version: the version that is installed.
        flavour: C(open), C(proprietary), or empty for any.
        found: what the kernel runs.
        asked: packages of the set that ask for a reboot. Where the kernel itself can tell, it is believed instead.
    """
    if found.container:
        return f"{', '.join(asked)} asked for it" if asked else ""
    if not found.version:
        return "the kernel runs nouveau" if found.nouveau else ""
    if found.version != version:
        return f"the kernel runs {name} {found.version}, but {version} is installed"
    if flavour and found.is_open is not None and found.is_open is not (flavour == "open"):
        running = "open" if found.is_open else "proprietary"
        return f"the kernel runs the {running} modules of {name}, but the {flavour} ones are installed"
    return ""


def refusal(name: str, error: str) -> str:
    """Return why a reboot would not help where modprobe failed, as a sentence with its cure; empty where it may.

    Args:
        name: kernel module.
        error: what modprobe printed.
    """
    if re.search(r"Key was rejected|Required key not available|Operation not permitted", error):
        return (
            f"the kernel refuses the module {name} ({error.strip()}): Secure Boot does not trust its key; "
            "enrol DKMS's key (mokutil --import /var/lib/dkms/mok.pub and a reboot), or switch Secure Boot off"
        )
    lost = re.search(r"Module \S+ not found in directory (\S+)", error)
    if lost:
        return (
            f"{lost.group(1)} has no module {name}: DKMS has not built it for the running kernel, so that a reboot would not help; "
            f"look at dkms status and /var/lib/dkms/{name}/*/build/make.log, repair that and run this again"
        )
    return ""


def gib(path: str) -> float:
    """Return the size of the file system at a path in GiB; 0 where there is none."""
    try:
        state = os.statvfs(path)
    except OSError:
        return 0  # nothing is mounted there: differs from every size that can be asked for
    return state.f_blocks * state.f_frsize / 1024**3


def service_words(fields: t.Mapping[str, str], runs: bool, sized: bool) -> list[str]:
    """Return what systemctl is asked for so that a unit is enabled and runs as its file says.

    Args:
        fields: C(LoadState), C(UnitFileState) and C(ActiveState) of the unit.
        runs: whether what the unit needs runs, so that it may start.
        sized: whether the file system that the unit resizes has its size; a unit that stays active after it has done its
            work does not do it again by itself.
    """
    if fields.get("LoadState") != "loaded":
        return []
    words = ["enable"] if fields["UnitFileState"] in ("disabled", "linked") else []
    if runs and fields["ActiveState"] in ("inactive", "failed"):
        return [*words, "start"]
    return [*words, "restart"] if runs and not sized else words


def disabling_words(fields: t.Mapping[str, str]) -> list[str]:
    """Return what systemctl is asked for so that a unit neither runs nor starts at boot."""
    if fields.get("LoadState") != "loaded":
        return []
    words = ["disable"] if fields["UnitFileState"] == "enabled" else []
    return words if fields["ActiveState"] in ("inactive", "failed") else [*words, "stop"]
