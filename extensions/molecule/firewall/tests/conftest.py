"""The nodes, the outsider, and Ansible run on them. Tests run in the order in which they are written."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).resolve().parent
SCENARIO = HERE.parent
ROOT = SCENARIO.parents[2]
INVENTORY = SCENARIO / "inventory"
BIN = Path(sys.executable).parent
HOSTS: dict[str, dict[str, str]] = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["train"]["hosts"]
OUTSIDER = yaml.safe_load((INVENTORY / "group_vars" / "all.yml").read_text())["lab_outsiders"][0]["name"]
NETWORK6 = "fdc6:1815:0:48::"
# The job's three ports and one of the kernel's: each has a listener on every node, and SSH has one of its own.
MASTER, SUPERVISOR, VERIFIER, EPHEMERAL, MONITORING = 29500, 29501, 29600, 45678, 9400
SOCKETS = tempfile.mkdtemp(prefix="ssh-")
LISTENER = f"""
import asyncio
async def hello(reader, writer):
    writer.write(b"hello")
    writer.close()
async def main():
    servers = [await asyncio.start_server(hello, None, port) for port in ({MASTER}, {SUPERVISOR}, {VERIFIER}, {EPHEMERAL}, {MONITORING})]
    await asyncio.Event().wait()
asyncio.run(main())
"""
CONNECT = """
import concurrent.futures, socket, sys
source = (sys.argv[2], 0) if sys.argv[2] != "any" else None
def ask(port):
    try:
        with socket.create_connection((sys.argv[1], int(port)), timeout=3, source_address=source) as connection:
            connection.settimeout(3)
            return connection.recv(5).decode()
    except TimeoutError:
        return "dropped"
    except OSError as error:
        return error.strerror
with concurrent.futures.ThreadPoolExecutor(len(sys.argv)) as pool:
    for port, answer in zip(sys.argv[3:], pool.map(ask, sys.argv[3:])):
        print(port, answer)
"""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail where a test was skipped or none ran; end the connections."""
    on_all(Node.hang_up)
    shutil.rmtree(SOCKETS, ignore_errors=True)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and (reporter.stats.get("skipped") or not reporter.stats.get("passed")):
        session.exitstatus = 1


MEASURED: list[str] = []  # lines that are shown at the end, also where everything passed


def pytest_terminal_summary(terminalreporter: t.Any) -> None:
    """Show what was measured."""
    for line in MEASURED:
        terminalreporter.write_line(line)


@dataclasses.dataclass(frozen=True)
class Node:
    """A booted node."""

    name: str

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return HOSTS[self.name]["ansible_host"]

    @property
    def address6(self) -> str:
        """Its IPv6 address: the same number in the network."""
        return f"{NETWORK6}{int(self.address.rsplit('.', 1)[1]):x}"

    @property
    def firewall(self) -> str:
        """What filters on it."""
        return HOSTS[self.name]["firewall_here"]

    def run(self, command: str, check: bool = True, data: str | None = None) -> str:
        """Run a shell command as root and return what it prints."""
        words = [*self.ssh(), self.name, f"sudo sh -c {shlex.quote(command)}"]
        done = subprocess.run(words, input=data or "", capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def ssh(self) -> list[str]:
        """Return the words that log in; one connection serves many commands."""
        options = ["ConnectTimeout=10", "ControlMaster=auto", f"ControlPath={SOCKETS}/{self.name}", "ControlPersist=120"]
        return ["ssh", "-F", str(INVENTORY / ".state" / "ssh_config"), *(word for option in options for word in ("-o", option))]

    def hang_up(self) -> None:
        """End the connection."""
        subprocess.run([*self.ssh(), "-O", "exit", self.name], capture_output=True, check=False)

    def listen(self) -> None:
        """Have it listen on the job's ports and an ephemeral one."""
        if self.run("systemctl is-active listener || true").strip() != "active":
            self.run("cat >/run/listener.py", data=LISTENER)
            self.run("systemd-run --quiet --collect --unit=listener python3 /run/listener.py")
        wait_until(lambda: self.run(f"ss -Htln 'sport = :{EPHEMERAL}'").strip(), f"{self.name} listens")

    def connect(self, address: str, *ports: int, source: str = "any") -> dict[int, str]:
        """Connect from this node to ports of an address: what comes back, or why nothing does."""
        text = self.run(f"python3 - {address} {source} {' '.join(map(str, ports))}", data=CONNECT)
        return {int(line.split()[0]): line.split(None, 1)[1] for line in text.splitlines()}

    def snapshot(self) -> str:
        """Return all that a firewall role could touch."""
        return self.run("sh /root/snapshot.sh")


NODES = [Node(name) for name in HOSTS]
BY_NAME = {node.name: node for node in NODES}


def on_all(function: t.Callable[[Node], t.Any], nodes: t.Sequence[Node] = NODES) -> dict[str, t.Any]:
    """Call a function for all nodes at once; their results by name."""
    with concurrent.futures.ThreadPoolExecutor(len(nodes)) as pool:
        return dict(zip((node.name for node in nodes), pool.map(function, nodes)))


def wait_until(condition: t.Callable[[], t.Any], what: str, seconds: float = 240) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.3)


def ansible(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands on the scenario's inventory."""
    command = [str(BIN / words[0]), "-i", str(INVENTORY), *words[1:]]
    environment = {**os.environ, "ANSIBLE_FORCE_COLOR": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def module(arguments: dict[str, t.Any], pattern: str = "train") -> dict[str, dict[str, t.Any]]:
    """Run the firewall's module on nodes and return their answers by name."""
    words = ["ansible", pattern, "-m", "onprem.torch.peer_firewall", "-a", json.dumps(arguments)]
    done = ansible(*words, ANSIBLE_LOAD_CALLBACK_PLUGINS="1", ANSIBLE_STDOUT_CALLBACK="ansible.posix.json")
    return json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]


def differences(pattern: str = "train") -> dict[str, list[str]]:
    """What the module says differs from what should be, by node."""
    return {name: list(answer["differences"]) for name, answer in module({"state": "verified", "job": "train"}, pattern).items()}


def converge(*words: str, works: bool = True) -> str:
    """Run the scenario's play again, with other variables; what it printed."""
    done = ansible("ansible-playbook", str(SCENARIO / "converge.yml"), *words)
    assert (done.returncode == 0) == works, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def plan_of_the_job() -> dict[str, t.Any]:
    """Return the plan as the playbook prints it for programs."""
    output = ansible("ansible-playbook", "onprem.torch.plan", "-e", "plan_format=json", "-e", "_cluster_fail=false").stdout
    return json.JSONDecoder().raw_decode(output[output.index("\n{\n") + 1 :])[0]


def in_sync() -> None:
    """Nothing differs on any node, by the module's own word."""
    assert differences() == {name: [] for name in HOSTS}


def restore_administrators_rules(node: Node) -> None:
    """Put back what the administrator's own rules lose by a restart without our doing."""
    if node.firewall == "firewalld":
        node.run("firewall-cmd --add-port=8080/tcp && firewall-cmd --add-rich-rule='rule family=ipv4 source address=192.0.2.7 reject'")


def restarted(action: t.Callable[[], t.Any]) -> None:
    """Do what restarts all nodes, and wait until they are back."""
    # The kernel is the host's and goes on; what begins anew is the node's first process.
    identity = "cut -d' ' -f22 /proc/1/stat"
    boot = on_all(lambda node: node.run(identity))
    action()
    on_all(Node.hang_up)

    def back(node: Node) -> bool:
        found = node.run(f"{identity}; systemctl is-system-running", check=False)
        return found.strip().endswith("running") and not found.startswith(boot[node.name])

    for node in NODES:
        wait_until(lambda node=node: back(node), f"{node.name} is back")
    on_all(restore_administrators_rules)


def outside(address: str, first: int = 1, last: int = 65535) -> dict[str, list[int]]:
    """Scan an address from the network namespace that belongs to no peer."""
    words = ["ip", "netns", "exec", OUTSIDER, sys.executable, str(HERE / "scan.py"), address, str(first), str(last)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=200)
    return json.loads(done.stdout)


def from_outsider(address: str, *ports: int) -> dict[int, str]:
    """Connect from there."""
    words = ["ip", "netns", "exec", OUTSIDER, sys.executable, "-c", CONNECT, address, "any", *map(str, ports)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=200)
    return {int(line.split()[0]): line.split(None, 1)[1] for line in done.stdout.splitlines()}


def assert_packets(nodes: t.Sequence[Node] = NODES) -> None:
    """Peers reach the job's ports, an ephemeral one and SSH; the outsider reaches SSH and none of the others. IPv4 and IPv6."""
    wanted = dict.fromkeys((MASTER, SUPERVISOR, VERIFIER, EPHEMERAL), "hello")
    on_all(Node.listen, nodes)

    def check(node: Node, key: str) -> None:
        peer, address = nodes[(nodes.index(node) + 1) % len(nodes)], getattr(node, key)
        assert peer.connect(address, *wanted, 22) == {**wanted, 22: "SSH-2"}, f"{peer.name} to {node.name}"
        found = from_outsider(address, *wanted, 22)
        assert found.pop(22) == "SSH-2"
        # firewalld rejects with ICMP (no route to host), the others drop.
        assert set(found.values()) <= {"dropped", "No route to host", "Permission denied"}, f"outsider to {node.name}: {found}"

    with concurrent.futures.ThreadPoolExecutor(2 * len(nodes)) as pool:
        for done in [pool.submit(check, node, key) for key in ("address", "address6") for node in nodes]:
            done.result()
