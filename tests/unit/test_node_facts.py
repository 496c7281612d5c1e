"""What a node says of itself, from recorded files and from this very machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import node_facts

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def line(address, state, inode):
    return f"   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100 0 0 10 0\n"


def put(root, path, text):
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


@pytest.mark.skipif(sys.byteorder != "little", reason="the recorded addresses are of a little-endian machine")
@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("0100007F:0016", "127.0.0.1", 22),
        ("00000000:733C", "0.0.0.0", 29500),
        ("0B0012C6:733C", "198.18.0.11", 29500),
        ("00000000000000000000000000000000:0016", "::", 22),
        ("00000000000000000000000001000000:0277", "::1", 631),
        ("0000000000000000FFFF00000B0012C6:733C", "::ffff:198.18.0.11", 29500),
    ],
)
def test_addresses_of_proc_net_tcp(text, address, port):
    assert node_facts.decode_address(text) == (address, port)


@pytest.mark.skipif(sys.byteorder != "little", reason="the recorded addresses are of a little-endian machine")
def test_listening_sockets_have_port_process_and_unit(tmp_path):
    put(
        tmp_path,
        "proc/net/tcp",
        HEADER + line("00000000:733C", "0A", 111) + line("0B0012C6:8000", "01", 112) + line("0100007F:1F90", "0A", 113),
    )
    put(tmp_path, "proc/net/tcp6", HEADER + line("00000000000000000000000000000000:733C", "0A", 114))
    put(tmp_path, "proc/42/comm", "python3\n")
    put(tmp_path, "proc/42/cgroup", "0::/system.slice/torchrun-train.service/job\n")
    (tmp_path / "proc/42/fd").mkdir()
    for number, inode in ((3, 111), (4, 114)):
        os.symlink(f"socket:[{inode}]", tmp_path / f"proc/42/fd/{number}")
    found = node_facts.listening(str(tmp_path))
    assert found == [
        {"address": "127.0.0.1", "port": 8080, "pid": 0, "command": "", "unit": ""},
        {"address": "0.0.0.0", "port": 29500, "pid": 42, "command": "python3", "unit": "torchrun-train.service"},
        {"address": "::", "port": 29500, "pid": 42, "command": "python3", "unit": "torchrun-train.service"},
    ]


def test_a_socket_of_this_process_is_found():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [entry for entry in node_facts.listening() if entry["port"] == port]
    assert [(entry["address"], entry["pid"]) for entry in found] == [("127.0.0.1", os.getpid())]


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/ssh.service\n", "ssh.service"),
        ("0::/system.slice/torchrun-train.service/supervisor\n", "torchrun-train.service"),
        ("12:pids:/a\n0::/system.slice/x@1.service\n", "x@1.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", ""),
        ("", ""),
    ],
)
def test_units_of_processes(tmp_path, text, unit):
    put(tmp_path, "proc/7/cgroup", text)
    assert node_facts.unit_of(7, str(tmp_path)) == unit


def test_distribution(tmp_path):
    put(
        tmp_path,
        "etc/os-release",
        'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nVERSION_ID="24.04"\nID=ubuntu\nVERSION_CODENAME=noble\n\n# a comment\n',
    )
    assert node_facts.distribution(str(tmp_path)) == {
        "id": "ubuntu",
        "version": "24.04",
        "codename": "noble",
        "name": "Ubuntu 24.04.1 LTS",
    }


def test_a_node_without_os_release_has_no_distribution(tmp_path):
    assert set(node_facts.distribution(str(tmp_path)).values()) == {""}


@pytest.mark.parametrize("text", ['NAME="open quote\nID=debian\n', "ID='debian\n"])
def test_a_broken_os_release_does_not_raise(tmp_path, text):
    put(tmp_path, "etc/os-release", text)
    assert set(node_facts.distribution(str(tmp_path))) == {"id", "version", "codename", "name"}


def test_ephemeral_ports(tmp_path):
    assert node_facts.ephemeral_ports(str(tmp_path)) == [32768, 60999]
    put(tmp_path, "proc/sys/net/ipv4/ip_local_port_range", "10000\t20000\n")
    assert node_facts.ephemeral_ports(str(tmp_path)) == [10000, 20000]


def test_interfaces_leave_link_local_addresses_out():
    links = [
        {
            "ifname": "eth0",
            "flags": ["BROADCAST", "UP", "LOWER_UP"],
            "mtu": 9000,
            "addr_info": [
                {"local": "198.18.0.5", "prefixlen": 24, "scope": "global"},
                {"local": "fe80::1", "prefixlen": 64, "scope": "link"},
                {"local": "fd00::5", "prefixlen": 64, "scope": "global"},
                {},
            ],
        },
        {"ifname": "lo", "flags": ["LOOPBACK", "UP"], "mtu": 65536, "addr_info": [{"local": "127.0.0.1", "prefixlen": 8}]},
        {"ifname": "ib0", "flags": []},
    ]
    assert node_facts.parse_addresses(links) == [
        {"name": "eth0", "up": True, "loopback": False, "mtu": 9000, "addresses": ["198.18.0.5/24", "fd00::5/64"]},
        {"name": "lo", "up": True, "loopback": True, "mtu": 65536, "addresses": ["127.0.0.1/8"]},
        {"name": "ib0", "up": False, "loopback": False, "mtu": 0, "addresses": []},
    ]


def test_free_bytes_of_a_folder_that_is_still_to_be_made(tmp_path):
    assert node_facts.free_bytes("/no/such/folder", str(tmp_path)) > 0


def test_the_version_of_torch_is_read_without_importing_it(tmp_path):
    assert node_facts.torch_version("/opt/env", str(tmp_path)) == ""
    put(tmp_path, "opt/env/lib/python3.11/site-packages/torch/version.py", "debug = False\n__version__ = '2.13.0+cpu'\n")
    assert node_facts.torch_version("/opt/env", str(tmp_path)) == "2.13.0+cpu"


def test_the_version_of_python():
    assert node_facts.python_version(sys.executable) == ".".join(str(part) for part in sys.version_info[:3])
    assert node_facts.python_version("/no/such/python") == ""
    assert node_facts.python_version("/bin/false") == ""


def test_our_jobs_are_found_by_their_units(tmp_path):
    assert node_facts.jobs(str(tmp_path)) == []
    text = "[Service]\nJob=not this\n[X-OnpremTorch]\nJob=train\nMasterPort=29500\nSupervisorPort=29501\nDevices=0,1\n"
    put(tmp_path, "etc/systemd/system/torchrun-train.service", text)
    put(tmp_path, "sys/fs/cgroup/system.slice/torchrun-train.service/cgroup.events", "populated 1\nfrozen 0\n")
    assert node_facts.jobs(str(tmp_path)) == [
        {
            "job": "train",
            "unit": "torchrun-train.service",
            "active": True,
            "devices": "0,1",
            "master_port": 29500,
            "supervisor_port": 29501,
        }
    ]


def test_secrets_are_found_before_the_first_start(tmp_path):
    assert not node_facts.secret_ids(str(tmp_path))
    put(tmp_path, "etc/torchrun/train.secret", "secret")
    put(tmp_path, "etc/torchrun/second.secret", "another")
    put(tmp_path, "etc/torchrun/train.env", "A=1")
    assert node_facts.secret_ids(str(tmp_path)) == {"second": "ae448ac86c4e", "train": "2bb80d537b1d"}


@pytest.mark.parametrize("text", ["", "[X-OnpremTorch]\nJob=train\nMasterPort=\n", "[X-OnpremTorch]\nMasterPort=soon\n"])
def test_a_unit_that_somebody_edited_does_not_raise(tmp_path, text):
    put(tmp_path, "etc/systemd/system/torchrun-train.service", text)
    assert node_facts.jobs(str(tmp_path))[0]["master_port"] == 0


HERE = {"machine_id": "a", "boot_id": "1"}


@pytest.mark.parametrize(
    ("node", "container", "same"),
    [
        (HERE, False, True),
        ({"machine_id": "b", "boot_id": "1"}, False, True),  # Ansible runs in a container on the node
        ({"machine_id": "a", "boot_id": "2"}, False, False),  # made of the same image
        ({"machine_id": "b", "boot_id": "2"}, False, False),
        ({"machine_id": "b", "boot_id": "1"}, True, False),  # a container beside Ansible has its host's kernel
        (HERE, True, True),  # Ansible and the node are one container
    ],
)
def test_the_control_node_is_known_among_the_nodes(node, container, same):
    assert node_facts.same_machine(HERE, node, container) is same


def test_a_machine_that_does_not_tell_its_boot_is_no_other(tmp_path):
    nothing = node_facts.machine(str(tmp_path))
    assert nothing == {"machine_id": "", "boot_id": ""} and not node_facts.same_machine(nothing, nothing, False)
    assert node_facts.machine()["boot_id"]


def test_paths_that_are_not_there_yet_are_on_the_file_system_above_them(tmp_path):
    above = node_facts.file_system(str(tmp_path))
    assert node_facts.file_system(str(tmp_path / "not/yet")) == above == os.stat(tmp_path).st_dev
    assert node_facts.free_bytes(str(tmp_path / "not/yet")) > 0
    assert node_facts.file_system("/proc/self") != above


def test_a_user_with_many_descriptors_holds_no_look_up():
    """20,000 of them, before the one that is asked for: they are not all read."""
    code = "import os, resource, sys; n = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)); "
    code += "[os.dup(1) for _ in range(min(n, 20_000) - 50)]; print('ready', flush=True); sys.stdin.read()"
    crowd = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _process in range(3)]
    try:
        for process in crowd:
            assert process.stdout.readline() == b"ready\n"
        with socket.create_server(("127.0.0.1", 0)) as server:
            inode = os.fstat(server.fileno()).st_ino
            seen, real = [], os.readlink
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "readlink", lambda path: seen.append(path) or real(path))
                assert node_facts.socket_owners({str(inode)}) == {str(inode): os.getpid()}
            for process in crowd:
                assert len([path for path in seen if f"/{process.pid}/" in path]) <= node_facts.MOST_DESCRIPTORS
    finally:
        for process in crowd:
            process.communicate()


@pytest.mark.parametrize("there", [True, False])
def test_the_system_bus(tmp_path, there):
    (tmp_path / "run/dbus").mkdir(parents=True)
    if there:
        (tmp_path / "run/dbus/system_bus_socket").write_text("")
    assert node_facts.system_bus(str(tmp_path)) is there
