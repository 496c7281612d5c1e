# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every fault once on eight booted nodes: it is named, and no healthy node is accused. Run as root: pytest tests/verify"""
from __future__ import annotations

import re
import threading
import time

import pytest
from lab import PYTHON_PACKAGES


def explained(found):
    return f"{found.report.get('headline')}\n{found.report.get('failures')}\n{found.report.get('culprits')}\n{found.text[-5000:]}"


def others(found, *guilty):
    """Healthy nodes that a failure or culprit accuses: the first name of each sentence is the accused one."""
    accused = {entry["host"] for entry in found.report["culprits"]} | {entry["peer"] for entry in found.report["culprits"] if entry["peer"]}
    return accused - set(guilty)


def test_healthy_nodes_pass_with_fewer_forks_than_nodes(verify, tmp_path):
    found = verify("--forks=2", store=tmp_path)
    assert found.report.get("verdict") == "pass", explained(found)
    assert found.culprits == [] and found.report["failures"] == []
    assert not re.search(r"changed=[1-9]", found.recap)
    assert found.report["tournament"]["rounds"] == 7
    assert len(found.report["pairs"]) == 8 * 7
    assert all(row["in_place"]["nwrong"] == 0 for row in found.report["nccl_tests"]["results"])
    assert len(found.screen()) <= 24
    assert "host0 reports no speed" in found.text, "a virtual adapter's speed is unknown, and that is said"
    assert found.page.count("<svg") == 2
    again = verify("-e", "nccl_verify_when=auto", store=tmp_path)
    assert "with the same nodes, hardware and versions: pass" in again.text and "Start the measurement" not in again.text


def test_unknown_hardware_warns_and_does_not_block(verify):
    found = verify("-e", "nccl_verify_pairwise=never", minimum=None)
    assert found.report.get("verdict") == "warn", explained(found)
    assert "failed=0" in found.recap and "failed=1" not in found.recap
    assert found.report["pairs"] == []


def test_a_slow_node_is_named(verify, lab):
    lab.nodes[4].limit()
    found = verify()
    assert found.report.get("verdict") == "fail", explained(found)
    assert found.culprits == [("node", "verify5", None)], explained(found)
    assert "verify5" in found.screen()[0] + found.screen()[1]


@pytest.mark.matrix
def test_two_slow_nodes_at_once_are_named(verify, lab):
    lab.nodes[0].limit()
    lab.nodes[6].limit()
    found = verify()
    assert found.culprits == [("node", "verify1", None), ("node", "verify7", None)], explained(found)


def test_a_slow_pair_is_named_and_neither_end_as_a_whole(verify, lab):
    lab.nodes[1].limit_to(lab.nodes[5])
    lab.nodes[5].limit_to(lab.nodes[1])
    found = verify("-e", "nccl_verify_pairwise=always")
    assert [entry[0] for entry in found.culprits] == ["link"], explained(found)
    assert {found.culprits[0][1], found.culprits[0][2]} == {"verify2", "verify6"}


def test_a_node_that_drops_packets_to_one_port_is_named(verify, lab):
    lab.nodes[2].drop(29600)
    found = verify()
    assert found.report.get("verdict") == "fail", explained(found)
    assert len(found.report["failures"]) == 1, explained(found)
    assert found.report["failures"][0].startswith("verify3 drops TCP from all other nodes to port 29600"), explained(found)


def test_a_node_with_another_torch_is_named(verify, lab):
    lab.nodes[3].shell(f"cd {PYTHON_PACKAGES}/torch-*/ && cp METADATA METADATA.kept && sed -i 's/^Version: .*/Version: 2.5.1/' METADATA")
    found = verify()
    assert len(found.report.get("failures", [])) == 1, explained(found)
    assert found.report["failures"][0].startswith("verify4 has torch 2.5.1, the others have 2."), explained(found)


def test_a_node_that_cannot_run_it_is_named_before_anything_is_launched(verify, lab):
    lab.nodes[7].shell(f"mount -t tmpfs none {PYTHON_PACKAGES}/torch")
    found = verify()
    assert "verify8: pytorch_environment is /opt/torch, in which there is no torch" in " ".join(found.text.split()), found.text
    assert "nccl_verify : Prepare" not in found.text
    lab.nodes[7].heal()
    # With folders of its own, since those of the job are another user's.
    found = verify("-e", "torchrun_user=somebody", "-e", "torchrun_root=/var/lib/elsewhere", "-e", "torchrun_log_root=/var/log/elsewhere")
    for number in range(1, 9):
        assert f"verify{number}: there is no user somebody, which the job runs as; provision the nodes first" in found.text
    assert "nothing was launched" in found.text and "Start the measurement" not in found.text and found.report == {}


def test_bad_values_are_all_named_at_once_before_anything_is_launched(verify):
    found = verify("-e", "nccl_verify_dtype=float33", "-e", "nccl_verify_size_min=many", "-e", "nccl_verify_backend=nccl",
                   "-e", "nccl_verify_interface=eth7", minimum="quick")
    everywhere = ", ".join(f"verify{number}" for number in range(1, 9))
    for sentence in ("nccl_verify_dtype is 'float33', but one of float64, float32",
                     "nccl_verify_size_min is 'many', which is no size; write bytes such as 8",
                     f"{everywhere}: nccl_verify_backend is nccl, but the node has no usable GPU",
                     f"{everywhere}: nccl_verify_interface is 'eth7', but the node's interfaces are host0",
                     "nccl_verify_minimum_gbytes_per_second is 'quick', but auto or a positive number of GB/s was expected"):
        assert sentence in " ".join(found.text.split()), f"{sentence}\n{found.text}"
    assert "nccl_verify : Prepare" not in found.text


def test_a_running_job_is_not_disturbed(verify, lab):
    lab.nodes[1].shell("printf '[Service]\\nExecStart=/bin/sleep 600\\n[X-OnpremTorch]\\nJob=other\\nMasterPort=29700\\nSupervisorPort=29701\\n' "
                       ">/etc/systemd/system/torchrun-other.service; systemctl daemon-reload; systemctl start torchrun-other.service")
    found = verify()
    assert "the job other runs on verify2" in found.text and "Start the measurement" not in found.text
    assert "failed=1" in found.recap
    found = verify("-e", "nccl_verify_when=auto")
    assert "not verified, since the job other runs on verify2" in " ".join(found.text.split())
    assert "failed=1" not in found.recap


def test_a_node_that_loses_power_during_the_run_and_stays_off(verify, lab):
    found = []
    thread = threading.Thread(target=lambda: found.append(verify("-e", "nccl_verify_iterations=1000", "-e", "nccl_verify_pairwise=always")))
    thread.start()
    node = lab.nodes[5]
    deadline = time.monotonic() + 120
    # Once workers have left a note of their first all-reduce, the measurement runs.
    while "all-reduce of" not in node.shell("cat /run/nccl-verify/result/stage-* 2>/dev/null", check=False):
        assert time.monotonic() < deadline and thread.is_alive(), "the measurement did not start"
        time.sleep(0.1)
    node.power_off()
    thread.join()
    during = found[0]
    assert during.report.get("verdict") == "fail", explained(during)
    assert len(during.report["failures"]) == 1, explained(during)
    assert during.report["failures"][0].startswith("verify6 went away during the measurement"), explained(during)
    assert not others(during), explained(during)
    before = verify()
    assert re.search(r"verify6: cannot be reached by SSH at 198\.18\.40\.16", before.text), before.text
    assert "1 problem found" in before.text and "Start the measurement" not in before.text


def test_an_interrupted_play_leaves_nothing_in_the_way_of_the_next(verify, lab):
    lab.nodes[0].shell("mkdir -p /run/nccl-verify; echo rubbish >/run/nccl-verify/result.json; "
                       "systemd-run --quiet --unit=nccl-verify.service sleep 300")
    found = verify("-e", "nccl_verify_pairwise=never")
    assert found.report.get("verdict") == "pass", explained(found)
