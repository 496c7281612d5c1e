"""The job's ports: in range, each its own, and free on rank 0."""

from __future__ import annotations

import builders
from ansible_collections.onprem.torch.plugins.module_utils import ports
from builders import node
from hypothesis import given
from hypothesis import strategies as st

GOOD = {ports.MASTER: 29500, ports.SUPERVISOR: 29501, ports.VERIFIER: 29600}
OWN = {"torchrun-train.service"}


def socket(port, unit="", command="python3", pid=4711):
    return {"address": "0.0.0.0", "port": port, "pid": pid, "command": command, "unit": unit}


def test_the_defaults_are_fine():
    assert ports.check(GOOD, "n1", node(), OWN) == []


def test_the_jobs_own_unit_does_not_take_its_own_port():
    busy = node(listening=[socket(29500, "torchrun-train.service"), socket(29501, "torchrun-train.service")])
    assert ports.check(GOOD, "n1", busy, OWN) == []


def test_a_port_held_twice_by_one_process_is_one_problem():
    busy = node(listening=[socket(29500), {**socket(29500), "address": "::"}])
    assert len(ports.check(GOOD, "n1", busy, OWN)) == 1


def test_a_node_that_could_not_be_read_leaves_the_range_check():
    assert ports.check(GOOD, "n1", {}, OWN) == []
    assert len(ports.check({**GOOD, ports.MASTER: 80}, "n1", {}, OWN)) == 1


@given(st.integers(-10, 70000), st.integers(-10, 70000), st.integers(-10, 70000))
def test_ports_are_accepted_exactly_when_they_can_be_used(master, supervisor, verifier):
    problems = ports.check({ports.MASTER: master, ports.SUPERVISOR: supervisor, ports.VERIFIER: verifier}, "n1", node(), OWN)
    numbers = [master, supervisor, verifier]
    usable = all(1024 <= number <= 65535 and not 32768 <= number <= 60999 for number in numbers) and len(set(numbers)) == 3
    assert bool(problems) != usable


def beside(job="other", active=True, master=29500, supervisor=29501):
    return {"job": job, "unit": f"torchrun-{job}.service", "active": active, "devices": "", "master_port": master,
            "supervisor_port": supervisor}


def test_a_job_beside_keeps_its_ports_though_it_does_not_listen_now():
    here = builders.host("n1", found=node(jobs=[beside(master=29501, supervisor=29510)]))
    (problem,) = ports.reserved(GOOD, [here], "train")
    assert problem.sentence() == (
        "n1: torchrun_supervisor_port is 29501, which is torchrun_master_port of the job 'other' on this node; "
        "give each job ports of its own, such as 29510 and 29511."
    )


def test_itself_and_a_job_that_does_not_run_keep_no_port():
    assert ports.reserved(GOOD, [builders.host("n1", found=node(jobs=[beside("train"), beside(active=False)]))], "train") == []


def test_a_clash_on_several_nodes_is_told_once():
    hosts = [builders.host(f"n{i}", found=node(i, jobs=[beside()])) for i in (1, 2, 3)]
    assert [problem.host for problem in ports.reserved(GOOD, hosts, "train")] == ["n1", "n1"]
