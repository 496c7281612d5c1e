"""Changes that lock out, are interrupted, meet a restart or each other. Each test leaves the nodes as it found them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import time

from conftest import (
    BIN,
    BY_NAME,
    HOSTS,
    INVENTORY,
    MEASURED,
    NODES,
    ROOT,
    SCENARIO,
    Node,
    assert_packets,
    converge,
    from_outsider,
    in_sync,
    module,
    on_all,
    plan_of_the_job,
    restarted,
    restore_administrators_rules,
    wait_until,
)

WAIT = 20
PENDING = "/var/lib/onprem.torch/firewall-rollback"
ROLLED_BACK = f"no new SSH connection got through the changed firewall rules within {WAIT} s, so the node put them back"
# Each backend has something to change for it.
MONITORED = {"firewall_monitoring_ports": [{"port": 9400, "sources": ["198.18.48.200"]}]}
# What lets strangers in, so that our own table has to keep them out, and what takes that back.
OPEN = {"nftables": "systemctl stop nftables", "firewalld": "firewall-cmd --zone=trusted --change-interface=host0", "ufw": "ufw default allow incoming"}
SHUT = {"nftables": "systemctl start nftables", "firewalld": "firewall-cmd --zone=trusted --remove-interface=host0", "ufw": "ufw default deny incoming"}


def changed(node: Node, before: str) -> str:
    """Return the lines of a snapshot that are no longer there, or new."""
    return "\n".join(sorted(set(before.splitlines()) ^ set(node.snapshot().splitlines())))


def unchanged(before: dict[str, str]) -> None:
    """Fail where a node is not as it was."""
    nodes = [BY_NAME[name] for name in before]
    found = on_all(lambda node: changed(node, before[node.name]), nodes)
    assert not any(found.values()), found


def test_change_that_would_lock_out_is_rolled_back():
    """SSH comes in by a forwarder on a port of the ephemeral range, of which the module cannot know."""
    module({"state": "absent"})
    on_all(lambda node: node.run(OPEN[node.firewall] if node.name != "nft12" else "true"))
    unit = "[Socket]\\nListenStream=50022\\n"

    def forward(node: Node) -> None:
        node.run(f"printf '{unit}' >/run/systemd/system/forward.socket")
        node.run("printf '[Service]\\nExecStart=/lib/systemd/systemd-socket-proxyd 127.0.0.1:22\\n' >/run/systemd/system/forward.service")
        node.run("systemctl daemon-reload && systemctl start forward.socket")

    on_all(forward)
    before = on_all(Node.snapshot)
    variables = {"cluster_plan": plan_of_the_job(), "ansible_port": 50022, "firewall_rollback_after": WAIT, "ansible_host_key_checking": False}
    start = time.monotonic()
    printed = converge("--skip-tags", "always", "-e", json.dumps(variables), works=False)
    MEASURED.append(f"locked out of {len(NODES)} nodes and let in again in {time.monotonic() - start:.0f} s")
    for name in HOSTS:
        assert f"{name}: {ROLLED_BACK}" in printed, printed
    assert time.monotonic() - start >= WAIT
    unchanged(before)
    assert set(on_all(lambda node: from_outsider(node.address, 22, 50022)[50022]).values()) == {"SSH-2"}
    on_all(lambda node: node.run("systemctl stop forward.socket forward.service; rm /run/systemd/system/forward.*; systemctl daemon-reload"))
    on_all(lambda node: node.run(SHUT[node.firewall] if node.name != "nft12" else "true"))
    converge()
    in_sync()


def test_rules_that_lock_out_and_were_flushed_by_hand_stay_flushed():
    """The next run would load the administrator's rules again, which do not let SSH in."""
    locking = {
        "ufw12": "ufw delete allow 22/tcp",
        "ufw13": "ufw delete allow 22/tcp",
        "fwd12": "firewall-cmd --permanent --remove-service=ssh && firewall-cmd --remove-service=ssh",
    }
    nodes = [BY_NAME[name] for name in locking]
    on_all(lambda node: node.run("cp -p /etc/ufw/user*.rules /root/" if node.firewall == "ufw" else "cp -p /etc/firewalld/zones/public.xml /root/"), nodes)
    kept = on_all(lambda node: node.run("cat /etc/ufw/user.rules /etc/ufw/user6.rules /etc/firewalld/zones/public.xml 2>/dev/null; true"), nodes)
    on_all(lambda node: node.run(f"{locking[node.name]}; nft flush ruleset"), nodes)
    assert len(nodes) == sum("gone from the kernel" in str(answer["differences"]) for answer in module({"state": "verified"}, ",".join(locking)).values())
    printed = converge("--limit", ",".join(locking), "-e", json.dumps({"firewall_rollback_after": WAIT}), works=False)
    on_all(Node.hang_up, nodes)
    for node in nodes:
        assert f"{node.name}: {ROLLED_BACK}" in printed, printed
        assert from_outsider(node.address, 22) == {22: "SSH-2"}
    on_all(lambda node: node.run("cp -p /root/user*.rules /etc/ufw/" if node.firewall == "ufw" else "cp -p /root/public.xml /etc/firewalld/zones/"), nodes)
    # ufw's flush leaves tables that its start does not make; they are empty.
    empty = "for family in ip ip6; do for table in nat mangle raw; do nft delete table $family $table 2>/dev/null; done; done; ufw reload"
    on_all(lambda node: node.run(empty if node.firewall == "ufw" else "systemctl restart firewalld"), nodes)
    on_all(restore_administrators_rules, nodes)
    assert on_all(lambda node: node.run("cat /etc/ufw/user.rules /etc/ufw/user6.rules /etc/firewalld/zones/public.xml 2>/dev/null; true"), nodes) == kept
    converge()
    in_sync()


def start(*words: str) -> subprocess.Popen[str]:
    """Begin a run of the scenario's play."""
    command = [str(BIN / "ansible-playbook"), "-i", str(INVENTORY), str(SCENARIO / "converge.yml"), *words]
    environment = {**os.environ, "ANSIBLE_FORCE_COLOR": "0"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(run: subprocess.Popen[str]) -> None:
    """Kill a run as the power loss of its machine would: Ansible's workers are sessions of their own, and outlive it otherwise."""
    parents = [line.split() for line in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()]
    family = [str(run.pid)]
    for pid in family:
        family += [child for child, parent in parents if parent == pid]
    for pid in family:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.wait()


def test_a_run_that_is_killed_before_it_confirms_is_put_back_by_the_nodes():
    before = on_all(Node.snapshot)
    confirmed = on_all(lambda node: node.run("cat /run/onprem.torch/firewall-confirmed"))
    variables = json.dumps({**MONITORED, "firewall_rollback_after": WAIT})
    run = start("-e", variables)
    watched = BY_NAME["fwd12"]
    watched.run(f"until [ -e {PENDING}/change ]; do sleep 0.02; done")
    kill(run)
    assert watched.run(f"cat {PENDING}/change")
    # Modules that were under way go on; each has started its timer first.
    module_ends = "! pgrep -f [A]nsiballZ_peer_firewall && [ ! -e {0} ] && [ ! -e {0}.running ]".format(PENDING)
    for node in NODES:
        wait_until(lambda node=node: node.run(f"({module_ends}) >/dev/null && echo yes; true").strip() == "yes", f"{node.name} has put it back", 120)
    same = {name for name, text in on_all(lambda node: node.run("cat /run/onprem.torch/firewall-confirmed")).items() if text == confirmed[name]}
    assert watched.name in same
    unchanged({name: before[name] for name in same})
    MEASURED.append(f"killed before it confirmed: put back on {len(same)} of {len(NODES)} nodes, the others had confirmed")
    # The same once more, and the next run does not wait for the timers.
    run = start("-e", json.dumps(MONITORED))
    watched.run(f"until [ -e {PENDING}/change ]; do sleep 0.02; done")
    kill(run)
    began = time.monotonic()
    converge()
    assert time.monotonic() - began < 45
    in_sync()
    unchanged(before)


def test_a_node_that_is_restarted_before_the_confirmation_starts_without_the_change():
    before = on_all(Node.snapshot)
    # The power goes as soon as the change begins on one node, and once it is made on the others.
    made = {
        "nftables": "nft list ruleset | grep -q sources4_9400",
        "firewalld": "nft list ruleset | grep -q onp_m4_9400",
        "ufw": "ipset list -n onp_m4_9400_train",
    }
    script = "until {}; do sleep 0.02; done; systemctl reboot --force --force"

    def cut(node: Node) -> None:
        condition = f"[ -e {PENDING}/change ]" if node.name == "nft12" else made[node.firewall]
        node.run(f"systemd-run --quiet --collect --unit=cut sh -c '{script.format(condition)}'")

    on_all(cut)
    restarted(lambda: converge("-e", json.dumps(MONITORED), works=False))
    # Where the change was confirmed before the power went, it stays, and is whole.
    confirmed = {name for name, text in on_all(lambda node: node.run("cat /etc/onprem.torch/firewall.d/train.json")).items() if "9400" in text}
    assert "nft12" not in confirmed
    unchanged({name: text for name, text in before.items() if name not in confirmed})
    for name in confirmed:
        assert module({"state": "verified"}, name)[name]["differences"] == []
    MEASURED.append(f"power lost: put back on {len(NODES) - len(confirmed)} of {len(NODES)} nodes, the others had confirmed")
    converge()
    unchanged(before)
    left = "ls -d /var/lib/onprem.torch /etc/systemd/system/*/onprem-torch-firewall-rollback.service 2>/dev/null; true"
    assert not any(on_all(lambda node: node.run(left)).values())
    in_sync()


def test_two_runs_at_once_and_two_jobs_on_the_nodes():
    before = on_all(Node.snapshot)
    second = {"torchrun_job": "second", "torchrun_master_port": 30500, "firewall_trust_peers": False, "firewall_ephemeral_ports": "50000-59999"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(converge, "-e", json.dumps(variables)) for variables in (MONITORED, second)]
        for run in runs:
            run.result()
    for answer in module({"state": "verified", "job": "second"}).values():
        assert (answer["jobs"], answer["differences"]) == (["second", "train"], [])

    def kept_to_the_peers(node: Node) -> None:
        peer = NODES[NODES.index(node) - 1]
        for address in (node.address, node.address6):
            assert set(peer.connect(address, 30500, 30501).values()) == {"Connection refused"}
            assert set(from_outsider(address, 30500, 30501).values()) <= {"dropped", "No route to host", "Permission denied"}
        assert from_outsider(node.address, 9400) == {9400: "hello"}

    on_all(Node.listen)
    on_all(kept_to_the_peers)
    converge("-e", json.dumps(MONITORED))  # while the second job narrows the range of the kernel, which it gives back in the end
    converge("-e", json.dumps({**second, "firewall_state": "absent"}))
    for answer in module({"state": "verified", "job": "train"}).values():
        assert (answer["jobs"], answer["differences"]) == (["train"], [])
    assert_packets()
    converge()
    unchanged(before)
