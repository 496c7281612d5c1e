# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a ruleset does with a first packet: conditions as nft 1.0.6 (Debian 12) and 1.1.3 (Debian 13) print them, and rules of iptables."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_iptables as iptables
from ansible_collections.onprem.torch.plugins.module_utils.firewall_verdict import Packet, Ruleset

PACKET = Packet(4, "198.18.0.7", 29500, "eth1")
FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
STATE = {"ct": {"key": "state"}}
FOUR = ["fin", "syn", "rst", "ack"]


def match(op, left, right):
    return {"match": {"op": op, "left": left, "right": right}}


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        # tcp flags & (fin | syn) == (fin | syn)
        (match("==", {"&": [FLAGS, ["fin", "syn"]]}, ["fin", "syn"]), False),
        (match("==", {"&": [FLAGS, {"|": ["fin", "syn"]}]}, {"|": ["fin", "syn"]}), False),
        # tcp flags & (fin | syn | rst | ack) != syn: what is no first packet
        (match("!=", {"&": [FLAGS, FOUR]}, "syn"), False),
        (match("!=", {"&": [FLAGS, {"|": FOUR}]}, "syn"), False),
        (match("==", {"&": [FLAGS, FOUR]}, "syn"), True),
        (match("==", {"&": [FLAGS, {"|": [{"|": ["fin", "syn"]}, "ack"]}]}, "syn"), True),
        (match("==", FLAGS, {"set": ["syn", {"|": ["syn", "ack"]}]}), True),
        (match("==", FLAGS, {"set": ["fin", {"|": ["syn", "ack"]}]}), False),
        (match("==", FLAGS, 2), True),
        (match("==", FLAGS, 3), False),
        # tcp flags ! fin,syn,…: none of them; tcp flags fin,syn: any
        (match("!", FLAGS, ["fin", "syn", "rst"]), False),
        (match("!", FLAGS, "ack"), True),
        (match("in", FLAGS, ["fin", "syn"]), True),
        (match("in", STATE, ["established", "related"]), False),
        (match("in", STATE, "new"), True),
        (match("==", STATE, {"set": ["related", "new"]}), True),
        (match("!=", STATE, "new"), False),
        (match("!=", STATE, {"set": ["established", "new"]}), False),
    ],
)
def test_conditions_on_flags_and_states(condition, met):
    chain = {"family": "inet", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}
    rule = {"family": "inet", "table": "filter", "chain": "input", "handle": 1, "expr": [condition, {"drop": None}]}
    verdict = Ruleset([{"chain": chain}, {"rule": rule}]).through(PACKET)
    assert (verdict.action, verdict.uncertain) == ("drop" if met else "accept", [])


DOCKER = """-P INPUT ACCEPT
-P FORWARD DROP
-N DOCKER
-A INPUT -p tcp -m multiport --dports 111,2049 -j DROP
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A FORWARD -j DOCKER
"""
STRICT = """-P INPUT DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "ssh -j ACCEPT" -j ACCEPT
"""


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("-P INPUT ACCEPT", "accept"),
        ("-P INPUT DROP", "drop"),
        (DOCKER, "accept"),
        (STRICT, "drop"),
        (STRICT + "-A INPUT -s 198.18.0.0/24 -i eth+ -p tcp -m multiport --dports 29500:29600,32768:60999 -j ACCEPT", "accept"),
        (STRICT + "-A INPUT -s 198.18.0.0/24 -p udp -m udp --dport 29500 -j ACCEPT", "drop"),
        (STRICT + "-A INPUT ! -s 198.18.0.0/24 -j ACCEPT", "drop"),
        (STRICT + "-N peers\n-A INPUT -g peers\n-A INPUT -j ACCEPT\n-A peers -s 198.18.0.9/32 -j ACCEPT", "drop"),
        (STRICT + "-N peers\n-A INPUT -j peers\n-A peers ! -i eth1 -j RETURN\n-A peers -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT", "accept"),
        (STRICT + "-A INPUT -m set --match-set peers src -j ACCEPT", "drop"),  # the set's elements are not known here
        ("-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN -j DROP\n-A INPUT -p tcp -m tcp --tcp-flags ALL NONE -j DROP", "accept"),
        ("-P INPUT ACCEPT\n-A INPUT -m limit --limit 3/sec -j LOG --log-prefix \"in: \"\n-A INPUT -j REJECT --reject-with icmp-host-prohibited", "drop"),
    ],
)
def test_rules_of_iptables(text, action):
    assert Ruleset(iptables.items(text, 4, iptables.LEGACY)).through(PACKET).action == action
    six = Packet(6, "fd00::7", 29500, "eth1")
    text = text.replace("198.18.0.0/24", "fd00::/64").replace("198.18.0.9/32", "fd00::9/128")
    assert Ruleset(iptables.items(text, 6, "filter")).through(six).action == action


def test_only_tables_that_hide_something_are_read_anew():
    hidden = {"rule": {"family": "ip", "table": "filter", "chain": "INPUT", "handle": 5, "expr": [{"xt": {"name": "multiport"}}, {"drop": None}]}}
    plain = {"rule": {"family": "ip6", "table": "filter", "chain": "INPUT", "handle": 5, "expr": [{"drop": None}]}}
    assert iptables.hidden_from_nft([hidden, plain]) == [4]
    assert iptables.replaced([hidden, plain], {4: "-A INPUT -j ACCEPT"})[0] == plain
    assert iptables.replaced([hidden, plain], {}) == [hidden, plain]
