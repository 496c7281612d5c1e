# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the journals of all nodes of a job, merged, and follows them until the job ends."""

from __future__ import annotations

import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import journal, progress
from ansible_collections.onprem.torch.plugins.plugin_utils import connections, terminal

SECONDS_BETWEEN_LOOKS = 1.0
# Looks at the same time; each holds a process of ssh on the control node for some milliseconds.
AT_ONCE = 32
# Nodes may be away while they reboot; the one with rank 0 says how the job ends.
SECONDS_AWAY = 600.0


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.logs)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Print what there is, follow where asked; fail where the job failed."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "plan": {"type": "dict", "required": True},
                "follow": {"type": "bool", "default": True},
                "since": {"type": "str", "default": ""},
                "rank": {"type": "str", "default": "all"},
            }
        )
        result.update(changed=False)
        plan = arguments["plan"]
        places = journal.ranks(plan["nodes"])
        rank = None
        if arguments["rank"] != "all":
            if not arguments["rank"].isdigit() or int(arguments["rank"]) not in places:
                expected = f"all or a rank from 0 to {len(places) - 1} was expected"
                return {**result, "failed": True, "msg": f"logs_rank is {arguments['rank']!r}, but {expected}; correct logs_rank."}
            rank = int(arguments["rank"])
        # The node with rank 0 is always looked at: its supervisor says how the job ends.
        hosts = plan["order"] if rank is None else list(dict.fromkeys([plan["order"][0], places[rank]]))
        reader = Reader(self, plan["job"], hosts, task_vars["hostvars"], arguments["since"])
        outcome, shown = self._print(reader, rank, bool(arguments["follow"]))
        result.update(outcome=outcome, lines=shown, unreachable_hosts=sorted(reader.away))
        look = reader.last.get(hosts[0])
        if arguments["follow"] and look:
            sentence = progress.ending(plan["job"], outcome, look)
            terminal.show([sentence])
            result.update(msg=sentence, failed=outcome in ("failed", "unknown"))
        return result

    def _print(self, reader: Reader, rank: int | None, follow: bool) -> tuple[str, int]:
        """Print lines until the job has ended or, without following, what there is. Returns the outcome and how many there were."""
        width = max(len(host) for host in reader.hosts)
        shown, seen, said = 0, time.monotonic(), set()
        while True:
            looks = reader.look()
            for host in sorted(reader.away - said):
                terminal.warn(f"{host} does not answer; its lines follow when it does")
            said = set(reader.away)
            for line in journal.merged(looks.values() if follow else reader.begun(looks), rank):
                terminal.show(journal.shown(line, width))
                shown += 1
            first = reader.last.get(reader.hosts[0])
            outcome = progress.outcome(first) if first else "unknown"
            if not follow:
                if any(looks[host].lines for host in reader.unfinished):
                    continue
                for host in sorted(reader.unfinished):
                    terminal.warn(f"the journal of {host} could not be read to its end; see: journalctl --unit {reader.job['unit']} there")
                return outcome, shown
            if first and outcome != "running" and not any(look.lines for look in looks.values()):
                return outcome, shown
            if reader.hosts[0] in looks:
                seen = time.monotonic()
            elif time.monotonic() - seen > SECONDS_AWAY:
                return "unknown", shown
            time.sleep(SECONDS_BETWEEN_LOOKS)


class Reader:
    """Looks at the journals of several hosts, rank 0's first, and remembers how far it has read."""

    def __init__(self, action: ActionBase, job: t.Mapping[str, t.Any], hosts: t.Sequence[str], hostvars: t.Any, since: str) -> None:
        self.job, self.hosts, self.since = job, hosts, since
        self.shells = {host: connections.shell(action, host, hostvars) for host in hosts}
        self.cursors: dict[str, str] = {}
        self.last: dict[str, journal.Look] = {}
        self.away: set[str] = set()
        # Without following, each journal ends with the second of its first look: a job may print faster than it is read.
        self.ends: dict[str, float] = {}
        self.unfinished: set[str] = set()

    def look(self) -> dict[str, journal.Look]:
        """Look at all hosts once, in parallel; those that do not answer are left out and stand in ``away``."""
        with ThreadPoolExecutor(min(AT_ONCE, len(self.hosts))) as pool:
            found = dict(zip(self.hosts, pool.map(self._look_at, self.hosts)))
        looks = {host: look for host, look in found.items() if look}
        self.away = set(self.hosts) - set(looks)
        for host, look in looks.items():
            self.ends.setdefault(host, look.now + 1.0 if look.now else float("inf"))
            self.last[host] = look
            self.cursors[host] = look.cursor or self.cursors.get(host, "")
        self.unfinished = {host for host, look in looks.items() if look.more and not (look.lines and look.lines[-1].time >= self.ends[host])}
        return looks

    def begun(self, looks: t.Mapping[str, journal.Look]) -> list[journal.Look]:
        """Return the looks without the lines that were written after the first of them."""
        return [replace(look, lines=[line for line in look.lines if line.time < self.ends[host]]) for host, look in looks.items()]

    def _look_at(self, host: str) -> journal.Look | None:
        text = journal.command(self.job["unit"], self.job["root"], self.cursors.get(host, ""), self.since)
        output = self.shells[host].output(text)
        return journal.parse(host, output) if output else None
