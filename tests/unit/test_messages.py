"""One exact sentence for every problem that the plan names."""

from __future__ import annotations

import functools
import typing as t

import pytest
from ansible.errors import AnsibleError
from ansible_collections.onprem.torch.plugins.action import plan as action
from ansible_collections.onprem.torch.plugins.module_utils import node_checks
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, connection_variables
from builders import GIB, RELEASE, HostVars, host, interface, node, reader, template

TWO_NETWORKS = [interface("lo", "127.0.0.1/8"), interface("eth0", "198.18.0.{0}/16"), interface("ib0", "198.19.0.{0}/24")]


def two(first: t.Optional[dict] = None, second: t.Optional[dict] = None, gpus: int = 0, nodes: tuple = ({}, {}), **both: t.Any):
    """Return the sentences for two hosts: variables of each, of both, and changes of what their nodes tell."""
    hosts = [
        host("n1", 1, node(1, gpus, **nodes[0]), **both, **(first or {})),
        host("n2", 2, node(2, gpus, **nodes[1]), **both, **(second or {})),
    ]
    return [problem.sentence() for problem in planning.make("train", hosts, RELEASE)[1]]


def read(**variables: t.Any) -> list[str]:
    """Return the sentences for the inventory variables of one host."""
    return [problem.sentence() for problem in reader({"n1": variables}).host("n1")[1]]


def connect(**variables: t.Any) -> list[str]:
    """Return the sentences for the variables that Ansible connects to one host with."""
    raw, templar = reader({"n1": variables}).environment("n1")
    return [problem.sentence() for problem in connection_variables.check("n1", raw, templar)]


def sockets(port: int, unit: str, command: str = "python3") -> dict[str, t.Any]:
    return {"listening": [{"address": "0.0.0.0", "port": port, "pid": 4711, "command": command, "unit": unit}]}


def job(name: str = "other", **changes: t.Any) -> dict[str, t.Any]:
    found = {"job": name, "unit": f"torchrun-{name}.service", "active": True, "devices": ""}
    return {"jobs": [{**found, "master_port": 29700, "supervisor_port": 29701, **changes}]}


def links(number: int) -> dict[str, t.Any]:
    filled = [{**link, "addresses": [text.format(number) for text in link["addresses"]]} for link in TWO_NETWORKS]
    return {"interfaces": filled}


CASES: dict[str, tuple[t.Callable[[], list[str]], list[str]]] = {
    "duplicate rank": (
        lambda: two({"torchrun_node_rank": 0}, {"torchrun_node_rank": 0}),
        ["n2: torchrun_node_rank is 0, which n1 has already; give each host a rank of its own from 0 to 1."],
    ),
    "rank on one host only": (
        lambda: two({"torchrun_node_rank": 0}),
        ["n2: torchrun_node_rank is not set here but on n1; set it on all 2 hosts (0 to 1) or on none."],
    ),
    "ranks with a gap": (
        lambda: two({"torchrun_node_rank": 0}, {"torchrun_node_rank": 2}),
        ["n2: torchrun_node_rank is 2, but 2 hosts have the ranks 0 to 1; number the hosts without a gap from 0."],
    ),
    "textual rank": (
        lambda: read(torchrun_node_rank="first"),
        ["n1: torchrun_node_rank is 'first', but a whole number was expected; correct torchrun_node_rank in the inventory."],
    ),
    "master is a name": (
        lambda: two(torchrun_master_addr="gpu01"),
        [
            "torchrun_master_addr is 'gpu01', but an IP address was expected (a name may resolve to loopback on its own host); "
            "remove it or set the address of n1."
        ],
    ),
    "master is loopback": (
        lambda: two(torchrun_master_addr="127.0.1.1"),
        [
            "torchrun_master_addr is 127.0.1.1, a loopback address, which no other node can reach; "
            "remove it or set the address of n1."
        ],
    ),
    "master is another node": (
        lambda: two(torchrun_master_addr="198.18.0.4"),
        [
            "torchrun_master_addr is 198.18.0.4, which is n2's, but the node with rank 0 is n1; "
            "remove it, or give n2 the rank 0."
        ],
    ),
    "master is not in the group": (
        lambda: two(torchrun_master_addr="192.0.2.9"),
        ["torchrun_master_addr is 192.0.2.9, which no host of the group has; remove it or set the address of n1."],
    ),
    "master port out of range": (
        lambda: two(torchrun_master_port=80, torchrun_supervisor_port=29501),
        ["torchrun_master_port is 80, but a port from 1024 to 65535 was expected; choose another, such as 29500."],
    ),
    "master port is no number": (
        lambda: read(torchrun_master_port="default"),
        ["n1: torchrun_master_port is 'default', but a whole number was expected; correct torchrun_master_port in the inventory."],
    ),
    "two ports are one": (
        lambda: two(torchrun_supervisor_port=29500),
        ["torchrun_supervisor_port is 29500, which is torchrun_master_port already; give each a port of its own."],
    ),
    "master port in the ephemeral range": (
        lambda: two(torchrun_master_port=40000, torchrun_supervisor_port=29501),
        [
            "n1: torchrun_master_port is 40000, inside the range 32768 to 60999 from which the kernel hands out ports, "
            "so any connection may take it; choose a port below 32768."
        ],
    ),
    "supervisor port in the ephemeral range": (
        lambda: two(torchrun_supervisor_port=40001),
        [
            "n1: torchrun_supervisor_port is 40001, inside the range 32768 to 60999 from which the kernel hands out ports, "
            "so any connection may take it; choose a port below 32768."
        ],
    ),
    "master port held by a process": (
        lambda: two(nodes=(sockets(29500, ""), {})),
        ["n1: torchrun_master_port is 29500, which python3 (pid 4711) holds; choose another port or end that process."],
    ),
    "supervisor port held by a service": (
        lambda: two(nodes=(sockets(29501, "jupyter.service", "jupyter"), {})),
        [
            "n1: torchrun_supervisor_port is 29501, which jupyter (pid 4711) of jupyter.service holds; "
            "choose another port or end that process."
        ],
    ),
    "master port held by another job": (
        lambda: two(nodes=(sockets(29500, "torchrun-llama.service"), {})),
        ["n1: torchrun_master_port is 29500, which the job 'llama' holds; choose another port or end that process."],
    ),
    "interface missing on one host": (
        lambda: two(None, {"cluster_interface": "ib0"}),
        [
            "n2: cluster_interface is 'ib0', but the node's interfaces are eth0; "
            "set cluster_interface for this host to one of them."
        ],
    ),
    "interface is loopback": (
        lambda: two({"cluster_interface": "lo"}),
        [
            "n1: cluster_interface is 'lo', the loopback interface, which no other node can reach; "
            "name the interface that the other nodes are reached by."
        ],
    ),
    "interface without an address": (
        lambda: two({"cluster_interface": "ib0"}, nodes=({"interfaces": [interface("ib0")]}, {})),
        ["n1: cluster_interface is 'ib0', which has no IPv4 address; give it one or name another interface."],
    ),
    "only loopback has an address": (
        lambda: two(nodes=({"interfaces": [interface("lo", "127.0.0.1/8")]}, {})),
        [
            "n1: an IPv4 address on an interface that is up was expected, but only loopback has one; "
            "configure the node's network."
        ],
    ),
    "no common network": (
        lambda: two(nodes=({"interfaces": [interface("eth0", "192.0.2.1/24")]}, {})),
        [
            "the nodes have no network in common (n1 is in 192.0.2.0/24; n2 is in 198.18.0.0/16); "
            "set cluster_interface to the interface the peers are reached by."
        ],
    ),
    "several common networks": (
        lambda: two(nodes=(links(1), links(2))),
        [
            "the nodes share several networks (198.18.0.0/16, 198.19.0.0/24); "
            "set cluster_interface to the one to train on, such as eth0."
        ],
    ),
    "two names with one address": (
        lambda: two(nodes=({}, {"interfaces": node(1)["interfaces"]})),
        ["n2: the address 198.18.0.3 is that of n1 too; give each node an address of its own."],
    ),
    "two names with one machine id": (
        lambda: two(nodes=({}, {"machine_id": node(1)["machine_id"]})),
        [
            "n2: the machine id is that of n1, so both names mean one machine or a copy of it; "
            "remove one of them, or make a new id with: rm /etc/machine-id && systemd-machine-id-setup."
        ],
    ),
    "unreachable": (
        lambda: [
            problem.sentence()
            for problem in node_checks.unreadable(
                host("n1", found={"error": "cannot be reached by SSH at 198.18.0.3 (Connection refused); try: ssh n1"})
            )
        ],
        ["n1: cannot be reached by SSH at 198.18.0.3 (Connection refused); try: ssh n1."],
    ),
    "processes negative": (
        lambda: two({"torchrun_nproc_per_node": -1}),
        [
            "n1: torchrun_nproc_per_node is -1, but auto or a whole number from 1 was expected; "
            "set auto for one process per GPU."
        ],
    ),
    "processes zero": (
        lambda: two({"torchrun_nproc_per_node": 0}),
        [
            "n1: torchrun_nproc_per_node is 0, but auto or a whole number from 1 was expected; "
            "set auto for one process per GPU."
        ],
    ),
    "processes text": (
        lambda: two({"torchrun_nproc_per_node": "many"}),
        [
            "n1: torchrun_nproc_per_node is 'many', but auto or a whole number from 1 was expected; "
            "set auto for one process per GPU."
        ],
    ),
    "processes above the GPUs": (
        lambda: two({"torchrun_nproc_per_node": 9}, gpus=8),
        [
            "n1: torchrun_nproc_per_node is 9, but auto or a whole number from 1 to 8 was expected (the node has 8 GPUs); "
            "set auto for one process per GPU."
        ],
    ),
    "arguments are no list": (
        lambda: read(torchrun_args="--epochs 3"),
        ["n1: torchrun_args is '--epochs 3', but a list was expected; correct torchrun_args in the inventory."],
    ),
    "devices without GPUs": (
        lambda: two({"torchrun_devices": "0"}),
        ["n1: torchrun_devices is '0', but the node has no NVIDIA GPU; remove it for a job on CPUs."],
    ),
    "absent device": (
        lambda: two({"torchrun_devices": "0,8"}, gpus=8),
        ["n1: torchrun_devices names GPU 8, but the node's GPUs are 0 to 7; name GPUs that nvidia-smi lists."],
    ),
    "device twice": (
        lambda: two({"torchrun_devices": "0,0"}, gpus=8),
        ["n1: torchrun_devices names GPU 0 more than once; name each GPU once."],
    ),
    "device shared with another job": (
        lambda: two({"torchrun_devices": "0,1"}, gpus=8, nodes=(job(devices="1,2"), {})),
        [
            "n1: GPU 1 is in use by the job 'other'; "
            "set torchrun_devices of both jobs to different GPUs, or stop the other job."
        ],
    ),
    "GPUs wanted and none there": (
        lambda: [
            problem.sentence()
            for problem in node_checks.mixed_hardware([planning.Host("n1", {"cuda_version": "13.0"}, node(1))])
        ],
        [
            "n1: cuda_version is '13.0', but the node has no NVIDIA GPU; "
            "set cuda_version: cpu for a job on CPUs, or take the host out of the group."
        ],
    ),
    "GPUs on some nodes only": (
        lambda: two(gpus=8, nodes=({}, {"hardware": {"gpus": [], "usable_gpus": []}})),
        [
            "n2: the node has no NVIDIA GPU that can be used, but other nodes of the group have; "
            "repair it, or take the host out of the group."
        ],
    ),
    "different Python versions": (
        lambda: two(nodes=({}, {"python": {"path": "/usr/bin/python3", "version": "3.13.5"}})),
        [
            "n2: Python is 3.13 here and 3.11 on n1, but one version was expected on all nodes; "
            "set pytorch_python to the same version everywhere."
        ],
    ),
    "no such Python": (
        lambda: two(
            pytorch_python="/opt/python",
            nodes=({"python": {"path": "/opt/python", "version": ""}}, {}),
        ),
        ["n1: pytorch_python is /opt/python, but no Python answers there; install it or name another Python."],
    ),
    "different torch versions": (
        lambda: two(
            pytorch_source="existing",
            pytorch_environment="/opt/e",
            pytorch_version="",
            nodes=({"torch": {"/opt/e": "2.13.0"}}, {"torch": {"/opt/e": "2.12.0"}}),
        ),
        ["n2: torch is 2.12.0 here and 2.13.0 on n1, but one version was expected on all nodes; install the same torch everywhere."],
    ),
    "another torch than asked for": (
        lambda: two(
            pytorch_source="existing",
            pytorch_environment="/opt/e",
            pytorch_version="2.13.0",
            nodes=({"torch": {"/opt/e": "2.11.0+cu130"}}, {"torch": {"/opt/e": "2.13.0+cu130"}}),
        ),
        [
            "n1: pytorch_version is 2.13.0, but /opt/e holds torch 2.11.0+cu130; "
            "leave it empty for whatever is there, or correct it."
        ],
    ),
    "environment without torch": (
        lambda: two(
            pytorch_source="existing", pytorch_environment="/opt/e", nodes=({"torch": {"/opt/e": "2.13.0"}}, {"torch": {"/opt/e": ""}})
        ),
        ["n2: pytorch_environment is /opt/e, in which there is no torch; name the folder of an environment with torch."],
    ),
    "existing environment that is not named": (
        lambda: two(pytorch_source="existing")[:1],
        [
            "n1: pytorch_source is existing, but pytorch_environment does not say which environment; "
            "set pytorch_environment to its folder."
        ],
    ),
    "unsupported distribution": (
        lambda: two(nodes=({"distribution": {"id": "gentoo", "version": "2", "codename": "", "name": "Gentoo Linux"}}, {})),
        [
            "n1: the distribution is Gentoo Linux, but Debian 12 or 13 or Ubuntu 22.04 or 24.04 was expected; "
            "install one of these or take the host out of the group."
        ],
    ),
    "unsupported architecture": (
        lambda: two(nodes=({"architecture": "ppc64le"}, {})),
        ["n1: the architecture is ppc64le, but x86_64 or aarch64 was expected; take the host out of the group."],
    ),
    "no systemd": (
        lambda: two(nodes=({"systemd": False}, {})),
        ["n1: systemd is not the first process, but the job is a systemd unit; boot the node with systemd."],
    ),
    "no system bus": (
        lambda: two(nodes=({"system_bus": False}, {})),
        [
            "n1: there is no system D-Bus, over which the job's supervisor asks systemd whether its unit is stopped or restarted; "
            "install it (apt-get install dbus)."
        ],
    ),
    "no systemd, and so no bus": (
        lambda: two(nodes=({"systemd": False, "system_bus": False}, {})),
        ["n1: systemd is not the first process, but the job is a systemd unit; boot the node with systemd."],
    ),
    "too little disk": (
        lambda: two(nodes=({"disk": {"/opt/onprem.torch": GIB}}, {})),
        [
            "n1: /opt/onprem.torch has 1.0 GiB free, but 2 GiB are needed for torch; "
            "free some space or set pytorch_root to a larger file system."
        ],
    ),
    "clock behind": (
        lambda: two(nodes=({"clock_offset_seconds": -3.21}, {})),
        [
            "n1: the clock is at least 3.2 s behind the control node's, but at most 1 s was expected; "
            "synchronise it (systemd-timesyncd or chrony)."
        ],
    ),
    "clock ahead": (
        lambda: two(nodes=({"clock_offset_seconds": 61.0}, {})),
        [
            "n1: the clock is at least 61.0 s ahead of the control node's, but at most 1 s was expected; "
            "synchronise it (systemd-timesyncd or chrony)."
        ],
    ),
    "data path missing": (
        lambda: two(torchrun_data_paths=["/data"], nodes=({"paths": {"/data": True}}, {"paths": {"/data": False}})),
        ["n2: torchrun_data_paths names /data, which does not exist on this node; mount or create it, or correct the path."],
    ),
    "remote source missing": (
        lambda: two(torchrun_source="remote:/srv/p", nodes=({"paths": {"/srv/p": False}}, {"paths": {"/srv/p": True}})),
        ["n1: torchrun_source names /srv/p, which does not exist on this node; mount or create it, or correct the path."],
    ),
    "misspelt variable": (
        lambda: read(torchrun_agrs=["--x"]),
        ["n1: torchrun_agrs is no variable of this collection; write torchrun_args."],
    ),
    "unknown variable": (
        lambda: read(torchrun_colour="blue"),
        [
            "n1: torchrun_colour is no variable of this collection; "
            "remove it, or see the list of variables in docs/variables.md."
        ],
    ),
    "wrong choice": (
        lambda: read(torchrun_wait_for="forever"),
        [
            "n1: torchrun_wait_for is 'forever', but one of first_step, finished was expected; "
            "correct torchrun_wait_for in the inventory."
        ],
    ),
    "environment is no mapping": (
        lambda: read(torchrun_environment=["A=1"]),
        [
            "n1: torchrun_environment is a list, but a mapping of names to values was expected; "
            "correct torchrun_environment in the inventory."
        ],
    ),
    "one job, two values": (
        lambda: two({"torchrun_stop_timeout": 10}, {"torchrun_stop_timeout": 20}),
        ["n2: torchrun_stop_timeout is 20 here and 10 on n1, but a job has one; set it once for the group."],
    ),
    "vault without its key": (
        lambda: [catalog.unreadable("n1", "torchrun_args", AnsibleError("Attempting to decrypt but no vault secrets found.")).sentence()],
        [
            "n1: torchrun_args is encrypted and cannot be read; "
            "give the right key with --vault-password-file or --ask-vault-pass."
        ],
    ),
    "not root": (
        lambda: two(nodes=({}, {"uid": 1000})),
        ["n2: modules run as the user with id 1000, but root was expected; set ansible_become: true for the group."],
    ),
    "job's name": (
        lambda: read(torchrun_job="a/b"),
        [
            "n1: torchrun_job is 'a/b', but at most 63 letters, digits, '_', '.' and '-' that begin with a letter or digit "
            "were expected; choose another name."
        ],
    ),
    "user's name": (
        lambda: read(torchrun_user="Me Too"),
        [
            "n1: torchrun_user is 'Me Too', but at most 32 lower-case letters, digits, '_' and '-' were expected; "
            "choose another name."
        ],
    ),
    "version that is none": (
        lambda: read(pytorch_version="newest"),
        ["n1: pytorch_version is 'newest', but a version was expected; write one such as 2.13.0."],
    ),
    "a version that YAML took for a number": (
        lambda: read(pytorch_version=2.10),
        ["n1: pytorch_version is '2.1', but all three numbers of a release were expected; write one such as 2.13.0."],
    ),
    "relative path": (
        lambda: read(torchrun_root="jobs"),
        ["n1: torchrun_root names 'jobs', but an absolute path was expected; begin it with /."],
    ),
    "empty path": (
        lambda: read(torchrun_data_paths=[""]),
        ["n1: torchrun_data_paths names an empty path, but an absolute path was expected; begin it with /."],
    ),
    "negative time": (
        lambda: read(torchrun_stop_timeout=-1),
        ["n1: torchrun_stop_timeout is -1, but 1 or more was expected; choose a larger number."],
    ),
    "name in the environment": (
        lambda: read(torchrun_environment={"A-B": "c"}),
        ["n1: torchrun_environment holds the name 'A-B', but letters, digits and '_' were expected; rename it."],
    ),
    "value in the environment": (
        lambda: read(torchrun_environment={"A": True}),
        ["n1: torchrun_environment gives A true or false, but text or a number was expected; put it in quotes."],
    ),
    "control character in the environment": (
        lambda: read(torchrun_environment={"A": "b\x07"}),
        ["n1: torchrun_environment gives A a value with control characters, but text was expected; remove them."],
    ),
    "pattern that is none": (
        lambda: read(torchrun_step_pattern="("),
        [
            "n1: torchrun_step_pattern is '(', but a regular expression was expected "
            "(missing ), unterminated subpattern at position 0); correct the expression."
        ],
    ),
    "boolean in quotes": (
        lambda: read(firewall_protect="false"),
        [
            "n1: firewall_protect is 'false', but true or false without quotes was expected; "
            "correct firewall_protect in the inventory."
        ],
    ),
    "item without a value": (
        lambda: read(torchrun_args=["--epochs", None]),
        [
            "n1: torchrun_args is ['--epochs', None], but a list of which each element is a value was expected; "
            "correct torchrun_args in the inventory."
        ],
    ),
    "undefined variable": (
        lambda: read(torchrun_args=[template("{{ epochs }}")]),
        ["n1: torchrun_args cannot be read ('epochs' is undefined); correct the expression."],
    ),
    "one bad port, one sentence": (
        lambda: read(torchrun_master_port=template("{{ nothing }}")),
        ["n1: torchrun_master_port cannot be read ('nothing' is undefined); correct the expression."],
    ),
    "port of ssh": (
        lambda: connect(ansible_port="ssh"),
        ["n1: ansible_port is 'ssh', but a port from 1 to 65535 was expected; correct ansible_port in the inventory."],
    ),
    "become in words": (
        lambda: connect(ansible_become="maybe"),
        ["n1: ansible_become is 'maybe', but true or false was expected; correct ansible_become in the inventory."],
    ),
    "become method": (
        lambda: connect(ansible_become_method="sodu"),
        [
            "n1: ansible_become_method is 'sodu', but a become plugin such as sudo was expected; "
            "correct ansible_become_method in the inventory."
        ],
    ),
    "connection plugin": (
        lambda: connect(ansible_connection="shh"),
        [
            "n1: ansible_connection is 'shh', but a connection plugin such as ssh was expected; "
            "correct ansible_connection in the inventory."
        ],
    ),
    "undefined user": (
        lambda: connect(ansible_user=template("{{ operator }}")),
        ["n1: ansible_user cannot be read ('operator' is undefined); correct the expression."],
    ),
    "file that is no YAML": (
        lambda: [action.unreadable_host("n1", AnsibleError("YAML parsing failed: While parsing.")).sentence()],
        ["n1: the inventory's variables cannot be read (YAML parsing failed: While parsing); correct that file."],
    ),
    "encrypted file without its key": (
        lambda: [action.unreadable_host("n1", AnsibleError("Attempting to decrypt but no vault secrets found.")).sentence()],
        [
            "n1: variables lie in an encrypted file that cannot be read; "
            "give the right key with --vault-password-file or --ask-vault-pass."
        ],
    ),
    "empty group": (
        lambda: [action.empty_group("train", {"groups": {"all": ["n1"]}, "hostvars": HostVars({"n1": {}})}).sentence()],
        ["the group train has no hosts; add the nodes' addresses to the group train."],
    ),
    "empty inventory": (
        lambda: [action.empty_group("train", {"groups": {}, "ansible_inventory_sources": ["/i"]}).sentence()],
        ["the group train has no hosts in /i; give an inventory that has hosts with -i."],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_problem_has_its_sentence_and_no_other(name):
    produce, sentences = CASES[name]
    assert produce() == sentences


def test_two_healthy_nodes_have_no_problem():
    assert two() == []


@functools.lru_cache(maxsize=1)
def all_sentences() -> tuple[str, ...]:
    return tuple(sentence for _produce, sentences in CASES.values() for sentence in sentences)


def test_each_sentence_says_what_to_do():
    for sentence in all_sentences():
        assert "; " in sentence, sentence
        assert sentence.count("\n") == 0


def test_a_report_counts_its_problems():
    one = Problem("n1", "x", "x is 1", "write 2")
    assert report([one]) == "1 problem found, nothing was changed:\n  - n1: x is 1; write 2."
    other = Problem("n1", "y", "y is 1", "write 2")
    assert report([one, other]).startswith("2 problems found, nothing was changed:\n")


def test_a_report_names_one_mistake_once_with_all_its_hosts():
    many = [Problem(f"n{number}", "x", "x is 1", "write 2") for number in range(1, 513)]
    assert report(many[:2]).splitlines()[1:] == ["  - n1, n2: x is 1; write 2."]
    assert report(many).splitlines()[1:] == ["  - n1, n2, n3, n4, n5, n6, n7, n8 and 504 more: x is 1; write 2."]
