# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules as firewalld's and ufw's: what they look like, and that the user's own bytes stay."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
import xml.etree.ElementTree as ET

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_checks as checks
from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files
from ansible_collections.onprem.torch.plugins.module_utils import firewall_firewalld as firewalld
from ansible_collections.onprem.torch.plugins.module_utils import firewall_iptables as iptables
from ansible_collections.onprem.torch.plugins.module_utils import firewall_plan as plan
from ansible_collections.onprem.torch.plugins.module_utils import firewall_sets as sets
from ansible_collections.onprem.torch.plugins.module_utils import firewall_spec as spec
from ansible_collections.onprem.torch.plugins.module_utils import firewall_ufw as ufw
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host
from hypothesis import given
from hypothesis import strategies as st

from .test_firewall_nft import several, with_peers
from .test_firewall_spec import GOOD

FILTER = "*filter\n:ufw-before-input - [0:0]\n-A ufw-before-input -i lo -j ACCEPT\n\n# don't delete\nCOMMIT\n"
NAT = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n"


@given(several)
def test_sets_have_names_of_their_own_that_ipset_takes(some):
    found = sets.accepts(some)
    names = [accept.source.name for accept in found]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 31 and sets.OUR_SET.fullmatch(name)


@given(several)
def test_what_ipset_is_given_is_what_it_is_compared_with(some):
    found = sets.accepts(some)
    text = ufw.ipsets_file(found)
    live = ufw.parse_ipsets(re.sub(rf"^(?:create|swap|destroy) {ufw.SPARE_SET}.*\n", "", text, flags=re.M).replace(f"add {ufw.SPARE_SET}", "add ?"))
    assert set(live) == {accept.source.name for accept in found}
    live = {a.source.name: (ufw.set_type(a.source), sets.normal(a.source.elements)) for a in found}
    rules = {version: ufw.comments("\n".join(ufw.rule_lines(found, version))) for version in (4, 6)}
    assert ufw.differences(ufw.Live(rules, live), found) == []
    assert ufw.differences(ufw.Live({4: None, 6: None}, live), found)
    assert len(ufw.differences(ufw.Live(rules, {}), found)) == len(found)


@given(several, st.sampled_from([FILTER, NAT + FILTER, FILTER + NAT, "# mine\n" + FILTER.replace("COMMIT\n", "COMMIT")]))
def test_the_block_of_ufw_goes_in_and_out_without_a_trace(some, text):
    lines = ufw.rule_lines(sets.accepts(some), 4)
    once = ufw.with_block(text, lines)
    assert once is not None and ufw.with_block(once, lines) == once
    assert ufw.without_block(once) == text == ufw.with_block(once, [])
    if lines:
        inside = once[once.index("*filter") :].split("\nCOMMIT")[0]
        assert all(line in inside for line in lines)


def test_a_file_without_filter_table_is_refused_with_a_sentence():
    found = sets.accepts([spec.parse_job(**GOOD)])
    (sentence,) = ufw.problems(found, {ufw.RULES_FILES[4]: NAT, ufw.RULES_FILES[6]: FILTER})
    assert sentence.startswith("/etc/ufw/before.rules has no filter table") and "; put back" in sentence


@given(several, st.sampled_from([(1, 3), (2, 3)]))
def test_firewalld_reads_what_it_is_compared_with(some, version):
    found = firewalld.with_interface(version, sets.accepts(some))
    root = ET.fromstring(firewalld.policy_file(found))
    assert len(root.findall("rule")) == len(firewalld.rules(found))
    assert {rule.find("source").get("ipset") for rule in root.findall("rule")} == {accept.source.name for accept in found}
    live, kinds = {}, {}
    for accept in found:
        ipset = ET.fromstring(firewalld.ipset_file(accept.source))
        live[accept.source.name] = sets.normal(entry.text for entry in ipset.findall("entry"))
        kinds[accept.source.name] = ipset.get("type")
        assert ("iface" in ipset.get("type")) == (version >= firewalld.SETS_WITH_INTERFACE and not accept.source.networks)
    texts = frozenset(text for _element, text in firewalld.rules(found))
    assert not firewalld.needs_reload(firewalld.Live(version, "nftables", texts, live, kinds), found)
    assert firewalld.changed_sets(firewalld.Live(version, "nftables", texts, live), found) == {}
    flushed = firewalld.differences(firewalld.Live(version, "nftables", texts, live), found, [])
    assert flushed == ["firewalld is active, but its rules are gone from the kernel, as after a flush by hand."]


def test_another_node_is_an_entry_and_no_reload():
    two, three = sets.accepts([with_peers(2)]), sets.accepts([with_peers(3)])
    texts = frozenset(text for _element, text in firewalld.rules(two))
    live = firewalld.Live((2, 3), "nftables", texts, {a.source.name: sets.normal(firewalld.entries(a.source)) for a in two})
    live.kinds = {accept.source.name: firewalld.kind(accept.source) for accept in two}
    assert not firewalld.needs_reload(live, three)
    assert set(firewalld.changed_sets(live, three)) == {"onp_p4_digits", "onp_p6_digits"}
    assert ufw.rule_lines(two, 4) == ufw.rule_lines(three, 4)
    live.kinds = {name: "hash:ip" for name in live.kinds}
    assert firewalld.needs_reload(live, three), "sets of an older release have another type"


def test_what_a_reload_forgets_is_brought_back():
    now = {"services": ["ssh"], "ports": [["8080", "tcp"]], "rules_str": ['rule family="ipv4" source address="192.0.2.7" reject'], "masquerade": True}
    permanent = {"services": ["ssh", "http"], "forward_ports": [["80", "tcp", "8080", ""]]}
    zones = {
        "public": (now, {**permanent, "interfaces": ["eth1", "eth2"]}),
        "internal": ({"interfaces": ["eth0", "eth2"]}, {"interfaces": []}),
    }
    changed = ({"ports": [["9999", "tcp"]], "ingress_zones": ["ANY"]}, {"ingress_zones": ["internal"]})
    policies = {"mine": changed, firewalld.POLICY: ({"rich_rules": ["x"]}, {})}
    commands = firewalld.lost_by_reload(zones, policies, {"banned": (["192.0.2.9"], [])})
    assert [" ".join(command[1:] if command[0] == "firewall-cmd" else command[-4:]) for command in commands] == [
        "--zone=public --remove-interface=eth1",
        "--zone=public --remove-service=http",
        "--zone=public --remove-forward-port=port=80:proto=tcp:toport=8080",
        "--policy=mine --remove-ingress-zone=internal",
        "changeZoneOfInterface ss internal eth0",
        "changeZoneOfInterface ss internal eth2",
        "--zone=public --add-port=8080/tcp",
        '--zone=public --add-rich-rule=rule family="ipv4" source address="192.0.2.7" reject',
        "--zone=public --add-masquerade",
        "--policy=mine --add-port=9999/tcp",
        "--policy=mine --add-ingress-zone=ANY",
        "--ipset=banned --add-entry=192.0.2.9",
    ]
    assert firewalld.lost_by_reload({"public": (now, now)}, {"mine": (now, now)}, {}) == []


def test_what_a_reload_would_load_for_the_first_time_is_named():
    block = {"target": "DROP", "priority": -200}
    policies = {"block": (None, block), "same": (block, block), "other": ({"target": "CONTINUE", "priority": -200}, block), firewalld.POLICY: (None, block)}
    assert firewalld.loaded_by_reload("policy", policies) == ["the policy block", "target DROP of the policy other"]
    assert firewalld.loaded_by_reload("zone", {"temporary": (block, None)}) == []


def test_a_service_that_was_changed_but_not_loaded_is_named():
    zones = {"public": ({"services": ["ssh"]}, {"services": ["ssh", "own"]}), "new": (None, {"services": ["http"]})}
    assert firewalld.used_services(zones, {"mine": ({}, None)}) == ["http", "own", "ssh"]
    ssh, moved = {"ports": [["22", "tcp"]]}, {"ports": [["2222", "tcp"]]}
    assert firewalld.changed_by_reload({"ssh": (ssh, moved), "http": (ssh, ssh), "own": (None, moved)}) == ["the service own", "the service ssh"]


def test_everyone_is_two_halves():
    assert sets.whole_halves(["0.0.0.0/0"]) == ("0.0.0.0/1", "128.0.0.0/1")
    assert sets.whole_halves(["::/0", "fd00::/64"]) == ("::/1", "8000::/1", "fd00::/64")


JOB = spec.parse_job(**GOOD)


@pytest.mark.parametrize(
    ("asked", "change", "sentence"),
    [
        ("auto", {"firewalld_active": True, "ufw_enabled": True}, "both active"),
        ("ufw", {}, "not installed"),
        ("ufw", {"programs": frozenset({"nft", "ufw"})}, "installed but not active"),
        ("nftables", {"firewalld_active": True, "programs": frozenset({"nft", "firewall-cmd"})}, "firewalld is active and decides"),
        ("auto", {"firewalld_active": True, "firewalld": firewalld.Live((1, 3), "iptables")}, "FirewallBackend=nftables"),
        ("auto", {"filters": iptables.items("-P INPUT DROP", 4, iptables.LEGACY)}, "Rules of legacy iptables"),
        ("auto", {"filters": iptables.items("-P INPUT DROP", 6, "filter")}, "Rules made with iptables"),
    ],
)
def test_a_node_that_cannot_be_served_is_refused_with_a_sentence(asked, change, sentence):
    with pytest.raises(spec.SpecError, match=sentence):
        plan.target(asked, [JOB], plan.Facts(**change))


def test_rules_of_iptables_that_let_the_peers_in_are_left_alone():
    text = "-P INPUT DROP\n-A INPUT -s {} -p tcp -m multiport --dports 29500:29600,32768:60999 -j ACCEPT"
    let_in = iptables.items(text.format("198.18.0.0/24"), 4, "filter") + iptables.items(text.format("fd00::/64"), 6, iptables.LEGACY)
    wanted = plan.target("auto", [JOB], plan.Facts(filters=let_in))
    assert wanted.backend == "nftables" and not wanted.jumps and not wanted.guard


@pytest.mark.parametrize(
    ("variables", "firewalls", "sentences"),
    [
        (
            {},
            {"installed": ["firewalld", "ufw"], "active": ["firewalld", "ufw"]},
            ["n1: firewalld and ufw are both active and overwrite each other's rules; disable one of them."],
        ),
        (
            {"firewall_backend": "ufw"},
            {"installed": [], "active": []},
            ["n1: firewall_backend is ufw, which is not installed; install and enable it, or set firewall_backend to auto."],
        ),
        (
            {"firewall_backend": "ufw"},
            {"installed": ["ufw"], "active": []},
            [
                "n1: firewall_backend is ufw, which is installed but not active; "
                "enable it with your SSH access allowed, or set firewall_backend to auto."
            ],
        ),
        (
            {"firewall_backend": "nftables"},
            {"installed": ["ufw"], "active": ["ufw"]},
            ["n1: firewall_backend is nftables, but ufw is active and decides; set firewall_backend to auto or ufw."],
        ),
        ({"firewall_backend": "ufw"}, {"installed": ["ufw"], "active": ["ufw"]}, []),
        ({"firewall_rollback_after": 1}, {}, ["firewall_rollback_after is 1, but 5 seconds or more were expected; a new SSH connection takes a moment."]),
        (
            {"firewall_trust_peers": False, "firewall_ephemeral_ports": "29000-30000"},
            {},
            ["firewall_ephemeral_ports is 29000-30000, in which torchrun_master_port (29500) lies, so any connection may take it; choose a range without it."],
        ),
        (
            {"firewall_monitoring_ports": [{"port": 29500, "sources": ["::/0"]}]},
            {},
            ["firewall_monitoring_ports names port 29500, which is torchrun_master_port; the job's ports are for its peers only, name another."],
        ),
        (
            {"firewall_trust_peers": False, "firewall_ephemeral_ports": "x", "firewall_monitoring_ports": [{"port": 1, "sources": ["office"]}, {"port": 1}]},
            {},
            [
                "firewall_monitoring_ports names the source 'office', which is neither an address nor a network; "
                "give for instance 198.18.0.5 or 198.18.0.0/24.",
                "firewall_monitoring_ports names no sources for port 1; give addresses or networks (0.0.0.0/0 and ::/0 for everyone).",
                "firewall_monitoring_ports names port 1 twice; each service of a job needs a port of its own.",
                "firewall_ephemeral_ports is 'x', which is no range of ports; give first-last between 1024 and 65535, as in 50000-60999.",
            ],
        ),
        ({"firewall_state": "absent", "firewall_rollback_after": 1}, {"installed": [], "active": ["firewalld", "ufw"]}, []),
    ],
)
def test_the_plan_names_bad_variables_and_firewalls(variables, firewalls, sentences):
    found = checks.check([Host("n1", variables, {"firewalls": firewalls} if firewalls else {})], {"torchrun_master_port": 29500})
    assert [problem.sentence() for problem in found] == sentences


@pytest.fixture
def kernel():
    """Shell commands in a network namespace of its own."""
    if os.geteuid() or not all(map(shutil.which, ("nft", "ip", "ipset", "iptables"))):
        pytest.skip("needs root, nft, ip, ipset and iptables")
    name = "onprem-" + uuid.uuid4().hex[:8]
    subprocess.run(["ip", "netns", "add", name], check=True)

    def run(*words: str, data: str = "") -> str:
        done = subprocess.run(["ip", "netns", "exec", name, *words], input=data, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    yield run
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_the_restoring_script_makes_the_live_rules_those_of_the_files(kernel, tmp_path):
    """With ufw's chains as ufw makes them; the jump to the user's rules stays the last."""
    script = files.restore_script()
    for path in (files.RULES_DIR, *ufw.RULES_FILES.values()):
        script = script.replace(path, str(tmp_path / path.rsplit("/", maxsplit=1)[-1]))
    (tmp_path / "firewall").mkdir()
    for program, chain, user in (("iptables", "ufw-before-input", "ufw-user-input"), ("ip6tables", "ufw6-before-input", "ufw6-user-input")):
        for words in (["-N", chain], ["-N", user], ["-A", chain, "-i", "lo", "-j", "ACCEPT"], ["-A", chain, "-j", user]):
            kernel(program, *words)
    before = kernel("iptables", "-S") + kernel("ip6tables", "-S")
    for job in (spec.parse_job(**GOOD), spec.parse_job(**{**GOOD, "trust_peers": False, "monitoring": [{"port": 9400, "sources": ["0.0.0.0/0"]}]}), None):
        found = sets.accepts([job] if job else [])
        (tmp_path / "firewall" / "ipsets").write_text(ufw.ipsets_file(found) if found else "")
        for version, name in ((4, "before.rules"), (6, "before6.rules")):
            (tmp_path / name).write_text(ufw.with_block(FILTER, ufw.rule_lines(found, version)))
        for _again in range(2):
            kernel("sh", "-s", data=script)
            rules = {4: kernel("iptables", "-S", "ufw-before-input"), 6: kernel("ip6tables", "-S", "ufw6-before-input")}
            assert all(text.splitlines()[-1].endswith("user-input") for text in rules.values())
            live = ufw.Live({version: ufw.comments(text) for version, text in rules.items()}, ufw.parse_ipsets(kernel("ipset", "save")))
            assert ufw.differences(live, found) == []
    assert kernel("iptables", "-S") + kernel("ip6tables", "-S") == before
    assert kernel("ipset", "list", "-n") == ""
