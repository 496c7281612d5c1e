# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's part of a verification: decides, tells each node what to run, judges what they bring back."""

from __future__ import annotations

import os
import secrets
import time
import typing as t

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import (
    hostile_input,
    job_state,
    launch,
    network,
    systemd,
    verify_config,
    verify_decision,
    verify_result,
    verify_text,
)
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, masked, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, given_up, runs, terminal, verify_page, verify_store

MODULE = "onprem.torch.nccl_all_reduce"
PROGRAMS = {
    "nccl_verify_node.py": "nccl_verify",
    "nccl_verify_worker.py": "nccl_verify",
    launch.WITHOUT_LIBUV: "torchrun",
}
# A node that loses power says nothing: without signs of life, ssh would wait for it for a quarter of an hour.
SIGNS_OF_LIFE = "-o ServerAliveInterval=3 -o ServerAliveCountMax=4"
STRINGS = ("size_min", "size_max", "pair_size", "minimum_gbytes_per_second", "dtype", "operation", "backend", "pairwise", "interface")
NUMBERS = ("size_factor", "iterations", "warmup", "correctness_repeats", "timeout", "arrival_timeout")


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.nccl_all_reduce)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Do what the state asks for."""
        result = super().run(tmp, task_vars)
        states = ("decided", "prepared", "configured", "started", "collected", "judged")
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "state": {"type": "str", "choices": list(states), "required": True},
                "plan": {"type": "dict"},
                "verification": {"type": "dict"},
                "variable": {"type": "str", "default": ""},
                "when": {"type": "str", "choices": ["auto", "always", "never"], "default": "always"},
                "valid_days": {"type": "int", "default": 30},
                "store": {"type": "str", "default": ""},
                "fail": {"type": "bool", "default": True},
                **{name: {"type": "raw"} for name in (*STRINGS, *NUMBERS, "environment")},
            },
            required_if=[("state", "decided", ("plan",)), *(("state", name, ("verification",)) for name in states[1:])],
        )
        result["changed"] = False
        result.update(getattr(self, f"_{arguments['state']}")(arguments, task_vars or {}))
        return result

    def _decided(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Check the settings, and say whether a verification is needed."""
        plan = arguments["plan"]
        values = {name: arguments[name] for name in (*STRINGS, "environment")}
        values.update({name: number(arguments[name]) for name in NUMBERS})
        gpus = {host: len((node.get("hardware") or {}).get("usable_gpus") or []) for host, node in plan["nodes"].items()}
        settings, problems = verify_config.read(values, gpus)
        raw = {host: task_vars["hostvars"].raw_get(host) for host in plan["order"]}
        ends, found = self._ends(plan, raw, str(arguments["interface"] or ""))
        problems += found
        if problems:
            reader = catalog.Reader(catalog.Catalog({}, {}), self._templar, task_vars["hostvars"])
            return {"failed": True, "msg": report(masked(problems, reader.all_secrets(plan["order"])))}
        left_out = [host for host in plan["order"] if host not in task_vars.get("ansible_play_hosts_all", [])]
        fingerprint = verify_config.fingerprint(plan["fingerprint"], settings)
        store = verify_store.folder_of(arguments["store"], task_vars)
        runs = verify_store.Store(store, fingerprint).history()
        active, finished = jobs(raw)
        decision, sentence = verify_decision.decide(
            arguments["when"], runs, time.time(), arguments["valid_days"], active, finished
        )
        if left_out and decision == "verify":
            decision, sentence = "skip", f"not verified, since --limit leaves out {', '.join(left_out)}"
        if decision == "refuse":
            return {"failed": True, "needed": False, "msg": sentence}
        if decision == "verify" and self._task.check_mode:
            decision, sentence = "skip", f"{sentence}; nothing is measured in check mode"
        terminal.show([sentence])
        job = plan["job"]
        return {
            "needed": decision == "verify",
            "msg": sentence,
            "fingerprint": fingerprint,
            "store": store,
            "settings": settings.as_dict(),
            "order": plan["order"],
            "nodes": {host: node_entry(plan["nodes"][host], ends[host]) for host in plan["order"]},
            "job": {
                key: job[key] for key in ("name", "user", "master_port", "verifier_port", "service_properties")
            },
            "token": secrets.token_hex(16),
            "started": time.time(),
        }

    @staticmethod
    def _ends(
        plan: dict[str, t.Any], raw: dict[str, dict[str, t.Any]], interface: str
    ) -> tuple[dict[str, network.Endpoint], list[Problem]]:
        """Return interface and address of every node: the plan's, or those of the interface that is asked for."""
        planned = {host: network.Endpoint(node["interface"], node["address"]) for host, node in plan["nodes"].items()}
        if not interface:
            return planned, []
        links = {host: ((raw[host].get("__cluster_node") or {}).get("node") or {}).get("interfaces") or [] for host in raw}
        return verify_config.endpoints(links, interface)

    def _prepared(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Copy the programs to the node and ask whether they can run there."""
        verification = arguments["verification"]
        programs = {}
        for name, role in PROGRAMS.items():
            with open(os.path.join(catalog.ROLES, role, "files", name), encoding="utf-8") as stream:
                programs[name] = stream.read()
        host = task_vars["inventory_hostname"]
        node = verification["nodes"][host]
        told = {"user": verification["job"]["user"], "python": node["python"], "backend": verification["settings"]["backend"]}
        return self._ask("prepared", told, task_vars, programs=programs)

    def _configured(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Join what the nodes told; fail with everything that keeps one of them from running it."""
        verification = {key: value for key, value in arguments["verification"].items() if key not in ("failed", "changed")}
        answers = collected(verification["order"], task_vars, arguments["variable"])
        problems = []
        for host, answer in answers.items():
            if answer.get("error") or not answer.get("ephemeral_ports"):
                problems.append(f"{host}: {answer.get('error') or 'no answer'}")
            problems += [f"{host}: {text}" for text in answer.get("problems") or []]
        if problems:
            lines = "\n".join(f"  - {text}" for text in problems)
            return {"failed": True, "msg": f"{len(problems)} problem{'s' * (len(problems) > 1)} found, nothing was launched:\n{lines}"}
        job = verification["job"]
        settings = verify_config.Settings(**verification["settings"])
        fixed = {job["master_port"], job["verifier_port"]}
        ports = verify_config.ephemeral([answer["ephemeral_ports"] for answer in answers.values()], fixed, verification["token"])
        if not ports:
            return {"failed": True, "msg": "the nodes' ranges of ephemeral ports have nothing in common; see net.ipv4.ip_local_port_range"}
        return {
            **verification,
            "ports": {"verifier": job["verifier_port"], "master": job["master_port"], "ephemeral": ports},
            "properties": [*job["service_properties"], f"RuntimeMaxSec={verify_config.deadline(settings)}"],
            "seconds": verify_config.deadline(settings) + 10,
            "minimum": verify_result.minimum(verification, verify_store.Store(verification["store"], verification["fingerprint"]).history()),
        }

    def _started(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Start the node's unit."""
        verification = arguments["verification"]
        host = task_vars["inventory_hostname"]
        node = verification["nodes"][host]
        settings = verify_config.Settings(**verification["settings"])
        members = [verification["nodes"][name] for name in verification["order"]]
        worker = verify_config.worker(settings, verification["order"], verification["minimum"])
        config = verify_config.node(settings, verification["token"], members, verification["ports"], worker)
        user = verification["job"]["user"]
        hidden = {"token": config.pop("token")}
        told = {
            "config": {**config, "rank": node["rank"], "python": node["python"], "torchrun": node["torchrun"]},
            "user": user,
            "properties": [*verification["properties"], f"User={user}", f"ReadWritePaths={verify_config.RESULTS}"],
        }
        # Values of the user's variables are secrets: they are in no result, but read here and handed to a file of root's.
        reader = catalog.Reader(catalog.load(self._loader, ("torchrun",)), self._templar, task_vars["hostvars"])
        values = {
            **launch.network_environment(node),
            "HOME": verify_config.RESULTS,
            **launch.communication_environment(reader.value(host, "torchrun_environment") or {}),
            **(arguments["environment"] or {}),
        }
        hidden["environment_file"] = systemd.environment_file({str(name): str(value) for name, value in values.items()})
        return self._ask("started", told, task_vars, hidden=hidden)

    def _collected(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Wait for the node's unit and take its result; a node that is gone is a finding."""
        self._watch_connection()
        return self._ask("collected", {"seconds": arguments["verification"]["seconds"]}, task_vars)

    def _judged(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Judge, keep the verdict, write the reports and print one screen."""
        verification = arguments["verification"]
        answers = collected(verification["order"], task_vars, arguments["variable"])
        store = verify_store.Store(verification["store"], verification["fingerprint"])
        history, now = store.history(), time.time()

        def judged(given: t.Mapping[str, t.Any]) -> tuple[dict[str, t.Any], str]:
            found = verify_result.assess(verification, given, history, now)
            page = verify_page.render(found)
            verify_text.screen(found, {})
            return found, page

        found, page = verify_result.sound(verification["order"], answers, judged)
        entry = {key: found[key] for key in ("time", "verdict", "headline", "figures", "seconds")}
        files = store.keep(entry, found, page)
        terminal.show(verify_text.screen(found, files))
        result = {"verdict": found["verdict"], "report": found, "files": files, "msg": found["headline"]}
        return {**result, "failed": arguments["fail"] and found["verdict"] == "fail"}

    def _watch_connection(self) -> None:
        """Let ssh notice within seconds that a node is gone, over a new connection, since only its start reads options."""
        try:
            options = self._connection.get_option("ssh_extra_args") or ""
            self._connection.set_option("ssh_extra_args", f"{options} {SIGNS_OF_LIFE}".strip())
            self._connection.reset()
        except (AnsibleError, AttributeError, KeyError):
            return  # no ssh

    def _ask(
        self,
        state: str,
        told: dict[str, t.Any],
        task_vars: dict[str, t.Any],
        programs: dict[str, str] | None = None,
        hidden: dict[str, str] | None = None,
    ) -> dict[str, t.Any]:
        """Run the module on the node; what keeps it from running is a finding too, so that all nodes are named at once."""
        arguments = {"state": state, "launch": told, "programs": programs or {}, "run": runs.carried(task_vars), **(hidden or {})}
        try:
            with given_up.ends_with_task():
                answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
        except AnsibleConnectionFailure as error:
            answer = {"unreachable": True, "msg": str(error)}
        except AnsibleError as error:
            answer = {"failed": True, "msg": str(error)}
        if answer.get("failed") or answer.get("unreachable"):
            words = str(answer.get("msg") or answer.get("module_stderr") or "no reason was given").strip().splitlines()
            text = "it cannot be reached by SSH any more" if answer.get("unreachable") else words[-1]
            return {"error": text, "unreachable_node": bool(answer.get("unreachable"))}
        return {key: value for key, value in answer.items() if key not in ("changed", "invocation", "_ansible_parsed")}


def number(value: t.Any) -> t.Any:
    """Return digits as a number; anything else is left for the check to name."""
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdigit() else value


def jobs(raw: t.Mapping[str, t.Mapping[str, t.Any]]) -> tuple[dict[str, str], bool]:
    """Return the jobs that run, by host, and whether the staged release has finished on all hosts.

    Where this play has staged a release already, its answer is newer than what node_info saw.
    """
    active: dict[str, str] = {}
    staged = {host: dict(variables.get("__torchrun_unit") or {}) for host, variables in raw.items()}
    for host, variables in raw.items():
        node = (variables.get("__cluster_node") or {}).get("node") or {}
        for entry in node.get("jobs") or []:
            if entry["active"]:
                active[host] = entry["job"]
        if staged[host].get("active"):
            active.setdefault(host, "that is to be started")
    if any("active" not in answer for answer in staged.values()):
        return active, False
    return active, job_state.decide(staged)[0] == "finished"


def node_entry(node: t.Mapping[str, t.Any], end: network.Endpoint) -> dict[str, t.Any]:
    """Return what a verification knows of a node."""
    kept = {key: node[key] for key in ("host", "rank", "nproc", "python", "devices")}
    torchrun = launch.torchrun_program(node, verify_config.FOLDER)
    return {**kept, "torchrun": torchrun, "interface": end.interface, "address": end.address}


def collected(order: t.Sequence[str], task_vars: t.Mapping[str, t.Any], variable: str) -> dict[str, dict[str, t.Any]]:
    """Return every host's registered answer, by rank."""
    hostvars = task_vars["hostvars"]
    # Measured by processes of the job's user.
    return {host: hostile_input.tidy(dict(hostvars.raw_get(host).get(variable) or {}), 1 << 20, lines=True) for host in order}
