"""Ansible's own vault: what it has decrypted is in no sentence, wherever it has been put."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
BY_ITSELF, IN_A_FILE, PLAIN, INDEX = "QZX-by-itself-77", "QZX-in-a-file-77", "QZX-plain-77", "bot:QZX-index-77"


def ansible(word, *words, **options):
    """A command of Ansible; its output."""
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ansible", word, *map(str, words)], cwd=ROOT, text=True, env=environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    ).stdout


@pytest.fixture
def inventory(tmp_path):
    folder = tmp_path / "inventory"
    (folder / "group_vars/train").mkdir(parents=True)
    (tmp_path / "key").write_text("a key\n")
    # The port cannot be one, so that nobody connects.
    (folder / "hosts.yml").write_text(yaml.safe_dump({"train": {"hosts": {"n1": {}, "n2": {"ansible_port": "{{ alone }}"}}}}))
    key = ["--vault-password-file", tmp_path / "key"]
    (folder / "group_vars/train/a.yml").write_text(
        subprocess.run([sys.executable, "-m", "ansible", "vault", "encrypt_string", *map(str, key), BY_ITSELF, "--name", "alone"],
                       stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout)
    secret = folder / "group_vars/train/vault.yml"
    secret.write_text(yaml.safe_dump({"shared": IN_A_FILE, "torchrun_stop_timeout": IN_A_FILE}))
    ansible("vault", "encrypt", *key, secret)
    assert secret.read_text().startswith("$ANSIBLE_VAULT")
    values = {
        "torchrun_user": "{{ shared }}!", "torchrun_args": ["--key={{ alone }}"], "torchrun_master_addr": "{{ alone }}",
        "torchrun_checkpoint_dir": "{{ shared }}" * 4, "torchrun_job": "{{ alone }} ", "torchrun_hang_timeout": "{{ inventory_hostname }}{{ shared }}",
        "torchrun_environment": {"A": PLAIN + "{{ inventory_hostname }}", "B": [PLAIN]}, "nccl_verify_environment": PLAIN,
        "pytorch_packages": [f"x @ https://{INDEX}@h/x.whl"], "cluster_mirror": f"ftp://{INDEX}@h", "pytorch_index_url": f"https://{INDEX}@h",
    }
    (folder / "group_vars/train/b.yml").write_text(yaml.safe_dump(values))
    return ["-i", folder, *key]


def test_no_sentence_has_a_secret(inventory):
    text = ansible("playbook", "playbooks/plan.yml", *inventory, "-vvv", "--diff")
    assert "QZX" not in text, text
    for sentence in (
        "n2: ansible_port is '(vaulted)', but a port from 1 to 65535 was expected",
        "n1, n2: torchrun_stop_timeout is '(vaulted)', but a whole number was expected",
        "n1, n2: torchrun_user is '(vaulted)!', but at most",
        "n1, n2: torchrun_args holds a vaulted value, but everybody on a node sees the arguments of its processes",
        "torchrun_master_addr is '(vaulted)', but an IP address was expected",
        "n1, n2: torchrun_environment gives B a list, but text or a number was expected",
        "n1, n2: nccl_verify_environment is a text, but a mapping of names to values was expected",
        "n1, n2: pytorch_packages holds a URL with a user, a password or a token",
        "n2: torchrun_environment differs from n1's in A, but a job has one",
    ):
        assert sentence in text, text
