# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a job from the control node, on the nodes of test_faults.py: every verb, releases, jobs beside, a spare."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import pytest
from faults import worker_killed
from job import FOREVER, Job, unchanged
from machines import ROOT, Machine

TARGET = "/var/lib/torchrun/target"
MEMORY_KIB, EXPOSURE = 64 * 1024, 4.0


def answer(output):
    """The JSON object that a playbook prints."""
    return json.JSONDecoder().raw_decode(output[output.index("\n{\n") + 1:])[0]


def variables(**values):
    return "-e", json.dumps(values)


def test_status_logs_and_why_tell_of_every_node(training):
    job = training
    before, since = job.state()["generation"], time.time()
    worker_killed(job, 2)
    generation, _step = job.trains(before)
    status = answer(job.playbook("playbooks/status.yml", *variables(status_format="json")))
    assert sorted(status["nodes"]) == [machine.name for machine in job.machines]
    for info in status["nodes"].values():
        assert (info["unit"], info["state"]["state"], info["state"]["generation"]) == ("active", "running", generation)
        assert info["state"]["restarts_left"] in (2, 3)
        assert info["checkpoint"]["name"].startswith("step-")
        assert info["gpus"] == []
    assert re.search(r"step \d+", status["nodes"]["fault1"]["step"])
    assert time.time() - status["nodes"]["fault1"]["step_time"] < 60
    table = job.playbook("playbooks/status.yml")
    assert re.search(r"HOST +RANK +STATE .* STEP AGE +NEWEST CHECKPOINT +GPU MEMORY +FIREWALL", table)
    assert len(re.findall(r"^fault\d +\d +running", table, re.M)) == 4

    why = answer(job.playbook("playbooks/why.yml", *variables(why_format="json")))
    assert why["cause"]["host"] == "fault3" and "killed by SIGKILL" in why["sentence"], why

    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(since)) + " UTC"
    merged = job.playbook("playbooks/logs.yml", *variables(logs_follow=False, logs_since=moment))
    lines = re.findall(r"^\d\d:\d\d:\d\d (fault\d) (.*)$", merged, re.M)
    resumed = {(host, text.split(" resumes")[0]) for host, text in lines if "resumes from step" in text}
    assert resumed == {(f"fault{number + 1}", f"[rank {number}]") for number in range(4)}, lines[-20:]
    assert any(text.startswith("supervisor: generation") for _host, text in lines)
    one = job.playbook("playbooks/logs.yml", *variables(logs_follow=False, logs_since=moment, logs_rank=2))
    assert {(host, text[:8]) for host, text in re.findall(r"^\d\d:\d\d:\d\d (fault\d) (.*)$", one, re.M)} == {("fault3", "[rank 2]")}
    with pytest.raises(RuntimeError, match="logs_rank is '9', but all or a rank from 0 to 3 was expected"):
        job.playbook("playbooks/logs.yml", *variables(logs_rank=9))


def test_the_unit_is_confined_and_what_it_is_not_has_a_reason(job):
    machine = job.machines[0]
    rows = json.loads(machine.shell(f"systemd-analyze security --no-pager --json=short {job.unit}"))
    unit = machine.shell(f"cat /etc/systemd/system/{job.unit}")
    comments = " ".join(line for line in unit.splitlines() if line.startswith("#"))
    unexplained = []
    for row in rows:
        name = row.get("name") or row["json_field"]
        if row["set"] in (True, None) or not float(row.get("exposure") or 0):
            continue
        words = re.findall(r"[A-Za-z@_]+", name.replace("=", " "))
        families = {"AF_(INET|INET6)": ["AF_INET", "AF_INET6"]}
        wanted = next((values for key, values in families.items() if key in name), [words[0], *[word for word in words if word[0] == "@"]])
        if not all(word in comments for word in wanted):
            unexplained.append((name, row["description"]))
    assert not unexplained
    level = machine.shell(f"systemd-analyze security --no-pager {job.unit} | tail -n 1")
    assert float(re.search(r"(\d+\.\d)", level).group(1)) <= EXPOSURE, level
    print(level.strip())


def test_the_supervisor_costs_next_to_nothing(training):
    def spent(pid):
        fields = machine.shell(f"cat /proc/{pid}/stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / int(machine.shell("getconf CLK_TCK"))
    job, shares = training, {}
    pids = {machine: machine.pid("supervisor") for machine in job.machines}
    before = {}
    for machine, pid in pids.items():
        before[machine] = (time.monotonic(), spent(pid))
    time.sleep(20)      # the kernel counts in hundredths of a second
    for machine, pid in pids.items():
        moment, seconds = before[machine]
        memory = int(re.search(r"VmRSS:\s+(\d+) kB", machine.shell(f"cat /proc/{pid}/status")).group(1))
        shares[machine.name] = ((spent(pid) - seconds) / (time.monotonic() - moment), memory)
    print({name: f"{share:.2%} of a CPU, {memory / 1024:.1f} MiB" for name, (share, memory) in shares.items()})
    # The share of a CPU is shown only: a busy machine changes it.
    assert all(memory < MEMORY_KIB for _share, memory in shares.values()), shares


ATTACK = """
import os, random, socket, struct, sys, time
address, chance = (sys.argv[1], int(sys.argv[2])), random.Random(7)
deadline, kept, count = time.time() + 6, [], 0
while time.time() < deadline:
    try:
        sock = socket.create_connection(address, 2)
        kind = count % 5
        if kind == 0:
            sock.sendall(os.urandom(chance.randrange(1, 4000)))
        elif kind == 1:
            sock.sendall(struct.pack(">I", chance.choice([513, 65537, 2 ** 31, 2 ** 32 - 1])) + b"x" * 1000)
        elif kind == 2:
            sock.sendall(struct.pack(">I", 100) + b"{")      # never goes on
        elif kind == 3:
            text = b'{"protocol": 1, "job": "train", "rank": 1, "nonce": "' + b"0" * 32 + b'"}'
            sock.sendall(struct.pack(">I", len(text)) + text + struct.pack(">I", 20) + b'{"proof": "' + b"0" * 7 + b'"}')
        kept = (kept + [sock])[-200:]                        # half open
        count += 1
    except OSError:
        pass
print("connections", count)
"""


def test_a_hostile_network_neither_stops_the_job_nor_grows_memory(training):
    job, first = training, training.machines[0]
    port = int(first.shell(f"grep ^SupervisorPort= /etc/systemd/system/{job.unit}").split("=")[1])
    generation, pid = job.state()["generation"], first.pid("supervisor")

    def memory():
        return int(re.search(r"VmRSS:\s+(\d+) kB", first.shell(f"cat /proc/{pid}/status")).group(1))
    outsider = Machine(len(job.machines), job.hall.place)
    probe = f"python3 -c \"import socket; socket.create_connection(('{first.address}', {port}), 3)\""
    assert "timed out" in outsider.shell(f"{probe} 2>&1 || true"), "the firewall lets an outsider to the supervisor"
    before = memory()
    job.machines[1].shell(f"cat >/run/attack.py <<'END'\n{ATTACK}\nEND")
    count = int(job.machines[1].shell(f"python3 /run/attack.py {first.address} {port}").split()[1])
    assert count > 100, "hardly any connection was tried"
    assert memory() - before < 4096, f"memory grew from {before} to {memory()} KiB"
    assert job.state()["generation"] == generation and job.state()["state"] == "running"
    assert job.wait(lambda: job.steps(time.time() - 3), 20, "steps after the attack")


def test_a_new_release_resumes_and_rollback_returns(training, tmp_path):
    job, first = training, training.machines[0]
    old = first.shell(f"readlink {job.root}/current").strip()
    project = tmp_path / "project"
    shutil.copytree(ROOT / "tests/faults/project", project)
    with (project / "train.py").open("a") as file:
        file.write("# changed\n")
    since = time.time()
    changed = variables(torchrun_source=str(project), torchrun_args=[TARGET, "--note=new"])
    output = job.playbook("train.yml", *changed)
    assert "it writes a checkpoint, stops, and the new one resumes" in output
    _generation, step = job.trains(0)
    assert job.resumed(step - 60) == job.stopped_at(since) > 0
    for machine in job.machines:
        assert machine.shell(f"readlink {job.root}/current").strip() != old
        assert "--note=new" in machine.shell(f"cat /etc/systemd/system/{job.unit}")
        assert "# changed" in machine.shell(f"tail -n 1 {job.root}/current/source/train.py")

    since = time.time()
    output = job.playbook("playbooks/rollback.yml")
    assert f"the job goes back to the release {old.rpartition('/')[2]}" in output
    _generation, step = job.trains(0)
    assert job.resumed(step - 60) == job.stopped_at(since) > 0
    for machine in job.machines:
        assert machine.shell(f"readlink {job.root}/current").strip() == old
        assert "--note=new" not in machine.shell(f"cat /etc/systemd/system/{job.unit}")
    generation = job.state()["generation"]
    output = job.playbook("playbooks/rollback.yml")
    assert f"the job runs the release {old.rpartition('/')[2]} already" in output
    assert (job.state()["generation"], job.state()["state"]) == (generation, "running")


def test_a_job_beside_needs_ports_of_its_own(training):
    job, second = training, Job(training.hall, "second")
    generation = job.state()["generation"]
    with pytest.raises(RuntimeError, match="torchrun_master_port is 29500, which") as error:
        job.playbook("playbooks/start.yml", *variables(torchrun_job="second"))
    assert "torchrun_supervisor_port is 29501, which" in str(error.value), "both are told at once"
    options = variables(torchrun_job="second", torchrun_master_port=29510)
    job.playbook("playbooks/start.yml", *options)
    second.trains(0)
    assert second.state()["job"] == "second"
    assert job.wait(lambda: job.steps(time.time() - 3), 20, "steps of the first job")
    follower = subprocess.Popen(["ansible-playbook", "playbooks/logs.yml", "-i", str(job.hall.place.inventory), *options], cwd=ROOT,
                                stdout=subprocess.PIPE, text=True)
    job.playbook("playbooks/stop.yml", *options)
    text = follower.communicate(timeout=60)[0]
    assert "[rank 0] stopped cleanly at step" in text and "the job second was stopped before it finished" in text
    assert set(second.units()) == {"inactive"}
    assert (job.state()["generation"], job.state()["state"]) == (generation, "running")
    output = job.playbook("playbooks/stop.yml", *options)
    unchanged(output)   # stopping twice


def test_lightning_trains_and_survives_a_reboot(job):
    """An ordinary Trainer on two nodes, with a checkpoint folder that both see."""
    lightning, machine = Job(job.hall, "lightning"), job.machines[1]
    lightning.machines = job.machines[:2]
    job.machines[0].shell(f"systemctl stop {job.unit}", timeout=90)      # the test's machine is small
    epochs = 100000     # never reached: the test ends it
    options = variables(
        cluster_group="pair", torchrun_job="lightning", torchrun_master_port=29520, torchrun_source=str(ROOT / "examples"),
        torchrun_script="train_lightning.py", torchrun_args=[f"--epochs={epochs}"], torchrun_checkpoint_dir="/mnt/shared/lightning",
        torchrun_checkpoint_glob="epoch=*.ckpt", torchrun_hang_timeout=0, torchrun_stop_timeout=20)
    first, leader, since = lightning.machines[0], machine.leader(), time.time()
    job.playbook("playbooks/start.yml", *options)
    lightning.wait(lambda: re.search(r"epoch ([3-9]|\d\d+)/\d+ accuracy", lightning.journal(first, since)), 120, "the third epoch")
    since = time.time()
    machine.reboot()
    machine.wait_reboot(leader)

    def resumed():
        text = lightning.journal(first, since).rpartition(f"/{epochs} in 2 processes")
        return int(text[0].rpartition("trains from epoch ")[2]) if text[1] and re.search(r"epoch \d+/\d+ accuracy 0\.\d+", text[2]) else 0
    assert lightning.wait(resumed, 180, "an epoch after the reboot") >= 3
    job.playbook("playbooks/stop.yml", *options)
    assert set(lightning.units()) == {"inactive"}
    first.shell("rm -rf /mnt/shared/lightning")


def test_a_spare_takes_over_the_rank_of_a_node_that_is_out(training, tmp_path):
    """Node 4 is lost for good. Each node holds checkpoints of its own, so that the spare must be given copies first."""
    job, spare = training, Machine(len(training.machines), training.hall.place)
    out = tmp_path / "out.yml"
    out.write_text("train:\n  hosts:\n    fault4:\n      torchrun_node_out: true\n")
    last = job.steps(time.time() - 10)[-1][0]
    job.machines[3].power_off()
    names = spare.shell("cat /etc/hosts")
    for machine in (*job.machines[:3], spare):
        if f"{spare.address} {spare.name}" not in names:
            lines = "\\n".join(f"{other.address} {other.name}" for other in (*job.machines, spare))
            machine.shell(f"printf '{lines}\\n' >>/etc/hosts")
    with pytest.raises(RuntimeError) as error:
        job.playbook("train.yml", "-i", str(out))
    text = " ".join(str(error.value).split())
    sentence = "fault5: it would take rank 3 from fault4, but the newest checkpoint step-[0-9]+.json of rank 3 in [^ ]+ lies on fault4, and it has none"
    assert re.search(sentence, text), text[-3000:]
    unchanged(text)     # it was refused before anything was changed
    folder = f"{job.root}/checkpoints"
    job.machines[0].shell(f"rm -rf /mnt/shared/copy && cp -r {folder} /mnt/shared/copy")
    spare.shell(f"mkdir -p {folder} && cp /mnt/shared/copy/step-*.json {folder}/ && echo {FOREVER} >{TARGET}")
    output = job.playbook("train.yml", "-i", str(out))
    assert "fault5 takes the place of fault4" in output
    job.machines = [*job.machines[:3], spare]
    assert '"NODE_RANK=3"' in spare.shell(f"cat /etc/systemd/system/{job.unit}")
    _generation, step = job.trains(0)
    assert job.resumed(step - 60) >= last - 20
    status = answer(job.playbook("playbooks/status.yml", "-i", str(out), *variables(status_format="json")))
    assert sorted(status["nodes"]) == ["fault1", "fault2", "fault3", "fault5"]
    job.finish()
