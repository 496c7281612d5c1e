"""Findings of the checks before the measurement: the right host is named."""

from ansible_collections.onprem.torch.plugins.module_utils import preflight, symptoms, transport

ORDER = ["a", "b", "c"]


def report(host, **changes):
    peers = [name for name in ORDER if name != host]
    found = {
        "facts": {"interface": "eth0", "interface_address": "198.18.0.1", "memlock_bytes": -1, "shm_free_bytes": 2**31},
        "versions": {"torch": "2.13.0", "nccl": "2.28.9", "python": "3.11.2"},
        "nccl_environment": {},
        "connections": [
            {"peer": peer, "port_kind": kind, "port": 29600, "result": "ok"} for peer in peers for kind in ("verifier", "ephemeral")
        ],
        "clock_offsets": {peer: 0.0 for peer in peers},
        "problems": [],
    }
    found.update(changes)
    return found


def healthy():
    return {host: report(host) for host in ORDER}


def failed(found):
    return [(entry["check"], entry["host"]) for entry in found if entry["status"] == "fail"]


def test_healthy_nodes_have_no_findings():
    assert preflight.judge(ORDER, healthy(), "nccl", rdma=ORDER, nvswitch=ORDER) == []


def test_a_node_that_never_arrived_is_listed_and_its_peers_failures_are_not():
    reports = healthy()
    del reports["b"]
    for host in "ac":
        for entry in reports[host]["connections"]:
            if entry["peer"] == "b":
                entry["result"] = "unreachable"
    found = preflight.judge(ORDER, reports, "gloo")
    assert failed(found) == [("arrival", "b")]


def test_a_port_that_all_miss_is_one_sentence():
    reports = healthy()
    for host in "ac":
        for entry in reports[host]["connections"]:
            if entry["peer"] == "b" and entry["port_kind"] == "ephemeral":
                entry["result"] = "dropped"
    found = preflight.judge(ORDER, reports, "gloo")
    assert failed(found) == [("tcp", "b")]
    assert found[0]["sentence"].startswith("b drops TCP from all other nodes to port 29600 (an ephemeral port)")


def test_one_direction_of_one_pair():
    reports = healthy()
    reports["a"]["connections"][0]["result"] = "refused"
    found = preflight.judge(ORDER, reports, "gloo")
    assert failed(found) == [("tcp", "b")] and found[0]["peer"] == "a"
    assert found[0]["sentence"].startswith("b refuses TCP from 198.18.0.1 (a) to port 29600 (nccl_verify_port) though it listens")


def test_the_odd_version_is_named():
    reports = healthy()
    reports["c"]["versions"]["torch"] = "2.12.0"
    found = preflight.judge(ORDER, reports, "gloo")
    assert failed(found) == [("torch", "c")]
    assert "c has torch 2.12.0, the others have 2.13.0" in found[0]["sentence"]


def test_an_odd_environment_warns():
    reports = healthy()
    reports["b"]["nccl_environment"] = {"NCCL_IB_DISABLE": "1"}
    found = preflight.judge(ORDER, reports, "nccl")
    assert [(entry["status"], entry["host"]) for entry in found] == [("warn", "b")]


def test_memlock_matters_where_rdma_is():
    reports = healthy()
    reports["a"]["facts"]["memlock_bytes"] = 8 << 20
    assert failed(preflight.judge(ORDER, reports, "nccl", rdma=ORDER)) == [("memlock", "a")]
    assert failed(preflight.judge(ORDER, reports, "nccl")) == []
    assert preflight.judge(ORDER, reports, "gloo") == []


def test_a_stopped_fabric_manager():
    reports = healthy()
    reports["a"]["facts"]["fabric_manager"] = "failed"
    assert failed(preflight.judge(ORDER, reports, "nccl", nvswitch=["a"])) == [("fabric_manager", "a")]


def test_a_clock_that_is_off_is_named_and_the_others_are_not():
    reports = healthy()
    reports["a"]["clock_offsets"]["b"] = reports["c"]["clock_offsets"]["b"] = 60.0
    reports["b"]["clock_offsets"] = {"a": -60.0, "c": -60.0}
    found = preflight.judge(ORDER, reports, "gloo")
    assert [(entry["check"], entry["host"]) for entry in found] == [("clock", "b")]


def test_known_texts_become_sentences():
    log = "x\n[rank1]: RuntimeError: ... Connection closed by peer [198.18.0.9]:37117\n"
    assert [entry["name"] for entry in symptoms.recognise([log])] == ["peer_gone"]
    log = "NCCL WARN Call to ibv_reg_mr failed with error Cannot allocate memory"
    assert symptoms.recognise([log])[0]["name"] == "memlock"
    log = "RuntimeError: The server socket has failed to listen on any local network address. port: 29600, code: -98, name: EADDRINUSE"
    assert symptoms.recognise([log])[0]["name"] == "port_in_use"
    assert symptoms.recognise(["all is well"]) == []
    assert all(len(entry.sentence.splitlines()) == 1 for entry in symptoms.SYMPTOMS)


LOG = """\
host:10:10 [0] NCCL INFO Bootstrap: Using eth0:198.18.0.1<0>
host:10:10 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:198.18.0.1<0>
host:10:10 [0] NCCL INFO Using network IB
NCCL version 2.28.9+cuda12.8
host:10:10 [0] NCCL INFO NVLS multicast support is available on dev 0
host:10:10 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
host:10:10 [0] NCCL INFO Channel 01/0 : 1[1] -> 2[0] [send] via NET/IB/0/GDRDMA
host:10:10 [0] NCCL INFO Channel 01/0 : 3[1] -> 0[0] [receive] via NET/Socket/0
host:10:10 [0] NCCL INFO Channel 00 : 2[0] -> 3[1] via SHM/direct/direct
"""


def test_transports_are_read():
    found = transport.parse(LOG.splitlines())
    assert found.version == "2.28.9" and found.network == "IB" and found.nvls is True
    assert found.interfaces == ["mlx5_0", "mlx5_1"] and found.bootstrap == "eth0"
    assert found.pairs == {(0, 1): {"P2P"}, (1, 2): {"IB/GDRDMA"}, (3, 0): {"Socket"}, (2, 3): {"SHM"}}


def test_a_silent_fall_back_is_told():
    found = transport.parse(LOG.splitlines())
    nodes = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert "between b and a" in transport.fell_back(found, nodes, {"a", "b"})
    assert transport.fell_back(found, nodes, {"a"}) == ""
