# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs beside each other: what Ansible gave up does not act later, and two runs do not disturb each other.

The job is a unit that sleeps, so nothing has to be installed for it. Run as root: pytest tests/interrupts/test_runs.py
"""
from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from cut import ENVIRONMENT, LAB, ROOT

UNIT = "torchrun-demo.service"
LOCK = "/run/onprem.torch/job-demo.lock"
STOP = """
- hosts: cut1
  gather_facts: false
  tasks:
    - onprem.torch.torchrun_unit: {state: stopped, job: demo, root: /var/lib/torchrun/demo}
      timeout: "{{ give_up | default(0) }}"
"""
# A verb that holds the cluster until a file says that it may go on, and then stops the job.
HOLDS = f"""
- import_playbook: {ROOT}/playbooks/parts/look.yml
  vars: {{look_takes: provision}}
- hosts: train
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - ansible.builtin.wait_for: {{path: "{{{{ go }}}}", timeout: 3000}}
      delegate_to: localhost
      become: false
      run_once: true
    - onprem.torch.torchrun_unit: {{state: stopped, job: demo, root: /var/lib/torchrun/demo}}
- import_playbook: {ROOT}/playbooks/parts/give_back.yml
"""
LEASE = "/run/onprem.torch/run.json"


@pytest.fixture
def node(cut):
    """The first node, with a job that runs."""
    first = cut.nodes[0]
    first.shell(f"printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >/etc/systemd/system/{UNIT}; systemctl daemon-reload; systemctl start {UNIT}")
    yield first
    first.shell(f"systemctl stop {UNIT}; rm -f /etc/systemd/system/{UNIT}; systemctl daemon-reload; systemctl stop holder 2>/dev/null || true")


# A control node that sees no process of this one.
ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def play(path, *options, where=()):
    return subprocess.Popen([*where, sys.executable, "-m", "ansible", "playbook", str(path), "-i", LAB, *options],
                            cwd=ROOT, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process, code=None):
    """The output of a run that has ended by itself."""
    output, _nothing = process.communicate(timeout=400)
    assert code is None or process.returncode == code, output[-6000:]
    return output


def says(process, words):
    """Wait until a run says something; it is left to run on."""
    told = ""
    for line in process.stdout:
        told += line
        if words in line:
            return
    raise AssertionError(told[-6000:])


def when(condition, what, process=None):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, what
        assert process is None or process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.2)


def active(node):
    return node.shell(f"systemctl is-active {UNIT} || true").strip()


def opened(node):
    """Descriptors of the lock that processes of the node have."""
    return int(node.shell(f"ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c {LOCK} || true"))


@pytest.mark.parametrize("way", ["timeout", "Ctrl-C", "killed"])
def test_a_module_that_was_given_up_while_it_waited_does_not_stop_the_job(cut, node, tmp_path, way):
    node.shell(f"mkdir -p -m 755 /run/onprem.torch; (umask 077; : >>{LOCK}); systemd-run --quiet --collect --unit=holder flock {LOCK} sleep 600")
    when(lambda: opened(node), "the lock is held")
    held = opened(node)
    (tmp_path / "stop.yml").write_text(STOP)
    process = play(tmp_path / "stop.yml", *(["-e", "give_up=30"] if way == "timeout" else []))
    when(lambda: opened(node) > held, "the module waits", process)
    if way == "timeout":
        assert "Timed out after 30" in ended(process, 2)
    elif way == "Ctrl-C":
        process.send_signal(signal.SIGINT)
        ended(process)
    else:
        cut.kill_play(process)
    when(lambda: not node.module(), "the module ends, although the lock is not free")
    node.shell("systemctl stop holder")
    assert opened(node) == 0 and active(node) == "active"


def test_other_users_delay_nothing(node, tmp_path):
    node.shell("runuser -u nobody -- sh -c 'mkdir -p /run/lock/onprem.torch-job-demo.lock; mkdir /run/onprem.torch/x 2>/dev/null && exit 9; "
               f"flock --nonblock {LOCK} true 2>/dev/null && exit 9; ln -sf /etc/passwd {LOCK} 2>/dev/null && exit 9; exit 0'")
    (tmp_path / "stop.yml").write_text(STOP)
    ended(play(tmp_path / "stop.yml", "-e", "give_up=90"), 0)
    assert active(node) == "inactive"
    node.shell("rmdir /run/lock/onprem.torch-job-demo.lock")


def test_of_two_runs_one_is_refused_or_waits_and_a_stop_interrupts(cut, node, tmp_path):
    (tmp_path / "holds.yml").write_text(HOLDS)
    first = play(tmp_path / "holds.yml", "-e", f"go={tmp_path}/go")
    when(lambda: all(each.shell(f"test -s {LEASE} && echo yes || true") for each in cut.nodes), "the first run has the cluster", first)
    lease = node.shell(f"cat {LEASE}")

    refused = ended(play("playbooks/verify.yml", "-e", "cluster_wait=0"), 2)
    assert "(provision of the job train, process" in refused and "cluster_take_over=true" in refused, refused[-3000:]
    assert "is changing this cluster" in ended(play("playbooks/plan.yml"), 0)
    refused = ended(play("playbooks/verify.yml", "-e", "cluster_wait=0", where=ELSEWHERE), 2)
    assert "(provision of the job train, process" in refused and "cluster_take_over=true" in refused, refused[-3000:]
    assert node.shell(f"cat {LEASE}") == lease, "the first run was disturbed"

    second = play(tmp_path / "holds.yml", "-e", f"go={ROOT}/README.md", "-e", "cluster_wait=300")
    says(second, "waiting up to")
    stop = ended(play("playbooks/stop.yml"), 0)
    assert "(provision of the job train, process" in stop and "is interrupted" in stop, stop[-3000:]
    ended(second, 0)
    assert not any(each.shell(f"test -s {LEASE} && echo yes || true") for each in cut.nodes), "the cluster was not given back"

    # The first run goes on, late; the job was started since.
    node.shell(f"systemctl start {UNIT}")
    (tmp_path / "go").write_text("")
    late = ended(first, 2)
    assert "was not changed" in late and active(node) == "active", late[-3000:]

    # A run that was killed holds nobody up.
    third = play(tmp_path / "holds.yml", "-e", f"go={tmp_path}/never")
    when(lambda: node.shell(f"test -s {LEASE} && echo yes || true"), "the third run has the cluster", third)
    cut.kill_play(third)
    after = ended(play(tmp_path / "holds.yml", "-e", f"go={tmp_path}/go", "-e", "cluster_wait=0"), 0)
    assert "has ended without giving the cluster back" in after and active(node) == "inactive", after[-3000:]

    # Another control node cannot know that it was killed, so a person has to say it.
    fourth = play(tmp_path / "holds.yml", "-e", f"go={tmp_path}/never")
    when(lambda: node.shell(f"test -s {LEASE} && echo yes || true"), "the fourth run has the cluster", fourth)
    cut.kill_play(fourth)
    words = (tmp_path / "holds.yml", "-e", f"go={tmp_path}/go", "-e", "cluster_wait=0")
    assert "cluster_take_over=true" in ended(play(*words, where=ELSEWHERE), 2)
    ended(play(*words, "-e", "cluster_take_over=true", where=ELSEWHERE), 0)
    assert not any(each.shell(f"test -s {LEASE} && echo yes || true") for each in cut.nodes), "the cluster was not given back"
