"""The plan as a whole, over generated inventories."""

from __future__ import annotations

import ipaddress
import json

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from builders import GIB, MANIFEST, RELEASE, gpu, host, interface, node
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def clusters(draw):
    """Draw a valid cluster: hosts with an address each, maybe GPUs, maybe explicit ranks, maybe two networks."""
    count = draw(st.integers(1, 12))
    gpus = draw(st.sampled_from([0, 0, 1, 4, 8]))
    explicit = draw(st.booleans())
    second = draw(st.booleans())
    port = draw(st.sampled_from([29500, 29510, 20000]))
    ranks = draw(st.permutations(range(count)))
    devices = draw(st.sampled_from(["", "0", "0,1"])) if gpus > 1 else ""
    limit = len(devices.split(",")) if devices else gpus
    hosts = []
    for number in range(count):
        variables = {"torchrun_master_port": port, "torchrun_devices": devices}
        if explicit:
            variables["torchrun_node_rank"] = ranks[number]
        if second:
            variables["cluster_interface"] = "ib0"
        variables["torchrun_nproc_per_node"] = draw(st.sampled_from(["auto", "1", *([str(limit)] if limit else ["3"])]))
        found = node(number + 1, gpus)
        if second:
            found["interfaces"].append(interface("ib0", f"10.10.{number}.1/16"))
        hosts.append(host(f"n{number}", number + 1, found, **variables))
    return hosts


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_a_valid_cluster_gives_a_consistent_plan(hosts):
    plan, problems = planning.make("train", hosts, RELEASE)
    assert [problem.sentence() for problem in problems] == []
    assert sorted(plan["order"]) == sorted(each.name for each in hosts)
    assert [plan["nodes"][name]["rank"] for name in plan["order"]] == list(range(len(hosts)))
    for each in hosts:
        if each.variables.get("torchrun_node_rank") is not None:
            assert plan["nodes"][each.name]["rank"] == each.variables["torchrun_node_rank"]
    job = plan["job"]
    first = plan["nodes"][plan["order"][0]]
    assert job["master_addr"] == first["address"]
    assert job["nnodes"] == len(hosts)
    assert job["world_size"] == sum(entry["nproc"] for entry in plan["nodes"].values())
    addresses = [entry["address"] for entry in plan["nodes"].values()]
    assert len(set(addresses)) == len(hosts)
    assert plan["peers"]["ipv4"] == addresses
    assert not any(ipaddress.ip_address(address).is_loopback for address in addresses)
    assert len({job["master_port"], job["supervisor_port"], job["verifier_port"]}) == 3
    for entry in plan["nodes"].values():
        words = entry["command"]
        assert f"--node-rank={entry['rank']}" in words
        assert f"--nnodes={len(hosts)}" in words
        assert f"--nproc-per-node={entry['nproc']}" in words
        assert f"--master-addr={first['address']}" in words
        assert entry["environment"]["NODE_RANK"] == str(entry["rank"])
    assert json.loads(json.dumps(plan)) == plan


@given(clusters())
@settings(max_examples=20, deadline=None)
def test_the_plan_depends_on_nothing_but_its_input(hosts):
    first, _problems = planning.make("train", hosts, RELEASE)
    second, _problems = planning.make("train", hosts, RELEASE)
    assert first == second


SPOILS = {
    "one rank": lambda hosts: hosts[0].variables.update(torchrun_node_rank=4711),
    "a negative rank": lambda hosts: [each.variables.update(torchrun_node_rank=number - 1) for number, each in enumerate(hosts)],
    "master name": lambda hosts: [each.variables.update(torchrun_master_addr="gpu01") for each in hosts],
    "master loopback": lambda hosts: [each.variables.update(torchrun_master_addr="127.0.0.1") for each in hosts],
    "master elsewhere": lambda hosts: [each.variables.update(torchrun_master_addr="192.0.2.9") for each in hosts],
    "port too low": lambda hosts: [each.variables.update(torchrun_master_port=22) for each in hosts],
    "ports equal": lambda hosts: [each.variables.update(torchrun_supervisor_port=29600) for each in hosts],
    "ephemeral port": lambda hosts: [each.variables.update(torchrun_master_port=40000) for each in hosts],
    "no processes": lambda hosts: hosts[-1].variables.update(torchrun_nproc_per_node="0"),
    "text processes": lambda hosts: hosts[-1].variables.update(torchrun_nproc_per_node="many"),
    "absent interface": lambda hosts: hosts[-1].variables.update(cluster_interface="nosuch0"),
    "no address": lambda hosts: hosts[-1].node.update(interfaces=[interface("lo", "127.0.0.1/8")]),
    "clock": lambda hosts: hosts[-1].node.update(clock_offset_seconds=-3.0),
    "distribution": lambda hosts: hosts[-1].node["distribution"].update(id="gentoo", version="2", name="Gentoo"),
    "architecture": lambda hosts: hosts[-1].node.update(architecture="ppc64le"),
    "no systemd": lambda hosts: hosts[-1].node.update(systemd=False),
    "no python": lambda hosts: hosts[-1].node["python"].update(version=""),
    "disk": lambda hosts: hosts[-1].node["disk"].update({"/opt/onprem.torch": 1}),
    "absent device": lambda hosts: hosts[-1].variables.update(torchrun_devices="99"),
}


@given(clusters(), st.sets(st.sampled_from(sorted(SPOILS)), min_size=1, max_size=4))
@settings(max_examples=120, deadline=None)
def test_a_spoilt_cluster_always_gives_problems_and_never_an_exception(hosts, spoils):
    for name in sorted(spoils):
        SPOILS[name](hosts)
    plan, problems = planning.make("train", hosts, RELEASE)
    assert problems
    assert sorted(plan["order"]) == sorted(each.name for each in hosts)
    for problem in problems:
        sentence = problem.sentence()
        assert sentence.endswith(".") and "\n" not in sentence
        assert problem.cure and problem.text


@given(clusters(), st.data())
@settings(max_examples=60, deadline=None)
def test_hosts_that_could_not_be_read_do_not_stop_the_others_from_being_planned(hosts, data):
    for each in hosts:
        if data.draw(st.booleans()):
            each.node = {}
    plan, _problems = planning.make("train", hosts, RELEASE)
    assert len(plan["nodes"]) == len(hosts)


def test_the_fingerprint_changes_with_nodes_hardware_and_versions_only():
    def fingerprint(change=lambda hosts: None, **variables):
        hosts = [host(f"n{number}", number, node(number, 2), **variables) for number in (1, 2)]
        change(hosts)
        return planning.make("train", hosts, RELEASE)[0]["fingerprint"]

    usual = fingerprint()
    assert fingerprint(torchrun_args=["--other"]) == usual
    assert fingerprint(torchrun_master_port=29700) == usual
    assert fingerprint(pytorch_version="2.12.0") != usual
    assert fingerprint(lambda hosts: hosts[1].node["hardware"].update(usable_gpus=[gpu(0)])) != usual
    assert fingerprint(lambda hosts: hosts[1].node["interfaces"].__setitem__(1, interface("eth0", "198.18.0.77/16"))) != usual


def test_a_secret_is_kept_where_all_nodes_have_the_same_though_the_job_was_never_started():
    def new(*ids):
        hosts = [host(f"n{number}", number, node(number, secret_ids={"train": known} if known else {})) for number, known in enumerate(ids, 1)]
        return planning.make("train", hosts, RELEASE)[0]["job"]["new_secret"]

    assert not new("a1", "a1")
    assert new("", "") and new("a1", "") and new("a1", "b2")


def test_a_release_follows_what_is_run_and_not_where_it_lies():
    def release(made=RELEASE, **variables):
        return planning.make("train", [host(**variables)], made)[0]["job"]["release"]

    usual = release()
    moved = planning.Release(RELEASE.hash, RELEASE.script, "/elsewhere", RELEASE.programs)
    assert release(moved, torchrun_source="/elsewhere") == usual
    assert release(torchrun_args=["--epochs=3"]) != usual
    assert release(torchrun_environment={"A": "1"}) != usual
    assert release(pytorch_version="2.12.0") != usual
    assert release(planning.Release("00" * 32, RELEASE.script, RELEASE.path, RELEASE.programs)) != usual


def test_processes_follow_gpus_then_devices():
    def count(gpus, **variables):
        return planning.make("train", [host(found=node(1, gpus), **variables)], RELEASE)[0]["job"]["world_size"]

    assert count(0) == 1
    assert count(8) == 8
    assert count(8, torchrun_devices="2,3") == 2
    assert count(8, torchrun_nproc_per_node="4") == 4
    assert count(0, torchrun_nproc_per_node="4") == 4


def test_a_job_on_cpus_uses_no_gpu_of_any_node():
    hosts = [host("n1", 1, node(1, 8), cuda_version="cpu"), host("n2", 2, node(2), cuda_version="cpu")]
    plan, problems = planning.make("train", hosts, RELEASE, MANIFEST)
    assert [problem.sentence() for problem in problems] == []
    assert plan["cuda_version"] == "cpu" and plan["job"]["world_size"] == 2
    assert [entry["pytorch"]["gpus"] for entry in plan["nodes"].values()] == [[], []]
    assert not any(word.startswith("gpus=") for word in plan["nodes"]["n1"]["supervisor_command"])
    assert len(plan["nodes"]["n1"]["hardware"]["gpus"]) == 8 and len(hosts[0].node["hardware"]["usable_gpus"]) == 8


@pytest.mark.parametrize(
    ("gib", "gpus", "torch", "builds", "words"),
    [
        (13, 8, {}, {}, "n1: /opt/onprem.torch has 13.0 GiB free, but 14 GiB are needed for torch"),
        (15, 8, {}, {}, ""),
        (1, 0, {}, {}, "1.0 GiB free, but 2 GiB are needed"),
        # An older torch beside it takes nothing off what a new one needs.
        (13, 8, {"/opt/onprem.torch/environments/old/": "2.11.0+cu130"}, {"/opt/onprem.torch/environments/old/": {"cuda": "13.0"}}, "14 GiB"),
        # The same one for another CUDA neither.
        (13, 8, {"/opt/onprem.torch/environments/old/": "2.13.0+cu129"}, {"/opt/onprem.torch/environments/old/": {"cuda": "12.9"}}, "14 GiB"),
        # The same one shares its files with the new environment.
        (13, 8, {"/opt/onprem.torch/environments/old/": "2.13.0+cu130"}, {"/opt/onprem.torch/environments/old/": {"cuda": "13.0"}}, ""),
        # Somebody else's does not.
        (13, 8, {"/srv/env": "2.13.0+cu130"}, {"/srv/env": {"cuda": "13.0"}}, "14 GiB"),
        (1, 8, {"{environment}/": "2.13.0+cu130"}, {"{environment}/": {"cuda": "13.0"}}, ""),
    ],
)
def test_room_for_the_environment_that_is_to_be_built(gib, gpus, torch, builds, words):
    each = host("n1", 1, node(1, gpus))
    each.node["hardware"]["driver"] = {"loaded": "580.105.08", "version": "580.105.08"}
    folder = planning.make("train", [each], RELEASE, MANIFEST)[0]["nodes"]["n1"]["pytorch"]["environment"]
    each.node["torch"] = {path.format(environment=folder): version for path, version in torch.items()}
    each.node["torch_builds"] = {path.format(environment=folder): build for path, build in builds.items()}
    each.node["disk"]["/opt/onprem.torch"] = gib * GIB
    problems = [problem.sentence() for problem in planning.make("train", [each], RELEASE, MANIFEST)[1]]
    assert len(problems) == bool(words) and all(words in problem for problem in problems), problems


def test_a_bare_node_cannot_tell_whose_uuid_is_named():
    each = host("n1", 1, node(1, 2), torchrun_devices="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert any("names GPU GPU-8932f937" in problem.text for problem in planning.make("train", [each], RELEASE, MANIFEST)[1])
    for gpu_found in each.node["hardware"]["usable_gpus"]:
        gpu_found["uuid"] = ""
    assert planning.make("train", [each], RELEASE, MANIFEST)[1] == []
