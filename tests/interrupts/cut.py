# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two nodes, runs of train.yml that are killed, and what must hold whenever one was."""
from __future__ import annotations

import atexit
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAB = HERE / "inventory"
BRIDGE, NAMES = "onpremI1", ("cut1", "cut2")
JOB, UNIT = "/var/lib/torchrun/train", "torchrun-train.service"
ENVIRONMENT = {**{key: value for key, value in os.environ.items() if key != "ANSIBLE_FORCE_COLOR"}, "ANSIBLE_NOCOLOR": "1"}
# Connections of these runs alone, so that they can die with a run. Short: the path of a socket has 108 bytes.
SOCKETS = tempfile.mkdtemp(prefix="cut")
atexit.register(shutil.rmtree, SOCKETS, True)
ENVIRONMENT["ANSIBLE_SSH_CONTROL_PATH_DIR"] = SOCKETS
FOREVER = 10 ** 9


def _nspawn():
    spec = importlib.util.spec_from_file_location("nspawn", ROOT / "plugins/module_utils/nspawn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nspawn = _nspawn()


def masters():
    """The ssh processes that hold the connections; they outlive a run, but not the machine that it ran on."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and SOCKETS.encode() in pathlib.Path(f"/proc/{entry}/cmdline").read_bytes():
                found.add(int(entry))
        except OSError:
            continue
    return found


def family(roots):
    """Some processes and all that descend from them, by this host's ids."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def send(pids, number):
    """A signal for processes; some may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Node:
    """One node, looked at from outside its network."""

    def __init__(self, name):
        self.name = name
        self.folder = LAB / ".state" / "nodes" / name / "root"

    def leader(self):
        return nspawn.leader(str(self.folder))

    def shell(self, command, check=True):
        """A command as root inside; its output."""
        done = subprocess.run(["nsenter", "--target", str(self.leader()), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--",
                               "/bin/sh", "-c", command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=120)
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stdout}"
        return done.stdout

    def module(self):
        """This host's ids of the processes of a module that Ansible runs there: from sudo down."""
        roots = []
        space = os.readlink(f"/proc/{self.leader()}/ns/pid")
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") != space:
                    continue
                words = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if b"BECOME-SUCCESS" in words:
                roots.append(int(entry))
        return family(roots)

    def runs(self, word):
        """Whether a module runs a command with this in it; words end with a NUL."""
        for pid in self.module():
            try:
                if word in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode():
                    return True
            except OSError:
                continue
        return False

    def journal(self, since=0.0):
        return self.shell(f"journalctl --quiet --no-pager --output=cat --unit={UNIT} --since=@{since:.6f}", check=False)

    def active(self):
        return self.shell(f"systemctl is-active {UNIT} || true").strip()


class Cut:
    """The nodes and the job on them."""

    def __init__(self):
        self.nodes = [Node(name) for name in NAMES]
        self.round = 0
        self.root = "/opt/onprem.torch"
        self.source = ""  # empty for the inventory's

    def lab(self, state):
        done = subprocess.run([sys.executable, "-m", "ansible", "playbook", "playbooks/lab.yml", "-i", LAB, "-e", f"lab_state={state}"],
                              cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout[-6000:]

    def target(self, steps):
        """How many steps the job has to do."""
        for node in self.nodes:
            node.shell(f"mkdir -p /var/lib/torchrun; echo {steps} >/var/lib/torchrun/t; chmod 644 /var/lib/torchrun/t; "
                       "mv /var/lib/torchrun/t /var/lib/torchrun/target")

    def start(self):
        """Begin a run of train.yml with the job's variables as they are now."""
        variables = {"torchrun_environment": {"ROUND": str(self.round)}, "pytorch_root": self.root}
        if self.source:
            variables["torchrun_source"] = self.source
        return subprocess.Popen([sys.executable, "-m", "ansible", "playbook", "train.yml", "-i", LAB, "-e", json.dumps(variables)],
                                cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self):
        """A run that nobody kills; its output."""
        process = self.start()
        output, _nothing = process.communicate(timeout=600)
        assert process.returncode == 0, output[-6000:]
        return output

    def kill_play(self, process):
        """SIGKILL for ansible-playbook and its forks, as when its machine dies; what it has started on the nodes goes on.

        Forks are sessions of their own, so no group of processes holds them all; stopped first, none of them can fork.
        """
        found = set()
        while more := family([process.pid]) - found:
            send(more, signal.SIGSTOP)
            found |= more
        send(found | masters(), signal.SIGKILL)
        process.communicate()

    def kill_main(self, process):
        """SIGKILL for ansible-playbook alone: each of its forks still brings its task to an end."""
        process.kill()
        process.communicate()

    def kill_modules(self, process, nodes=None):
        """SIGKILL for what runs on the nodes; returns what ansible-playbook says of it."""
        send(set().union(*(node.module() for node in nodes or self.nodes)), signal.SIGKILL)
        output, _nothing = process.communicate(timeout=600)
        return output

    def installs(self, node):
        """Whether uv installs there into the environment that the newest run asked for."""
        return node.runs(f"\0pip\0install\0--python\0{self.root}/environments/")

    def when(self, process, condition):
        """Wait for a moment; whether it came before the run's end."""
        while process.poll() is None:
            if condition():
                return True
            time.sleep(0.003)
        return False

    def quiet(self):
        """Wait until what killed runs have left on the nodes has ended."""
        deadline = time.monotonic() + 300
        while any(node.module() for node in self.nodes):
            assert time.monotonic() < deadline, "a module does not end"
            time.sleep(0.2)

    def check(self):
        """What must hold at every moment: what is in use is whole. Returns what is in use, by node."""
        used = {}
        for node in self.nodes:
            # Read in one go, so that a module that still runs does not change it in between.
            text = node.shell(
                f"cat /etc/systemd/system/{UNIT} 2>/dev/null; echo; echo @@@; readlink {JOB}/current; echo @@@; cat {JOB}/current/release.json; "
                f"echo @@@; cat /etc/torchrun/train.env; echo @@@; ls {JOB}/checkpoints; echo @@@; systemctl is-active {UNIT}", check=False)
            unit, link, release, settings, names, state = (part.strip() for part in text.split("@@@"))
            used[node.name] = {"unit": unit, "release": link, "state": state}
            if not link.startswith("releases/"):
                assert state != "active", f"{node.name}: a unit runs without a release"
                continue
            assert json.loads(release)["release"] == link.split("/")[1], f"{node.name}: the current release is not whole"
            if unit and "[X-OnpremTorch]" not in unit:
                raise AssertionError(f"{node.name}: the unit is not whole: {unit}")
            if state == "active":
                python = re.search(r"(/\S+)/bin/python3 \\?\s*-m \\?\s*torch", unit)[1]
                assert "versions" in json.loads(node.shell(f"cat {python}/.onprem-torch.json")), f"{node.name}: runs in a half-built environment"
                running = node.shell(f"tr '\\0' '\\n' </proc/$(systemctl show --property=MainPID --value {UNIT})/environ | grep ^ROUND=")
                used[node.name]["round"] = running.strip()
                # The environment of the next release must not reach a unit that starts again before the switch.
                assert running.strip() in settings.replace('"', "").replace("'", ""), f"{node.name}: {running} runs, {settings} is there"
            for name in names.split():
                if name.startswith("step-"):
                    json.loads(node.shell(f"cat {JOB}/checkpoints/{name} 2>/dev/null || echo '{{}}'"))  # gone is fine, half is not
        return used

    def trains(self, since):
        """Wait for a step that was done after a moment."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = re.findall(r"step (\d+) at ([\d.]+)", self.nodes[0].journal(since - 1))
            if any(float(moment) > since for _step, moment in found):
                return
            time.sleep(0.5)
        raise AssertionError(self.nodes[0].journal(time.time() - 120)[-4000:])

    def converged(self):
        """Run once more and to the end: the release that was asked for trains on all nodes, and nothing is left to change."""
        self.run()
        used = self.check()
        releases = {entry["release"] for entry in used.values()}
        assert len(releases) == 1 and {entry["state"] for entry in used.values()} == {"active"}, used
        assert {entry["round"] for entry in used.values()} == {f"ROUND={self.round}"}, used
        self.trains(time.time())

    def finish(self):
        """Let the job end: its state tells whether a step was lost or done twice in any of the interruptions."""
        step = int(re.findall(r"step (\d+) at", self.nodes[0].journal(time.time() - 20))[-1]) + 60
        since = time.time()
        self.target(step)
        deadline = time.monotonic() + 120
        while {node.active() for node in self.nodes} != {"inactive"}:
            assert time.monotonic() < deadline, self.nodes[0].journal(since)[-4000:]
            time.sleep(0.5)
        for node in self.nodes:
            (done, state, expected), = re.findall(r"finished: step (\d+) state (\d+) expected (\d+)", node.journal(since))
            assert int(done) == step and state == expected, f"{node.name}: a step was lost or done twice"
        return step
