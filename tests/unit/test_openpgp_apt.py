"""Fingerprints of keys against gpg's own, and what apt's answers mean."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import apt, openpgp


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is not installed")
@pytest.mark.parametrize("algorithm", ["ed25519", "rsa3072"])
def test_fingerprints_are_those_of_gpg(tmp_path, algorithm):
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet"]
    subprocess.run([*gpg, "--passphrase", "", "--quick-generate-key", "Test <test@example.org>", algorithm, "sign", "never"], check=True)
    listing = subprocess.run([*gpg, "--with-colons", "--list-keys"], check=True, capture_output=True, text=True).stdout
    wanted = [line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:")][:1]
    for words in (["--export"], ["--armor", "--export"]):
        data = subprocess.run([*gpg, *words], check=True, capture_output=True).stdout
        assert openpgp.fingerprints(data) == wanted
        with pytest.raises(openpgp.KeyFileError):
            openpgp.fingerprints(data[: len(data) // 2])
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!!!\n-----END PGP PUBLIC KEY BLOCK-----\n"])
def test_what_is_no_key_is_said_to_be_none(data):
    with pytest.raises(openpgp.KeyFileError):
        openpgp.fingerprints(data)


def test_a_pattern_of_a_version_matches_each_revision_and_no_other_version():
    assert apt.matches("580.159.03-1ubuntu1", "580.159.03-*")
    assert not apt.matches("580.159.04-1", "580.159.03-*")
    assert apt.matches("2.28.9-1+cuda13.0", "2.28.9-1+cuda13.0")


def test_installed_packages_are_read_from_dpkg():
    text = "a\t1\tinstall\tinstalled\nb\t2\thold\tinstalled\nc\t3\tinstall\thalf-configured\nd\t\tunknown\tnot-installed\ne\t1\tdeinstall\tconfig-files\n"
    assert apt.parse_installed(text) == {"a": ("1", False, True), "b": ("2", True, True), "c": ("3", False, False)}


def test_held_are_those_that_belong_together():
    installed = apt.parse_installed("libcuda1\t580.1-1\tinstall\tinstalled\nnvidia-container-toolkit\t1.17\tinstall\tinstalled\nvim\t9\tinstall\tinstalled\n")
    assert apt.covered(installed, [{"packages": ["nvidia-*", "libcuda1"], "version": "580.1-*"}]) == ["libcuda1"]
