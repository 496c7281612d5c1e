"""What the firewall role does to packets, on every firewall and distribution; each test leaves the nodes as it found them."""

from __future__ import annotations

import itertools
import json
import re

from conftest import (
    BY_NAME,
    EPHEMERAL,
    HOSTS,
    MASTER,
    MEASURED,
    MONITORING,
    NODES,
    SUPERVISOR,
    VERIFIER,
    Node,
    ansible,
    assert_packets,
    converge,
    differences,
    from_outsider,
    in_sync,
    module,
    on_all,
    outside,
    plan_of_the_job,
    restarted,
    restore_administrators_rules,
    wait_until,
)

ALL = set(range(1, 65536))
JOB_PORTS = {MASTER, SUPERVISOR, VERIFIER}
KERNELS_RANGE = set(range(32768, 61000))
# What answers the outsider: by default-drop rules only what the administrator opened (see prepare.yml), whether
# permanently or not; on the node without a firewall everything but what our own table keeps to the peers.
EXPECTED = {
    "nft12": ALL - JOB_PORTS - KERNELS_RANGE,
    "nft13": {22, 8443},
    "fwd12": {22, 8080, 8443},
    "fwd13": {22, 8080, 8443},
    "ufw12": {22, 8443},
    "ufw13": {22, 8443},
}
BACKENDS = {"nftables": {"nft12", "nft13"}, "firewalld": {"fwd12", "fwd13"}, "ufw": {"ufw12", "ufw13"}}


def ranges(ports: set[int]) -> str:
    """Write ports as ranges, for a message."""
    groups = itertools.groupby(enumerate(sorted(ports)), lambda pair: pair[1] - pair[0])
    return ", ".join(f"{run[0]}-{run[-1]}" for run in ([port for _index, port in group] for _key, group in groups))


def test_backend_is_the_active_one():
    for name, answer in module({"state": "verified"}).items():
        assert name in BACKENDS[answer["backend"]]
        assert answer["protected"] == (name == "nft12")
    for name in BACKENDS["ufw"]:
        assert "install ok installed" in BY_NAME[name].run("dpkg-query -W -f '${Status}' ipset"), "it was not there before the role"


def test_outsider_meets_exactly_the_expected_ports_of_all_65535():
    on_all(Node.listen)
    for address in ("address", "address6"):
        for name, found in on_all(lambda node, key=address: outside(getattr(node, key))).items():
            answering = {*found["open"], *found["closed"]}
            extra, missing = answering - EXPECTED[name], EXPECTED[name] - answering
            assert answering == EXPECTED[name], f"{name} {address}: also {ranges(extra)}; not {ranges(missing)}"
            assert 22 in found["open"]


def test_peers_reach_the_ports_and_the_outsider_does_not():
    assert_packets()


def test_no_change_costs_one_remote_module_and_little_cpu():
    def used(node: Node) -> float:
        stat = node.run("cat /sys/fs/cgroup/cpu.stat")
        return int(stat.split()[1]) / 1e6

    plan = plan_of_the_job()  # the connections are open now
    before = on_all(used)
    printed = converge("--skip-tags", "always", "-e", json.dumps({"cluster_plan": plan}))
    seconds = {name: spent - before[name] for name, spent in on_all(used).items()}
    assert "changed=1" not in printed and printed.count("TASK [") == 1
    MEASURED.append("node CPU of a run without a change: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    assert max(seconds.values()) <= 1.0, seconds


def test_rules_survive_the_services():
    rounds = [
        {"nftables": "systemctl restart nftables", "firewalld": "systemctl restart firewalld", "ufw": "systemctl restart ufw"},
        {"nftables": "systemctl reload nftables", "firewalld": "firewall-cmd --reload", "ufw": "ufw reload"},
        {"nftables": "true", "firewalld": "firewall-cmd --complete-reload", "ufw": "ufw disable && ufw --force enable"},
    ]
    for commands in rounds:
        on_all(lambda node, commands=commands: node.run(commands[node.firewall]))
        assert_packets()
    in_sync()
    on_all(restore_administrators_rules)


def test_flush_by_hand_is_seen_by_status_and_healed_by_the_next_run():
    on_all(lambda node: node.run("nft flush ruleset"))
    found = differences()
    # firewalld on Debian 13 owns its table, which a flush does not touch.
    assert {name for name, sentences in found.items() if sentences} == set(HOSTS) - {"fwd13"}, found
    printed = ansible("ansible-playbook", "onprem.torch.status").stdout
    for name in set(HOSTS) - {"fwd13"}:
        assert f"{name}: its firewall does not hold what it should" in printed, printed
    converge()
    in_sync()
    assert_packets()
    # The administrator's own rules are theirs to bring back; then their chain decides again instead of our table.
    BY_NAME["nft13"].run("systemctl restart nftables")
    converge()
    in_sync()
    assert_packets()
    lines = ansible("ansible-playbook", "onprem.torch.status").stdout.splitlines()
    assert {line.split()[0] for line in lines if line.endswith(" intact")} == set(HOSTS), lines


def test_rules_survive_a_reboot():
    restarted(lambda: on_all(lambda node: node.run("systemctl --no-block reboot", check=False)))
    in_sync()
    assert_packets()


def test_node_removed_and_added():
    gone, rest = BY_NAME["ufw13"], [node for node in NODES if node.name != "ufw13"]
    on_all(Node.listen)
    before = on_all(rule_count)
    converge("-e", "cluster_group=smaller")

    def stays_out(node: Node) -> None:
        for address in (node.address, node.address6):
            found = gone.connect(address, MASTER, EPHEMERAL, 22)
            assert found.pop(22) == "SSH-2"
            assert "hello" not in found.values(), node.name

    on_all(stays_out, rest)
    assert_packets(rest)
    assert rule_count_of(rest) == {name: before[name] for name in rule_count_of(rest)}
    assert "changed=1" in converge()
    assert_packets()
    assert on_all(rule_count) == before
    in_sync()


def rule_count(node: Node) -> int:
    """Count the rules of the kernel: another node is one more element of a set, no rule."""
    return sum("rule" in item for item in json.loads(node.run("nft -j list ruleset"))["nftables"])


def rule_count_of(nodes: list[Node]) -> dict[str, int]:
    """Count the rules on some nodes."""
    return on_all(rule_count, nodes)


def test_peers_that_are_not_trusted_and_monitoring():
    monitoring = [{"port": MONITORING, "sources": ["198.18.48.200", "fdc6:1815:0:48::c8/128"]}]
    variables = json.dumps({"firewall_trust_peers": False, "firewall_ephemeral_ports": "44000-46999", "firewall_monitoring_ports": monitoring})
    plan = converge("-e", variables, "--check", "--diff")
    for text in ("+net.ipv4.ip_local_port_range = 44000 46999", "onp_m4_9400_train", "sources4_9400_train"):
        assert text in plan
    assert set(on_all(lambda node: node.run("cat /proc/sys/net/ipv4/ip_local_port_range").split()[0]).values()) == {"32768"}
    converge("-e", variables)
    assert set(on_all(lambda node: node.run("cat /proc/sys/net/ipv4/ip_local_port_range").strip()).values()) == {"44000\t46999"}
    assert_packets()
    # At the next boot the files are read by name; an administrator's own must not come last.
    own = "/etc/sysctl.d/99-tuning.conf"
    on_all(lambda node: node.run(f"echo net.ipv4.ip_local_port_range = 1024 65535 >{own}; systemctl restart systemd-sysctl; rm {own}"))
    assert set(on_all(lambda node: node.run("cat /proc/sys/net/ipv4/ip_local_port_range").strip()).values()) == {"44000\t46999"}
    on_all(lambda node: node.run("systemd-run --quiet --collect --unit=other python3 -m http.server --bind :: 33333"))
    dropping = [node for node in NODES if node.name != "nft12"]
    wait_until(lambda: all(on_all(lambda node: node.run("ss -Htln 'sport = :33333'").strip()).values()), "33333 is listened on")

    def only_what_was_asked_for(node: Node) -> None:
        peer = dropping[dropping.index(node) - 1]
        for address in (node.address, node.address6):
            assert from_outsider(address, MONITORING) == {MONITORING: "hello"}, node.name
            found = peer.connect(address, MONITORING, 33333)
            assert set(found.values()) <= {"dropped", "No route to host", "Permission denied"}, f"{node.name}: {found}"

    on_all(only_what_was_asked_for, dropping)
    on_all(lambda node: node.run("systemctl stop other"))
    converge()
    assert set(on_all(lambda node: node.run("cat /proc/sys/net/ipv4/ip_local_port_range").strip()).values()) == {"32768\t60999"}
    in_sync()


def test_bad_input_is_named_all_at_once_before_anything_changes():
    variables = {
        "cluster_group": "debian12",
        "torchrun_master_port": 29600,
        "firewall_backend": "ufw",
        "firewall_trust_peers": False,
        "firewall_ephemeral_ports": "60000-50000",
        "firewall_monitoring_ports": [{"port": 9400, "sources": ["office"]}, {"port": 9401, "sources": []}, {"port": 9401, "sources": ["::/0"]}],
    }
    done = ansible("ansible-playbook", "onprem.torch.provision", "-e", json.dumps(variables))
    assert done.returncode != 0
    for sentence in (
        "nccl_verify_port is 29600, which is torchrun_master_port already",
        "firewall_ephemeral_ports is '60000-50000'",
        "names the source 'office'",
        "firewall_monitoring_ports names no sources for port 9401",
        "firewall_monitoring_ports names port 9401 twice",
        "nft12: firewall_backend is ufw, which is installed but not active",
        "fwd12: firewall_backend is ufw, but firewalld is active",
    ):
        assert sentence in done.stdout, sentence + done.stdout
    assert "nothing was changed" in done.stdout
    lost = {"cluster_group": "debian12", "cluster_interface": "{{ 'eth9' if inventory_hostname == 'fwd12' else 'host0' }}"}
    done = ansible("ansible-playbook", "onprem.torch.provision", "-e", json.dumps(lost))
    assert "fwd12: cluster_interface is 'eth9', but the node's interfaces are host0" in done.stdout
    # What the plan cannot let through, the module itself refuses, too.
    asked = {"job": "train", "ports": [MASTER, MASTER], "peers": [], "interface": "eth9"}
    for name, answer in module(asked).items():
        interface, port, peers = answer["problems"]
        assert interface == "cluster_interface is eth9, which this node does not have; choose one of host0."
        assert f"names port {MASTER} twice" in port and peers.startswith("The peers' list is empty")
        assert answer["msg"].startswith(f"{name}: {interface} {name}: ")
    BY_NAME["nft12"].run("mv /usr/sbin/ufw /root/ufw")
    try:
        answer = module({**asked, "ports": [MASTER], "peers": ["198.18.48.11"], "interface": "host0", "backend": "ufw"}, "nft12")["nft12"]
    finally:
        BY_NAME["nft12"].run("mv /root/ufw /usr/sbin/ufw")
    assert answer["msg"].startswith("nft12: firewall_backend is ufw, which is not installed; install and enable it"), answer
    in_sync()


def test_absent_removes_exactly_what_was_made_though_the_inventory_has_changed():
    changed = json.dumps({"firewall_state": "absent", "cluster_group": "smaller", "torchrun_master_port": 29700})
    converge("-e", changed)
    printed = converge("-e", json.dumps({"firewall_state": "absent"}))
    assert re.findall(r"^(\w+) .*changed=1", printed, re.M) == ["ufw13"], printed
    on_all(lambda node: node.run("systemctl stop listener"))

    def difference(node: Node) -> str:
        return node.run("sh /root/snapshot.sh >/root/after-the-role; diff /root/before-the-role /root/after-the-role; true")

    found = on_all(difference)
    assert not any(found.values()), "\n".join(f"--- {name}\n{text}" for name, text in found.items() if text)
    assert all(len(text) > 1000 for text in on_all(lambda node: node.run("cat /root/before-the-role")).values())
    for node in NODES:
        peer = NODES[NODES.index(node) - 1]
        assert peer.connect(node.address, 22) == {22: "SSH-2"} == from_outsider(node.address, 22)
