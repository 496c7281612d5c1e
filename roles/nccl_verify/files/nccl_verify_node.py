# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the verification on one node: checks with all peers first, then torch.distributed.run, watched all the time.

Standard library only. Every node connects to every other one before torch is imported. They tell each other what they
found, and start torch only when everybody found everything in order: a firewall is named in seconds instead of a
timeout after minutes. While torch runs, the connections stay open, so that a node that is lost is noticed and named.

Usage: nccl_verify_node.py FOLDER, where FOLDER holds config.json and the programs, and need not be writable;
FOLDER/result/result.json is written in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import hmac
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
import typing as t

CONNECT_SECONDS = 2.0
RETRY_SECONDS = 0.3
# How long a port of a peer that is surely there may stay closed.
BLOCKED_SECONDS = 6.0
HEARTBEAT_SECONDS = 1.0
LOST_SECONDS = 8.0
REPORT_SECONDS = 15.0
LINE_LIMIT = 1 << 22
# What the job's user writes lies apart from what root has put there.
RESULTS = "result"


def read_text(path: str) -> str:
    """Return the text of a file, empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def outcome_of(error: BaseException) -> str:
    """Return in one word what a failed connection means."""
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "dropped"
    number = getattr(error, "errno", None)
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN):
        return "unreachable"
    if number in (errno.EPERM, errno.EACCES):
        return "forbidden"
    if number == errno.ETIMEDOUT:
        return "dropped"
    return f"error {errno.errorcode.get(number, number)}" if number else f"error {type(error).__name__}"


def command_output(words: t.Sequence[str], seconds: float = 15.0) -> str:
    """Return what a command prints, empty where it fails or is not there."""
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def nics(interface: str) -> list[dict[str, t.Any]]:
    """Return the training interface and the RDMA ports that are up, from sysfs."""
    found = []
    base = f"/sys/class/net/{interface}"
    speed = read_text(f"{base}/speed").strip()
    physical = os.path.exists(f"{base}/device")
    found.append(
        {
            "name": interface,
            "rdma": False,
            "mbits": float(speed) if physical and speed.lstrip("-").isdigit() and int(speed) > 0 else 0.0,
            **pcie(f"{base}/device"),
        }
    )
    for port in sorted(glob.glob("/sys/class/infiniband/*/ports/*")):
        if "ACTIVE" not in read_text(f"{port}/state"):
            continue
        words = read_text(f"{port}/rate").split()
        device = port.split("/")[4]
        found.append(
            {
                "name": device,
                "rdma": True,
                "mbits": float(words[0]) * 1000 if words else 0.0,
                **pcie(f"/sys/class/infiniband/{device}/device"),
            }
        )
    return found


def pcie(device: str) -> dict[str, t.Any]:
    """Return GT/s and lanes of a device's PCIe link, zeros where there is none."""
    speed, width = read_text(f"{device}/current_link_speed").split(), read_text(f"{device}/current_link_width").strip()
    return {"pcie_speed": float(speed[0]) if speed else 0.0, "pcie_width": int(width) if width.isdigit() else 0}


def addresses(name: str) -> list[str]:
    """Return what a name resolves to, on this node."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def has_address(address: str) -> bool:
    """Return whether an address is this node's."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
            return True
        except OSError:
            return False


def gpu_processes() -> list[dict[str, t.Any]]:
    """Return the processes that hold a GPU."""
    text = command_output(["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"])
    rows = [line.split(",", 1) for line in text.splitlines() if "," in line]
    return [{"pid": row[0].strip(), "name": row[1].strip()} for row in rows]


VERSIONS = """
import importlib.metadata as m, json, platform
found = {"python": platform.python_version(), "torch": "", "nccl": "", "cuda": ""}
for d in m.distributions():
    n = (d.metadata["Name"] or "").lower()
    if n == "torch":
        found["torch"] = d.version
    elif n.startswith("nvidia-nccl-cu"):
        found["nccl"] = d.version
    elif n.startswith("nvidia-cuda-runtime"):
        found["cuda"] = d.version
print(json.dumps(found))
"""


def versions(python: str) -> dict[str, str]:
    """Return versions without importing torch."""
    text = command_output([python, "-I", "-c", VERSIONS], 60.0)
    found: dict[str, str] = json.loads(text) if text else {"python": "", "torch": "", "nccl": "", "cuda": ""}
    found["driver"] = read_text("/sys/module/nvidia/version").strip()
    return found


def facts(config: dict[str, t.Any]) -> dict[str, t.Any]:
    """Return what this node is, as its checks need it."""
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    me = config["nodes"][config["rank"]]
    nccl = config["worker"]["backend"] == "nccl"
    manager = ""
    if nccl and os.path.exists("/lib/systemd/system/nvidia-fabricmanager.service"):
        # "is-active" fails for a service that is down, and its word is what counts.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            words = ["systemctl", "is-active", "nvidia-fabricmanager.service"]
            manager = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    found = {
        "interface": me["interface"],
        "interface_address": me["address"] if has_address(me["address"]) else "",
        "name_addresses": addresses(socket.gethostname()),
        "memlock_bytes": -1 if memlock == resource.RLIM_INFINITY else memlock,
        "shm_free_bytes": shm.f_bavail * shm.f_frsize if shm else None,
        "gpu_processes": gpu_processes() if nccl else [],
        "kernel": platform.release(),
        "nics": nics(me["interface"]),
    }
    if manager:
        found["fabric_manager"] = manager
    return found


class Peer:
    """What this node knows of another one."""

    def __init__(self, entry: dict[str, t.Any]) -> None:
        self.host: str = entry["host"]
        self.rank: int = entry["rank"]
        self.address: str = entry["address"]
        self.seen = 0.0  # monotonic time of the first sign of life
        self.heard = 0.0  # of the last one
        self.report: dict[str, t.Any] | None = None
        self.said_goodbye = ""
        self.writers: list[asyncio.StreamWriter] = []
        self.offset: float | None = None
        self.trip = 1e9
        self.results: dict[str, str] = {}

    def sign(self) -> None:
        """Note that the peer lives."""
        self.heard = time.monotonic()
        self.seen = self.seen or self.heard


class Node:
    """The verification on this node."""

    def __init__(self, folder: str, config: dict[str, t.Any]) -> None:
        self.programs, self.folder, self.config = folder, os.path.join(folder, RESULTS), config
        self.me = config["nodes"][config["rank"]]
        self.token = config["token"]
        self.peers = [Peer(entry) for entry in config["nodes"] if entry["rank"] != config["rank"]]
        self.by_rank = {peer.rank: peer for peer in self.peers}
        self.deadline = time.monotonic() + config["arrival_seconds"]
        self.problems: list[dict[str, str]] = []
        self.ports: dict[str, int] = {}
        self.servers: dict[str, asyncio.AbstractServer] = {}
        self.result: dict[str, t.Any] = {"host": self.me["host"], "rank": self.me["rank"], "outcome": "", "started": time.time()}
        self.report: dict[str, t.Any] = {}
        self.lost = ""
        self.stopping = False
        self.tasks: list[asyncio.Task[None]] = []

    def problem(self, check: str, text: str) -> None:
        """Note what is wrong with this node itself."""
        self.problems.append({"check": check, "text": text})

    def alike(self, value: str) -> str:
        """Return what is the same on all nodes of this run where the value is, and does not tell it."""
        return hmac.new(self.token.encode(), value.encode(errors="surrogateescape"), "sha256").hexdigest()[:12]

    async def listen(self) -> None:
        """Open the ports that peers will try."""
        kinds = [("verifier", [self.config["ports"]["verifier"]]), ("ephemeral", self.config["ports"]["ephemeral"])]
        if self.config["rank"] == 0 and self.config["ports"].get("master"):
            kinds.append(("master", [self.config["ports"]["master"]]))
        for kind, candidates in kinds:
            for port in candidates:
                try:
                    self.servers[kind] = await asyncio.start_server(
                        self.answer, self.me["address"], port, limit=LINE_LIMIT, reuse_address=True
                    )
                    self.ports[kind] = port
                    break
                except OSError as error:
                    if kind != "master" and port == candidates[-1]:
                        cure = "choose another nccl_verify_port" if kind == "verifier" else "see ip_local_port_range"
                        self.problem("port", f"cannot listen on port {port} ({error.strerror}); {cure}")

    def hello(self, **more: t.Any) -> bytes:
        """Return the first line of either side."""
        words = {"token": self.token, "rank": self.me["rank"], "time": time.time(), "ports": self.ports, **more}
        return json.dumps(words).encode() + b"\n"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection: greet, and where the peer keeps it open, listen to it."""
        try:
            greeting = json.loads(await asyncio.wait_for(reader.readline(), 10))
            if greeting.get("token") != self.token:
                return
            peer = self.by_rank[greeting["rank"]]
            peer.sign()
            writer.write(self.hello())
            await writer.drain()
            if greeting.get("session"):
                await self.hear(peer, reader, writer)
        except (OSError, ValueError, KeyError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # a stranger, or the end of this program
        finally:
            writer.close()

    async def hear(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take in what a peer says, until it ends."""
        peer.writers.append(writer)
        try:
            while True:
                line = await reader.readline()
                if not line:
                    break
                peer.sign()
                words = json.loads(line)
                if words["type"] == "report":
                    peer.report = words["report"]
                elif words["type"] == "goodbye":
                    peer.said_goodbye = words["outcome"]
        except (OSError, ValueError):
            pass
        finally:
            peer.writers.remove(writer)

    def tell(self, words: dict[str, t.Any]) -> None:
        """Send a line to every peer over every open connection."""
        line = json.dumps(words).encode() + b"\n"
        for peer in self.peers:
            for writer in list(peer.writers):
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write(line)

    async def reach(self, peer: Peer, kind: str) -> None:
        """Try one port of a peer until it answers, is surely blocked, or nobody comes."""
        candidates = self.config["ports"]["ephemeral"] if kind == "ephemeral" else [self.config["ports"][kind]]
        tried = 0
        last = "unreachable"
        while True:
            known = peer.results.get("port_of_ephemeral")
            port = int(known) if kind == "ephemeral" and known else candidates[tried % len(candidates)]
            started = time.monotonic()
            try:
                connecting = asyncio.open_connection(
                    peer.address, port, limit=LINE_LIMIT, local_addr=(self.me["address"], 0)
                )
                reader, writer = await asyncio.wait_for(connecting, CONNECT_SECONDS)
                last = await self.greet(peer, kind, port, reader, writer)
                if last == "ok":
                    return
            except (OSError, asyncio.TimeoutError) as error:
                last = outcome_of(error)
            tried += 1
            now = time.monotonic()
            peer.results[kind] = last
            if (peer.seen and now - peer.seen > BLOCKED_SECONDS) or now > self.deadline:
                return
            await asyncio.sleep(max(0.0, RETRY_SECONDS - (now - started)))

    async def greet(
        self, peer: Peer, kind: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> str:
        """Exchange greetings on a fresh connection; keep it where it is the lasting one."""
        keep = kind == "ephemeral"
        sent = time.time()
        try:
            writer.write(self.hello(session=keep))
            await writer.drain()
            answer = json.loads(await asyncio.wait_for(reader.readline(), 5))
            if answer.get("token") != self.token or answer.get("rank") != peer.rank:
                raise ValueError("not the verification")
        except asyncio.TimeoutError:
            writer.close()
            return "dropped"
        except (OSError, ValueError):
            writer.close()
            return "taken"
        came = time.time()
        peer.sign()
        if came - sent < peer.trip:  # the quickest answer tells the clock best
            peer.trip = came - sent
            peer.offset = answer["time"] - (sent + came) / 2
        if "ephemeral" in answer["ports"]:
            peer.results["port_of_ephemeral"] = str(answer["ports"]["ephemeral"])
        peer.results[kind] = "ok"
        if keep:
            self.tasks.append(asyncio.ensure_future(self.session(peer, reader, writer)))
        else:
            writer.close()
        return "ok"

    async def session(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hold the lasting connection that this node opened."""
        try:
            await self.hear(peer, reader, writer)
        finally:
            writer.close()

    async def check(self) -> bool:
        """Check everything with all peers; return whether torch may start."""
        # The blocking parts run beside the network's.
        loop = asyncio.get_running_loop()
        about = loop.run_in_executor(None, facts, self.config)
        found = loop.run_in_executor(None, versions, self.config["python"])
        await self.listen()
        kinds = ["verifier", "ephemeral"]
        attempts = [self.reach(peer, kind) for peer in self.peers for kind in kinds]
        first = self.by_rank.get(0)
        if first and self.config["ports"].get("master"):
            attempts.append(self.reach(first, "master"))
        await asyncio.gather(*attempts)
        self.report = {
            "facts": await about,
            "versions": await found,
            # Values may be secrets, and reports are kept: what is told is whether nodes have the same.
            "nccl_environment": {name: self.alike(value) for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
            "problems": self.problems,
        }
        if not self.report["versions"]["torch"]:
            self.problem("torch", f"{self.config['python']} has no torch; provision the nodes or set pytorch_environment")
        self.report["connections"] = self.connections()
        self.report["clock_offsets"] = {peer.host: peer.offset for peer in self.peers if peer.offset is not None}
        self.result["preflight"] = self.report
        self.result["preflight_seconds"] = time.time() - self.result["started"]
        brief = {
            "bad": [entry for entry in self.report["connections"] if entry["result"] != "ok"],
            "problems": self.problems,
            "versions": self.report["versions"],
        }
        waited = time.monotonic() + REPORT_SECONDS
        while True:
            self.tell({"type": "report", "report": brief})
            silent = [peer for peer in self.peers if peer.report is None]
            # A peer that has never shown itself will not report either.
            if not [peer for peer in silent if peer.seen] or time.monotonic() > waited:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.3 if self.peers else 0)  # let the last report reach those who wait for it
        return self.may_start()

    def connections(self) -> list[dict[str, t.Any]]:
        """Return how each port of each peer answered."""
        found = []
        for peer in self.peers:
            for kind in ("verifier", "ephemeral", "master"):
                if kind not in peer.results:
                    continue
                numbers = self.config["ports"][kind]
                port = int(peer.results.get("port_of_ephemeral") or numbers[0]) if kind == "ephemeral" else numbers
                found.append({"peer": peer.host, "port_kind": kind, "port": port, "result": peer.results[kind]})
        return found

    def may_start(self) -> bool:
        """Return whether everybody reported that everything is in order; every node comes to the same answer."""
        absent = [peer.host for peer in self.peers if peer.report is None]
        self.result["absent"] = absent
        if absent or self.problems or [entry for entry in self.report["connections"] if entry["result"] != "ok"]:
            return False
        mine = [self.report["versions"][key] for key in ("torch", "nccl", "cuda")]
        for peer in self.peers:
            report = t.cast("dict[str, t.Any]", peer.report)
            if report["bad"] or report["problems"] or [report["versions"][key] for key in ("torch", "nccl", "cuda")] != mine:
                return False
        return True

    async def watch(self) -> None:
        """Send signs of life, and note a peer that gives none."""
        for peer in self.peers:
            peer.sign()
        while not self.stopping:
            self.tell({"type": "life"})
            await asyncio.sleep(HEARTBEAT_SECONDS)
            now = time.monotonic()
            for peer in self.peers:
                if peer.said_goodbye == "measured":
                    continue
                gone = not peer.writers and now - peer.heard > 2 * HEARTBEAT_SECONDS
                if peer.said_goodbye or gone or now - peer.heard > LOST_SECONDS:
                    self.lost = self.lost or peer.host
                    self.result["lost_reason"] = peer.said_goodbye or ("closed" if gone else "silent")

    def command(self) -> list[str]:
        """Return the command of torch.distributed.run, as the job's."""
        return [
            *self.config["torchrun"],
            f"--nnodes={len(self.config['nodes'])}",
            f"--node-rank={self.me['rank']}",
            f"--nproc-per-node={self.me['nproc']}",
            f"--master-addr={self.config['nodes'][0]['address']}",
            f"--master-port={self.config['ports']['verifier']}",
            "--max-restarts=0",
            os.path.join(self.programs, "nccl_verify_worker.py"),
            f"--config={os.path.join(self.folder, 'worker.json')}",
            f"--folder={self.folder}",
        ]

    async def measure(self) -> str:
        """Run torch and return the outcome."""
        for kind in ("verifier", "master"):
            if kind in self.servers:
                self.servers[kind].close()
                await self.servers[kind].wait_closed()
        environment = dict(os.environ)
        if self.config["worker"]["backend"] == "nccl":
            # Printed while connections are set up only, so it does not slow what is measured.
            environment.setdefault("NCCL_DEBUG", "INFO")
            environment.setdefault("NCCL_DEBUG_SUBSYS", "INIT,BOOTSTRAP,ENV,NET,P2P,SHM")
            environment["NCCL_DEBUG_FILE"] = os.path.join(self.folder, "nccl-%p.log")
        environment.setdefault("OMP_NUM_THREADS", "1")
        log = open(os.path.join(self.folder, "torchrun.log"), "wb")  # noqa: SIM115
        child = await asyncio.create_subprocess_exec(
            *self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        log.close()
        watcher = asyncio.ensure_future(self.watch())
        ended = asyncio.ensure_future(child.wait())
        end = time.monotonic() + self.config["measure_seconds"]
        outcome = ""
        while not ended.done():
            await asyncio.wait([ended], timeout=0.5)
            if ended.done():
                break
            if self.lost and not outcome:
                outcome = "lost"
                end = min(end, time.monotonic() + 3.0)  # the worker's own words are worth a moment
            if time.monotonic() > end:
                outcome = outcome or "timeout"
                break
        if not ended.done():
            await self.end(child)
        self.stopping = True
        watcher.cancel()
        self.result["returncode"] = child.returncode
        return outcome or ("measured" if child.returncode == 0 else "failed")

    async def end(self, child: asyncio.subprocess.Process) -> None:
        """End torch and its workers; what is left after three seconds is killed."""
        for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(child.wait()), seconds)
                return

    def collect(self) -> None:
        """Put what the workers left into the result."""
        self.result["stages"] = {
            path.rsplit("-", 1)[1]: read_text(path) for path in sorted(glob.glob(os.path.join(self.folder, "stage-*")))
        }
        self.result["errors"] = [
            json.loads(read_text(path)) for path in sorted(glob.glob(os.path.join(self.folder, "error-*.json")))
        ]
        text = read_text(os.path.join(self.folder, "measured.json"))
        if text:
            self.result["measured"] = json.loads(text)
        self.result["log"] = read_text(os.path.join(self.folder, "torchrun.log"))[-8000:]
        lines: dict[str, None] = {}
        for path in sorted(glob.glob(os.path.join(self.folder, "nccl-*.log"))):
            for line in read_text(path).splitlines():
                if any(word in line for word in self.config["keep"]):
                    lines.setdefault(line.split("NCCL INFO", 1)[-1][:400], None)
        self.result["nccl_log"] = list(lines)[:4000]

    async def run(self) -> None:
        """Check, measure, tell the peers and write the result."""
        try:
            self.result["outcome"] = await self.measure() if await self.check() else "checks"
        finally:
            self.collect()
            self.result["lost"] = self.lost
            self.result["ended"] = time.time()
            path = os.path.join(self.folder, "result.json")
            with open(f"{path}.partial", "w", encoding="utf-8") as stream:
                json.dump(self.result, stream)
            os.rename(f"{path}.partial", path)
            self.tell({"type": "goodbye", "outcome": self.result["outcome"] or "error"})
            await asyncio.sleep(0.2)


def main() -> int:
    """Run the verification of this node."""
    folder = sys.argv[1]
    config = json.loads(read_text(os.path.join(folder, "config.json")))
    node = Node(folder, config)
    os.makedirs(node.folder, exist_ok=True)
    with open(os.path.join(node.folder, "worker.json"), "w", encoding="utf-8") as stream:
        json.dump(config["worker"], stream)
    asyncio.run(node.run())
    return 0 if node.result["outcome"] == "measured" else 1


if __name__ == "__main__":
    sys.exit(main())
