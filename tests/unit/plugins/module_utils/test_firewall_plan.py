# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""From what the node has to what it should have: who is kept out already, whom the user's rules would drop, and the kernel's range."""

from __future__ import annotations

import dataclasses
import time

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_iptables as iptables
from ansible_collections.onprem.torch.plugins.module_utils import firewall_plan as plan
from ansible_collections.onprem.torch.plugins.module_utils import firewall_spec as spec

from .test_firewall_spec import GOOD

JOB = spec.parse_job(**GOOD)
CHAIN = {"family": "inet", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0}
SOURCE = {"payload": {"protocol": "ip", "field": "saddr"}}


def both(text):
    """Rules of iptables for IPv4 and IPv6."""
    return [*iptables.items(text, 4, "filter"), *iptables.items(text, 6, "filter")]


def ruleset(policy, *conditions, elements=()):
    """A chain of nftables with this policy that accepts what meets one of the conditions; `elements` are those of its set @nodes."""
    rules = [
        {"rule": {"family": "inet", "table": "filter", "chain": "input", "handle": number, "expr": [condition, {"accept": None}]}}
        for number, condition in enumerate(conditions)
    ]
    named = {"family": "inet", "table": "filter", "name": "nodes", "type": "ipv4_addr", "elem": list(elements)}
    return [{"set": named}, {"chain": {**CHAIN, "policy": policy}}, *rules]


def equal(left, right):
    return {"match": {"op": "==", "left": left, "right": right}}


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("-P INPUT ACCEPT", True),
        ("-P INPUT DROP", False),
        # Rules that close some ports are no default.
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 0 -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 0:1023 -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 29500:29600 -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 32768:60999 -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 1024:32767 -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 1024:65535 -j DROP", False),
        # Nor are rules that let some in: what the administrator opens stays open.
        ("-P INPUT DROP\n-A INPUT -p tcp --dport 29500 -j ACCEPT\n-A INPUT -p tcp --dport 40000:50000 -j ACCEPT", False),
        ("-P INPUT DROP\n-A INPUT -p tcp --dport 1025:65535 -j ACCEPT", True),
        ("-P INPUT DROP\n-A INPUT -p tcp --dport 32768:60999 -j ACCEPT", True),
        ("-P INPUT DROP\n-A INPUT -i eth1 -j ACCEPT", True),
    ],
)
def test_strangers_are_kept_out_where_nothing_else_does(text, guard):
    job = dataclasses.replace(JOB, interface="eth1")
    assert plan.stranger_gets_in([job], plan.Facts(filters=both(text))) is guard
    assert plan.stranger_gets_in([dataclasses.replace(job, protect=False)], plan.Facts(filters=both(text))) is False


def test_one_ip_version_that_is_open_calls_for_the_guard():
    assert plan.stranger_gets_in([JOB], plan.Facts(filters=iptables.items("-P INPUT DROP", 4, "filter")))


def cluster(count, **changes):
    peers = tuple(f"198.18.{number // 250}.{number % 250 + 1}" for number in range(count))
    return dataclasses.replace(JOB, peers4=peers, peers6=(), monitoring=(), interface="eth1", **changes)


def test_a_node_between_those_that_the_user_lets_in_gets_a_rule():
    three = cluster(3)
    allowed = ruleset("drop", equal(SOURCE, "@nodes"), elements=[three.peers4[0], three.peers4[2]])
    assert list(plan.target("auto", [three], plan.Facts(filters=allowed)).jumps) == [("inet", "filter", "input")]
    every = ruleset("drop", equal(SOURCE, "@nodes"), elements=[{"range": [three.peers4[0], three.peers4[2]]}])
    assert not plan.target("auto", [three], plan.Facts(filters=every)).jumps


def test_a_part_of_the_range_that_is_closed_gets_a_rule():
    port = {"payload": {"protocol": "tcp", "field": "dport"}}
    some = ruleset("drop", equal(port, {"range": [29500, 31000]}), equal(port, {"range": [40000, 60999]}))
    assert plan.target("auto", [cluster(2)], plan.Facts(filters=some)).jumps
    whole = ruleset("drop", equal(port, {"range": [29500, 31000]}), equal(port, {"range": [32768, 60999]}))
    assert not plan.target("auto", [cluster(2)], plan.Facts(filters=whole)).jumps


def test_those_that_monitor_may_come_in_by_another_interface():
    trusted = ruleset("drop", equal({"meta": {"key": "iifname"}}, "eth1"))
    watched = dataclasses.replace(cluster(2), monitoring=(spec.Monitoring(9100, ("192.0.2.0/24",), ()),))
    assert not plan.target("auto", [cluster(2)], plan.Facts(filters=trusted)).jumps
    assert plan.target("auto", [watched], plan.Facts(filters=trusted)).jumps
    # What nft must not open is the business of whoever wrote the rules for one interface.
    trusted = iptables.items("-P INPUT DROP\n-A INPUT -i eth1 -j ACCEPT", 4, "filter")
    assert plan.target("auto", [watched], plan.Facts(filters=trusted)).backend == "nftables"


def test_hundreds_of_peers_are_looked_up_in_no_time():
    many = cluster(600)
    allowed = ruleset("drop", *[equal(SOURCE, f"192.0.2.{number}") for number in range(20)], equal(SOURCE, "@nodes"), elements=many.peers4)
    before = time.process_time()
    assert not plan.target("auto", [many], plan.Facts(filters=allowed)).jumps
    assert time.process_time() - before < 1.0


def test_the_range_is_the_kernels_whoever_narrows_it_and_goes():
    usual = (32768, 60999)
    trusting = dataclasses.replace(JOB, job="a", narrow=False, ephemeral=usual)
    narrowing = dataclasses.replace(JOB, job="b", trust_peers=False, narrow=True, ephemeral=(50000, 60999))
    assert [job.ephemeral for job in spec.with_range_of_the_kernel([trusting, narrowing], usual)] == [(50000, 60999)] * 2
    (left,) = spec.with_range_of_the_kernel([dataclasses.replace(trusting, ephemeral=(50000, 60999))], usual)
    assert left.ephemeral == usual and left.trust_peers
