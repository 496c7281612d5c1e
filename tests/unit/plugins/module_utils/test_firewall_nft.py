# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The nftables rules: what they look like, that the kernel takes them, and that they are recognised again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_nft as nft
from ansible_collections.onprem.torch.plugins.module_utils import firewall_spec as spec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .test_firewall_spec import GOOD, jobs

several = st.lists(jobs, min_size=1, max_size=3, unique_by=lambda job: job.job)


@pytest.fixture(scope="module")
def kernel():
    """`nft` in a network namespace of its own."""
    if os.geteuid() or not shutil.which("nft") or not shutil.which("ip"):
        pytest.skip("needs root, nft and ip")
    name = "onprem-" + uuid.uuid4().hex[:8]
    subprocess.run(["ip", "netns", "add", name], check=True)

    def run(text: str = "", *args: str) -> str:
        done = subprocess.run(["ip", "netns", "exec", name, "nft", *(args or ("-f", "-"))], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr + text
        return done.stdout

    yield run
    subprocess.run(["ip", "netns", "del", name], check=True)


def ruleset(kernel):
    return json.loads(kernel("", "-j", "list", "ruleset"))["nftables"]


def with_peers(count: int, **change):
    peers = [f"198.18.{n // 250}.{n % 250 + 1}" for n in range(count)] + [f"fd00::{n + 1:x}" for n in range(count)]
    return spec.parse_job(**{**GOOD, "peers": peers, **change})


@pytest.mark.parametrize("trust", [True, False])
def test_any_number_of_nodes_is_the_same_rules(trust):
    few, many = with_peers(2, trust_peers=trust), with_peers(500, trust_peers=trust)
    assert nft.guard_table([few]).chains == nft.guard_table([many]).chains
    assert nft.opening_table([few], "inet", "filter").chains == nft.opening_table([many], "inet", "filter").chains


def test_another_node_is_one_line_more():
    two = nft.render_own(nft.guard_table([with_peers(2)])).splitlines()
    three = nft.render_own(nft.guard_table([with_peers(3)])).splitlines()
    assert sorted(set(three) - set(two)) == ["\t\t\t198.18.0.3,", "\t\t\tfd00::3,"]


@given(several)
def test_rules_name_sets_and_never_addresses(some):
    for table in (nft.guard_table(some), *(nft.opening_table(some, family, "filter") for family in ("inet", "ip", "ip6"))):
        names = {item.name for item in table.sets}
        for chain in table.chains:
            for rule in chain.rules:
                for word in rule.split():
                    if word.startswith("@"):
                        assert word[1:] in names
                assert "198.18." not in rule and "fd00" not in rule


@given(several)
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernel_takes_them_and_they_are_recognised(kernel, some):
    kernel("flush ruleset")
    guard = nft.guard_table(some, [50022])
    kernel(nft.render_own(guard))
    kernel(nft.render_own(guard))
    assert nft.differences(ruleset(kernel), guard, own=True) == []
    for family in ("inet", "ip", "ip6"):
        kernel(f"table {family} user {{ chain input {{ type filter hook input priority 0; policy drop; tcp dport 22 accept; }}; }}")
        before = kernel("", "list", "table", family, "user")
        opening = nft.opening_table(some, family, "user")
        kernel(nft.render_opening(opening))
        kernel(nft.render_opening(opening))
        kernel(f"insert rule {family} user input {nft.commented(nft.jump_rule())}")
        live = ruleset(kernel)
        assert nft.differences(live, opening, own=False) == []
        assert [jump[:3] for jump in nft.jumps(live)] == [(family, "user", "input")]
        assert nft.leftovers(live) == [(family, "user")] or not opening.sets
        kernel("\n".join(nft.removal(live, family, "user")) + "\n")
        assert kernel("", "list", "table", family, "user") == before


@pytest.mark.parametrize(
    "damage",
    [
        "delete element inet onprem_torch peers4_digits { 198.18.0.11 }",
        "add element inet onprem_torch peers4_digits { 203.0.113.1 }",
        "add element inet onprem_torch job_ports { 80 }",
        "flush chain inet onprem_torch peers",
        "insert rule inet onprem_torch guard tcp dport 29500 accept",
        "add chain inet onprem_torch guard { policy drop; }",
        "add chain inet onprem_torch other",
        "add set inet onprem_torch other { type ipv4_addr; }",
        "delete table inet onprem_torch",
    ],
)
def test_a_change_by_hand_is_seen(kernel, damage):
    guard = nft.guard_table([spec.parse_job(**GOOD)])
    kernel("flush ruleset\n" + nft.render_own(guard))
    assert nft.differences(ruleset(kernel), guard, own=True) == []
    kernel(damage)
    assert len(nft.differences(ruleset(kernel), guard, own=True)) == 1


@given(st.lists(st.integers(1, 65535), max_size=20))
def test_intervals_do_not_depend_on_how_they_are_written(ports):
    merged = nft.intervals(ports)
    assert nft.intervals([f"{low}-{high}" for low, high in merged]) == merged
    assert nft.intervals([{"range": [low, high]} for low, high in merged]) == merged
    assert {p for low, high in merged for p in range(low, high + 1)} == set(ports)
