# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Secrets of a job show nowhere: in no output with -vvv --diff, on no command line, in no file that others can read."""
from __future__ import annotations

import base64
import json
import pathlib
import re
import subprocess
import threading
import time
from urllib.parse import quote

import pytest
from job import Job
from machines import ROOT, run

# Made up, and unlike anything else. The odd one reads differently quoted for a URL, for JSON and for a shell.
PLAIN, ODD, VAULTED = "p1ain-QZX7731-token", 'o dd/QZX7732+"%&$HOME\\é', "vau1ted-QZX7733-token"
INDEX = "bot:1ndex-QZX7734%2F%40token"
NAME = "secrets"
PLACES = "/tmp /var/tmp /run /etc /var/lib /var/log /home /root"


def forms(secret):
    """All that would tell a secret: as it is, quoted, and in base64 whatever stands before it."""
    data = secret.encode()
    aligned = [base64.b64encode(b"x" * shift + data).decode()[shift + bool(shift) : -4] for shift in range(3)]
    return {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1], *aligned}


SECRETS = [PLAIN, ODD, VAULTED, INDEX, "1ndex-QZX7734/@token"]
FORMS = {form.encode(): secret for secret in SECRETS for form in forms(secret)}


def told(data):
    """The secrets that a text or bytes tell."""
    data = data.encode() if isinstance(data, str) else data
    return sorted({secret for form, secret in FORMS.items() if form in data})


class CommandLines(threading.Thread):
    """Looks at all command lines of this machine, its nodes' among them, until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.found, self.rounds = threading.Event(), set(), 0

    def run(self):
        while not self.done.wait(0.05):
            self.rounds += 1
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                try:
                    words = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"QZX773" in words or told(words):
                    self.found.add(words)


@pytest.fixture
def given(tmp_path):
    """The job's variables, one of them vaulted, as a user has them in files of their own."""
    (tmp_path / "key").write_text("a key for this test\n")
    words = ["ansible-vault", "encrypt_string", "--vault-password-file", str(tmp_path / "key"), "--stdin-name", "hidden"]
    vaulted = subprocess.run(words, input=VAULTED, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    path = tmp_path / "variables.yml"
    values = {"PLAIN": PLAIN, "ODD": ODD, "NCCL_PLAIN": PLAIN, "VAULTED": "{{ hidden }}", "NUMBER": 1}
    # Nothing of torch's but torchrun itself: this is about what is said of a job, not about what it does.
    (tmp_path / "idle.py").write_text("import time\nfor step in range(10**6):\n    print(f'step {step}', flush=True)\n    time.sleep(1)\n")
    job = {"cluster_group": "pair", "torchrun_job": NAME, "torchrun_master_port": 29540, "torchrun_environment": values,
           "torchrun_source": str(tmp_path / "idle.py"), "torchrun_script": "", "torchrun_args": [], "torchrun_hang_timeout": 0}
    path.write_text(vaulted + "".join(f"\n{name}: {json.dumps(value)}" for name, value in job.items()) + "\n")
    path.chmod(0o600)
    return ["-e", f"@{path}", "--vault-password-file", str(tmp_path / "key"), "-vvv", "--diff"]


def test_secrets_are_nowhere_to_be_seen(job, given, tmp_path, monkeypatch):
    pair = job.machines[:2]
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("ANSIBLE_LOCAL_TEMP", str(scratch / "ansible"))
    since, watch = time.time(), CommandLines()
    watch.start()
    outputs = {}

    def play(what, verbs, *options, check=True):
        books = [f"playbooks/{verb}.yml" for verb in verbs.split()]
        outputs[what] = run("ansible-playbook", "-i", str(job.hall.place.inventory), *given, *options, *books, check=check, cwd=ROOT, timeout=900)
        return outputs[what]

    try:
        play("start", "start")
        beside = Job(job.hall, NAME)
        beside.wait(lambda: beside.machines[0].shell(f"systemctl is-active {beside.unit} || true").strip() == "active", 120, "the start")
        # The values arrive as they were written.
        environment = pair[0].shell(f"cat /proc/$(systemctl show --property=MainPID --value {beside.unit})/environ").split("\0")
        assert {f"PLAIN={PLAIN}", f"ODD={ODD}", f"VAULTED={VAULTED}", "NUMBER=1"} <= set(environment)
        play("look", "plan status logs why stop", "-e", "plan_format=json", "-e", "status_format=json", "-e", "logs_follow=false")
        index = f"https://{INDEX}@index.invalid/simple"
        odd = {"torchrun_args": ["{{ hidden }}"], "torchrun_user": "{{ hidden }}!",
               "pytorch_index_url": index, "cluster_mirror": f"ftp://{INDEX}@x", "nccl_verify_environment": [PLAIN],
               "torchrun_environment": {"DIFFERS": PLAIN + "{{ inventory_hostname }}", "WRONG": [ODD]}}
        (tmp_path / "odd.yml").write_text(json.dumps(odd))
        refused = play("refused", "plan", "-e", f"@{tmp_path}/odd.yml", check=False)
    finally:
        run("ansible-playbook", "playbooks/stop.yml", "-i", str(job.hall.place.inventory), *given[:4], check=False, cwd=ROOT)
        watch.done.set()
        watch.join(30)
    assert '"environment_names": [' in outputs["look"] and "job secrets" in outputs["look"]
    assert "torchrun_args holds a vaulted value, but everybody on a node sees the arguments of its processes" in refused
    assert re.search(r"torchrun_environment differs from fault1's in DIFFERS", refused), refused[-3000:]
    assert "torchrun_user holds a vaulted value, but everybody on a node sees the names of its users" in refused
    assert "gives WRONG a list" in refused
    assert {what: told(text) for what, text in outputs.items() if told(text)} == {}
    assert watch.rounds > 20 and watch.found == set()

    allowed = {f"/etc/torchrun/{NAME}.env", f"/var/lib/torchrun/{NAME}/releases/RELEASE/environment"}
    # What tells all of the secrets, whatever is quoted around it.
    for machine in pair:
        found = machine.shell(f"grep -rlaF QZX773 {PLACES} --exclude-dir=journal --exclude-dir=shared || true").split()
        assert found and {re.sub(r"releases/[0-9a-f]+/", "releases/RELEASE/", path) for path in found} <= allowed
        assert set(machine.shell(f"stat --format=%a:%U {' '.join(found)}").split()) == {"600:root"}
        assert not told(machine.shell(f"journalctl --quiet --no-pager --all --output=cat --since=@{since:.0f}"))
        assert not told(machine.shell(f"systemctl show {beside.unit}; systemctl cat {beside.unit}"))
    kept = [path for folder in (scratch, job.hall.place.nodes.parent) for path in folder.rglob("*")
            if path.is_file() and job.hall.place.nodes not in path.parents]
    assert [path for path in kept if path.stat().st_mtime >= since and told(path.read_bytes())] == []
    for machine in pair:
        machine.shell(f"rm -rf /etc/torchrun/{NAME}.* /etc/systemd/system/{beside.unit} /var/lib/torchrun/{NAME}; systemctl daemon-reload")
