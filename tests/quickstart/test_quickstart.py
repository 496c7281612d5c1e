# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The README's path, typed as it stands there, and what a person does with the job afterwards. In this order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

from clone import BRIDGE, NODES, UNIT, Clone

RECAP = re.compile(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
LONG = ["-e", json.dumps({"torchrun_args": ["--epochs=4000", "--pause=0.3"], "torchrun_wait_for": "first_step"})]


def changed(output: str) -> dict[str, int]:
    """Return how many tasks changed something, by host."""
    found = {row[0]: int(row[1]) for row in RECAP.findall(output)}
    assert set(NODES) <= set(found), output[-3000:]
    return {name: found[name] for name in NODES}


def leftovers(clone: Clone) -> list[str]:
    """Return what of the clone's lab this machine still has; not what an earlier clone left that was killed."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    with open("/proc/self/mountinfo", encoding="utf-8") as stream:
        mounts = [line for line in stream if f"{clone.folder}/" in line]
    return [line for line in (links + tables).splitlines() if BRIDGE in line] + mounts


def wait(condition, seconds: float, what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.5)


def test_before_the_lab_is_booted_the_command_that_boots_it_is_named(clone: Clone):
    clone.run("make", "setup")
    done = clone.play("train.yml", check=False)
    assert done.returncode != 0
    assert "make lab" in done.stdout, done.stdout


def test_check_mode_on_bare_nodes_changes_nothing(clone: Clone):
    clone.run("make", "lab")
    look = "find /etc /var/lib /usr /opt /srv -xdev -newer /run/seen -not -path '/etc/mtab' -not -path '/var/lib/systemd/*' | head; getent passwd torchrun"
    for node in NODES:
        clone.shell(node, "touch /run/seen; sleep 1")
    done = clone.play("train.yml", "--check", "--diff")
    assert all(count > 0 for count in changed(done.stdout).values())
    for node in NODES:
        assert clone.shell(node, look, check=False) == ""


def test_one_command_trains_a_model(clone: Clone):
    output = clone.run("make", "train").stdout
    assert re.search(r"^RANK +HOST +ADDRESS +INTERFACE +PROCESSES", output, re.MULTILINE), output
    steps = re.findall(r"epoch (\d+)/20 loss", output)
    assert len(set(steps)) >= 10, "the progress was not shown while it trained"
    (accuracy,) = set(re.findall(r"last words +finished: accuracy ([\d.]+) on 360 held-out images, \d+ images/s", output))
    assert float(accuracy) >= 0.95
    assert re.search(r"checkpoint +lab1:/var/lib/torchrun/train/checkpoints/epoch-00019.pt", output)
    assert re.search(r"logs +/var/log/torchrun/train", output)


def test_a_second_run_changes_nothing_and_says_that_it_is_finished(clone: Clone):
    done = clone.play("train.yml")
    assert changed(done.stdout) == dict.fromkeys(NODES, 0)
    assert "finished already" in done.stdout


def test_check_mode_on_provisioned_nodes_changes_nothing(clone: Clone):
    before = [clone.shell(node, f"cat /etc/systemd/system/{UNIT}; readlink /var/lib/torchrun/train/current") for node in NODES]
    done = clone.play("train.yml", "--check", *LONG)
    assert all(count > 0 for count in changed(done.stdout).values())
    after = [clone.shell(node, f"cat /etc/systemd/system/{UNIT}; readlink /var/lib/torchrun/train/current") for node in NODES]
    assert before == after


def test_ctrl_c_leaves_the_job_running_and_tells_how_to_follow_it(clone: Clone):
    words = [f"{clone.folder}/.venv/bin/ansible-playbook", "train.yml", "-i", "inventories/lab", *LONG, "-e", "torchrun_wait_for=finished"]
    environment = {**os.environ, "PATH": f"{clone.folder}/.venv/bin:{os.environ['PATH']}", "NO_COLOR": "1"}
    environment.pop("ANSIBLE_CONFIG", None)
    log = clone.folder / "follow.log"
    with log.open("w") as stream:
        follower = subprocess.Popen(words, cwd=clone.folder, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait(lambda: len(re.findall(r"epoch \d+/4000", log.read_text())) >= 2 or follower.poll() is not None, 300, "progress")
        assert follower.poll() is None, log.read_text()[-4000:]
        os.killpg(follower.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
        follower.wait(60)
    finally:
        if follower.poll() is None:
            os.killpg(follower.pid, signal.SIGKILL)
    (again,) = set(re.findall(r"follow it again with: (.+)", log.read_text()))
    assert "onprem.torch.logs" in again
    assert [clone.property(node, "ActiveState") for node in NODES] == ["active", "active"]
    done = clone.run(*again.split(), "--syntax-check")
    assert "logs" in done.stdout


def test_status_tells_the_step_of_the_running_job(clone: Clone):
    output = clone.play("playbooks/status.yml").stdout
    rows = [line.split() for line in output.splitlines() if line.startswith(NODES)]
    assert [row[:3] for row in rows[:2]] == [["lab1", "0", "running"], ["lab2", "1", "running"]], output
    assert re.search(r"^lab1 .*epoch \d+/4000 .*epoch-\d+\.pt", output, re.MULTILINE), output


def test_running_it_again_follows_the_job_and_does_not_disturb_it(clone: Clone):
    before = [clone.property(node, "MainPID") for node in NODES]
    done = clone.play("train.yml", *LONG)
    assert changed(done.stdout) == dict.fromkeys(NODES, 0)
    assert [clone.property(node, "MainPID") for node in NODES] == before


def test_stop_is_clean(clone: Clone):
    clone.play("playbooks/stop.yml", *LONG)
    for node in NODES:
        assert clone.property(node, "ActiveState") == "inactive"
        assert clone.property(node, "Result") == "success"
        assert clone.property(node, "ExecMainStatus") == "0"
        assert clone.shell(node, "pgrep --uid torchrun", check=False) == ""
    journal = clone.shell("lab1", f"journalctl --unit {UNIT} --output cat --no-pager")
    (epoch,) = re.findall(r"stopped on request after epoch (\d+)/4000", journal)
    assert clone.shell("lab1", f"ls /var/lib/torchrun/train/checkpoints/epoch-{int(epoch) - 1:05d}.pt")
    assert clone.play("playbooks/stop.yml", *LONG).returncode == 0


def test_start_goes_on_from_the_checkpoint(clone: Clone):
    clone.play("playbooks/start.yml", *LONG)
    journal = clone.shell("lab1", f"journalctl --unit {UNIT} --output cat --no-pager")
    stopped = re.findall(r"stopped on request after epoch (\d+)/4000", journal)[-1]
    assert re.findall(r"resumed after epoch (\d+)/4000", journal)[-1] == stopped
    clone.play("playbooks/stop.yml", *LONG)


def test_restart_trains_anew_and_keeps_the_old_checkpoints(clone: Clone):
    clone.play("playbooks/restart.yml", "-e", json.dumps({"torchrun_args": ["--epochs=3"]}))
    assert clone.shell("lab1", "ls /var/lib/torchrun/train/checkpoints/*.pt").split()[-1].endswith("epoch-00002.pt")
    assert clone.shell("lab1", "ls -d /var/lib/torchrun/train/checkpoints/set-aside-*/*.pt")


def test_a_process_that_fails_fails_the_play_which_names_node_rank_and_error(clone: Clone):
    script = clone.folder / "broken.py"
    script.write_text(
        "import os, time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "if os.environ['RANK'] == '1':\n    raise RuntimeError('no more sugar in bowl 7')\n"
        "time.sleep(600)\n"
    )
    settings = {"torchrun_job": "broken", "torchrun_source": str(script), "torchrun_script": "broken.py", "torchrun_args": []}
    settings |= {"torchrun_max_restarts": 0, "torchrun_master_port": 29510}
    done = clone.play("train.yml", "-e", json.dumps(settings), check=False)
    assert done.returncode != 0
    messages = [" ".join(text.split()) for text in re.findall(r"^ *msg: (?:>-\n)?(.+(?:\n {4,}.+)*)", done.stdout, re.MULTILINE)]
    assert any(
        "lab2" in text and "rank 1" in text and "RuntimeError: no more sugar in bowl 7" in text for text in messages
    ), done.stdout[-4000:]
    for node in NODES:
        assert clone.shell(node, "systemctl is-active torchrun-broken.service", check=False) in ("failed", "inactive")
        assert clone.shell(node, "pgrep --uid torchrun", check=False) == ""


def test_it_can_be_repeated_over_a_lab_that_was_killed(clone: Clone):
    pids = subprocess.run(["pgrep", "-f", f"^systemd-nspawn .*--network-bridge={BRIDGE}"], capture_output=True, text=True, check=True)
    for pid in pids.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    output = clone.run("make", "train").stdout
    assert re.search(r"finished already|last words +finished: accuracy", output), output[-4000:]


def test_clean_leaves_nothing_behind(clone: Clone):
    clone.run("make", "clean")
    assert leftovers(clone) == []
    assert not (clone.folder / "inventories" / "lab" / ".state").exists()
    clone.run("make", "clean")
