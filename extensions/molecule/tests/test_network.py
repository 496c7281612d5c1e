"""Who reaches the job's ports: packets from a peer and from an outsider on the same network."""

from __future__ import annotations

import subprocess

import pytest
import testinfra

LISTEN = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.socket(family)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], int(sys.argv[2])))
server.listen()
server.settimeout(40)
try:
    while True:
        server.accept()[0].sendall(b"hello")
except TimeoutError:
    pass
"""
CONNECT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2) as connection:
        connection.settimeout(2)
        print(connection.recv(5).decode())
except TimeoutError:
    print("dropped")
except OSError as error:
    print(error.strerror)
"""


def from_outsider(lab: dict, address: str, port: int) -> str:
    """Try to connect from a network namespace on the bridge that is no peer."""
    words = ["ip", "netns", "exec", lab["lab_outsiders"][0]["name"], "python3", "-c", CONNECT, address, str(port)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("port", [29500, 29501, 29600, 45678], ids=["master", "supervisor", "verifier", "ephemeral"])
@pytest.mark.parametrize("version", ["ipv4", "ipv6"])
def test_peers_reach_the_port_and_outsiders_do_not(host, node, plan, lab, inventory, port, version):
    address = node["address"] if version == "ipv4" else node["address6"]
    assert address
    peer_name = next(name for name in plan["order"] if name != node["host"])
    peer = testinfra.get_host(f"ssh://{peer_name}", ssh_config=str(inventory / ".state" / "ssh_config"))
    unit = f"listener-{port}-{version}"
    with host.sudo():
        host.check_output(f"systemd-run --quiet --collect --unit={unit} python3 -c '{LISTEN}' {address} {port}")
        try:
            for _attempt in range(20):
                if host.run(f"ss --no-header --listening --tcp 'sport = :{port}' | grep -q .").rc == 0:
                    break
            assert peer.check_output(f"python3 -c '{CONNECT}' {address} {port}") == "hello"
            assert from_outsider(lab, address, port) == "dropped"
        finally:
            host.run(f"systemctl stop {unit}")


def test_ssh_stays_open_to_all(node, lab):
    assert from_outsider(lab, node["address"], 22) == "SSH-2"
