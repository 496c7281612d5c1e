# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs that would begin anew, or from an older checkpoint, without being told to: refused before the running job is stopped.

Field cases H16 (hosts change places), H17 (a node installed anew under its old name) and H18 (a host that is lost is taken out).
Every node of tests/faults writes full copies, so checkpoints are taken away from nodes 2 to 4 where rank 0 is to have them alone.
"""
from __future__ import annotations

import json
import re

import pytest
import yaml
from job import unchanged
from machines import HERE

PLAN, ACCEPT = "playbooks/plan.yml", "torchrun_accept_lost_progress"
FIRST = {"fault1": 0, "fault2": 1, "fault3": 2, "fault4": 3}
SWAPPED = {"fault2": 0, "fault1": 1, "fault3": 2, "fault4": 3}


@pytest.fixture
def other(training, tmp_path):
    """Runs a verb with an inventory in which the group has these hosts in this order; returns output or refusal as one line."""
    state = HERE / "inventory"

    def play(name, hosts, *options, ranks=None):
        data = yaml.safe_load((state / "hosts.yml").read_text())
        children = data["nodes"]["children"]
        entries = {**children["train"]["hosts"], **children["spares"]["hosts"]}
        children["train"]["hosts"] = {host: dict(entries[host], **({"torchrun_node_rank": ranks[host]} if ranks else {})) for host in hosts}
        del children["spares"], children["pair"]
        place = tmp_path / "inventory"
        place.mkdir(exist_ok=True)
        (place / "hosts.yml").write_text(yaml.safe_dump(data, sort_keys=False))
        for link in ("group_vars", ".state"):
            if not (place / link).is_symlink():
                (place / link).symlink_to(state / link)
        # Its own inventory only: one beside that of the tests would keep the order of the first.
        words = ("-i", str(place / "hosts.yml"), "-e", json.dumps({"torchrun_source": str(HERE / "project")}), *options)
        try:
            return " ".join(play.run(name, *words).split())
        except RuntimeError as error:
            return " ".join(str(error).split())

    def run(name, *words):
        from machines import ROOT, run as command
        return command("ansible-playbook", name, *words, cwd=ROOT, timeout=600)
    play.run = run
    return play


# What a job leaves on a node: its checkpoints and state, root's record and the unit, each with the name under which it is kept.
LEFT = {"/var/lib/torchrun/train/checkpoints": "checkpoints", "/var/lib/torchrun/train/state/state.json": "state.json",
        "/etc/torchrun/train.past.json": "past.json", "/etc/systemd/system/torchrun-train.service": "unit"}
COPY, UNDO = "/var/tmp/harm_progress", "/var/tmp/harm_progress/done"


@pytest.fixture
def stopped(training):
    """The job, stopped after it has written checkpoints. Whatever a test takes away is put back, and the job trains on."""
    job = training
    job.playbook("playbooks/stop.yml")
    try:
        for machine in job.machines:
            copies = " && ".join(f"cp -a {path} {COPY}/{name}" for path, name in LEFT.items())
            machine.shell(f"rm -rf {COPY} && mkdir -m 0700 {COPY} && {copies} && touch {UNDO}")
        yield job
    finally:
        for machine in job.machines:
            back = " && ".join(f"rm -rf {path} && cp -a {COPY}/{name} {path}" for path, name in LEFT.items())
            machine.shell(f"[ ! -e {UNDO} ] || {{ {back} && systemctl daemon-reload && rm -rf {COPY}; }}", timeout=120)
        job.playbook("playbooks/start.yml")


def alone(job, keeper):
    """Leave checkpoints on one node only; the job is stopped meanwhile, so that nobody writes new ones."""
    for machine in job.machines:
        if machine is not keeper:
            machine.shell(f"rm -f {job.root}/checkpoints/step-*")


def test_a_node_installed_anew_is_refused(stopped, other):
    """H17: the folders of rank 0's node are gone, and root's record with them, as after an installation."""
    job, first = stopped, stopped.machines[0]
    text = other(PLAN, FIRST)
    assert "it would take rank" not in text and "failed=0" in text, text[-3000:]    # the same hosts in the same places
    # As the other nodes know it: a step may have been written while the job was being stopped.
    newest = job.state(job.machines[1])["checkpoints"]["0"]["path"].rpartition("/")[2]
    first.shell(f"rm -f {job.root}/checkpoints/step-* {' '.join(path for path in LEFT if not path.endswith('checkpoints'))}"
                " && systemctl daemon-reload")
    text = unchanged(other("train.yml", FIRST))
    assert re.search(rf"fault1: rank 0 had its newest checkpoint {newest} in {job.root}/checkpoints here, and now it has none", text), text[-3000:]
    assert ACCEPT in text
    assert re.search(rf"copy fault[234]:{job.root}/checkpoints/step-\d+\.json \(if each node writes all of the state\) to fault1", text), text[-3000:]
    warned = other(PLAN, FIRST, "-e", f"{ACCEPT}=true")
    assert "accepted with" in warned and "failed=0" in warned, warned[-3000:]


def test_ranks_that_leave_their_checkpoints_are_refused(stopped, other):
    """H16: rank 0 alone has checkpoints, two hosts change places. H18: its host is taken out."""
    job, first = stopped, stopped.machines[0]
    newest = first.shell(f"ls {job.root}/checkpoints | grep ^step- | tail -n 1").strip()   # rank 0 has it itself
    for machine in job.machines:
        state = json.loads(machine.shell(f"cat {job.root}/state/state.json"))
        state["checkpoint_hosts"], state["checkpoint"] = ["fault1"], state["checkpoint"] if machine is first else None
        state["checkpoints"] = {"0": state["checkpoints"]["0"]}
        for rank, member in (state.get("members") or {}).items():
            member["checkpoint"] = member["checkpoint"] if rank == "0" else None
        machine.shell(f"cat >{job.root}/state/state.json <<'END'\n{json.dumps(state)}\nEND")
    alone(job, first)
    text = unchanged(other("train.yml", SWAPPED))
    assert re.search(rf"fault2: it would take rank 0 from fault1 and had rank 1, but the newest checkpoint {newest} of rank 0", text), text[-3000:]
    assert "fault1 0, fault2 1, fault3 2, fault4 3" in text
    assert "failed=0" in other(PLAN, SWAPPED, ranks=FIRST), "the ranks written down"

    # Leftovers of an earlier life lie on the next host.
    job.machines[1].shell(f"touch -d '2 days ago' {job.root}/checkpoints/step-0000015.json")
    text = unchanged(other("train.yml", ["fault2", "fault3", "fault4"]))
    assert "has only the older step-0000015.json" in text and f"copy fault1:{job.root}/checkpoints/{newest} to fault2" in text, text[-3000:]
    assert "it may begin from step-0000015.json" in text
    # The way out: the copy.
    content = first.shell(f"cat {job.root}/checkpoints/{newest}")
    job.machines[1].shell(f"cat >{job.root}/checkpoints/{newest} <<'END'\n{content}\nEND")
    assert "failed=0" in other(PLAN, ["fault2", "fault3", "fault4"])


def test_the_job_trains_on_afterwards(training):
    """What the tests before took away is back, and the job has gone on from it."""
    job = training
    assert job.resumed(job.state()["since"] - 60) > 0


def test_a_running_job_is_not_stopped_by_a_refused_run(training, other):
    """H16 as it is written: the job trains, another folder holds nothing, the run is refused and the job has not noticed."""
    job = training
    generation = job.state()["generation"]
    text = unchanged(other("train.yml", FIRST, "-e", "torchrun_checkpoint_dir=/var/lib/torchrun/elsewhere"))
    assert "has its newest checkpoint step-" in text and "with the present torchrun_checkpoint_dir it has none" in text, text[-3000:]
    assert (job.state()["generation"], job.state()["state"]) == (generation, "running")
