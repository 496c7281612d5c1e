"""The earliest cause across nodes, from recorded lines of kernels, torchrun and the supervisors."""

from __future__ import annotations

import json

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import job_causes, job_evidence, journal

OOM = "1700000099.100000 n2 kernel: Out of memory: Killed process 4242 (python3) total-vm:1kB, anon-rss:1kB"
XID = "1700000098.500000 n3 kernel: NVRM: Xid (PCI:0000:65:00): 79, pid=1234, name=python3, GPU has fallen off the bus."
OTHER = "1700000000.000000 n2 kernel: usb 1-1: new high-speed USB device"


def cause(**changes):
    told = {"host": "n2", "node_rank": 1, "rank": 1, "local_rank": 0, "reason": "signal", "signal": "SIGKILL", "error": None,
            "generation": 3, "time": 1700000100.0, "text": "n2, rank 1 (local rank 0): killed by SIGKILL"}
    return {**told, **changes}


def info(told=None, kernel="", errors=(), room=(), **state):
    found = {"state": "waiting", "text": "generation 4 runs", "generation": 3, "first_cause": told, **state}
    return {"state": found, "evidence": {"kernel": job_evidence.kernel_events(kernel), "errors": list(errors), "room": list(room)}}


def test_a_kernel_that_killed_for_memory_explains_the_signal():
    found = job_causes.explain({"n1": info(cause()), "n2": info(cause(), f"{OTHER}\n{OOM}")})
    assert found["sentence"].startswith("first on n2: the kernel ended a process because the node's memory was used up: Out of memory")
    assert found["meaning"] == [job_causes.CURES["out of memory"]]


def test_a_limit_of_memory_is_named_and_told_from_a_node_that_is_full():
    line = OOM.replace("Out of memory", "Memory cgroup out of memory")
    found = job_causes.explain({"n2": info(cause(), line)})
    assert found["sentence"].startswith("first on n2: the kernel ended a process because a limit of memory was reached: Memory cgroup")
    assert found["meaning"][0] == job_causes.CURES["memory limit"]
    text = "n2: the kernel killed 1 process(es) of the job for memory, of which the unit may use 0.50 GiB (torchrun_memory_max)"
    for kernel in (line, ""):
        found = job_causes.explain({"n2": info(cause(reason="out of memory", text=text), kernel)})
        assert found["sentence"] == f"first on {text}"
        assert found["meaning"] == [job_causes.CURES["memory limit"]]


def test_a_gpu_fault_on_another_node_just_before_is_the_cause():
    told = cause(reason="hang", text="n2: hang: no output")
    found = job_causes.explain({"n2": info(told), "n3": info(told, XID)})
    assert found["cause"]["host"] == "n3"
    assert "Xid" in found["sentence"]


def test_what_a_worker_says_itself_is_not_explained_away():
    told = cause(reason="error", error="ValueError: bad", text="n2, rank 1 (local rank 0): exit code 1: ValueError: bad")
    found = job_causes.explain({"n2": info(told), "n3": info(told, XID)})
    assert found["sentence"] == "first on n2, rank 1 (local rank 0): exit code 1: ValueError: bad"
    assert any(entry["kind"] == "xid" for entry in found["evidence"]), "it is shown beside it"


def test_what_happened_long_before_is_no_evidence():
    found = job_causes.explain({"n2": info(cause(), OOM.replace("1700000099", "1700000001"))})
    assert found["sentence"] == "first on n2, rank 1 (local rank 0): killed by SIGKILL"


def test_without_an_early_end_the_state_is_told():
    found = job_causes.explain({"n1": info(), "n2": {"error": "no route"}})
    assert found["sentence"] == "nothing has ended the job early: generation 4 runs"
    assert any("n2" in line and "no route" in line for line in job_causes.lines("train", found))
    assert "no supervisor" in job_causes.explain({})["sentence"]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"path": "/c", "free_bytes": 4096, "free_inodes": 5, "read_only": False}, "/c has 4 KiB free"),
        ({"path": "/c", "free_bytes": 1 << 30, "free_inodes": 0, "read_only": False}, "/c has no inode left"),
        ({"path": "/c", "free_bytes": 1 << 30, "free_inodes": 5, "read_only": True}, "/c is mounted read-only"),
    ],
)
def test_full_disks_are_evidence(place, text):
    found = job_causes.explain({"n1": info(cause(), room=[place])})
    assert found["evidence"][-1]["text"] == text


def test_a_full_disk_is_explained():
    told = cause(reason="error", text="n4, rank 3 (local rank 0): exit code 1: OSError: [Errno 28] No space left on device")
    assert job_causes.explain({"n1": info(told)})["meaning"] == [job_causes.CURES["full"]]


def test_reports_of_workers_are_found_and_those_of_an_ordered_end_are_not(tmp_path):
    for rank, message in (("0", "SignalException: told to end"), ("1", "ValueError:\n bad sample")):
        folder = tmp_path / "none_x1" / "attempt_0" / rank
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "5"}}}))
    (tmp_path / "none_x1" / "attempt_0" / "0" / "stdout.log").write_text("")
    (report,) = job_evidence.error_files(str(tmp_path))
    assert (report["text"], report["local_rank"]) == ("ValueError: bad sample", 1)
    (tmp_path / "none_x1" / "attempt_0" / "1" / "error.json").write_text("{broken")
    assert job_evidence.error_files(str(tmp_path)) == []


def test_the_last_step_and_its_time():
    lines = [journal.Line(5.1, "n1", "[rank 0] step 1"), journal.Line(6.2, "n1", "[rank 0] step 2 "), journal.Line(7.0, "n1", "saved")]
    assert job_evidence.last_step(lines, r"step \d") == ("[rank 0] step 2", 6.2)
    assert job_evidence.last_step(lines, "") == ("", None)
    assert job_evidence.last_step([], r"step") == ("", None)


def test_processes_that_hold_gpu_memory():
    rows = "GPU-1, 77, /usr/bin/python3, 1024 MiB\nGPU-1, 78, [Not Found], [N/A]\nNo devices were found\n"
    found = job_evidence.gpu_processes(rows, lambda pid: "torchrun-train.service" if pid == 77 else "")
    assert found == [
        {"gpu": "GPU-1", "pid": 77, "name": "python3", "unit": "torchrun-train.service", "used_mib": 1024},
        {"gpu": "GPU-1", "pid": 78, "name": "[Not Found]", "unit": "", "used_mib": None},
    ]
