"""The earliest cause across nodes, from recorded lines of kernels, torchrun and the supervisors."""

from __future__ import annotations

import json

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import job_causes, job_evidence, journal
from supervisor_support import load

torchrun_supervisor = load()

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


# -- which lines of a kernel are events

TRUE = [
    ("xid", "NVRM: Xid (PCI:0000:65:00): 79, pid=1234, name=python3, GPU has fallen off the bus."),
    ("xid", "NVRM: Xid (PCI:0000:3b:00): 13, pid='<unknown>', name=<unknown>, Graphics Exception: ESR 0x404490=0x80000001"),
    ("xid", "NVRM: Xid (PCI:0009:01:00 GPU-I:05): 43, pid=7, name=a[1]: b, Ch 00000008"),
    ("xid", "NVRM: Xid (0000:06:00): 31, Ch 0000007e, engmask 00000111, intr 10000000"),
    ("memory limit", "Memory cgroup out of memory: Killed process 4242 (python3) total-vm:1kB, anon-rss:1kB"),
    ("out of memory", "Out of memory: Killed process 4242 (x[1]: segfault) total-vm:1kB, anon-rss:1kB"),
    ("out of memory", "Out of memory (oom_kill_allocating_task): Killed process 4242 (python3) total-vm:1kB"),
    ("disk", "I/O error, dev nvme0n1, sector 2048 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 2"),
    ("disk", "blk_update_request: I/O error, dev sda, sector 2048 op 0x0:(READ) flags 0x0"),
    ("disk", "print_req_error: I/O error, dev sda, sector 2048"),
    ("disk", "Buffer I/O error on dev sda1, logical block 0, async page read"),
    ("disk", "Buffer I/O error on device sda1, logical block 17"),
    ("disk", "EXT4-fs error (device sda1): ext4_find_entry:1455: inode #2: comm python3: reading directory lblock 0"),
    ("disk", "EXT4-fs error (device dm-0) in ext4_reserve_inode_write:5764: Journal has aborted"),
    ("disk", "JBD2: I/O error when updating journal superblock for sda1-8."),
    ("disk", "lost page write due to I/O error on sda1"),
    ("disk", "EXT4-fs (sda1): Remounting filesystem read-only"),
    ("disk", "EXT4-fs (sda1): I/O error while writing superblock"),
    ("disk", "EXT4-fs warning (device sda1): ext4_end_bio:343: I/O error 10 writing to inode 12 starting block 7"),
    ("disk", "XFS (nvme0n1p1): metadata I/O error in \"xfs_da_read_buf\" at daddr 0x8 len 8 error 5"),
    ("disk", "XFS (sda1): log I/O error -5"),
    ("disk", "XFS (sda1): Corruption of in-memory data detected.  Shutting down filesystem"),
    ("disk", "XFS (sda1): Metadata corruption detected at xfs_inode_buf_verify+0x14d/0x160 [xfs]"),
    ("disk", "XFS (sda1): xfs_do_force_shutdown(0x2) called from line 1200 of file fs/xfs/xfs_log.c. Return address = 0x1"),
    ("disk", "nvme nvme0: I/O 12 QID 3 timeout, aborting"),
    ("disk", "nvme nvme0: controller is down; will reset: CSTS=0xffffffff, PCI_STATUS=0xffff"),
    ("disk", "nvme 0000:01:00.0: I/O 12 QID 3 timeout, aborting"),
    ("network", "mlx5_core 0000:65:00.0 ens1f0np0: Link down"),
    ("network", "mlx5_core 0000:65:00.0: mlx5_0: port 1 link down"),
    ("network", "mlx4_en: eth0: Link Down"),
    ("network", "igb 0000:01:00.0 eno1: igb: eno1 NIC Link is Down"),
    ("network", "e1000e: eth0 NIC Link is Down"),
    ("network", "bnxt_en 0000:18:00.0 eno1np0: NIC Link is Down"),
    ("network", "bnx2x 0000:02:00.0 eth0: NIC Link is Down"),
    ("network", "bnx2x: [bnx2x_link_report:1180(eth0)]NIC Link is Down"),
    ("network", "tg3 0000:02:00.0 eth0: Link is down"),
    ("network", "r8169 0000:03:00.0: eth0: link down"),
    ("network", "macb 4a000000.ethernet eth0: Link is Down"),
    ("network", "qede 0000:05:00.0: [qed_link_update:650(eth0)]Link is down"),
    ("network", "NETDEV WATCHDOG: eth0 (mlx5_core): transmit queue 3 timed out"),
    ("network", "ixgbe 0000:01:00.0 eth0: NETDEV WATCHDOG: CPU: 3: transmit queue 1 timed out 5004 ms"),
    ("machine check", "mce: [Hardware Error]: Machine check events logged"),
    ("machine check", "mce: [Hardware Error]: CPU 3: Machine Check: 0 Bank 5: bea0000000000108"),
    ("machine check", "{1}[Hardware Error]: event severity: recoverable"),
    ("machine check", "[Hardware Error]: Corrected error, no action required."),
    ("machine check", "Machine check events logged"),
]
# What the kernel says about any process: NAME is at most 15 bytes, FILE and PATH are names of files.
ABOUT_PROCESSES = [
    "NAME[4711]: segfault at 0 ip 00007f1 sp 00007ff error 4 in FILE[7f0000000000+1000] likely on CPU 1 (core 1, socket 0)",
    "NAME[4711] general protection fault ip:7f1 sp:7ff error:0 in FILE[7f0000000000+1000]",
    "NAME[4711] trap invalid opcode ip:7f1 sp:7ff error:0 in FILE[7f0000000000+1000]",
    "traps: NAME[4711] general protection fault ip:7f1 sp:7ff error:0 in FILE[7f0000000000+1000]",
    "traps: NAME[4711] trap divide error ip:7f1 sp:7ff error:0 in FILE[7f0000000000+1000]",
    "NAME[4711] vsyscall attempted with vsyscall=none ip:7f1 cs:33 sp:7ff ax:0 si:0 di:0",
    "NAME[4711]: bad frame in rt_sigreturn frame:00007f1 ip:7f1 sp:7ff orax:0 in FILE[7f0000000000+1000]",
    "NAME invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
    "NAME: page allocation failure: order:5, mode:0x40dc0(GFP_KERNEL|__GFP_COMP|__GFP_ZERO), nodemask=(null)",
    "NAME: potentially unexpected fatal signal 11.",
    "CPU: 3 PID: 4711 Comm: NAME Not tainted 6.1.0-30-amd64 #1  Debian 6.1.124-1",
    "INFO: task NAME:4711 blocked for more than 120 seconds.",
    "x86/split lock detection: #AC: NAME/4711 took a split_lock trap at address: 0x7f1",
    "umip: NAME[4711] ip:7f1 sp:7ff: SGDT instruction cannot be used by applications.",
    "mmap: NAME (4711): VmData 1 exceed data ulimit 0. Update limits or use boot option ignore_rlimit_data.",
    "process 'PATH' started with executable stack",
    "coredump: 4711(NAME): over core_pipe_limit, skipping core dump",
    "audit: type=1701 audit(1796074649.918:7): auid=1000 uid=1000 pid=4711 comm=\"NAME\" exe=\"PATH\" sig=11 res=1",
]
SMALLEST = ["a: b link down", "a b link is down", "a: link is down", "nvme a: timeout", "nvme nvme0: I/O", "XFS (a)shutdown", "XFS (a): I/O err",
            "NVRM: Xid (): 7", "NVRM: Xid", "link is down", "[Hardware Error]", "{1}[Hardware Er", "a 0000:00:00.0 ", "NETDEV WATCHDOG",
            "I/O error, dev ", "JBD2: I/O error", "x\rNVRM: Xid (0"]
PARTS = {text[start : start + 15] for _kind, text in TRUE for start in range(len(text))}
NAMES = sorted(PARTS | {name[:15] for name in SMALLEST})


def line(text):
    return f"1700000098.500000 n3 kernel: {text}"


@pytest.mark.parametrize(("kind", "text"), TRUE)
def test_a_kernel_tells_of_an_event(kind, text):
    assert [(event["kind"], event["time"]) for event in job_evidence.kernel_events(line(text))] == [(kind, 1700000098.5)]
    assert bool(torchrun_supervisor.XID.match(text)) == (kind == "xid")


@pytest.mark.parametrize("form", ABOUT_PROCESSES)
def test_no_name_of_a_process_or_file_is_an_event(form):
    files = ["libc.so.6", *(text for _kind, text in TRUE), *(f"\n{line(text)}" for _kind, text in TRUE[:1])]
    for number, file in enumerate(files if "FILE" in form or "PATH" in form else files[:1]):
        # journalctl indents the further lines of a message.
        shown = file.replace("\n", "\n" + " " * 20)
        about = form.replace("FILE", shown.replace("/", "_")).replace("PATH", f"/tmp/{shown}")
        names = [*NAMES[number % 9 :: 9], *(name[:15] for name in SMALLEST)] if number else NAMES
        texts = [about.replace("NAME", name) for name in names]
        assert job_evidence.kernel_events("\n".join(map(line, texts))) == []
        assert not [text for text in texts if torchrun_supervisor.XID.match(text)]


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x85", "\u2028"])
def test_only_the_journal_ends_a_line(end):
    assert job_evidence.kernel_events(line(f"a{end}{XID}")) == []
    assert job_evidence.kernel_events(XID.replace(" kernel: ", " systemd[1]: ")) == []
