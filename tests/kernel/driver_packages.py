"""The packages of a driver that has a kernel module: DKMS builds it from source, as it does NVIDIA's."""

from __future__ import annotations

import shutil
import sys
import typing as t
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "nvidia"))
import apt_repository

FLAVOURS = {
    "nvidia-kernel-open-dkms": "Open Kernel Module for x86_64",
    "nvidia-kernel-dkms": "x86_64 Kernel Module",
}
# As dh_dkms writes them. A version that could not be built may be unknown to DKMS, and its package has to go all the same.
POSTINST = """#!/bin/sh
set -e
[ "$1" != configure ] || /usr/lib/dkms/common.postinst nvidia {version} /usr/share/{name} "" "$2"
"""
PRERM = """#!/bin/sh
set -e
[ ! -x /usr/sbin/dkms ] || dkms remove -m nvidia -v {version} --all || true
"""
# The real one loads the modules and makes the device files.
MODPROBE = """#!/bin/sh
modprobe nvidia && modprobe nvidia-uvm
"""


def tree(package: apt_repository.Package, broken: bool) -> t.Callable[[Path], None]:
    """Return what puts a package's files into its tree.

    Args:
        package: one of :data:`FLAVOURS`, or nvidia-modprobe.
        broken: whether the module's source does not compile.
    """
    version = package.version.rpartition("-")[0]

    def fill(root: Path) -> None:
        if package.name == "nvidia-modprobe":
            program = root / "usr/bin/nvidia-modprobe"
            program.parent.mkdir(parents=True)
            program.write_text(MODPROBE)
            program.chmod(0o755)
            return
        source = root / "usr/src" / f"nvidia-{version}"
        shutil.copytree(HERE / "driver_source", source)
        for name in ("Makefile", "dkms.conf"):
            text = (source / name).read_text()
            (source / name).write_text(text.replace("@VERSION@", version).replace("@FLAVOUR@", FLAVOURS[package.name]))
        if broken:
            with (source / "nvidia.c").open("a") as stream:
                stream.write('#error "this kernel is too new for this driver"\n')
        for name, text in (("postinst", POSTINST), ("prerm", PRERM)):
            (root / "DEBIAN" / name).write_text(text.format(version=version, name=package.name))
            (root / "DEBIAN" / name).chmod(0o755)

    return fill


def offer(
    repository: apt_repository.Repository,
    versions: t.Sequence[str],
    broken: t.Sequence[str] = (),
    further: t.Sequence[apt_repository.Package] = (),
) -> None:
    """Offer drivers of these versions, of which some have modules that do not compile, and further packages."""
    packages = list(further)
    for version in versions:
        for package in apt_repository.driver(version):
            if package.name in FLAVOURS:
                package = package._replace(depends=f"dkms, {package.depends}", slow=False)
            packages.append(package)
            if package.name in FLAVOURS or package.name == "nvidia-modprobe":
                path = repository.folder / f"{package.name}_{package.version}_all.deb"
                if not path.exists():
                    apt_repository.build(package, repository.folder, tree(package, version in broken))
    repository.offer(packages)
