# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad inventories, given to the README's command: every problem as one exact sentence, at once. Run as root: pytest tests/inventory"""
from __future__ import annotations

import re

import machines

TWO = {"inv1": {}, "inv2": {}}
LATE_PYTHON = "/var/tmp/late-python"


def test_group_that_is_not_there(inventory):
    inventory.group(TWO, "gpus")
    assert machines.sentences(inventory.train()) == [
        f"the group train has no hosts in {inventory.folder}; add the nodes' addresses to the group train."]


def test_group_without_hosts(inventory):
    inventory.write("hosts.yml", "train:\n  hosts:\n")
    assert machines.sentences(inventory.train()) == [
        f"the group train has no hosts in {inventory.folder}; give an inventory that has hosts with -i."]


def test_group_chosen_where_plays_cannot_read_it(inventory):
    inventory.group(TWO, "gpus", cluster_group="gpus")
    assert machines.sentences(inventory.train()) == [
        f"the group train has no hosts in {inventory.folder}; "
        "choose the group on the command line, where plays can read it: -e cluster_group=gpus."]


def test_file_that_is_no_yaml(inventory):
    inventory.group(TWO)
    inventory.write("hosts.yml", "train:\n  hosts:\n    inv1: {ansible_host: 198.18.56.11\n")
    assert f"[ERROR]: Completely failed to parse inventory source {inventory.folder}/hosts.yml" in inventory.train()


def test_inventory_that_is_not_there(inventory):
    inventory.folder /= "nowhere"
    assert f"[ERROR]: Completely failed to parse inventory source {inventory.folder}" in inventory.train()


def test_variables_that_are_no_yaml(inventory):
    inventory.group(TWO)
    path = inventory.write("group_vars/train.yml", "torchrun_args: [a\nb: c\n")
    assert machines.sentences(inventory.train()) == [
        "inv1, inv2: the inventory's variables cannot be read (YAML parsing failed: While parsing a flow sequence did not find "
        f"expected ',' or ']', {path}:2:2); correct that file."]


def test_encrypted_file_without_its_key(inventory):
    inventory.group(TWO, torchrun_args="x")
    vaulted = inventory.encrypted("x").partition("|\n")[2]
    inventory.write("host_vars/inv2.yml", "\n".join(line.strip() for line in vaulted.splitlines()) + "\n")
    assert machines.sentences(inventory.train()) == [
        "inv2: variables lie in an encrypted file that cannot be read; "
        "give the right key with --vault-password-file or --ask-vault-pass.",
        "inv1: torchrun_args is 'x', but a list was expected; correct torchrun_args in the inventory."]


def test_variables_that_ansible_connects_with(inventory):
    """Ansible itself would end with the first of them, and with an error of its own."""
    inventory.group({"inv1": {"ansible_user": "{{ nobody }}", "ansible_port": "abc"},
                     "inv2": {"ansible_become": "maybe", "ansible_connection": "sssh"}}, torchrun_args="x")
    inventory.write("host_vars/inv2.yml", f"ansible_become_password: {inventory.encrypted('x')}")
    assert sorted(machines.sentences(inventory.train())) == [
        "inv1, inv2: torchrun_args is 'x', but a list was expected; correct torchrun_args in the inventory.",
        "inv1: ansible_port is 'abc', but a port from 1 to 65535 was expected; correct ansible_port in the inventory.",
        "inv1: ansible_user cannot be read ('nobody' is undefined); correct the expression.",
        "inv2: ansible_become is 'maybe', but true or false was expected; correct ansible_become in the inventory.",
        "inv2: ansible_become_password is encrypted and cannot be read; "
        "give the right key with --vault-password-file or --ask-vault-pass.",
        "inv2: ansible_connection is 'sssh', but a connection plugin such as ssh was expected; "
        "correct ansible_connection in the inventory."]


def test_nodes_that_cannot_be_asked(nodes, inventory, tmp_path_factory):
    """Each in its own way, and the one that can be asked is checked all the same."""
    at = {"ansible_host": machines.ADDRESSES["inv2"]}
    other = tmp_path_factory.mktemp("key") / "other"
    machines.subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    # Another connection for each, since those with the right key would open the door for the others.
    apart = inventory.sockets + "/%%C"
    inventory.group({
        "inv1": {},
        "off": {"ansible_host": "198.18.56.99"},
        "unnamed": {"ansible_host": "no-such.invalid"},
        "no-sudo": {**at, "ansible_user": "plain"},
        "no-become": {**at, "ansible_become": False},
        "no-python": {**at, "ansible_python_interpreter": "/opt/no/python3"},
        "stranger": {**at, "ansible_ssh_private_key_file": str(other), "ansible_control_path": f"{apart}1"},
        "no-key": {**at, "ansible_ssh_private_key_file": "/no/key", "ansible_control_path": f"{apart}2"},
        "unknown": {**at, "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null", "ansible_control_path": f"{apart}3"},
        "bad-option": {**at, "ansible_ssh_common_args": "-o Foo=bar", "ansible_control_path": f"{apart}4"},
    }, torchrun_data_paths=["/no/data"])
    found = machines.sentences(inventory.train())
    cannot = "cannot be reached by SSH at"
    assert found == [
        f"off: {cannot} 198.18.56.99 (No route to host); check ansible_host and try: ssh ops@198.18.56.99.",
        f"unnamed: {cannot} no-such.invalid (Could not resolve hostname no-such.invalid: {resolver(found)}); "
        "set ansible_host to the node's address.",
        "no-sudo: plain has no sudo without a password (Missing sudo password); "
        "give the user passwordless sudo or run the play with --ask-become-pass.",
        "no-python: no Python answers at /opt/no/python3; install it (apt install python3) or set ansible_python_interpreter.",
        f"stranger: {cannot} 198.18.56.12 (ops@198.18.56.12: Permission denied (publickey)); "
        "copy your key with: ssh-copy-id ops@198.18.56.12.",
        f"no-key: {cannot} 198.18.56.12 (ops@198.18.56.12: Permission denied (publickey)); "
        "correct ansible_ssh_private_key_file, since there is no file /no/key.",
        f"unknown: {cannot} 198.18.56.12 (Host key verification failed); compare the key and accept it with: ssh ops@198.18.56.12.",
        f"bad-option: {cannot} 198.18.56.12 (command-line: line 0: Bad configuration option: foo); "
        "correct ansible_ssh_common_args or ansible_ssh_extra_args.",
        "inv1, no-become: torchrun_data_paths names /no/data, which does not exist on this node; "
        "mount or create it, or correct the path.",
        "no-become: modules run as the user with id 1000, but root was expected; set ansible_become: true for the group."]


def resolver(found):
    """What this machine's resolver says of a name that does not exist; it depends on the network."""
    both = ("Name or service not known", "Temporary failure in name resolution")
    return next((text for text in both if any(text in sentence for sentence in found)), both[0])


def test_variables(nodes, inventory):
    inventory.group(
        {"inv1": {"torchrun_node_rank": 0, "torchrun_devices": "0"},
         "inv2": {"torchrun_nproc_per_node": -1, "cluster_interface": "ib7"}},
        torchrun_args="--epochs 3", torchrun_agrs=["--epochs=3"], torchrun_master_port="80", torchrun_master_addr="gpu01",
        firewall_protect="false", torchrun_source="nowhere", torchrun_wait_for="ever", torchrun_stop_timeout="{{ undefined_here }}",
        torchrun_user="A B", torchrun_environment={"A B": "c"}, cuda_version="13.0", torchrun_step_pattern="(", torchrun_max_restarts=-1)
    inventory.write("host_vars/inv1.yml", "pytorch_packages: " + inventory.encrypted("numpy"))
    found = machines.sentences(inventory.train())
    assert found == [
        "inv1, inv2: torchrun_agrs is no variable of this collection; write torchrun_args.",
        "inv1, inv2: firewall_protect is 'false', but true or false without quotes was expected; "
        "correct firewall_protect in the inventory.",
        "inv1: pytorch_packages is encrypted and cannot be read; "
        "give the right key with --vault-password-file or --ask-vault-pass.",
        "inv1, inv2: torchrun_args is '--epochs 3', but a list was expected; correct torchrun_args in the inventory.",
        "inv1, inv2: torchrun_wait_for is 'ever', but one of first_step, finished was expected; "
        "correct torchrun_wait_for in the inventory.",
        "inv1, inv2: torchrun_stop_timeout cannot be read ('undefined_here' is undefined); correct the expression.",
        "inv1, inv2: torchrun_user is 'A B', but at most 32 lower-case letters, digits, '_' and '-' were expected; choose another name.",
        "inv1, inv2: torchrun_max_restarts is -1, but 0 or more was expected; choose a larger number.",
        "inv1, inv2: torchrun_environment holds the name 'A B', but letters, digits and '_' were expected; rename it.",
        "inv1, inv2: torchrun_step_pattern is '(', but a regular expression was expected "
        "(missing ), unterminated subpattern at position 0); correct the expression.",
        f"torchrun_source is 'nowhere', but {inventory.folder}/nowhere does not exist; "
        "correct the path (relative paths start at the inventory's folder).",
        "inv2: torchrun_node_rank is not set here but on inv1; set it on all 2 hosts (0 to 1) or on none.",
        "inv2: cluster_interface is 'ib7', but the node's interfaces are host0; set cluster_interface for this host to one of them.",
        "torchrun_master_addr is 'gpu01', but an IP address was expected (a name may resolve to loopback on its own host); "
        "remove it or set the address of inv1.",
        "torchrun_master_port is 80, but a port from 1024 to 65535 was expected; choose another, such as 29500.",
        "inv1: torchrun_devices is '0', but the node has no NVIDIA GPU; remove it for a job on CPUs.",
        "inv1, inv2: cuda_version is '13.0', but the node has no NVIDIA GPU; "
        "set cuda_version: cpu for a job on CPUs, or take the host out of the group.",
        "inv2: torchrun_nproc_per_node is -1, but auto or a whole number from 1 was expected; set auto for one process per GPU."]


def test_limit_hides_no_host(nodes, inventory):
    inventory.group({"inv1": {}, "inv2": {"torchrun_args": "x"}, "inv3": {}}, torchrun_source="")
    assert machines.sentences(inventory.train("--limit", "inv1")) == [
        "inv2: torchrun_args is 'x', but a list was expected; correct torchrun_args in the inventory.",
        "torchrun_source is not set, but a script, a project folder or remote:PATH was expected; set torchrun_source for the group.",
        "inv3: Python is 3.13 here and 3.11 on inv1, but one version was expected on all nodes; "
        "set pytorch_python to the same version everywhere."]


def test_two_names_for_one_node(nodes, inventory):
    inventory.group({"inv1": {}, "again": {"ansible_host": machines.ADDRESSES["inv1"]}}, torchrun_script="nothing.py",
                    torchrun_master_addr="127.0.0.1")
    assert machines.sentences(inventory.train()) == [
        f"torchrun_script is 'nothing.py', which is not in {machines.ROOT}/examples; name a script that is there, such as "
        f"{sorted(path.name for path in (machines.ROOT / 'examples').glob('*.py'))[0]}.",
        "torchrun_master_addr is 127.0.0.1, a loopback address, which no other node can reach; remove it or set the address of inv1.",
        "again: the machine id is that of inv1, so both names mean one machine or a copy of it; "
        "remove one of them, or make a new id with: rm /etc/machine-id && systemd-machine-id-setup."]


def test_nodes_with_troubles(nodes, inventory):
    """Ports that others hold, a full disk, a wrong clock, another distribution, other versions: all real, all at once."""
    listen = "import socket, time; s = socket.socket(); s.bind((\"0.0.0.0\", {})); s.listen(); time.sleep(600)"
    unit = "[Service]\\nExecStart=/usr/bin/python3 -c '{}'\\n[X-OnpremTorch]\\nJob=other\\nMasterPort=29501\\nSupervisorPort=0\\nDevices=\\n"
    machines.shell("inv1", f"systemd-run --quiet --unit=holder /usr/bin/python3 -c '{listen.format(29500)}'")
    machines.shell("inv1", f"mkdir -p /run/systemd/system && printf \"{unit.format(listen.format(29501).replace(chr(34), chr(92) * 3 + chr(34)))}\" "
                           ">/run/systemd/system/torchrun-other.service && systemctl daemon-reload && systemctl start torchrun-other")
    for name in TWO:
        machines.shell(name, "mkdir -p /srv/small && mount -t tmpfs -o size=1m,mode=755 tmpfs /srv/small")
    machines.shell("inv1", "mkdir -p /srv/data")
    machines.shell("inv2", "sed 's/^ID=.*/ID=gentoo/; s/^PRETTY_NAME=.*/PRETTY_NAME=\"Gentoo Linux\"/' /etc/os-release >/run/os-release "
                           "&& mount --bind /run/os-release /usr/lib/os-release")
    # The module's own clock is moved; the kernel's is that of the machine that the tests run on.
    machines.shell("inv2", f"printf '#!/bin/sh\\n[ \"$1\" = -c ] && exec /usr/bin/python3 \"$@\"\\n"
                           f"exec /usr/bin/python3 -c \"import sys, time; real = time.time; time.time = lambda: real() - 60; "
                           f"exec(compile(sys.stdin.read(), chr(60) + chr(62), chr(101) + chr(120) + chr(101) + chr(99)))\"\\n' >{LATE_PYTHON} "
                           f"&& chmod 755 {LATE_PYTHON}")
    try:
        machines.shell("inv1", "for port in 29500 29501; do timeout 30 sh -c \"until ss -Hltn sport = :$port | grep -q .; do sleep 0.2; done\"; done")
        inventory.group({"inv1": {}, "inv2": {"ansible_python_interpreter": LATE_PYTHON}},
                        torchrun_data_paths=["/srv/data"], pytorch_root="/srv/small")
        found = machines.sentences(inventory.train())
        pid = machines.shell("inv1", "systemctl show --property=MainPID --value holder").strip()
        # What the question itself took is not counted, since nobody knows which part of it passed before the clock was read.
        behind = re.search(r"at least ([\d.]+) s behind", "".join(found))[1]
        assert 30 < float(behind) <= 60.1
        assert found == [
            f"inv1: torchrun_master_port is 29500, which python3 (pid {pid}) of holder.service holds; choose another port or end that process.",
            "inv1: torchrun_supervisor_port is 29501, which the job 'other' holds; choose another port or end that process.",
            "inv2: the distribution is Gentoo Linux, but Debian 12 or 13 or Ubuntu 22.04 or 24.04 was expected; "
            "install one of these or take the host out of the group.",
            f"inv2: the clock is at least {behind} s behind the control node's, but at most 1 s was expected; "
            "synchronise it (systemd-timesyncd or chrony).",
            "inv2: torchrun_data_paths names /srv/data, which does not exist on this node; mount or create it, or correct the path.",
            # What takes room is known once all else is decided.
            "inv1, inv2: /srv/small has 0.0 GiB free, but 2 GiB are needed for torch; "
            "free some space or set pytorch_root to a larger file system."]
    finally:
        machines.shell("inv1", "systemctl stop holder torchrun-other; rm -f /run/systemd/system/torchrun-other.service; systemctl daemon-reload; "
                               "umount /srv/small; rm -rf /srv/small /srv/data")
        machines.shell("inv2", f"umount /usr/lib/os-release /srv/small; rm -rf /srv/small; rm -f /run/os-release {LATE_PYTHON}")


def test_networks(nodes, inventory):
    inventory.group(TWO, torchrun_master_port=40000, torchrun_supervisor_port=29501)
    ephemeral = machines.shell("inv1", "cat /proc/sys/net/ipv4/ip_local_port_range").split()
    try:
        for number in (1, 2):
            links = "ip link add second type veth peer name other && ip link set other up && ip link set second up"
            machines.shell(f"inv{number}", f"{links} && ip address add 198.19.56.{number}/24 dev second")
        assert machines.sentences(inventory.train()) == [
            "the nodes share several networks (198.18.56.0/24, 198.19.56.0/24); set cluster_interface to the one to train on, such as host0.",
            f"inv1: torchrun_master_port is 40000, inside the range {ephemeral[0]} to {ephemeral[1]} from which the kernel hands out ports, "
            f"so any connection may take it; choose a port below {ephemeral[0]}."]
    finally:
        for number in (1, 2):
            machines.shell(f"inv{number}", "ip link delete second || true")
