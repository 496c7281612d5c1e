"""The job on a node, as its user and its administrator see it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

UNIT = "torchrun-train.service"


def show(host, *names: str) -> dict[str, str]:
    """Return properties of the unit."""
    words = " ".join(f"--property={name}" for name in names)
    output = host.check_output(f"systemctl show {words} {UNIT}")
    return dict(line.split("=", 1) for line in output.splitlines())


def test_ranks_are_distinct_and_contiguous(plan):
    ranks = [plan["nodes"][name]["rank"] for name in plan["order"]]
    assert ranks == list(range(len(plan["nodes"]))) and len(ranks) >= 2


def test_unit_holds_the_command_that_one_would_type(host, node, plan):
    job = plan["job"]
    text = host.file(f"/etc/systemd/system/{UNIT}").content_string
    command = re.search(r" -- \\\n\s+(.*)\n", text).group(1)
    # The distribution's torch may have been built without libuv (Debian 13), which torch.distributed.run takes for granted.
    launcher = ["/var/lib/torchrun/train/current/torchrun_without_libuv.py"]
    assert shlex.split(command) == [
        node["python"],
        *(launcher if node["pytorch"]["environment"] == "/usr" else ["-m", "torch.distributed.run"]),
        f"--nnodes={len(plan['nodes'])}",
        f"--node-rank={node['rank']}",
        f"--nproc-per-node={node['nproc']}",
        f"--master-addr={plan['nodes'][plan['order'][0]]['address']}",
        "--master-port=29500",
        "--max-restarts=0",
        "--tee=3",
        "--log-dir=/var/log/torchrun/train",
        "/var/lib/torchrun/train/current/source/train_ddp.py",
        *job["args"],
    ]
    for name, value in (("NODE_RANK", node["rank"]), ("MASTER_ADDR", job["master_addr"]), ("MASTER_PORT", 29500)):
        assert f'Environment="{name}={value}"' in text


def test_unit_runs_as_a_system_user_with_the_limits_of_training(host):
    properties = show(host, "User", "LimitNOFILE", "TasksMax", "KillMode", "Delegate", "OOMPolicy")
    assert properties["User"] == "torchrun"
    assert host.user("torchrun").uid < 1000
    assert properties["LimitNOFILE"] == "1048576"
    assert properties["TasksMax"] == "infinity"
    assert properties["KillMode"] == "mixed"
    assert properties["Delegate"] == "yes"
    assert properties["OOMPolicy"] == "continue"
    assert "LimitMEMLOCK=infinity" in host.file(f"/etc/systemd/system/{UNIT}").content_string


def test_job_has_finished_and_left_nothing(host, plan):
    properties = show(host, "ActiveState", "Result")
    assert properties == {"ActiveState": "inactive", "Result": "success"}
    with host.sudo():
        state = json.loads(host.file("/var/lib/torchrun/train/state/state.json").content_string)
        processes = host.run("pgrep --uid torchrun --list-full")
    assert state["state"] == "done"
    assert processes.stdout == ""


def test_model_has_learnt(host, node, plan):
    if node["rank"] != 0:
        with host.sudo():
            assert host.file("/var/lib/torchrun/train/checkpoints").listdir() == []
        return
    with host.sudo():
        journal = host.check_output(f"journalctl --unit {UNIT} --output cat --no-pager")
        checkpoints = host.file("/var/lib/torchrun/train/checkpoints").listdir()
    accuracy = re.findall(r"finished: accuracy ([\d.]+) on 360 held-out", journal)
    assert accuracy and float(accuracy[-1]) >= 0.95
    epochs = int(next(word.split("=")[1] for word in plan["job"]["args"] if word.startswith("--epochs")))
    assert f"epoch-{epochs - 1:05d}.pt" in checkpoints


def test_release_is_the_same_everywhere_and_read_only(host, plan):
    assert host.run("ls /var/lib/torchrun/train/current/").rc != 0, "the login user is let into a release"
    with host.sudo():
        record = json.loads(host.file("/var/lib/torchrun/train/current/release.json").content_string)
        assert record == {"release": plan["job"]["release"], "source_hash": plan["job"]["source_hash"]}
        # The group bits of a folder with an access control list are the list's mask (acl(5)).
        assert host.check_output("find /var/lib/torchrun/train/releases/ -not -user root -o -perm /022 -not -type l") == ""


def test_environment_of_the_user_reaches_the_job_and_only_root_reads_it(host, plan):
    with host.sudo():
        file = host.file("/etc/torchrun/train.env")
        assert (file.user, file.mode) == ("root", 0o600)
        secret = host.file("/etc/torchrun/train.secret")
        assert (secret.user, secret.mode) == ("root", 0o600)
        if "A_SECRET" not in plan["job"]["environment_names"]:
            return
        # systemd's own reading of the file decides.
        command = "systemd-run --quiet --pipe --wait --property=EnvironmentFile=/etc/torchrun/train.env printenv A_SECRET"
        assert host.check_output(command) == 'with "quotes", $dollar, %percent and a \\backslash'


def test_unit_starts_at_boot_but_a_finished_job_does_not_train_again(host):
    assert host.service("torchrun-train").is_enabled
    with host.sudo():
        before = host.check_output(f"journalctl --unit {UNIT} --output cat --no-pager | grep -c 'generation 1 runs' || true")
        host.check_output(f"systemctl start {UNIT}")
        for _attempt in range(20):
            if show(host, "ActiveState")["ActiveState"] == "inactive":
                break
            host.run("sleep 0.5")
        after = host.check_output(f"journalctl --unit {UNIT} --output cat --no-pager | grep -c 'generation 1 runs' || true")
    assert show(host, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert before == after


def test_playbooks_run_from_anywhere(inventory, tmp_path, plan):
    words = ["ansible-playbook", "onprem.torch.status", "-i", str(inventory), "-e", "status_format=json"]
    output = subprocess.run(words, capture_output=True, text=True, check=True, cwd=inventory).stdout
    answer = json.JSONDecoder().raw_decode(output[output.index("\n{\n") + 1 :])[0]
    assert set(answer["nodes"]) == set(plan["nodes"])
    assert all(info["state"]["state"] == "done" for info in answer["nodes"].values())
