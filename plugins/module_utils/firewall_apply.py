# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying out a request on the node: gather, compare, and change with a timer that puts everything back unless confirmed."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files
from ansible_collections.onprem.torch.plugins.module_utils import firewall_firewalld as firewalld
from ansible_collections.onprem.torch.plugins.module_utils import firewall_plan as plan
from ansible_collections.onprem.torch.plugins.module_utils import firewall_rollback as rollback
from ansible_collections.onprem.torch.plugins.module_utils import firewall_ufw as ufw
from ansible_collections.onprem.torch.plugins.module_utils.firewall_node import SSH_SOCKETS, Node, NodeError
from ansible_collections.onprem.torch.plugins.module_utils.firewall_sets import OUR_SET
from ansible_collections.onprem.torch.plugins.module_utils.firewall_spec import JobRules, SpecError, check_together, load, parse_job, with_range_of_the_kernel


@dataclass
class Request:
    """The module's arguments."""

    state: str = "present"
    job: Optional[str] = None
    ports: Sequence[int] = ()
    peers: Sequence[str] = ()
    interface: Optional[str] = None
    trust_peers: bool = True
    ephemeral_ports: str = "50000-60999"
    protect: bool = True
    monitoring_ports: Sequence[Mapping[str, Any]] = field(default_factory=list)
    backend: str = "auto"
    rollback_after: int = 60


def gather(node: Node) -> plan.Facts:
    """What the node has. Raises NodeError."""
    programs = frozenset(name for name in ("nft", "firewall-cmd", "ufw", "ipset") if node.which(name))
    units = node.units(["firewalld.service", files.UNIT, *SSH_SOCKETS])
    paths = [
        *(path for path in node.listing(files.JOBS_DIR) if path.endswith(".json")),
        *node.listing(files.RULES_DIR),
        files.SCRIPT,
        files.UNIT_FILE,
        files.DROP_IN,
        files.SYSCTL_FILE,
        firewalld.POLICY_FILE,
        *(path for path in node.listing(firewalld.IPSETS_DIR) if OUR_SET.fullmatch(os.path.basename(path)[: -len(".xml")])),
    ]
    present = {path: text for path in paths for text in [node.read(path)] if text is not None}
    firewalld_active = units.get("firewalld.service", {}).get("ActiveState") in ("active", "reloading", "activating")
    ufw_conf = node.read("/etc/ufw/ufw.conf") or ""
    ufw_enabled = "ufw" in programs and any(line.strip().lower() == "enabled=yes" for line in ufw_conf.splitlines())
    ruleset = node.ruleset() if "nft" in programs else []
    plain = not firewalld_active and not ufw_enabled
    filters = (node.iptables_nft(ruleset) if plain else ruleset) + node.iptables_legacy()
    return plan.Facts(
        programs=programs,
        ruleset=ruleset,
        firewalld_active=firewalld_active,
        ufw_enabled=ufw_enabled,
        filters=filters,
        management_ports=tuple(node.management_ports(units)),
        kernel_range=node.kernel_range(),
        present=present,
        shared={path: text for path in ufw.RULES_FILES.values() for text in [node.read(path)] if text is not None},
        enabled=os.path.islink(files.UNIT_LINK),
        firewalld=node.firewalld() if firewalld_active else firewalld.Live(),
        ufw=node.ufw(ufw_enabled),
    )


def jobs_after(node: Node, request: Request, facts: plan.Facts) -> list[JobRules]:
    """The jobs that the node should hold after the request, sorted by name. Raises SpecError."""
    jobs: dict[str, JobRules] = {}
    problems: list[str] = []
    for path, text in facts.present.items():
        if os.path.dirname(path) == files.JOBS_DIR:
            name = os.path.basename(path)[: -len(".json")]
            if request.state != "verified" and name == request.job:
                continue
            try:
                jobs[name] = load(text)
            except ValueError as error:
                problems.append(f"{path} cannot be read ({error}); remove it and run the role for that job again.")
    if request.state == "absent":
        if request.job is None:
            return []
    elif request.state == "present":
        if request.interface and not node.has_interface(request.interface):
            known = ", ".join(name for name in node.interfaces() if name != "lo")
            problems.append(f"cluster_interface is {request.interface}, which this node does not have; choose one of {known}.")
        try:
            rules = parse_job(
                request.job,
                request.ports,
                request.peers,
                request.interface,
                request.trust_peers,
                kernel_range=facts.kernel_range,
                narrow_range=request.ephemeral_ports,
                protect=request.protect,
                monitoring=request.monitoring_ports,
                management_ports=facts.management_ports,
            )
            jobs[rules.job] = rules
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    result = [jobs[name] for name in sorted(jobs)]
    check_together(result)
    return with_range_of_the_kernel(result, plan.range_before(facts) or facts.kernel_range)


def carry_out(node: Node, request: Request, check_mode: bool, still_ours: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The module's result. Raises SpecError and NodeError, and what still_ours raises (see rollback.alone)."""
    with rollback.alone(node, check_mode or request.state == "verified", still_ours):
        facts = gather(node)
        jobs = jobs_after(node, request, facts)
        wanted = plan.target(request.backend, jobs, facts)
        changes = plan.file_changes(wanted, facts)
        missing = plan.missing_packages(wanted, facts)
        differences = plan.live_differences(wanted, facts) + [f"The package {name} is not installed." for name in missing]
        if request.state == "verified" and request.job and request.job not in [job.job for job in jobs]:
            differences.append(f"The node holds no firewall rules of the job {request.job}.")
        result: dict[str, Any] = {
            "backend": wanted.backend,
            "protected": wanted.guard is not None,
            "opened": [f"{' '.join(key)}: {reason}" for key, reason in wanted.jumps.items()],
            "jobs": [job.job for job in jobs],
            "differences": [_sentence(path, *texts) for path, texts in changes.items()] + differences,
            "in_sync": not changes and not differences,
            "missing_packages": missing,
            "pending": False,
        }
        result["changed"] = not result["in_sync"] and request.state != "verified"
        result["diff"] = _diff(changes, differences)
        if not result["changed"] or check_mode:
            return result
        if result["missing_packages"]:
            result["changed"] = False
            return result
        result["change"] = _change(node, wanted, facts, changes, request.rollback_after)
        result["pending"] = True
        return result


def _change(node: Node, wanted: plan.Target, facts: plan.Facts, changes: Mapping[str, tuple[Optional[str], Optional[str]]], rollback_after: int) -> str:
    """Make the change, after the timer that would put it back has been started, and return its name. A failure puts it back at once."""
    lost = node.lost_by_reload() if facts.firewalld_active else []
    before = {path: text is not None for path, (text, _after) in changes.items()}
    name = rollback.begin(
        node,
        before,
        _undone_by(facts, lost),
        {files.UNIT_LINK: facts.enabled} if wanted.unit != facts.enabled else {},
        facts.kernel_range if plan.wanted_range(wanted, facts) else None,
        rollback_after,
    )
    try:
        for path, (_before, after) in changes.items():
            if after is None and path != files.UNIT_FILE:
                node.remove(path)
            elif after is not None:
                node.write(path, after, wanted.files[path][1] if path in wanted.files else 0o640)
        text = plan.transaction(wanted, facts)
        if text and "nft" in facts.programs:
            node.command(["nft", "-f", "-"], data=text)
        new_range = plan.wanted_range(wanted, facts)
        if new_range:
            node.set_kernel_range(*new_range)
        _unit(node, wanted, facts, changes)
        _ufw(node, wanted, facts)
        _firewalld(node, wanted, facts, lost)
    except (NodeError, OSError) as error:
        rollback.put_back(node)
        raise NodeError(f"The firewall was put back as it was, because the change failed: {error}") from error
    return name


def _undone_by(facts: plan.Facts, lost: Sequence[Sequence[str]]) -> list[str]:
    """Shell commands that take the live rules back once the files are as before.

    Where rules of firewalld or ufw had been flushed by hand, the change loads them again, and these flush them again: they
    may be what locks out.
    """
    commands = [f"sh {files.ROLLBACK_DIR}.running/restore --clean"]
    if facts.firewalld_active:
        table = " ".join(firewalld.TABLE)
        commands += [f"nft add table {table}", "firewall-cmd --reload", *(shlex.join(command) for command in lost)]
        if plan.flushed(facts):
            commands.append(f"nft delete table {table}")
    elif plan.flushed(facts):
        commands.append(ufw.FLUSH)
    return commands


def _ufw(node: Node, wanted: plan.Target, facts: plan.Facts) -> None:
    """The sets, and the rules in ufw's chains; chains that are gone although ufw is enabled come back first."""
    if not (facts.ufw.rules or facts.ufw.sets or wanted.backend == "ufw"):
        return
    node.command(["sh", f"{files.ROLLBACK_DIR}/restore"])
    if ufw.flushed(facts.ufw):
        node.command(["ufw", "reload"])


def _firewalld(node: Node, wanted: plan.Target, facts: plan.Facts, lost: Sequence[Sequence[str]]) -> None:
    """firewalld's sets and policy. A reload, which new sets need, keeps connections; what it forgets is brought back."""
    if not facts.firewalld_active:
        return
    accepts = wanted.accepts if wanted.backend == "firewalld" else []
    if plan.flushed(facts):
        # Older releases end a reload with an error where they do not find the table that they want to replace.
        node.command(["nft", "add", "table", *firewalld.TABLE])
    if plan.flushed(facts) or firewalld.needs_reload(facts.firewalld, accepts):
        node.command(["firewall-cmd", "--reload"])
        for command in lost:
            node.command(command)
        return
    for name, entries in firewalld.changed_sets(facts.firewalld, accepts).items():
        node.bus(".ipset", "setEntries", "sas", name, str(len(entries)), *entries)
    if firewalld.differences(node.firewalld(), accepts, node.ruleset()):
        # What firewalld believes is right, what the kernel holds is not: somebody has flushed it.
        node.command(["firewall-cmd", "--reload"])
        for command in lost:
            node.command(command)


def _unit(node: Node, wanted: plan.Target, facts: plan.Facts, changes: Mapping[str, tuple[Optional[str], Optional[str]]]) -> None:
    """Enable or remove the unit that loads the rules at boot."""
    if not wanted.unit and files.UNIT_FILE in facts.present:
        node.command(["systemctl", "disable", "--quiet", files.UNIT])
        node.command(["systemctl", "stop", files.UNIT], check=False)
        node.remove(files.UNIT_FILE)
    if files.UNIT_FILE in changes or files.DROP_IN in changes:
        node.command(["systemctl", "daemon-reload"])
    if wanted.unit and not facts.enabled:
        node.command(["systemctl", "enable", "--quiet", files.UNIT])
    if wanted.unit and files.UNIT_FILE in changes:
        node.command(["systemctl", "start", files.UNIT])


def _sentence(path: str, before: Optional[str], after: Optional[str]) -> str:
    """What happens to a file, in words."""
    if before is None:
        return f"{path} is missing."
    return f"{path} is no longer wanted." if after is None else f"{path} differs."


def _diff(changes: Mapping[str, tuple[Optional[str], Optional[str]]], differences: Sequence[str]) -> list[dict[str, str]]:
    """The change as Ansible shows it: the files' texts, then the live rules that differ although their file does not."""
    shown = [{"before_header": path, "after_header": path, "before": before or "", "after": after or ""} for path, (before, after) in changes.items()]
    if differences:
        shown.append({"before_header": "live rules", "after_header": "live rules", "before": "\n".join(differences) + "\n", "after": ""})
    return shown
