"""A signed apt repository like NVIDIA's: flat, with packages of the real names, versions and dependencies, but empty."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import typing as t
from pathlib import Path

SERVICE = "[Unit]\nDescription={name}\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
# A post-installation script that takes as long as a DKMS build where the test asks for it.
# Where the test asks for it, it fails as DKMS does, or asks for a reboot as packages of Debian and Ubuntu do.
POSTINST = """#!/bin/sh
set -e
while [ -e /run/slow-build ]; do sleep 0.1; done
# The file may name the version that cannot be built.
case "@VERSION@" in "$(cat /run/broken-build 2>/dev/null || echo none)"*)
    echo "Error! Bad return status for module build on kernel: $(uname -r) (x86_64)" >&2
    echo "Consult /var/lib/dkms/nvidia/1/build/make.log for more information." >&2
    exit 10
    ;;
esac
if [ -e /etc/asks-for-reboot ]; then
    touch /run/reboot-required
    echo "$DPKG_MAINTSCRIPT_PACKAGE" >>/run/reboot-required.pkgs
fi
"""


class Package(t.NamedTuple):
    """A package to build."""

    name: str
    version: str
    depends: str = ""
    service: str = ""
    slow: bool = False
    conflicts: str = ""
    size_kib: int = 0
    conffile: str = ""


def driver(version: str) -> list[Package]:
    """Return the packages of a driver as NVIDIA's repository for Debian has them; all depend on their own version."""
    same = f"(= {version})"
    return [
        Package("libcuda1", version, f"libnvidia-ptxjitcompiler1 {same}"),
        Package("libnvidia-ptxjitcompiler1", version),
        Package("libnvidia-ml1", version),
        Package("nvidia-smi", version, f"libnvidia-ml1 {same}"),
        Package("nvidia-modprobe", version, conffile="/etc/nvidia-stand-in.conf"),
        Package("firmware-nvidia-gsp", version),
        Package("nvidia-kernel-open-dkms", version, f"firmware-nvidia-gsp {same}", slow=True, conflicts="nvidia-kernel-dkms"),
        Package("nvidia-kernel-dkms", version, f"firmware-nvidia-gsp {same}", slow=True, conflicts="nvidia-kernel-open-dkms"),
        Package("nvidia-persistenced", version, "", "nvidia-persistenced.service"),
        Package(
            "nvidia-driver-cuda",
            version,
            f"libcuda1 {same}, nvidia-smi {same}, nvidia-modprobe {same}, nvidia-kernel-open-dkms {same} | nvidia-kernel-dkms {same}",
        ),
        Package("nvidia-fabricmanager", version, "", "nvidia-fabricmanager.service"),
    ]


def headers(kernel: str) -> list[Package]:
    """Return the headers of a kernel, which Debian's own archive has for its own kernels only."""
    return [Package(f"linux-headers-{kernel}", "1")]


def nccl(version: str) -> list[Package]:
    """Return NCCL's packages."""
    return [Package("libnccl2", version), Package("libnccl-dev", version, f"libnccl2 (= {version})")]


def toolkit(line: str, version: str) -> list[Package]:
    """Return the CUDA toolkit's package, with one part of it."""
    dashed = line.replace(".", "-")
    return [Package(f"cuda-toolkit-{dashed}", version, f"cuda-nvcc-{dashed}"), Package(f"cuda-nvcc-{dashed}", version)]


def build(package: Package, folder: Path, fill: t.Callable[[Path], None] = lambda tree: None) -> Path:
    """Build a package and return its file.

    Args:
        package: what it is.
        folder: where its file will lie.
        fill: puts further files into the package's tree.
    """
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "DEBIAN").mkdir(parents=True)
    lines = [
        f"Package: {package.name}",
        f"Version: {package.version}",
        "Architecture: all",
        "Maintainer: Test <test@example.org>",
        "Description: empty stand-in with the real name, version and dependencies",
        *([f"Depends: {package.depends}"] if package.depends else []),
        *([f"Conflicts: {package.conflicts}"] if package.conflicts else []),
        *([f"Installed-Size: {package.size_kib}"] if package.size_kib else []),
    ]
    (tree / "DEBIAN" / "control").write_text("\n".join(lines) + "\n")
    if package.slow:
        (tree / "DEBIAN" / "postinst").write_text(POSTINST.replace("@VERSION@", package.version))
        (tree / "DEBIAN" / "postinst").chmod(0o755)
    if package.service:
        unit = tree / "usr/lib/systemd/system" / package.service
        unit.parent.mkdir(parents=True)
        unit.write_text(SERVICE.format(name=package.name))
    if package.conffile:
        file = tree / package.conffile.lstrip("/")
        file.parent.mkdir(parents=True)
        file.write_text(f"# as {package.version} ships it\n")
        (tree / "DEBIAN" / "conffiles").write_text(f"{package.conffile}\n")
    note = tree / "usr/share/doc" / package.name / "version"
    note.parent.mkdir(parents=True)
    note.write_text(f"{package.version}\n")
    fill(tree)
    target = folder / f"{package.name}_{package.version}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(target)], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return target


class Key:
    """A throwaway key that signs."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700, parents=True)
        self.home = home
        self.gpg("--passphrase", "", "--quick-generate-key", "Throwaway <test@example.org>", "rsa3072", "sign", "never")
        listing = self.gpg("--with-colons", "--list-keys").decode()
        self.fingerprint = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))

    def gpg(self, *words: str) -> bytes:
        """Run gpg with this key's folder."""
        return subprocess.run(["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--yes", *words], check=True, stdout=subprocess.PIPE).stdout

    def public(self) -> bytes:
        """Return the public key, armored."""
        return self.gpg("--armor", "--export", self.fingerprint)

    def close(self) -> None:
        """End gpg's agent."""
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False)


class Repository:
    """A folder that is a flat apt repository."""

    def __init__(self, folder: Path, key: Key, origin: str = "NVIDIA") -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.origin = origin
        self.key = key
        self.sign_with(key)

    def sign_with(self, key: Key) -> None:
        """Let a key sign from now on; the public key on offer stays."""
        self.key = key
        offered = self.folder / "key.pub"
        if not offered.exists():
            offered.write_bytes(key.public())
            (self.folder / "key.gpg").write_bytes(key.gpg("--export", key.fingerprint))

    def offer(self, packages: t.Iterable[Package]) -> None:
        """Offer exactly these packages."""
        entries = []
        for old in self.folder.glob("*.deb"):
            if old.name not in {f"{package.name}_{package.version}_all.deb" for package in packages}:
                old.unlink()
        for package in packages:
            path = self.folder / f"{package.name}_{package.version}_all.deb"
            if not path.exists():
                build(package, self.folder)
            data = path.read_bytes()
            control = subprocess.run(["dpkg-deb", "--field", str(path)], check=True, stdout=subprocess.PIPE, text=True).stdout
            entries.append(f"{control}Filename: ./{path.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n")
        self.publish("\n".join(entries))

    def publish(self, index: str) -> None:
        """Write and sign the index."""
        plain = index.encode()
        (self.folder / "Packages").write_bytes(plain)
        (self.folder / "Packages.gz").write_bytes(gzip.compress(plain, mtime=0))
        sums = []
        for name in ("Packages", "Packages.gz"):
            data = (self.folder / name).read_bytes()
            sums.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}")
        date = subprocess.run(["date", "-Ru"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip().replace("+0000", "UTC")
        text = "\n".join([f"Origin: {self.origin}", f"Label: {self.origin}", "Architectures: amd64 all", f"Date: {date}", "SHA256:", *sums]) + "\n"
        (self.folder / "Release").write_text(text)
        self.key.gpg("--local-user", self.key.fingerprint, "--clearsign", "--output", str(self.folder / "InRelease"), str(self.folder / "Release"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: t.Any) -> None:  # pylint: disable=redefined-builtin
        """Say nothing."""


def serve(folder: Path, address: str) -> tuple[http.server.ThreadingHTTPServer, int]:
    """Serve a folder on an address and return server and port."""
    server = http.server.ThreadingHTTPServer((address, 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_address[1]


# The manifest's driver and a newer one by distribution: NVIDIA's repository for Debian 13 has no 580.
MIRROR = {"debian12": ("580.105.08-1", "580.159.03-1"), "debian13": ("590.48.01-1", "595.71.05-1")}


def main(folder: Path) -> None:
    """Build a mirror of the repositories for both Debians as FOLDER/mirror.tar; the key's fingerprint lies beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        key = Key(Path(scratch) / "gpg")
        # Toolkit and NCCL are the same in both: what NVIDIA's own repository for Debian 13 lacks, a mirror of one's own may have.
        further = [*headers(platform.release()), *toolkit("13.0", "13.0.2-1"), *nccl("2.28.9-1+cuda13.0"), *nccl("2.29.7-1+cuda12.9")]
        for name, drivers in MIRROR.items():
            repository = Repository(Path(scratch) / f"mirror/nvidia/{name}/x86_64", key)
            repository.offer([*further, *(package for version in drivers for package in driver(version))])
            for key_name in ("3bf863cc.pub", "8793F200.pub"):
                shutil.copy(repository.folder / "key.pub", repository.folder / key_name)
        subprocess.run(["tar", "--create", "--file", str(folder / "mirror.tar"), "--directory", scratch, "mirror"], check=True)
        (folder / "fingerprint").write_text(key.fingerprint)
        key.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
