"""Sets of packages as the plan gives them, and what the module answers."""

from __future__ import annotations

import typing as t

import apt_repository
import conftest
from builders import MANIFEST

OLD, NEW = "580.105.08-1", "580.159.03-1ubuntu1"
UPGRADE = "DEBIAN_FRONTEND=noninteractive apt-get --yes full-upgrade"
# Only the new repository is asked, so that the nodes' other packages stay as they are.
UPDATE = "apt-get -o Dir::Etc::SourceList=/etc/apt/sources.list.d/onprem-torch-nvidia.sources -o Dir::Etc::SourceParts=/dev/null update"
PACKAGES = ("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager")
FAMILY = MANIFEST["driver_family"]
WHOLE = {package.name for package in apt_repository.driver(OLD)} - {"nvidia-kernel-dkms"}


def driver(source: conftest.Source, version: str = "580.105.08", **changes: t.Any) -> dict[str, t.Any]:
    """Return the settings of the driver as the plan gives them."""
    return {
        "name": "nvidia_driver",
        "repository": source.settings,
        "packages": [{"name": name, "version": f"{version}-*"} for name in PACKAGES],
        "pins": [{"packages": FAMILY, "version": f"{version}-*"}],
        "files": {"/etc/modprobe.d/onprem-torch-nouveau.conf": "blacklist nouveau\n"},
        "services": ["nvidia-persistenced.service", "nvidia-fabricmanager.service"],
        **changes,
    }


def library(source: conftest.Source, version: str) -> dict[str, t.Any]:
    """Return the settings of NCCL as the plan gives them."""
    names = ["libnccl2", "libnccl-dev"]
    packages = [{"name": name, "version": version} for name in names]
    return {"name": "nccl", "repository": source.settings, "packages": packages, "pins": [{"packages": names, "version": version}]}


def succeeded(answers: list[dict[str, t.Any]], changed: bool = True) -> list[dict[str, t.Any]]:
    for answer in answers:
        assert not answer.get("failed"), answer.get("msg")
        assert answer["changed"] is changed, answer.get("diff")
    return answers


def refused(answers: list[dict[str, t.Any]]) -> list[str]:
    for answer in answers:
        assert answer.get("failed"), answer
        assert "Traceback" not in answer["msg"]
    return [str(answer["msg"]) for answer in answers]
