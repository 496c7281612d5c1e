# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The steps of make gpu. Each returns what it saw: rows and lines for people, the rest for build/gpu.json."""
from __future__ import annotations

import json
import os
import re
import statistics
import time

import faults
import host
import nccl_log
import nccl_tests
import packages
from host import BUILD, HOSTS, ROOT
from job import FOREVER, Job
from machines import Hall, run
from overhead import pairs
from plain import stop

ALL = ("machine", "lab", "plan", "packages", "provision", "verify", "train", "faults", "overhead", "release", "slow", "single", "compare")
NEEDED = ("lab", "plan", "provision")   # without these nothing after them makes sense
AWAY = 5            # seconds for which a node stays off
PAIRS, SECONDS = 3, 6.0
REPEATS = 5


class Run:
    """One run on one division of the GPUs."""

    def __init__(self, gpus, place):
        self.gpus, self.place = gpus, place
        self.hall = Hall(place)
        self.memory_before = host.memory_used()
        self.job = Job(self.hall, "faults")
        self.environment = {}
        self.building = None

    def playbook(self, name, *options, log=""):
        """A playbook's output, kept in build/gpu/log."""
        began = time.monotonic()
        text = ""
        try:
            text = run("ansible-playbook", name, "-i", str(HOSTS), "-e", f"lab_bundle={os.environ.get('BUNDLE', 'build/bundle')}",
                       *options, cwd=ROOT, timeout=400)
        except RuntimeError as error:
            text = str(error)
            raise
        finally:
            path = BUILD / "log" / f"{log or os.path.basename(name).removesuffix('.yml')}.log"
            path.write_text(f"{text}\n{time.monotonic() - began:.1f} s\n")
        return text

    def close(self):
        """Remove the nodes and all that belongs to them."""
        self.playbook("playbooks/lab.yml", "-e", "lab_state=absent", log="absent")

    def machine(self):
        """What runs it all."""
        python = os.path.join(os.environ["PYTORCH"], "bin/python3")
        text = run(python, "-c", "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, "
                   "'.'.join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else '', torch.cuda.device_count()]))")
        torch, cuda, nccl, count = json.loads(text.strip().splitlines()[-1])
        rows = [{"GPU": number, "name": row[0], "UUID": row[1], "PCI": row[2], "driver": row[3], "MiB": row[4]}
                for number, row in enumerate(self.gpus)]
        topology = run("nvidia-smi", "topo", "-m", check=False).splitlines() if self.gpus else []
        if self.gpus and os.environ.get("NCCL_TESTS"):
            self.building = nccl_tests.start_build(os.environ["NCCL_TESTS"], python)
        (BUILD / "log" / "machine.log").write_text("\n".join([*topology, run("nvidia-smi", "nvlink", "--status", check=False) if self.gpus else ""]))
        return {"rows": rows, "torch": torch, "cuda": cuda, "nccl": nccl, "kernel": os.uname().release, "cpus": os.cpu_count(),
                "topology": topology, "lines": [f"torch {torch}, CUDA {cuda}, NCCL {nccl}, {count} GPUs, kernel {os.uname().release}, "
                                                f"{os.cpu_count()} CPUs"]}

    def lab(self):
        """Boot the nodes."""
        self.playbook("playbooks/lab.yml")
        rows = []
        for machine in self.hall.machines:
            devices = machine.shell("ls /dev | grep -E '^nvidia[0-9]+$' || true").split()
            state = machine.shell("systemctl is-system-running || true").strip()
            failed = machine.shell("systemctl --failed --plain --no-legend || true").split()[:1]
            rows.append({"node": machine.name, "address": machine.address, "systemd": state, "failed": " ".join(failed), "devices": " ".join(devices)})
            if state != "running":
                (BUILD / "log" / f"lab-{machine.name}.log").write_text(machine.shell("journalctl --no-pager -b || true"))
        return {"rows": rows}

    def plan(self):
        """Show the plan."""
        text = self.playbook("playbooks/plan.yml")
        shown = [line.strip() for line in text.splitlines()]
        self.environment = self.variables()
        return {"lines": [line for line in shown if line and not re.match(r"PLAY|TASK|ok:|changed:|\S+ +: ok=", line)][:40]}

    def packages(self):
        """The roles that install packages, by the apt of this machine's distribution."""
        return packages.installed(self)

    def variables(self):
        """The environment that the inventory gives processes on this machine's GPUs."""
        text = run("ansible", "gpu1", "-i", str(HOSTS), "-m", "ansible.builtin.debug", "-a", "var=gpu_host_environment", "-o", cwd=ROOT)
        return json.loads(re.search(r"=> (\{.*)", text, re.S).group(1))["gpu_host_environment"]

    def provision(self):
        """Provision the nodes."""
        self.playbook("playbooks/provision.yml")

    def train(self):
        """train.yml to a trained model, and what NCCL said of it."""
        began = time.time()
        # Small steps on the few CPUs of a trial take long.
        trial = [] if self.gpus else ["-e", '{"torchrun_args": ["--epochs=2", "--batch-size=32"]}']
        self.playbook("train.yml", *trial)
        job = Job(self.hall)
        rows, logs = [], {}
        for rank, machine in enumerate(self.hall.machines):
            logs[machine.name] = text = job.journal(machine, began)
            (BUILD / "log" / f"nccl-{machine.name}.log").write_text(text)
            rows.append({"node": machine.name, "NODE_RANK": rank, **nccl_log.facts(text)})
        text = logs[self.hall.machines[0].name]
        began = time.monotonic()
        again = self.playbook("train.yml", *trial, log="train-again")
        seconds_again = time.monotonic() - began
        changed = sum(int(count) for count in re.findall(r"changed=(\d+)", again))
        assert changed == 0, f"the second run has changed {changed} things, see build/gpu/log/train-again.log"
        finished = re.findall(r"finished: accuracy ([\d.]+) on \d+ held-out images, (\d+) images/s", text)
        assert finished, f"no accuracy was told, see build/gpu/log/nccl-{self.hall.machines[0].name}.log"
        if self.gpus:
            assert all(row["nNodes"] == str(len(rows)) for row in rows), f"NCCL saw other nodes than {len(rows)}: {rows}"
            buses = [bus for row in rows for bus in row["GPUs"].split()]
            assert len(set(buses)) == len(self.gpus), f"not every GPU has a rank: {buses}"
            assert len(buses) == max(len(self.gpus), len(rows)), f"GPUs are not one for each rank: {buses}"
        units = {machine.name: machine.shell("systemctl cat torchrun-train.service | grep -o 'node-rank=[0-9]*' | head -n 1").strip()
                 for machine in self.hall.machines}
        return {"rows": rows, "units": units, "accuracy": float(finished[0][0]), "images_per_second": int(finished[0][1]),
                "lines": [f"accuracy {finished[0][0]} on held-out images, {finished[0][1]} images/s; "
                          f"train.yml again: nothing changed, {seconds_again:.1f} s"]}

    def faults(self):
        """Recovery from faults with the job that knows whether a step was lost or done twice."""
        settings = {"torchrun_job": "faults", "torchrun_source": str(ROOT / "tests/faults/project"), "torchrun_script": "train.py",
                    "torchrun_args": ["/var/lib/torchrun/target"], "torchrun_checkpoint_glob": "step-*.json", "torchrun_wait_for": "first_step",
                    "torchrun_hang_timeout": 30, "torchrun_stop_timeout": 20, "torchrun_environment": self.environment}
        path = BUILD / "faults.json"
        path.write_text(json.dumps(settings))
        self.job.deploy("-e", f"@{path}", "-e", f"lab_bundle={os.environ.get('BUNDLE', 'build/bundle')}")
        self.job.trains(0)
        faults.AWAY = AWAY
        rows = []
        for fault, number in ((faults.worker_killed, -1), (faults.torchrun_killed, 0), (faults.power_loss, -1)):
            time.sleep(3)
            try:
                row = faults.recovered(self.job, fault, number % len(self.hall.machines))
            finally:
                (BUILD / "log" / f"fault-{fault.__name__}.log").write_text(self.job.report())
            rows.append({"fault": row["fault"], "node": self.hall.machines[row["node"]].name, "from fault to new generation (s)": row["to_start"],
                         "from fault to new step (s)": row["to_step"], "from return to new generation (s)": row["start_from_return"],
                         "torch and NCCL (s)": row["torch"]})
        began = time.monotonic()
        steps = self.job.finish()
        held = host.freed(self.memory_before)
        assert held is not None, f"GPU memory is held after the end of the job: {host.holders()} {host.memory_used()} MiB"
        return {"rows": rows, "lines": [f"ended at step {steps} with every step done once, {time.monotonic() - began:.1f} s"]}

    def overhead(self):
        """Steps a second under unit and supervisor against torchrun by hand, interleaved."""
        self.job.target(FOREVER)
        environment = {**self.environment, "TRAIN_PAUSE": "0", **({"TRAIN_COMPUTE": "1", "TRAIN_SIDE": "4096"} if self.gpus else {})}
        rows = [{"under the unit (steps/s)": under, "by hand (steps/s)": by_hand, "ratio": under / by_hand}
                for under, by_hand in pairs(self.job, PAIRS, SECONDS, environment)]
        ratio = statistics.median(row["ratio"] for row in rows)
        if self.gpus:
            assert ratio >= 0.99, f"the median ratio is {ratio:.3f}, at least 0.99 was expected: {rows}"
        return {"rows": rows, "ratio": ratio, "lines": [f"median ratio {ratio:.4f}"]}

    def release(self):
        """Nothing of a GPU is held after a requested stop."""
        began = time.time()
        self.job.start_again()
        self.job.wait(lambda: len(self.job.steps(began)) > 3, 120, "training")
        used, holders = host.memory_used(), host.holders()
        start = time.monotonic()
        stop(self.job)
        seconds = time.monotonic() - start
        held = host.freed(self.memory_before)
        states = self.job.units()
        assert held is not None, f"GPU memory is held after the stop: {host.holders()}, {host.memory_used()} MiB"
        assert set(states) == {"inactive"}, f"units after the stop: {states}"
        rows = [{"GPU": number, "before (MiB)": self.memory_before[number], "training (MiB)": used[number], "after the stop (MiB)": now}
                for number, now in enumerate(host.memory_used())]
        return {"rows": rows, "processes_while_training": len(holders),
                "lines": [f"stopped in {seconds:.1f} s; processes with GPU memory: {len(holders)} before, {len(host.holders())} after"]}

    def verify(self, *options, log="verify"):
        """The verdict over all nodes, and pairs."""
        try:
            self.playbook("playbooks/verify.yml", "-e", "nccl_verify_pairwise=always", *options, log=log)
        except RuntimeError:
            if "VERIFIED: FAIL" not in (BUILD / "log" / f"{log}.log").read_text():
                raise
        shown = (BUILD / "log" / f"{log}.log").read_text().splitlines()
        report = newest_report()
        (BUILD / "log" / f"{log}.json").write_text(json.dumps(report, indent=1))
        rows = [{"figure": answer["name"], "status": answer["status"], "measured (GB/s)": answer["measured"], "expected (GB/s)": answer["expected"],
                 "at least (GB/s)": answer["minimum"], "arithmetic": answer["arithmetic"]} for answer in report["answers"]]
        result = {"rows": rows, "verdict": report["verdict"], "transport": report["transport"], "latency": report["latency"],
                  "culprits": report["culprits"], "plateau": report["plateau"], "correctness": report["correctness"],
                  "lines": screen(shown)}
        return result

    def slow(self):
        """One node is slowed by tc: the verdict names it. Two nodes cannot tell which of them is slow."""
        if len(self.hall.machines) < 3:
            return {"lines": ["needs three nodes"]}
        machine = self.hall.machines[1]
        run("tc", "qdisc", "add", "dev", f"vb-{machine.machine}", "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms")
        try:
            result = self.verify(log="verify-slow")
        finally:
            run("tc", "qdisc", "del", "dev", f"vb-{machine.machine}", "root")
        culprits = newest_report()["culprits"]
        assert {entry["host"] for entry in culprits} == {machine.name}, f"slow was {machine.name}, accused were {culprits}"
        return {**result, "culprits": culprits, "lines": [f"{machine.name} was slowed, and named: {culprits[0]['evidence']}"]}

    def single(self):
        """All GPUs in one node: the verdict inside the node."""
        self.close()
        self.place = host.share(1, len(self.gpus))
        self.hall = Hall(self.place)
        self.job = Job(self.hall, "faults")
        self.playbook("playbooks/lab.yml", log="lab-single")
        self.playbook("playbooks/provision.yml", log="provision-single")
        return self.verify(log="verify-single")

    def by_hand(self, *options, log, environment=None):
        """nccl_verify_worker.py under torchrun on the machine itself."""
        path = BUILD / "log" / f"worker{log}.json"
        path.unlink(missing_ok=True)
        python = os.path.join(os.environ["PYTORCH"], "bin/python3")
        text = run(python, "-m", "torch.distributed.run", f"--nproc-per-node={len(self.gpus) or 2}", "--master-port=29555",
                   str(ROOT / "roles/nccl_verify/files/nccl_verify_worker.py"), *options, "--json", str(path),
                   env={**os.environ, **self.environment, **(environment or {})}, timeout=300)
        (BUILD / "log" / f"worker{log}.log").write_text(text)
        return json.loads(path.read_text())

    def compare(self):
        """Side by side with nccl-tests where the user has given its source: the same NCCL, in turns, the median of five."""
        if not self.environment:
            self.environment = self.variables()
        planted = BUILD / "plant.json"
        rank = (len(self.gpus) or 2) - 1
        planted.write_text(json.dumps({"plant": {"rank": rank, "index": 12345, "where": "output"}}))
        size = "64M" if self.gpus else "64K"
        wrong = self.by_hand("--config", str(planted), f"--size-min={size}", f"--size-max={size}", "--pairwise=never", log="-planted")
        entry = wrong["correctness"]["wrong"][0]
        assert (entry["rank"], entry["index"]) == (rank, 12345), f"planted was element 12345 of rank {rank}, found was {entry}"
        lines = [f"a planted wrong element was found: rank {entry['rank']}, element {entry['index']}, got {entry['got']:g}, expected {entry['expected']:g}"]
        if not self.gpus or len(self.gpus) < 2:
            return {"lines": lines}
        self.by_hand("--size-min=8", "--size-max=8", "--pairwise=never", "--correctness-repeats=0", log="-nccl",
                     environment={"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "ALL"})
        if not self.building:
            return {"lines": [*lines, "NCCL_TESTS names no copy of nccl-tests"]}
        path, process = self.building
        assert process.wait(300) == 0, "nccl-tests cannot be built, see build/gpu/log/nccl-tests-build.log"
        program = nccl_tests.Program(path, len(self.gpus), self.environment)
        sizes = ("-b", "128M", "-e", "2G", "-f", "2", "-n", "20", "-w", "5", "-c", "0")
        ours, theirs, latencies = {}, {}, {"graph": [], "ours": [], "call": []}
        for turn in range(REPEATS):
            result = self.by_hand("--size-min=128M", "--size-max=2G", "--pairwise=never", "--correctness-repeats=0", "--warmup=5", log=f"-{turn}")
            for row in result["rows"]:
                ours.setdefault(row["size"], []).append(row["busbw"])
            latencies["ours"].append(result["latency"]["graph_seconds"] * 1e6)
            latencies["call"].append(result["latency"]["seconds"] * 1e6)
            for row in program(*sizes, log=f"-{turn}"):
                theirs.setdefault(row["bytes"], []).append(row["busbw"])
            latencies["graph"].append(program("-b", "8", "-e", "8", "-n", "20", "-w", "20", "-G", "20", "-c", "0", log=f"-latency-{turn}")[0]["time_us"])
        rows = []
        for bytes_, values in sorted(ours.items()):
            mine, other = statistics.median(values), statistics.median(theirs[bytes_])
            rows.append({"bytes": bytes_, "this (GB/s)": mine, "nccl-tests (GB/s)": other, "ratio": mine / other,
                         "this, all": " ".join(f"{value:.1f}" for value in values), "nccl-tests, all": " ".join(f"{value:.1f}" for value in theirs[bytes_])})
        mine, other = statistics.median(latencies["ours"]), statistics.median(latencies["graph"])
        lines += [f"8 B from a CUDA graph: {mine:.2f} us, nccl-tests -G {other:.2f} us, ratio {mine / other:.3f}; "
                  f"called from Python {statistics.median(latencies['call']):.2f} us"]
        where = self.profile()
        lines += [f"of ours: {where['graph_us']:.1f} us for a graph, {where['each_us']:.2f} us for each call in it"]
        # One process with a thread for each GPU reaches the other GPU's memory by pointer; two processes cannot.
        shared = nccl_tests.Program(path, len(self.gpus), {**self.environment, "NCCL_P2P_DIRECT_DISABLE": "1"})
        indirect = shared("-b", "8", "-e", "8", "-n", "20", "-w", "20", "-G", "20", "-c", "0", log="-latency-indirect")[0]["time_us"]
        lines += [f"nccl-tests without direct pointers: {indirect:.2f} us"]
        return {"rows": rows, "latencies_us": latencies, "indirect_us": indirect, "profile": where, "lines": lines}

    def profile(self):
        """Where the time of an 8 B all-reduce from a graph goes."""
        python = os.path.join(os.environ["PYTORCH"], "bin/python3")
        text = run(python, "-m", "torch.distributed.run", f"--nproc-per-node={len(self.gpus)}", "--master-port=29556",
                   str(ROOT / "tests/gpu/graph_profile.py"), env={**os.environ, **self.environment}, timeout=120)
        (BUILD / "log" / "graph-profile.log").write_text(text)
        return json.loads(re.search(r"^\{.*\}$", text, re.M).group(0))


def newest_report():
    """The report of the last verification."""
    found = (BUILD / ".state" / "verify").glob("*/*Z.json")
    return json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text())


def screen(lines):
    """What a playbook has shown for people."""
    kept, skip = [], False
    for line in lines:
        if re.match(r"(PLAY|TASK|ok:|changed:|included:|skipping:|\S+ +: ok=)", line):
            skip = False
            continue
        if line.strip() and not skip:
            kept.append(line.rstrip())
    return kept[:60]
