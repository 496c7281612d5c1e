# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The request to the firewall: what is refused, and that its file can be read back."""

from __future__ import annotations

import ipaddress

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_spec as spec
from hypothesis import given
from hypothesis import strategies as st

GOOD = {
    "job": "digits",
    "ports": [29500, 29501, 29600],
    "peers": ["198.18.0.11", "198.18.0.12", "fd00::11"],
    "interface": "eth1",
    "trust_peers": True,
    "kernel_range": (32768, 60999),
    "narrow_range": "50000-60999",
}

addresses = st.one_of(
    st.integers(0xC6120001, 0xC613FFFE).map(ipaddress.IPv4Address),
    st.integers(1, 2**64 - 1).map(lambda n: ipaddress.IPv6Address((0xFD00 << 112) + n)),
).map(str)

jobs = st.builds(
    lambda name, ports, peers, interface, trust, protect, rows: spec.parse_job(
        name, ports, peers, interface, trust, (32768, 60999), "50000-60999", protect, [{"port": p, "sources": s} for p, s in rows]
    ),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", fullmatch=True),
    st.lists(st.integers(1024, 65535), min_size=1, max_size=5, unique=True),
    st.lists(addresses, min_size=1, max_size=40, unique=True),
    st.sampled_from(["eth1", "host0", "bond0.100"]),
    st.booleans(),
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(1024, 65535),
            st.lists(st.sampled_from(["198.18.9.0/24", "0.0.0.0/0", "::/0", "fd00:9::/64", "198.18.9.7"]), min_size=1, max_size=3),
        ),
        max_size=3,
        unique_by=lambda row: row[0],
    ),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ports": [29500, 29500]}, "port 29500 twice"),
        ({"ports": [0]}, "no port"),
        ({"ports": ["http"]}, "'http'"),
        ({"ports": []}, "torchrun_master_port"),
        ({"ports": [22, 29500]}, "sshd"),
        ({"peers": []}, "empty"),
        ({"peers": ["lab1"]}, "'lab1'"),
        ({"peers": ["127.0.0.1"]}, "no address of a node"),
        ({"interface": ""}, "cluster_interface"),
        ({"interface": 'e"; flush ruleset'}, "cluster_interface"),
        ({"job": 'x"; drop'}, "torchrun_job"),
        ({"trust_peers": False, "narrow_range": "60999-50000"}, "firewall_ephemeral_ports"),
        ({"trust_peers": False, "narrow_range": "80-90"}, "firewall_ephemeral_ports"),
        ({"monitoring": [{"port": 9400, "sources": ["office"]}]}, "'office'"),
        ({"monitoring": [{"port": 9400, "sources": []}]}, "no sources"),
        ({"monitoring": [{"port": 9400, "sources": ["::/0"]}, {"port": 9400, "sources": ["::/0"]}]}, "9400 twice"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_that_names_it(change, expected):
    with pytest.raises(spec.SpecError) as caught:
        spec.parse_job(**{**GOOD, "management_ports": (22,), **change})
    assert any(expected in problem for problem in caught.value.problems)
    assert all(problem.endswith(".") for problem in caught.value.problems)


def test_all_problems_are_reported_at_once():
    with pytest.raises(spec.SpecError) as caught:
        spec.parse_job(**{**GOOD, "job": "", "ports": [1, 1], "peers": ["x"], "interface": None})
    assert len(caught.value.problems) == 4


@given(jobs)
def test_a_job_can_be_read_back(job):
    assert spec.load(spec.dump(job)) == job


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', "null"])
def test_a_file_of_another_make_is_refused(text):
    with pytest.raises(ValueError):
        spec.load(text)


@given(st.text("ab-_.0f", min_size=1, max_size=30), st.text("ab-_.0f", min_size=1, max_size=30))
def test_two_jobs_never_share_an_identifier(one, other):
    assert (spec.slug(one) == spec.slug(other)) == (one == other)
    assert len(spec.slug(one)) <= 18


def test_one_kernel_has_one_range():
    one = spec.parse_job(**{**GOOD, "trust_peers": False})
    other = spec.parse_job(**{**GOOD, "job": "b", "trust_peers": False, "narrow_range": "40000-50000"})
    spec.check_together([one, one])
    with pytest.raises(spec.SpecError, match="one range"):
        spec.check_together([one, other])
