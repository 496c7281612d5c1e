# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Root and the folders of a job: what a job prepares there never makes root do anything outside (docs/security.md)."""
from __future__ import annotations

import contextlib
import json
import time

import pytest

# What the attacks of this file would change.
WATCHED = "stat -c '%n %U %G %a' /etc /etc/systemd/system /home/ops /etc/victim; cat /etc/victim; ls /etc/systemd/system; ls -A /home/ops"
DROP_IN = "torchrun-train.service.d"
# As the job's user: a drop-in for its own unit, and a link to systemd's folder under every name that the next minutes could give.
PREPARE = """
import os, time
os.makedirs("{folder}/{drop_in}", exist_ok=True)
with open("{folder}/{drop_in}/x.conf", "w") as file:
    file.write("[Service]\\nExecStartPre=+/bin/sh -c 'id >/root/pwned'\\n")
with open("{folder}/notes.txt", "w") as file:
    file.write("not a checkpoint")
with open("{folder}/.hidden", "w") as file:
    file.write("nor this")
for second in range(-5, 600):
    name = "{folder}/set-aside-" + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + second))
    if not os.path.lexists(name):
        os.symlink("/etc/systemd/system", name)
"""


def variables(**values):
    return "-e", json.dumps(values)


def as_user(machine, program):
    return machine.shell(f"cat >/run/attack.py <<'END'\n{program}\nEND\nchmod 644 /run/attack.py; "
                         "setpriv --reuid=torchrun --regid=torchrun --init-groups python3 /run/attack.py")


def watched(machine):
    return machine.shell(WATCHED)


@pytest.fixture
def victims(training):
    for machine in training.machines:
        machine.shell("echo kept >/etc/victim; chmod 600 /etc/victim")
    yield training
    for machine in training.machines:
        machine.shell(f"rm -rf /etc/victim /run/attack.py /home/ops/ckpt {training.root}/checkpoints/{DROP_IN}; "
                      f"cd {training.root}/checkpoints && rm -f notes.txt .hidden && find . -maxdepth 1 -type l -name 'set-aside-*' -delete")


def test_restart_moves_checkpoints_and_nothing_else(victims):
    job = victims
    folder = f"{job.root}/checkpoints"
    before = [watched(machine) for machine in job.machines]
    for machine in job.machines:
        as_user(machine, PREPARE.format(folder=folder, drop_in=DROP_IN))
    since = time.time()
    job.playbook("playbooks/restart.yml")
    job.wait(lambda: job.steps(since), 120, "training from nothing")
    for machine, was in zip(job.machines, before):
        assert machine.shell("ls /root/pwned 2>/dev/null || true") == "", "the job became root"
        assert watched(machine) == was
        names = machine.shell(f"ls -A {folder}").split()
        assert {DROP_IN, "notes.txt", ".hidden"} <= set(names)
        real = machine.shell(f"find {folder} -maxdepth 1 -type d -name 'set-aside-*' -user torchrun -newermt @{since - 5:.0f}").split()
        assert len(real) == 1, names
        assert "step-" in machine.shell(f"ls {real[0]}")


def test_the_plan_refuses_folders_that_are_no_jobs(victims):
    job, first = victims, victims.machines[0]
    first.shell("ln -s /etc /home/ops/ckpt; mkdir -p /srv/alice && chmod 700 /srv/alice; mkdir -p /srv/data && chmod 700 /srv/data")
    before = watched(first)
    try:
        with pytest.raises(RuntimeError) as error:
            job.playbook("playbooks/plan.yml", *variables(
                torchrun_checkpoint_dir="/srv/alice", torchrun_log_root="/tmp/logs", torchrun_data_paths=["/srv/data", "/etc", "/home/ops"]))
        text = " ".join(str(error.value).split())
        for sentence in (
            "torchrun_log_root names /tmp/logs, but the job's unit has a /tmp and a /var/tmp of its own",
            "torchrun_data_paths names /etc, a folder of the system",
            "torchrun_data_paths names /home/ops, a whole home",
            "fault1: torchrun_checkpoint_dir names /srv/alice, but the job's user torchrun cannot make files in it (Permission denied)",
            "fault1: torchrun_data_paths names /srv/data, but the job's user torchrun cannot open and list it (Permission denied)",
        ):
            assert sentence in text, text[-4000:]
        with pytest.raises(RuntimeError) as error:
            job.playbook("playbooks/plan.yml", *variables(torchrun_checkpoint_dir="/home/ops/ckpt", torchrun_root="/"))
        text = " ".join(str(error.value).split())
        assert "torchrun_root names /, a folder of the system" in text
        assert "fault1: torchrun_checkpoint_dir names /home/ops/ckpt, which leads to /etc" in text, text[-4000:]
        assert watched(first) == before
        assert first.shell("stat -c '%U %a' /srv/alice /srv/data").split() == ["root", "700"] * 2
    finally:
        first.shell("rm -rf /srv/alice /srv/data")


def test_a_verification_writes_over_nothing(victims):
    job, first = victims, victims.machines[0]
    job.playbook("playbooks/stop.yml")
    before = watched(first)
    attack = ("until [ -e /run/attacked ]; do ln -sf /etc/victim /run/nccl-verify/config.json; "
              "ln -sfn /etc /run/nccl-verify; ln -sf /etc/victim /run/nccl-verify/result/result.json; sleep .1; done")
    first.shell(f"systemd-run --quiet --unit=attack --uid=torchrun /bin/sh -c '{attack}'")
    try:
        # The job's user may well spoil its own result; what counts is everything else.
        with contextlib.suppress(RuntimeError):
            job.playbook("playbooks/verify.yml", *variables(nccl_verify_size_max="64K", nccl_verify_pairwise="never", nccl_verify_iterations=2))
    finally:
        first.shell("touch /run/attacked; systemctl stop attack; rm -f /run/attacked", check=False)
    assert watched(first) == before
    assert first.shell("ls -d /run/nccl-verify 2>/dev/null || true") == ""
    releases = first.shell(f"stat -c '%U %G %a' {job.root}/releases/*/").split("\n")
    assert {line for line in releases if line} == {"root root 750"}
    assert set(first.shell(f"stat -c '%U %a' {job.root}/releases/*/unit").splitlines()) == {"root 600"}
    job.playbook("playbooks/start.yml")
