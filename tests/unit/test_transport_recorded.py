"""The transport parser on what NCCL 2.28.9 printed on two H100 SXM, recorded by make gpu."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

from ansible_collections.onprem.torch.plugins.module_utils import bandwidth, transport

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/unit/fixtures/nccl"


def lines(*names):
    return [line for name in names for line in (FIXTURES / f"{name}.log").read_text().splitlines()]


def test_two_nodes_reach_each_other_by_sockets():
    found = transport.parse(lines("h100-two-nodes-socket-rank0", "h100-two-nodes-socket-rank1"))
    assert found.version == "2.28.9"
    assert found.network == "Socket"
    assert found.interfaces == ["host0"]
    assert found.pairs == {(0, 1): {"Socket"}, (1, 0): {"Socket"}}
    assert transport.fell_back(found, {0: "gpu1", 1: "gpu2"}, set()) == ""


def test_two_gpus_of_one_node_reach_each_other_by_nvlink():
    found = transport.parse(lines("h100-one-node-nvlink"))
    assert found.version == "2.28.9"
    assert found.pairs == {(0, 1): {"P2P"}, (1, 0): {"P2P"}}
    assert found.kinds() == {"P2P": 2}


def test_the_derived_figure_is_the_one_that_nccl_itself_works_with():
    told = {float(value) for line in lines("h100-one-node-nvlink") for value in re.findall(r"\(\d/([\d.]+)/NVL\)", line)}
    first, last, each = next(entry for entry in bandwidth.NVLINK_GBYTES_PER_SECOND if entry[0] <= 90 <= entry[1])
    assert first == 90 and last == 99 and told == {round(18 * each, 1)}


def test_what_make_gpu_reads_from_the_logs():
    facts = {}
    for rank in (0, 1):
        text = "\n".join(lines(f"h100-two-nodes-socket-rank{rank}"))
        facts[rank] = nccl_facts(text)
        assert facts[rank]["nNodes"] == "2" and facts[rank]["ranks"] == str(rank)
        assert facts[rank]["transports"] == "NET/Socket/0"
    assert {facts[rank]["GPUs"] for rank in facts} == {"60", "70"}


def nccl_facts(text):
    spec = importlib.util.spec_from_file_location("nccl_log", ROOT / "tests/gpu/nccl_log.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nccl_log"] = module
    spec.loader.exec_module(module)
    return module.facts(text)
