"""Whose bridges and networks are, from recorded answers of ip."""

from __future__ import annotations

import json

import pytest
from ansible_collections.onprem.torch.plugins.filter.lab_subnet6 import lab_subnet6
from ansible_collections.onprem.torch.plugins.module_utils import lab_network, nspawn, value_checks
from hypothesis import given
from hypothesis import strategies as st

MINE = lab_network.Lab("/home/me/b/inventories/lab/.state/nodes", "onprem0", ("198.18.0.0/24", "fdc6:1815::/64"))
THEIRS = "/home/me/a/inventories/lab/.state/nodes"


def bridge(name="onprem0", address="198.18.0.1", prefix=24, alias="", up=True, kind="bridge", **more):
    entry = {"ifname": name, "flags": ["UP"] if up else [], "linkinfo": {"info_kind": kind}, "addr_info": [], **more}
    if address:
        entry["addr_info"] = [{"local": address, "prefixlen": prefix, "scope": "global"}, {"local": "fe80::1", "prefixlen": 64, "scope": "link"}]
    return {**entry, **({"ifalias": alias} if alias else {})}


def rules(network="198.18.0.0/24"):
    """A bridge's table as nft lists it."""
    return f'table ip onprem_lab_onprem0 {{\n\tchain postrouting {{\n\t\tip saddr {network} oifname != "onprem0" masquerade\n\t}}\n}}\n'


def look(*entries, lab=MINE, machines=(), tables=None, routes=()):
    return lab_network.look(lab, lab_network.links(json.dumps(entries)), [json.dumps(routes)], machines, tables or {})


@pytest.fixture
def living(tmp_path):
    """A node of another lab whose folder is there."""
    folder = tmp_path / "other" / "inventories" / "lab" / ".state" / "nodes" / "lab1"
    folder.mkdir(parents=True)
    (folder / nspawn.SETTINGS_FILE).write_text("{}")
    return nspawn.Machine(7, "lab1-abcdef", str(folder / "root"), "onprem0")


GONE = nspawn.Machine(8, "lab1-abcdef", f"{THEIRS}/lab1/root", "onprem0")


@pytest.mark.parametrize("alias", ["", "signed"])
def test_a_bridge_with_living_nodes_of_another_lab_is_refused_and_both_named(living, alias):
    found = look(bridge(alias=lab_network.ALIAS + living.nodes if alias else ""), machines=[living])
    assert len(found.problems) == 1 and not found.end and not found.remove
    for words in ("bridge onprem0", lab_network.shown(living.nodes), "lab1", "make clean", "lab_bridge", "lab_subnet", lab_network.shown(MINE.nodes)):
        assert words in found.problems[0]


def test_another_lab_is_taken_over_only_when_asked_or_gone(living):
    taken = look(bridge(alias=lab_network.ALIAS + living.nodes), lab=MINE._replace(take_over=True), machines=[living])
    assert taken == lab_network.Findings([], [living], ["onprem0"])
    assert look(bridge(alias=lab_network.ALIAS + THEIRS), machines=[GONE]) == lab_network.Findings([], [GONE], ["onprem0"])
    assert look(bridge(), machines=[GONE], tables={lab_network.table("onprem0"): rules()}) == lab_network.Findings([], [GONE], ["onprem0"])
    unproven = look(bridge(), machines=[GONE])
    assert len(unproven.problems) == 1 and "lab_bridge" in unproven.problems[0] and not unproven.end and not unproven.remove
    assert look(bridge(alias=lab_network.ALIAS + THEIRS)) == lab_network.Findings([], [], ["onprem0"])


def test_the_own_bridge_is_kept_also_one_of_before_bridges_were_signed():
    own = nspawn.Machine(9, "lab1-123456", f"{MINE.nodes}/lab1/root", "onprem0")
    for found in (
        look(bridge(alias=lab_network.ALIAS + MINE.nodes), machines=[own]),
        look(bridge(), machines=[own], tables={lab_network.table("onprem0"): rules()}),
        look(bridge(), tables={lab_network.table("onprem0"): rules()}),
        look(bridge(address="", up=False)),
        look(),
    ):
        assert found == lab_network.Findings([], [], [])


@pytest.mark.parametrize("kind", ["bridge", "", "veth"])
def test_an_interface_of_somebody_elses_is_never_touched(kind):
    found = look(bridge(address="172.17.0.1", kind=kind))
    assert len(found.problems) == 1 and "lab_bridge" in found.problems[0] and not found.remove
    found = look(bridge("docker0", kind=kind))
    assert len(found.problems) == 1 and "lab_subnet" in found.problems[0] and "docker0" in found.problems[0] and not found.remove
    port = {"ifname": "tap0", "master": "onprem0"}
    assert look(bridge(address="", up=False), port).problems, "somebody is about to use it"


SIGNED = lab_network.ALIAS + MINE.nodes
UPLINK = {"ifname": "eth0", "master": "onprem0"}
PLUGGED = {"ifname": "vb-lab1-123456", "master": "onprem0", "linkinfo": {"info_kind": "veth"}}


@pytest.mark.parametrize(
    ("entry", "ports", "table", "nodes", "ours"),
    [
        (bridge(alias=SIGNED), [], "", MINE.nodes, True),
        (bridge(alias=SIGNED), [UPLINK], "", MINE.nodes, True),
        (bridge(alias=SIGNED), [], rules(), THEIRS, False),
        (bridge(alias=SIGNED), [], rules(), "", False),
        (bridge(alias="onprem.torch"), [], "", "", True),
        (bridge(alias="onprem.torch"), [], rules(), MINE.nodes, False),
        # What killed runs and earlier releases left.
        (bridge(address="", up=False), [], "", MINE.nodes, True),
        (bridge(), [PLUGGED, {"ifname": "vo-stranger", "master": "onprem0"}], rules(), MINE.nodes, True),
        (bridge(address="", up=True), [], rules(), MINE.nodes, True),
        (bridge(), [], rules(), "", True),
        # The operator's own, also where an earlier release has had its nodes on it.
        (bridge(), [], "", MINE.nodes, False),
        (bridge(), [], "", "", False),
        (bridge(), [PLUGGED], "", MINE.nodes, False),
        (bridge(address="", up=True), [UPLINK], "", MINE.nodes, False),
        (bridge(address="", up=False), [UPLINK], "", MINE.nodes, False),
        (bridge(alias="uplink"), [], rules(), MINE.nodes, False),
        (bridge(), [UPLINK], rules(), MINE.nodes, False),
        (bridge(address="192.168.122.1"), [], rules(), MINE.nodes, False),
        (bridge(), [], "table ip onprem_lab_onprem0 {\n}\n", MINE.nodes, False),
        (bridge(kind=""), [], rules(), MINE.nodes, False),
        (bridge(alias=SIGNED, kind="bond"), [], rules(), MINE.nodes, False),
    ],
)
def test_only_a_bridge_that_is_provably_the_labs_belongs_to_it(entry, ports, table, nodes, ours):
    found = lab_network.links(json.dumps([entry, *ports]))
    assert lab_network.belongs(found[0], nodes, found, table) == ours


@given(st.sampled_from(["", "192.168.122.1", "198.18.0.1"]), st.booleans(), st.sampled_from(["eth0", "tap0", "bond0"]), st.booleans(), st.booleans())
def test_a_bridge_with_somebody_elses_port_is_never_an_unsigned_labs(address, up, port, plugged, table):
    entries = [bridge(address=address, up=up), {"ifname": port, "master": "onprem0"}, *([PLUGGED] if plugged else [])]
    found = lab_network.links(json.dumps(entries))
    assert not lab_network.belongs(found[0], MINE.nodes, found, rules() if table else "")
    unproven = look(*entries, machines=[GONE], tables={lab_network.table("onprem0"): rules()} if table else {})
    assert unproven.problems and not unproven.end and not unproven.remove


def test_the_alias_of_a_bridge_tells_its_owner_or_none():
    assert lab_network.alias("") == "onprem.torch"
    assert lab_network.links(json.dumps([bridge(alias=lab_network.alias(MINE.nodes))]))[0].owner == MINE.nodes
    assert lab_network.links(json.dumps([bridge(alias=lab_network.alias(""))]))[0].owner == ""


def test_the_same_network_on_another_labs_bridge(living):
    machine = living._replace(bridge="onprem7")
    found = look(bridge("onprem7"), machines=[machine])
    assert len(found.problems) == 1 and "198.18.0.0/24" in found.problems[0] and "onprem7" in found.problems[0]
    assert look(bridge("onprem7", alias=lab_network.ALIAS + THEIRS)).remove == ["onprem7"]


@pytest.mark.parametrize(("target", "refused"), [("198.18.0.0/24", True), ("198.18.0.64/26", True), ("198.18.0.0/16", False), ("default", False)])
def test_a_network_that_is_reached_another_way_is_refused(target, refused):
    found = look(bridge("eth0", "10.0.0.5"), routes=[{"dst": target, "dev": "eth0"}])
    assert bool(found.problems) == refused
    assert look(bridge(alias=lab_network.ALIAS + MINE.nodes), routes=[{"dst": target, "dev": "onprem0"}]).problems == []


def test_outsiders_are_found_by_their_plugs():
    port = {"ifname": "vo-stranger", "master": "onprem0", "link_netnsid": 5}
    entries = [bridge(), port, {**port, "ifname": "vo-b", "master": "onprem1", "link_netnsid": 6}]
    found = lab_network.links(json.dumps(entries), '[{"name":"b","id":6},{"name":"stranger","id":5},{"name":"unused"}]')
    assert lab_network.outsiders("onprem0", found) == ["stranger"]


def test_an_alias_that_the_kernel_would_not_take_is_refused():
    with pytest.raises(ValueError, match="lab_state_dir"):
        lab_network.alias("/" + "x" * 300)


@given(st.lists(st.integers(0, 2**32 - 1).map(lambda number: number & ~0xFF), min_size=2, max_size=2, unique=True))
def test_two_subnets_have_two_ipv6_networks(numbers):
    import ipaddress

    first, second = (ipaddress.ip_network(lab_subnet6("auto", f"{ipaddress.ip_address(number)}/24")) for number in numbers)
    assert not first.overlaps(second)


@given(st.text(alphabet="node-0123", min_size=1, max_size=30), st.text(alphabet="ab/", min_size=1, max_size=20))
def test_a_machine_has_a_name_that_interfaces_take_and_that_no_other_folder_gives(name, folder):
    machine = nspawn.machine_name(name, f"/{folder}")
    assert len(machine) <= nspawn.LONGEST_MACHINE
    assert machine != nspawn.machine_name(name, f"/{folder}c")


def test_nodes_are_told_from_other_containers():
    words = ["/usr/bin/systemd-nspawn", "--boot", "--machine=lab1-ab", "--directory=/x/.state/nodes/lab1/root", "--network-bridge=onprem0"]
    found = nspawn.machine_of(5, words)
    assert found and (found.node, found.nodes, found.bridge, found.kept) == ("lab1", "/x/.state/nodes", "onprem0", False)
    assert nspawn.machine_of(5, ["systemd-nspawn", "--machine=m"]) is None
    assert nspawn.machine_of(5, ["sh", *words]) is None


def test_a_link_beside_the_nodes_is_not_followed(tmp_path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "evil").symlink_to("/")
    assert nspawn.located(str(tmp_path / "nodes" / "evil")) == str(tmp_path / "nodes" / "evil")
    mountinfo = "25 30 0:1 / / rw - ext4 a rw\n26 25 0:2 / /n/a\\040b/root rw - overlay o rw\n27 25 0:3 / /n/ab rw - tmpfs t rw\n"
    assert nspawn.mounts_below("/n/a b", mountinfo) == ["/n/a b/root"]
    assert nspawn.mounts_below("/n/a", mountinfo) == []


@pytest.mark.parametrize(("value", "wanted"), [("", 0), ("50%", 500), ("2K", 2048), ("1G", 1 << 30), ("77", 77)])
def test_limits_of_memory(value, wanted):
    assert nspawn.memory_bytes(value, 1000) == wanted


@pytest.mark.parametrize("value", ["0", "101%", "1.5G", "-1", "2g", "lots"])
def test_limits_of_memory_that_are_none(value):
    with pytest.raises(ValueError, match="memory"):
        nspawn.memory_bytes(value, 1000)


@pytest.mark.parametrize(("value", "good"), [("", True), ("90%", True), ("200G", True), ("200", False), ("0%", False), ("4G\nExecStart=x", False)])
def test_the_jobs_limit_of_memory_has_a_unit(value, good):
    assert (not value_checks.check("n1", {"torchrun_memory_max": value})) == good
