# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one node's share of a torch.distributed.run job and keep its life in order.

The main process of ``torchrun-<job>.service``. torchrun runs in a sub-cgroup of its own, so that nothing of it
survives; the supervisor stays alive to tell why it ended.

Exit codes
    0   the job is done, or its stop was requested (systemctl stop, shutdown of the node)
    2   wrong usage or configuration; systemd must not restart (RestartPreventExitStatus=2 10)
    10  the job failed for good; systemd must not restart
    1   the supervisor itself failed; systemd restarts it
"""
from __future__ import annotations

import argparse
import collections
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Iterable, Optional

EXIT_OK, EXIT_INTERNAL, EXIT_USAGE, EXIT_FAILED = 0, 1, 2, 10
MARKER = "TORCHRUN_SUPERVISOR_ID"   # environment variable that names every process of this supervisor
TAIL_LINES, TAIL_WIDTH = 60, 1000   # what is kept of torchrun's output to tell a cause

_output_lock = threading.Lock()


def write_all(descriptor: int, data: bytes) -> None:
    """Write bytes as one piece: lines of several threads never mix."""
    with _output_lock:
        while data:
            try:
                data = data[os.write(descriptor, data):]
            except OSError:      # the reader has gone; training matters more than its log
                return


def say(text: str) -> None:
    """One line of the supervisor's own in the journal."""
    write_all(1, f"supervisor: {text}\n".encode("utf-8", "replace"))


def notify(text: str) -> None:
    """Tell systemd (sd_notify protocol) where NOTIFY_SOCKET is set."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        pass


def write_json(path: str, value: Any) -> None:
    """Replace a JSON file in one step; readers never see half of it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def read_json(path: str) -> Optional[dict[str, Any]]:
    """A JSON object from a file, or None where there is none that can be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ---------------------------------------------------------------------------------------------------------------------
# The processes of one generation


class CgroupTree:
    """All processes of torchrun in one sub-cgroup: whatever they fork, setsid or orphan, they stay inside."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.path = os.path.join(unit, "torchrun")
        own = os.path.join(unit, "supervisor")
        os.makedirs(own, exist_ok=True)
        with open(os.path.join(own, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(str(os.getpid()))
        os.makedirs(self.path, exist_ok=True)

    @staticmethod
    def unit_path() -> Optional[str]:
        """The delegated cgroup of this unit, or None where there is none."""
        try:
            with open("/proc/self/cgroup", encoding="utf-8") as file:
                own = [line[3:].strip() for line in file if line.startswith("0::")]
            with open("/proc/self/mountinfo", encoding="utf-8") as file:
                mounts = [line.split(" ") for line in file if " - cgroup2 " in line]
        except OSError:
            return None
        for mount in mounts:
            if not own or mount[3] != "/":
                continue
            path = mount[4] + own[0]
            if os.path.basename(path) == "supervisor":
                path = os.path.dirname(path)
            files = [path, os.path.join(path, "cgroup.procs")]
            if path.endswith((".service", ".scope")) and all(os.access(name, os.W_OK) for name in files):
                return path
        return None

    def command(self, command: list[str]) -> list[str]:
        """The command, entering the cgroup before it becomes torchrun."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', os.path.join(self.path, "cgroup.procs"), *command]

    def pids(self) -> list[int]:
        """Every process inside, sub-cgroups included."""
        found: list[int] = []
        for folder, _folders, _files in os.walk(self.path):
            try:
                with open(os.path.join(folder, "cgroup.procs"), encoding="ascii") as file:
                    found += [int(line) for line in file]
            except OSError:
                pass
        return found

    def kill(self) -> None:
        """SIGKILL to every process at once (cgroup.kill, Linux 5.14), else one by one."""
        try:
            with open(os.path.join(self.path, "cgroup.kill"), "w", encoding="ascii") as file:
                file.write("1")
        except OSError:
            kill_each(self.pids())

    def oom_kills(self) -> int:
        """How many processes of the unit the kernel has killed for memory, so far."""
        try:
            with open(os.path.join(self.unit, "memory.events"), encoding="ascii") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except (OSError, ValueError):
            return 0


class MarkedTree:
    """The same without a delegated cgroup: processes are found by a marker in their environment."""

    def __init__(self, marker: str) -> None:
        self.marker = f"{MARKER}={marker}".encode()

    def command(self, command: list[str]) -> list[str]:
        return command

    def pids(self) -> list[int]:
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    with open(f"/proc/{name}/environ", "rb") as file:
                        if self.marker in file.read().split(b"\0"):
                            found.append(int(name))
                except OSError:
                    pass
        return found

    def kill(self) -> None:
        kill_each(self.pids())

    def oom_kills(self) -> int:
        return 0


def kill_each(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


class Pump(threading.Thread):
    """Passes one output stream of torchrun on, line by line, and remembers its end."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(daemon=True)
        self.source, self.target = source, target
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.lines = 0

    def run(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self.source, 65536)
            except OSError:
                data = b""
            rest += data
            cut = len(rest) if not data or len(rest) > 65536 else rest.rfind(b"\n") + 1
            if cut:
                whole, rest = rest[:cut], rest[cut:]
                self.lines += 1
                self.tail.extend(line[:TAIL_WIDTH] for line in whole.decode("utf-8", "replace").splitlines())
                write_all(self.target, whole)
            if not data:
                os.close(self.source)
                return


class Torchrun:
    """One generation's torchrun on this node: start, end, and why it ended."""

    def __init__(self, tree: Any, marker: str) -> None:
        self.tree, self.marker = tree, marker
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.pumps: list[Pump] = []
        self.error_file = ""
        self.started = 0.0
        self.oom_before = 0

    def start(self, command: list[str], generation: int, error_dir: str) -> None:
        self.clear()
        os.makedirs(error_dir, exist_ok=True)
        self.error_file = os.path.join(error_dir, f"generation-{generation}.json")
        for path in glob.glob(os.path.join(error_dir, "generation-*.json")):
            os.unlink(path)
        environment = dict(os.environ, TORCHELASTIC_ERROR_FILE=self.error_file, TORCHRUN_GENERATION=str(generation))
        environment[MARKER] = self.marker
        environment.pop("NOTIFY_SOCKET", None)
        self.oom_before, self.started = self.tree.oom_kills(), time.time()
        self.process = subprocess.Popen(self.tree.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, env=environment, start_new_session=True)
        assert self.process.stdout and self.process.stderr
        self.pumps = [Pump(os.dup(stream.fileno()), target)
                      for stream, target in ((self.process.stdout, 1), (self.process.stderr, 2))]
        self.process.stdout.close()
        self.process.stderr.close()
        for pump in self.pumps:
            pump.start()

    def lines(self) -> int:
        """Pieces of output seen so far: a change means that something still speaks."""
        return sum(pump.lines for pump in self.pumps)

    def terminate(self) -> None:
        """SIGTERM to torchrun, which passes it on to its workers."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> Optional[int]:
        """torchrun's exit code (negative: signal), None while it runs."""
        return self.process.poll() if self.process else None

    def clear(self, seconds: float = 10.0) -> list[int]:
        """Kill whatever is left; returns the processes that cannot be killed (uninterruptible sleep)."""
        deadline = time.monotonic() + seconds
        while True:
            left = [pid for pid in self.tree.pids() if not is_zombie(pid)]
            if not left:
                break
            self.tree.kill()
            if time.monotonic() > deadline:
                return left
            time.sleep(0.02)
        if self.process:
            self.process.wait()
        for pump in self.pumps:
            pump.join(1.0)
        return []

    def cause(self) -> dict[str, Any]:
        """Why torchrun ended, from error.json, its own report, the kernel and the last lines."""
        code = self.exit_code() or 0
        tail = list(self.pumps[1].tail) if len(self.pumps) > 1 else []
        cause = cause_from(code, read_json(self.error_file), tail)
        cause["time"] = time.time()
        oom = self.tree.oom_kills() - self.oom_before
        if oom > 0:
            cause["reason"] = "out of memory"
            cause["error"] = f"the kernel killed {oom} process(es) of the job for memory. {cause['error'] or ''}".strip()
        return cause


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def cause_from(code: int, report: Optional[dict[str, Any]], tail: list[str]) -> dict[str, Any]:
    """One cause from torchrun's exit code, the error.json it left and the end of its stderr.

    Keys: reason (exit, signal, error), error (text), exit_code, signal, rank, local_rank; None where unknown.
    """
    cause: dict[str, Any] = {"reason": "exit", "error": None, "exit_code": code, "signal": None,
                             "rank": None, "local_rank": None}
    if code < 0:
        cause.update(reason="signal", exit_code=None, signal=signal_name(-code), error="torchrun itself was killed")
    text = "\n".join(tail)
    root = text.rfind("Root Cause (first observed failure)")
    if root >= 0:
        block = text[root:]
        rank = re.search(r"rank\s*: (\d+) \(local_rank: (\d+)\)", block)
        exitcode = re.search(r"exitcode\s*: (-?\d+)", block)
        if rank:
            cause["rank"], cause["local_rank"] = int(rank.group(1)), int(rank.group(2))
        if exitcode:
            worker = int(exitcode.group(1))
            if worker < 0:
                cause.update(reason="signal", signal=signal_name(-worker), exit_code=None)
            else:
                cause["exit_code"] = worker
    message = (report or {}).get("message")
    if isinstance(message, dict):
        message = message.get("message")
    if isinstance(message, str) and message:
        cause.update(reason="error", error=message[:TAIL_WIDTH])
    elif cause["error"] is None:
        spoken = [line for line in tail if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b", line)
                  and "ChildFailedError" not in line]
        if spoken:
            cause["error"] = spoken[-1]
    return cause


def describe(cause: dict[str, Any]) -> str:
    """A cause as one sentence."""
    who = cause.get("host") or "this node"
    if cause.get("rank") is not None:
        who += f", rank {cause['rank']} (local rank {cause['local_rank']})"
    if cause.get("signal"):
        what = f"killed by {cause['signal']}"
    elif cause.get("exit_code"):
        what = f"exit code {cause['exit_code']}"
    else:
        what = str(cause.get("reason"))
    if cause.get("reason") not in ("exit", "signal", "error", None):
        what = f"{cause['reason']} ({what})"
    return f"{who}: {what}" + (f": {cause['error']}" if cause.get("error") else "")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun_supervisor", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--host", required=True, help="this node's inventory name")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--coordinator", default="", help="ADDRESS:PORT of rank 0's supervisor")
    parser.add_argument("--bind", default="", help="this node's address on the training interface")
    parser.add_argument("--secret-file", default="")
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--checkpoint-dir", default="")
    parser.add_argument("--checkpoint-glob", default="*")
    parser.add_argument("--log-dir", default="")
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--hang-timeout", type=float, default=0.0, help="seconds, 0: off")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL at a requested stop")
    parser.add_argument("--abort-grace", type=float, default=5.0, help="the same when a generation is aborted")
    parser.add_argument("--release", default="")
    parser.add_argument("--check", action="append", default=[], metavar="KIND=VALUE")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        options.command = options.command[1:]
    if not options.command:
        parser.error("no command given after --")
    if not 0 <= options.node_rank < options.nnodes:
        parser.error(f"--node-rank {options.node_rank} is not within --nnodes {options.nnodes}")
    return options


class Solo:
    """First version: this node alone, one generation, no restarts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        marker = os.path.abspath(options.state_dir)   # one per job and node
        unit = CgroupTree.unit_path()
        self.torchrun = Torchrun(CgroupTree(unit) if unit else MarkedTree(marker), marker)
        self.stop_asked = 0.0
        self.state: dict[str, Any] = {
            "version": 1, "job": options.job, "host": options.host, "rank": options.node_rank,
            "nnodes": options.nnodes, "release": options.release, "pid": os.getpid(), "generation": 1,
            "max_restarts": options.max_restarts, "restarts_left": options.max_restarts, "last_exit": None,
            "first_cause": None, "result": None, "members": {},
        }

    def enter(self, state: str, text: str, **values: Any) -> None:
        now = time.time()
        self.state.update(values, state=state, text=text, since=now, written=now)
        write_json(os.path.join(self.options.state_dir, "state.json"), self.state)
        notify(f"STATUS={state}: {text}")
        say(text)

    def run(self) -> int:
        marker_file = os.path.join(self.options.state_dir, "done")
        done = read_json(marker_file)
        if done and done.get("release") == self.options.release:
            notify("READY=1")
            self.enter("done", f"job {self.options.job} has finished already (release {self.options.release}); "
                       f"remove {marker_file} to train anew", result="done")
            return EXIT_OK
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_stop)
        notify("READY=1")
        self.torchrun.start(self.options.command, 1, os.path.join(self.options.state_dir, "errors"))
        self.enter("running", f"generation 1 of job {self.options.job} runs on {self.options.host}")
        killed = False
        told = False
        while self.torchrun.exit_code() is None:
            if self.stop_asked and not told:
                told = True
                self.enter("stopping", f"stop requested on {self.options.host}; {self.options.grace:g} s to end cleanly")
                self.torchrun.terminate()
            if self.stop_asked and not killed and time.monotonic() - self.stop_asked > self.options.grace:
                killed = True
                say(f"not ended within {self.options.grace:g} s: killing it")
                self.torchrun.tree.kill()
            try:
                assert self.torchrun.process
                self.torchrun.process.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
        code = self.torchrun.exit_code()
        self.torchrun.clear()
        last = {"generation": 1, "time": time.time(), "code": code}
        if self.stop_asked:
            self.enter("stopped", f"stopped as requested on {self.options.host}", last_exit=last, result="stopped")
            return EXIT_OK
        if code == 0:
            write_json(marker_file, {"release": self.options.release, "finished": time.time(), "job": self.options.job})
            self.enter("done", f"job {self.options.job} is finished", last_exit=last, result="done")
            return EXIT_OK
        cause = dict(self.torchrun.cause(), host=self.options.host)
        self.enter("failed", f"failed on {describe(cause)}", last_exit=last, first_cause=cause, result="failed")
        return EXIT_FAILED

    def on_stop(self, _number: int, _frame: Any) -> None:
        self.stop_asked = self.stop_asked or time.monotonic()


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    os.makedirs(options.state_dir, exist_ok=True)
    return Solo(options).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
