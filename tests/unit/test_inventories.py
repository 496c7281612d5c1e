"""Whole inventories, generated: right ones have no problem, wrong ones have one, and none of them raises."""

from __future__ import annotations

import copy
import functools
import typing as t

from ansible.parsing.dataloader import DataLoader
from ansible_collections.onprem.torch.plugins.module_utils import node_checks
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, merged, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, connection_variables
from builders import GIB, RELEASE, interface, node, reader, specification, template
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Inventory = t.Dict[str, t.Dict[str, t.Any]]
Nodes = t.Dict[str, t.Dict[str, t.Any]]
RUNS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", " ", "0", "-1", "{", "{{ x", "/", "../x", "\n", "é", "0,1", "198.18.0.3", "127.0.0.1", "::1", "remote:", "("])
    | st.sampled_from(["{{ nothing }}", "{{ 1 / 0 }}", "{{ torchrun_job }}", "{% if %}", "{{ lookup('file', '/no') }}", "{{ [] }}"]).map(template),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@functools.lru_cache(maxsize=1)
def manifest() -> dict[str, t.Any]:
    """Return the collection's manifest of versions."""
    return DataLoader().load_from_file(catalog.MANIFEST)


def judge(inventory: Inventory, nodes: Nodes) -> list[Problem]:
    """Return the problems of an inventory, as the plays find them: connections first, then variables and nodes together."""
    read = reader(inventory)
    problems = []
    for name in inventory:
        problems += connection_variables.check(name, *read.environment(name))
    hosts = []
    for name in inventory:
        host, found = read.host(name)
        problems += found
        host.node = copy.deepcopy(nodes.get(name, {"error": "the node was not looked at; run the play without --limit"}))
        problems += node_checks.unreadable(host)
        if host.node.get("error"):
            host.node = {}
        hosts.append(host)
    return problems + planning.make("train", hosts, RELEASE, manifest())[1]


@st.composite
def right(draw: t.Any) -> tuple[Inventory, Nodes]:
    """Draw an inventory that is right, with what its nodes tell."""
    count = draw(st.integers(2, 5))
    gpus = draw(st.sampled_from([0, 1, 8]))
    ranks = draw(st.permutations(range(count))) if draw(st.booleans()) else None
    shared = draw(
        st.fixed_dictionaries(
            {"torchrun_source": st.just("/home/me/project")},
            optional={
                "torchrun_args": st.lists(st.text("abc-= ", min_size=1, max_size=5), max_size=3),
                "torchrun_environment": st.dictionaries(st.sampled_from(["A", "B_1", "_c"]), st.integers() | st.text("xyz $%\"'", max_size=5)),
                "torchrun_master_port": st.integers(1024, 29000),
                "torchrun_job": st.sampled_from(["train", "llama-7b", "a.b_C"]),
                "torchrun_stop_timeout": st.integers(1, 1000) | st.integers(1, 9).map(str),
                "torchrun_wait_for": st.sampled_from(["first_step", "finished"]),
                "torchrun_checkpoint_dir": st.sampled_from(["/data/checkpoints", template("{{ torchrun_root }}/x")]),
                "torchrun_nproc_per_node": st.sampled_from(["auto", 1, "1"]),
                "firewall_protect": st.booleans(),
                "ansible_become": st.sampled_from([True, "yes", "true"]),
                "ansible_user": st.just(template("{{ 'ops' }}")),
                "ansible_port": st.sampled_from([22, "2222"]),
                "site_colour": st.just("{{ not_ours }}").map(template),
            },
        )
    )
    inventory, nodes = {}, {}
    for number in range(count):
        name = f"n{number}"
        inventory[name] = {**shared, **({} if ranks is None else {"torchrun_node_rank": ranks[number]})}
        nodes[name] = node(number + 1, gpus)
    return inventory, nodes


def variable(name: str, *values: t.Any) -> list[t.Callable[[Inventory, Nodes, str], None]]:
    """Return spoils that give a variable a wrong value: each on one host, and on all."""
    spoils: list[t.Callable[[Inventory, Nodes, str], None]] = []
    for value in values:
        spoils.append(lambda inventory, nodes, host, value=value: inventory[host].update({name: value}))
        spoils.append(lambda inventory, nodes, host, value=value: [each.update({name: value}) for each in inventory.values()])
    return spoils


def tells(**changes: t.Any) -> t.Callable[[Inventory, Nodes, str], None]:
    """Return a spoil that changes what one node tells."""
    return lambda inventory, nodes, host: nodes[host].update(changes)


SPOILS = [
    *variable("torchrun_node_rank", "first", -1, 99, 1.5, True),
    *variable("torchrun_master_port", "default", 80, 70000, 40000, 22, template("{{ x }}")),
    *variable("torchrun_supervisor_port", "x", 1, 99999, 45000),
    *variable("torchrun_master_addr", "gpu01", "127.0.0.1", "192.0.2.9", "::1", ["198.18.0.3"]),
    *variable("torchrun_nproc_per_node", 0, -3, 9999, "many"),
    *variable("torchrun_args", "--epochs 3", {"a": 1}, [None], [["a"]], [template("{{ x }}")]),
    *variable("torchrun_environment", ["A=1"], {"A-B": 1}, {"A": None}, {"A": True}, {1: "x"}, {"": "x"}),
    *variable("torchrun_devices", "99", "0,0", "x"),
    *variable("torchrun_job", "a b", "", "-x", "a/b", "x" * 80),
    *variable("torchrun_wait_for", "ever", 3),
    *variable("torchrun_stop_timeout", 0, -1, "soon", []),
    *variable("torchrun_data_paths", "/data", ["data"], [""], [{"a": 1}]),
    *variable("torchrun_agrs", ["x"]),
    *variable("torchrun_mster_port", 29500),
    *variable("firewall_protect", "false", 0, "no"),
    *variable("firewall_monitoring_ports", [9400], [{"port": 0, "sources": ["::/0"]}], [{"port": float("inf"), "sources": ["::/0"]}]),
    *variable("cluster_interface", "ib9", "lo"),
    *variable("pytorch_version", "newest", [2]),
    *variable("pytorch_root", "relative", "/a\nb"),
    *variable("ansible_port", "ssh", 0, 99999),
    *variable("ansible_become", "maybe", [1]),
    *variable("ansible_user", template("{{ x }}")),
    *variable("ansible_connection", "shh"),
    tells(error="cannot be reached by SSH at 198.18.0.3 (Connection refused); try: ssh n1"),
    tells(uid=1000),
    tells(systemd=False),
    tells(architecture="riscv64"),
    tells(clock_offset_seconds=-3.0),
    tells(clock_offset_seconds=1.01),
    tells(disk={"/opt/onprem.torch": GIB}),
    tells(distribution={"id": "arch", "version": "", "codename": "", "name": "Arch Linux"}),
    tells(python={"path": "/usr/bin/python3", "version": ""}),
    tells(python={"path": "/usr/bin/python3", "version": "3.9.2"}),
    tells(interfaces=[interface("lo", "127.0.0.1/8")]),
    tells(interfaces=[interface("lo", "127.0.0.1/8"), interface("eth0", "192.0.2.1/24")]),
    tells(interfaces=[]),
    lambda inventory, nodes, host: [each.update(machine_id="1" * 32) for each in nodes.values()],
    lambda inventory, nodes, host: [each.update(interfaces=node(1)["interfaces"]) for each in nodes.values()],
]


@given(right())
@RUNS
def test_a_right_inventory_has_no_problem(made):
    assert [problem.sentence() for problem in judge(*made)] == []


@given(right(), st.lists(st.sampled_from(SPOILS), min_size=1, max_size=4), st.data())
@RUNS
def test_a_spoilt_inventory_has_problems_that_say_what_to_do(made, spoils, data):
    inventory, nodes = made
    before = copy.deepcopy((inventory, nodes))
    for spoil in spoils:
        spoil(inventory, nodes, data.draw(st.sampled_from(sorted(inventory))))
    if (inventory, nodes) == before:
        return
    problems = judge(inventory, nodes)
    assert problems
    well_formed(problems, inventory)


NAMES = [*sorted(specification().specs), "ansible_host", "ansible_port", "ansible_become"]


@given(right(), st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=4), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_of_any_variable_raises(made, values, data):
    inventory, nodes = made
    for host in data.draw(st.sets(st.sampled_from(sorted(inventory)))):
        inventory[host].update(values)
    if data.draw(st.booleans()):
        del nodes[data.draw(st.sampled_from(sorted(nodes)))]
    well_formed(judge(inventory, nodes), inventory)


def well_formed(problems: t.Sequence[Problem], inventory: Inventory) -> None:
    """Check that each problem is one line: a host of the inventory or none, what is the case, what to do."""
    for problem in problems:
        assert problem.host in {"", *inventory}
        assert problem.text and problem.cure, problem
        sentence = problem.sentence()
        assert len(sentence.splitlines()) == 1, repr(sentence)
        assert len(sentence) < 500, sentence
        assert "Traceback" not in sentence and "object at 0x" not in sentence
    for problem in merged(problems):
        assert f"  - {problem.sentence()}" in report(problems).split("\n")
