"""What an administrator may have on a node beside the firewall that the inventory names. Each test leaves the nodes as it found them."""

from __future__ import annotations

import json

from conftest import (
    BY_NAME,
    EPHEMERAL,
    MASTER,
    NETWORK6,
    NODES,
    Node,
    assert_packets,
    converge,
    from_outsider,
    in_sync,
    module,
    on_all,
    outside,
)

PLAIN = [BY_NAME["nft12"], BY_NAME["nft13"]]
FIREWALLD = [BY_NAME["fwd12"], BY_NAME["fwd13"]]
UFW = [BY_NAME["ufw12"], BY_NAME["ufw13"]]
KEPT = {MASTER, 29501, 29600, *range(32768, 61000)}
# Rules that drop what begins no connection, as most hardening guides have them.
HARDENING = """table inet hardening { chain input { type filter hook input priority -150; policy accept;
tcp flags & (fin | syn) == (fin | syn) drop
tcp flags & (fin | syn | rst | ack) != syn ct state new drop
ct state invalid drop
}
}
"""


def test_nodes_without_and_with_default_drop_the_other_way_round():
    """Our own table on Debian 13, the chain that decides on Debian 12; sshd listens within the ephemeral range, too."""
    dropping, bare = PLAIN
    rules = bare.run("grep -v '^flush' /etc/nftables.conf")
    bare.run("systemctl stop nftables && nft -f -", data=HARDENING)
    dropping.run("nft -f -", data=rules)
    bare.run("mkdir /etc/ssh/more && printf 'Port 22\\nPort 50022\\n' >/etc/ssh/more/ports && sed -i '1i Include /etc/ssh/more/*' /etc/ssh/sshd_config")
    bare.run("systemctl reload ssh")
    try:
        converge()
        found = module({"state": "verified"}, "nft12,nft13")
        assert [(found[node.name]["protected"], len(found[node.name]["opened"])) for node in PLAIN] == [(False, 1), (True, 0)], found
        assert_packets([*PLAIN, BY_NAME["fwd12"]])
        for address in (bare.address, bare.address6):
            assert from_outsider(address, 50022) == {50022: "SSH-2"}
        answers = outside(bare.address)
        assert {*answers["open"], *answers["closed"]} == set(range(1, 65536)) - KEPT | {50022}
        answers = outside(dropping.address)
        assert {*answers["open"], *answers["closed"]} == {22, 8443}
        refused = module({"job": "other", "ports": [50022], "peers": ["198.18.48.11"], "interface": "host0"}, "nft13")["nft13"]
        assert refused["msg"].startswith("nft13: The job's port 50022 is where sshd listens on this node; set torchrun_master_port"), refused
    finally:
        bare.run("sed -i 1d /etc/ssh/sshd_config; rm -r /etc/ssh/more; systemctl reload ssh; nft delete table inet hardening")
        bare.run("systemctl start nftables")
        dropping.run("nft delete table inet filter")
        converge()
    in_sync()


def test_sshd_within_the_ephemeral_range_stays_reachable():
    node = BY_NAME["nft12"]
    node.run("printf 'Port 22\\nPort 50022\\n' >/etc/ssh/sshd_config.d/ports.conf && systemctl reload ssh")
    try:
        assert from_outsider(node.address, 50022) == {50022: "dropped"}  # what the table does that was made before
        converge("--limit", "nft12")
        assert from_outsider(node.address, 50022, 50023) == {50022: "SSH-2", 50023: "dropped"}
    finally:
        node.run("rm /etc/ssh/sshd_config.d/ports.conf; systemctl reload ssh")
        converge("--limit", "nft12")
    in_sync()


def test_zones_of_firewalld():
    """The training interface in a zone that drops, or trusts everybody, and another one in a third; none of it permanently."""
    monitored = {"firewall_monitoring_ports": [{"port": 9400, "sources": ["198.18.48.200"]}]}
    on_all(Node.listen, FIREWALLD)
    on_all(lambda node: node.run("firewall-cmd --zone=internal --add-interface=other0 && firewall-cmd --policy=allow-host-ipv6 --add-port=9999/tcp"), FIREWALLD)
    try:
        for zone, variables in (("drop", monitored), ("trusted", {})):
            change = f"firewall-cmd --zone={zone} --change-interface=host0 && firewall-cmd --zone={zone} --add-service=ssh"
            on_all(lambda node, change=change: node.run(change), FIREWALLD)
            converge("-e", json.dumps(variables))  # new sets, or fewer, take a reload, which forgets zones that are not permanent
            for node in FIREWALLD:
                zones = "; ".join(f"firewall-cmd --get-zone-of-interface={name}" for name in ("host0", "other0"))
                assert node.run(f"{zones}; firewall-cmd --policy=allow-host-ipv6 --list-ports").split() == [zone, "internal", "9999/tcp"], node.name
                assert (from_outsider(node.address, 9400)[9400] == "hello") == (zone == "trusted" or bool(variables))
            protected = {name: answer["protected"] for name, answer in module({"state": "verified"}, "fwd12,fwd13").items()}
            assert set(protected.values()) == {zone == "trusted"}, protected
            assert_packets([*FIREWALLD, BY_NAME["nft12"]])
            on_all(lambda node, zone=zone: node.run(f"firewall-cmd --zone={zone} --remove-service=ssh" if zone == "trusted" else "true"), FIREWALLD)
    finally:
        undone = "for zone in trusted drop; do firewall-cmd --zone=$zone --remove-interface=host0; done; "
        undone += "firewall-cmd --zone=internal --remove-interface=other0; "
        undone += "for zone in trusted drop; do firewall-cmd --zone=$zone --remove-service=ssh; done"
        on_all(lambda node: node.run(f"{undone}; firewall-cmd --policy=allow-host-ipv6 --remove-port=9999/tcp"), FIREWALLD)
        converge()
    in_sync()


def test_what_waits_for_a_reload_of_firewalld_is_not_loaded_for_the_administrator():
    """It may lock out, and a roll-back could not take it away."""
    waiting = ["--new-policy=strict", "--policy=strict --set-target=DROP", "--service=ssh --add-port=2222/tcp", "--service=ssh --remove-port=22/tcp"]
    on_all(lambda node: node.run(" && ".join(f"firewall-cmd --permanent {words}" for words in waiting)), FIREWALLD)
    try:
        asked = {"job": "other", "ports": [30500], "peers": ["198.18.48.11"], "interface": "host0"}
        for name, answer in module(asked, "fwd12,fwd13").items():
            assert answer["failed"] and "holds what is not loaded yet (the policy strict, the service ssh)" in answer["msg"], (name, answer)
    finally:
        undone = [f"firewall-cmd --permanent {words}" for words in ("--delete-policy=strict", "--load-service-defaults=ssh")]
        on_all(lambda node: node.run(" && ".join([*undone, "rm -f /etc/firewalld/services/ssh.xml*"])), FIREWALLD)
    in_sync()


# As Docker and a careful administrator leave them: no rule keeps the peers out.
DOCKER = """iptables -N DOCKER; iptables -A FORWARD -j DOCKER; iptables -P FORWARD DROP; iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER; iptables -t nat -A DOCKER -p tcp --dport 8088 -j DNAT --to 172.17.0.2:80
iptables -t raw -A PREROUTING -d 172.17.0.2 ! -i docker0 -j DROP; iptables -A INPUT -p tcp -m multiport --dports 111,2049 -j DROP
iptables -A INPUT -p tcp --tcp-flags FIN,SYN FIN,SYN -j DROP; iptables -A INPUT -m conntrack --ctstate INVALID -j DROP"""
# By default they drop, and let the peers in by an extension that nft does not show.
DROPPING = """{0} -A INPUT -i lo -j ACCEPT; {0} -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT; {0} -A INPUT -p tcp --dport 22 -j ACCEPT
{0} -A INPUT -p {1} -j ACCEPT; {0} -A INPUT -s {2}/{3} -p tcp -m multiport --dports 29500:29600,32768:60999 -j ACCEPT; {0} -P INPUT DROP"""
CLEARED = "for p in {0}; do $p -P INPUT ACCEPT; $p -P FORWARD ACCEPT; for t in filter nat raw; do $p -t $t -F; $p -t $t -X; done; done"
GONE = "; for f in ip ip6; do for t in filter nat raw; do nft delete table $f $t 2>/dev/null; done; done; true"


def test_rules_of_iptables_that_let_the_peers_in_are_left_alone():
    on_all(lambda node: node.run(DOCKER), PLAIN)
    try:
        assert "changed=1" not in converge()
        assert_packets([*PLAIN, BY_NAME["fwd12"]])
        # The outsider's address is none of those: 198.18.48.8/29 holds .11 to .15, 198.18.48.16/32 the last node.
        for program, icmp, network, bits in (("iptables", "icmp", "198.18.48.8", 29), ("iptables", "icmp", "198.18.48.16", 32)):
            on_all(lambda node, words=(program, icmp, network, bits): node.run(DROPPING.format(*words)), PLAIN)
        on_all(lambda node: node.run(DROPPING.format("ip6tables-legacy", "ipv6-icmp", NETWORK6, 123)), PLAIN)
        converge()
        assert_packets([*PLAIN, BY_NAME["fwd12"]])
        found = module({"state": "verified"}, "nft12,nft13")
        assert not any(answer["protected"] or answer["differences"] for answer in found.values()), found
    finally:
        on_all(lambda node: node.run(CLEARED.format("iptables ip6tables-legacy") + GONE), PLAIN)
        converge()
    in_sync()


def test_firewalls_that_contradict_each_other_are_named():
    lets_ssh_in = (
        "{0} -A INPUT -i lo -j ACCEPT; {0} -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT; "
        "{0} -A INPUT -p tcp --dport 22 -j ACCEPT; {0} -P INPUT DROP"
    )
    # Not while ufw's rules are loaded: where firewalld starts, it flushes them and leaves their policy, which drops.
    disabled = "sed -i s/^ENABLED=yes/ENABLED=no/ /etc/ufw/ufw.conf"
    both = "ufw disable && systemctl start firewalld && sed -i s/^ENABLED=no/ENABLED=yes/ /etc/ufw/ufw.conf"
    cases = [
        (UFW, both, f"systemctl stop firewalld; {disabled}; ufw --force enable", "firewalld and ufw are both active"),
        (PLAIN, lets_ssh_in.format("iptables"), CLEARED.format("iptables") + GONE, "Rules made with iptables drop the jobs' connections"),
        (PLAIN, lets_ssh_in.format("iptables-legacy"), CLEARED.format("iptables-legacy"), "Rules of legacy iptables drop the jobs' connections"),
    ]
    for nodes, make, undo, sentence in cases:
        on_all(lambda node, make=make: node.run(make), nodes)
        try:
            answers = module({"state": "verified"}, ",".join(node.name for node in nodes))
        finally:
            on_all(lambda node, undo=undo: node.run(undo), nodes)
        for name, answer in answers.items():
            assert answer["failed"] and answer["msg"].startswith(f"{name}: {sentence}"), answer
    in_sync()


def test_several_addresses_on_the_training_interface():
    """The kernel and the libraries pick one by rules of their own, so all of a node's are its peers'."""

    def more(node: Node) -> tuple[str, str]:
        number = int(node.address.rsplit(".", 1)[1]) + 100
        return f"198.18.48.{number}", f"{NETWORK6}{number:x}"

    def each(node: Node, verb: str) -> None:
        four, six = more(node)
        node.run(f"ip address {verb} {four}/24 dev host0; ip address {verb} {six}/64 dev host0{' nodad' if verb == 'add' else ''}")

    on_all(lambda node: each(node, "add"))
    on_all(Node.listen)
    try:
        converge()

        def reach(node: Node) -> None:
            peer = NODES[NODES.index(node) - 1]
            for source, targets in zip(more(peer), ((node.address, more(node)[0]), (node.address6, more(node)[1]))):
                for target in targets:
                    assert peer.connect(target, MASTER, EPHEMERAL, source=source) == {MASTER: "hello", EPHEMERAL: "hello"}, (peer.name, source, target)

        on_all(reach)
    finally:
        on_all(lambda node: each(node, "delete"))
        converge()
    in_sync()
