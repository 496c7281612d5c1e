"""The training interface and address of each node."""

from __future__ import annotations

import ipaddress

from ansible_collections.onprem.torch.plugins.module_utils import network
from builders import interface
from hypothesis import given
from hypothesis import strategies as st


def chosen(nodes, **wanted):
    return network.choose(nodes, {host: wanted.get(host, "") for host in nodes})


def test_the_one_common_network_is_taken():
    nodes = {
        "a": [interface("lo", "127.0.0.1/8"), interface("eth0", "198.18.0.1/24"), interface("ib0", "198.19.1.1/24")],
        "b": [interface("lo", "127.0.0.1/8"), interface("ens3", "198.18.7.2/24"), interface("ib0", "198.19.1.2/24")],
    }
    ends, problems = chosen(nodes)
    assert problems == []
    assert ends == {"a": network.Endpoint("ib0", "198.19.1.1"), "b": network.Endpoint("ib0", "198.19.1.2")}


def test_names_may_differ_between_hosts():
    nodes = {"a": [interface("eth0", "198.18.0.1/24")], "b": [interface("enp1s0", "198.18.0.2/24")]}
    ends, problems = chosen(nodes)
    assert problems == []
    assert {host: end.interface for host, end in ends.items()} == {"a": "eth0", "b": "enp1s0"}


def test_networks_of_containers_and_links_that_are_down_join_nobody():
    nodes = {
        "a": [interface("docker0", "172.17.0.1/16"), interface("eth1", "198.19.0.1/24", up=False), interface("eth0", "198.18.0.1/24")],
        "b": [interface("docker0", "172.17.0.1/16"), interface("eth1", "198.19.0.2/24", up=False), interface("eth0", "198.18.0.2/24")],
    }
    ends, problems = chosen(nodes)
    assert problems == []
    assert {end.interface for end in ends.values()} == {"eth0"}


def test_two_common_networks_need_a_choice_and_the_choice_is_offered():
    nodes = {
        "a": [interface("eth0", "198.18.0.1/24"), interface("ib0", "198.19.0.1/24")],
        "b": [interface("eth0", "198.18.0.2/24"), interface("ib0", "198.19.0.2/24")],
    }
    ends, problems = chosen(nodes)
    assert ends == {}
    assert [problem.variable for problem in problems] == ["cluster_interface"]
    ends, problems = chosen(nodes, a="ib0", b="ib0")
    assert problems == []
    assert ends["b"] == network.Endpoint("ib0", "198.19.0.2")


def test_one_host_with_a_choice_decides_for_the_others():
    nodes = {
        "a": [interface("eth0", "198.18.0.1/24"), interface("ib0", "198.19.0.1/24")],
        "b": [interface("eth0", "198.18.0.2/24"), interface("ib0", "198.19.0.2/24")],
    }
    ends, problems = chosen(nodes, a="ib0")
    assert problems == []
    assert ends["b"].address == "198.19.0.2"


def test_a_node_that_is_alone_may_have_several_networks():
    ends, problems = chosen({"a": [interface("eth0", "198.18.0.1/24"), interface("ib0", "198.19.0.1/24")]})
    assert problems == []
    assert ends["a"].address in ("198.18.0.1", "198.19.0.1")


def test_the_ipv6_address_goes_along():
    ends, _problems = chosen({"a": [interface("eth0", "198.18.0.1/24", "fd00::1/64")]})
    assert ends["a"].address6 == "fd00::1"


@given(st.integers(1, 40), st.integers(8, 28), st.data())
def test_every_host_gets_an_address_of_its_own_in_the_common_network(count, prefix, data):
    common = ipaddress.ip_network(f"10.0.0.0/{prefix}" if prefix < 27 else "10.0.0.0/26")
    nodes = {}
    for number in range(count):
        links = [
            interface("lo", "127.0.0.1/8"),
            interface("train0", f"{common.network_address + number + 1}/{common.prefixlen}"),
            interface("mgmt0", f"198.18.{number}.5/24"),
        ]
        nodes[f"n{number}"] = data.draw(st.permutations(links))
    ends, problems = chosen(nodes)
    assert problems == []
    assert len({end.address for end in ends.values()}) == count
    if count > 1:
        assert all(ipaddress.ip_address(end.address) in common for end in ends.values())


LINK = st.builds(
    interface,
    st.sampled_from(["lo", "eth0", "ib0", "docker0", "ens1"]),
    st.sampled_from(["198.18.0.1/24", "198.18.0.2/24", "198.19.0.1/16", "127.0.0.1/8", "fd00::1/64"]),
    up=st.booleans(),
)


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(LINK, max_size=4), min_size=1), st.data())
def test_no_interface_table_raises_and_hosts_without_an_address_are_explained(nodes, data):
    names = st.sampled_from(["", "", "eth0", "lo", "nosuch"])
    wanted = {host: data.draw(names) for host in nodes}
    ends, problems = network.choose(nodes, wanted)
    assert set(ends) <= set(nodes)
    assert problems or set(ends) == set(nodes)
    assert not any(ipaddress.ip_address(end.address).is_loopback for end in ends.values())


def test_a_node_may_be_met_by_every_address_of_its_training_interface():
    there = [interface("eth0", "198.18.0.1/24", "198.18.0.9/24", "fd00::1/64", "fd00::9/64"), interface("ib0", "198.19.1.1/24")]
    end = network.Endpoint("eth0", "198.18.0.9", "fd00::1")
    assert network.addresses(end, there, 4) == ["198.18.0.9", "198.18.0.1"]
    assert network.addresses(end, there, 6) == ["fd00::1", "fd00::9"]
    assert network.addresses(network.Endpoint("", ""), there, 4) == []
