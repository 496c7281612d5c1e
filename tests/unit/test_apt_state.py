"""What dpkg and apt print, and OpenPGP keys made by the real gpg."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, openpgp

STATUS = """\
Package: libnccl2
Status: hold ok installed
Version: 2.29.7-1+cuda12.9

Package: nvidia-kernel-open-dkms
Status: install ok half-configured
Version: 580.105.08-1

Package: gone
Status: deinstall ok config-files
Version: 1

Package: torn
Status: install reinstreq half-installed
Version: 2
"""


def test_dpkgs_status():
    state = apt_state.parse_status(STATUS)
    assert state["libnccl2"] == {"want": "hold", "flag": "ok", "state": "installed", "version": "2.29.7-1+cuda12.9"}
    assert apt_state.broken(state) == ["nvidia-kernel-open-dkms", "torn"]
    assert apt_state.installed(state, "libnccl2") == "2.29.7-1+cuda12.9"
    assert apt_state.installed(state, "gone") == apt_state.installed(state, "torn") == apt_state.installed(state, "never") == ""


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("580.105.08-1", "580.105.08-*", True),
        ("580.105.08-0ubuntu1", "580.105.08-*", True),
        ("580.105.081-1", "580.105.08-*", False),
        ("2.29.7-1+cuda12.9", "2.29.7-1+cuda12.9", True),
        ("2.29.7-1+cuda13.0", "2.29.7-1+cuda12.9", False),
        ("1", "", True),
    ],
)
def test_versions_fit(version, wanted, expected):
    assert apt_state.fits(version, wanted) is expected


def test_what_lacks_and_what_belongs_to_a_pin():
    state = apt_state.parse_status(STATUS)
    wanted = [{"name": "libnccl2", "version": "2.29.*"}, {"name": "libnccl-dev", "version": ""}, {"name": "gone", "version": ""}]
    assert [entry["name"] for entry in apt_state.lacking(state, wanted)] == ["libnccl-dev", "gone"]
    assert apt_state.family(state, [{"packages": ["libnccl*", "gone"], "version": "2.29.7-1+cuda12.9"}]) == {
        "libnccl2": "2.29.7-1+cuda12.9"
    }


def test_madison_and_simulation():
    text = "  libnccl2 | 2.29.7-1+cuda12.9 | http://198.18.0.1/ / Packages\n  libnccl2 | 2.28.9-1+cuda12.9 | http://x/ / Packages\n"
    assert apt_state.parse_madison(text) == {"libnccl2": ["2.29.7-1+cuda12.9", "2.28.9-1+cuda12.9"]}
    text = "Remv nvidia-kernel-dkms [1] [x ]\nInst libnccl2 [2.28.9-1] (2.29.7-1 nv:1.0/x [amd64])\nInst new:amd64 (1 Debian)\nConf new (1)\n"
    assert apt_state.parse_simulation(text) == ({"libnccl2": "2.29.7-1", "new": "1"}, ["nvidia-kernel-dkms"])
    assert apt_state.parse_sizes("Size: 100\nInstalled-Size: 2\n\nSize: 1\nInstalled-Size: 1\n") == (101, 3072)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Err:1 http://x / InRelease\n  Could not connect to 198.18.0.9:80 (198.18.0.9). - connect (111: Connection refused)\n", "Could not connect"),
        ("W: GPG error: http://x / Release: Not verified: NO_PUBKEY 1234\nE: The repository 'http://x' is not signed.\n", "NO_PUBKEY"),
        ("E: Unable to locate package x\n", "Unable to locate package x"),
        (
            "Error! Bad return status for module build on kernel: 6.1.0-30-amd64 (x86_64)\n"
            "Consult /var/lib/dkms/nvidia/580.105.08/build/make.log for more information.\n"
            "dpkg: error processing package nvidia-kernel-open-dkms (--configure):\n"
            " installed nvidia-kernel-open-dkms package post-installation script subprocess returned error exit status 10\n"
            "E: Sub-process /usr/bin/dpkg returned an error code (1)\n",
            "nvidia-kernel-open-dkms: a kernel module was not built, see /var/lib/dkms/nvidia/580.105.08/build/make.log",
        ),
        (
            "dpkg: error processing archive /var/cache/apt/archives/x_1_all.deb (--unpack):\n trying to overwrite '/usr/x', which is also in package y 1\n"
            "E: Sub-process /usr/bin/dpkg returned an error code (1)\n",
            "dpkg cannot set up /var/cache/apt/archives/x_1_all.deb",
        ),
    ],
)
def test_apts_complaint_in_one_line(text, word):
    assert word in apt_state.complaint(text)
    assert "\n" not in apt_state.complaint(text)


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is needed to make a key")
@pytest.mark.parametrize("algorithm", ["rsa2048", "ed25519"])
def test_fingerprints_are_those_of_gpg(tmp_path, algorithm):
    tmp_path.chmod(0o700)
    gpg = ["gpg", "--homedir", str(tmp_path), "--batch", "--quiet"]
    subprocess.run([*gpg, "--passphrase", "", "--quick-gen-key", "test@example.org", algorithm, "sign", "never"], check=True)
    listed = subprocess.run([*gpg, "--with-colons", "--list-keys"], check=True, capture_output=True, text=True).stdout
    expected = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))
    for armor in ([], ["--armor"]):
        data = subprocess.run([*gpg, *armor, "--export"], check=True, capture_output=True).stdout
        assert openpgp.fingerprints(data) == [expected]
        assert openpgp.is_armored(data) is bool(armor)
        with pytest.raises(openpgp.KeyFileError):
            openpgp.fingerprints(data[: len(data) // 2])
    subprocess.run(["gpgconf", "--homedir", str(tmp_path), "--kill", "all"], check=False)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x99\x01"])
def test_what_is_no_key_is_refused(data):
    with pytest.raises(openpgp.KeyFileError):
        openpgp.fingerprints(data)


def test_packages_of_interest_are_told_with_what_is_half_done():
    status = (
        "Package: nvidia-smi\nStatus: hold ok installed\nVersion: 1\n\nPackage: vim\nStatus: install ok installed\nVersion: 2\n\n"
        "Package: cups\nStatus: install ok half-configured\nVersion: 3\n\nPackage: nvidia-old\nStatus: deinstall ok config-files\nVersion: 4\n"
    )
    assert sorted(apt_state.chosen(apt_state.parse_status(status), ["nvidia-*"])) == ["cups", "nvidia-smi"]
    assert sorted(apt_state.chosen(apt_state.parse_status(status), [])) == ["cups"]


def test_own_pins_are_read_from_our_files_only(tmp_path):
    folder = tmp_path / "etc/apt/preferences.d"
    folder.mkdir(parents=True)
    (folder / "00-onprem-torch-nccl.pref").write_text(apt_state.preferences([{"packages": ["libnccl2", "libnccl-dev"], "version": "1"}]))
    (folder / "other.pref").write_text("Package: vim\nPin: version 1\nPin-Priority: 1001\n")
    assert apt_state.own_pins(str(tmp_path)) == ["libnccl2", "libnccl-dev"]


def test_of_a_package_that_the_repository_has_only_its_own_versions_count():
    text = "libcuda1 | 580.105.08-4 | http://deb.debian.org/debian trixie/non-free amd64 Packages\nlibcuda1 | 580.105.08-1 | http://nv/x  Packages\n"
    text += "dkms | 3.0.10-8 | http://deb.debian.org/debian trixie/main amd64 Packages\n"
    assert apt_state.parse_madison(text, "http://nv/x/") == {"libcuda1": ["580.105.08-1"], "dkms": ["3.0.10-8"]}
    assert apt_state.parse_madison(text, "http://nv/") == apt_state.parse_madison(text)
    assert apt_state.parse_madison("a | 1 | file:/srv/x  Packages\na | 2 | http://x  Packages\n", "file:///srv/x/") == {"a": ["1"]}
    assert apt_state.parse_madison(text) == {"libcuda1": ["580.105.08-4", "580.105.08-1"], "dkms": ["3.0.10-8"]}


def test_the_distributions_packages_are_refused_before_a_version_is_preferred():
    pins = [{"packages": ["libcuda1", "nvidia-*"], "version": "580.105.08-*"}, {"packages": ["nvlsm"], "version": ""}]
    first, second, third = apt_state.preferences(pins, refuse_distribution=True).split("\n\n")
    assert first.endswith("Package: libcuda1 nvidia-*\nPin: release o=/^(Debian|Ubuntu|LP-PPA-)/\nPin-Priority: -1")
    assert second == "Package: libcuda1 nvidia-*\nPin: version 580.105.08-*\nPin-Priority: 1001"
    assert third == "Package: nvlsm\nPin: version *\nPin-Priority: 500\n"
    assert "release" not in apt_state.preferences(pins)


def test_sources_that_apt_could_not_read():
    assert apt_state.unreadable_sources("E: Conflicting values set for option Signed-By\nE: The list of sources could not be read.\n")
    assert not apt_state.unreadable_sources("N: Unable to locate package x\n")


def test_what_a_set_pins_no_more_is_released():
    entry = {"flag": "ok", "state": "installed", "version": "1"}
    packages = {"cuda-toolkit-12-9": {**entry, "want": "hold"}, "cuda-toolkit-13-0": {**entry, "want": "hold"}, "vim": {**entry, "want": "hold"}}
    pins = [{"packages": ["cuda-toolkit-13-0"], "version": "1"}]
    assert apt_state.released(packages, pins, ["cuda-toolkit-12-9", "cuda-toolkit-13-0"]) == ["cuda-toolkit-12-9"]
    assert apt_state.released(packages, pins, []) == []


def test_no_key_hides_behind_another_one():
    body = b"\x04" + bytes(20)
    one = b"\x99" + len(body).to_bytes(2, "big") + body
    assert len(openpgp.fingerprints(one)) == 1 and len(openpgp.fingerprints(one + one)) == 2
    with pytest.raises(openpgp.KeyFileError, match="another version"):
        openpgp.fingerprints(one + one.replace(b"\x04", b"\x06"))


@pytest.mark.parametrize(
    ("text", "locked"),
    [
        ("E: Could not get lock /var/lib/apt/lists/lock. It is held by process 87 (apt-get)\nE: Unable to lock directory /var/lib/apt/lists/\n", True),
        ("E: Could not get lock /var/lib/dpkg/lock-frontend\n", False),
        ("", False),
    ],
)
def test_another_update_at_work(text, locked):
    assert apt_state.lists_locked(text) is locked


def test_what_is_held_at_whatever_version_it_has_is_never_torn_and_never_raised():
    pins = [{"packages": ["cuda-toolkit-13-0"], "version": "13.0.2-*"}, {"packages": ["cuda-*-13-0*"], "version": ""}]
    text = apt_state.preferences(pins)
    assert "Package: cuda-toolkit-13-0\nPin: version 13.0.2-*\nPin-Priority: 1001\n" in text
    assert "Package: cuda-*-13-0*\nPin: version *\nPin-Priority: 500\n" in text
    entry = {"want": "hold", "flag": "ok", "state": "installed"}
    packages = {"cuda-toolkit-13-0": {**entry, "version": "13.0.1-1"}, "cuda-nvcc-13-0": {**entry, "version": "13.0.88-1"}}
    assert apt_state.family(packages, pins) == {"cuda-nvcc-13-0": "", "cuda-toolkit-13-0": "13.0.2-*"}
    assert apt_state.foreign_holds(packages, [], pins, []) == [("cuda-toolkit-13-0", "13.0.1-1", "13.0.2-*")]


def test_what_is_left_half_done_and_gets_another_version_is_replaced():
    packages = {
        "nvidia-kernel-open-dkms": {"want": "install", "flag": "ok", "state": "half-configured", "version": "580.105.08-1"},
        "nvidia-driver-cuda": {"want": "install", "flag": "ok", "state": "unpacked", "version": "580.159.03-1"},
        "cuda-broken": {"want": "install", "flag": "ok", "state": "half-configured", "version": "1"},
        "nvidia-smi": {"want": "install", "flag": "ok", "state": "installed", "version": "580.105.08-1"},
    }
    pins = [{"packages": ["nvidia-*"], "version": "580.159.03-*"}]
    assert apt_state.replaced(packages, pins) == ["nvidia-kernel-open-dkms"]
    assert apt_state.replaced(packages, [{"packages": ["*"], "version": ""}]) == []
