#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: torchrun_unit
short_description: Keep a node's part of a torch.distributed.run job
version_added: 0.1.0
description:
  - Keeps the system user, folders, secret, environment file, release and systemd unit of a job on one node.
  - V(present) stages a release beside the one that runs and touches nothing that runs; V(started) switches to it.
  - The action plugin of this name copies the source to the node where the release is not there yet.
options:
  state:
    description:
      - V(present) stages the release and everything that a running job does not notice.
      - V(started) switches the unit to the release and starts it. A unit that runs it already is left alone.
      - V(rolled_back) starts a release that ran before, with the unit and environment that it had then.
      - V(stopped) stops the unit; the job writes its checkpoint first.
      - V(fresh) sets the checkpoints of a stopped job aside, so that it starts from nothing.
      - V(absent) removes the unit, secret and releases. Checkpoints and logs stay.
    type: str
    choices: [present, started, rolled_back, stopped, fresh, absent]
    default: present
  job:
    description: Name of the job.
    type: str
    required: true
  root:
    description: Folder of the job on the node.
    type: path
    required: true
  user:
    description: System user that the job runs as.
    type: str
    default: torchrun
  folders:
    description: Folders that belong to the job's user.
    type: list
    elements: path
    default: []
  checkpoint_dir:
    description: Folder of the checkpoints, for V(fresh).
    type: path
    default: ""
  release:
    description: Id of the release.
    type: str
    default: ""
  source_path:
    description: Path of the source on the control node, or on the node with O(source_remote=true).
    type: path
    default: ""
  source_remote:
    description: Whether the source lies on the nodes already.
    type: bool
    default: false
  source_hash:
    description: Hash that the source must have; empty for a source that lies on the nodes.
    type: str
    default: ""
  archive:
    description: Archive of the source on the node; set by the action plugin.
    type: path
    default: ""
  programs:
    description: Name and text of each file that lies beside the source of a release, such as the supervisor.
    type: dict
    default: {}
  unit:
    description: Text of the systemd unit.
    type: str
    default: ""
  environment:
    description: The user's environment variables for the job.
    type: dict
    default: {}
  secret:
    description: The secret that the supervisors share. Empty keeps the one that is there.
    type: str
    default: ""
  keep_releases:
    description: Number of releases that are kept for a roll-back.
    type: int
    default: 3
  hosts:
    description: All hosts that take part, in the order of their ranks, which root remembers on the node for the next start.
    type: list
    elements: str
    default: []
  accept_lost:
    description: Whether a person accepts that the job goes on without checkpoints that it had.
    type: bool
    default: false
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows the change of the unit.
    support: full
  action:
    description: The action plugin provides the source.
    support: full
"""

EXAMPLES = r"""
- name: Stop the node's part of the job
  onprem.torch.torchrun_unit:
    state: stopped
    job: train
    root: /var/lib/torchrun/train
"""

RETURN = r"""
active:
  description: Whether the unit runs, or is about to.
  returned: always
  type: bool
current:
  description: Id of the release that the unit runs.
  returned: always
  type: str
source_hash:
  description: Hash of the staged release's source on this node.
  returned: when a release was given
  type: str
switch:
  description: Whether the unit has to be switched to become what was asked for.
  returned: when a unit was given
  type: bool
finished:
  description: Whether the job has finished with this release.
  returned: always
  type: bool
"""

import os
import pwd
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import environment, job_folders, job_past, launch, node_lock, source_tree, systemd

UNITS = "/etc/systemd/system"
# Time that the module of a killed run may take to end, in seconds. The longest is a stop, in which the job writes its checkpoint.
WAIT = 600


class Node:
    """The job's part on this node. Every ``keep`` method makes one thing so and remembers whether it had to."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.changes: list[str] = []
        self.unit_name = f"torchrun-{self.params['job']}.service"
        self.unit_path = os.path.join(UNITS, self.unit_name)
        self.diff: list[dict[str, str]] = []
        self.secret_changed = False

    def systemctl(self, *words: str) -> str:
        """Run systemctl and return what it prints; fail with its reason."""
        returncode, stdout, stderr = self.module.run_command(["systemctl", *words])
        if returncode != 0:
            self.module.fail_json(msg=f"systemctl {' '.join(words)} failed: {stderr.strip() or stdout.strip()}")
        return stdout

    def active(self) -> bool:
        """Return whether the unit runs, starts, or waits for its restart."""
        show = self.systemctl("show", "--property=ActiveState", "--value", self.unit_name).strip()
        return show in ("active", "activating", "reloading", "deactivating")

    def keep_user(self) -> None:
        """The job's user is a system account: logind removes the shared memory of ordinary users at logout."""
        name = self.params["user"]
        try:
            pwd.getpwnam(name)
            return
        except KeyError:
            self.changes.append(f"user {name}")
        if self.module.check_mode:
            return
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
        returncode, _stdout, stderr = self.module.run_command([*command, "--home-dir", self.params["root"], name])
        if returncode != 0:
            self.module.fail_json(msg=f"the user {name} cannot be created: {stderr.strip()}; set torchrun_user to one that exists")

    def keep_folder(self, path: str, owner: str, mode: int = 0o755) -> None:
        """A folder exists and belongs to somebody. Modes of folders that exist are their owner's affair."""
        try:
            account = pwd.getpwnam(owner)
            identity = (account.pw_uid, account.pw_gid)
        except KeyError:  # in check mode, before the user exists
            identity = (-1, -1)
        if os.path.isdir(path):
            found = os.stat(path)
            if (found.st_uid, found.st_gid) == identity or -1 in identity:
                return
            self.changes.append(f"owner of {path}")
        else:
            self.changes.append(f"folder {path}")
        if not self.module.check_mode:
            os.makedirs(path, mode=mode, exist_ok=True)
            os.chown(path, *identity)

    def keep_file(self, path: str, text: str, mode: int, secret: bool = False) -> bool:
        """A file has a content and mode; return whether it was changed."""
        before = ""
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                before = stream.read()
            if before == text and os.stat(path).st_mode & 0o7777 == mode:
                return False
        self.changes.append(f"file {path}")
        if not secret:
            self.diff.append({"before_header": path, "after_header": path, "before": before, "after": text})
        if not self.module.check_mode:
            environment.write_atomically(path, text, mode)
        return True

    def keep_release(self) -> None:
        """The release is staged."""
        root, release = self.params["root"], self.params["release"]
        if job_folders.staged(root, release):
            return
        if self.module.check_mode:
            self.changes.append(f"release {release}")
            return
        if not self.params["source_remote"] and not self.params["archive"]:
            # The action plugin copies the source and calls again.
            self.module.exit_json(changed=bool(self.changes), needs_archive=True)
        self.changes.append(f"release {release}")
        remote = self.params["source_path"] if self.params["source_remote"] else ""
        try:
            job_folders.stage(
                root, release, self.params["archive"], remote, self.params["programs"], self.params["source_hash"]
            )
        except (OSError, source_tree.SourceError) as error:
            self.module.fail_json(msg=f"the release {release} cannot be staged: {error}; run the play again")

    def wanted(self, path: str) -> bool:
        """Return whether the unit on disk and the current release are what is asked for."""
        if job_folders.current(self.params["root"]) != self.params["release"] or not os.path.exists(path):
            return False
        with open(path, encoding="utf-8") as stream:
            return stream.read() == self.params["unit"]

    def present(self) -> None:
        """Make everything ready that a running job does not notice."""
        params = self.params
        self.keep_user()
        for path in (launch.SETTINGS, params["root"], os.path.join(params["root"], "releases")):
            self.keep_folder(path, "root")
        for path in params["folders"]:
            self.keep_folder(path, params["user"])
        if params["secret"]:
            path = os.path.join(launch.SETTINGS, f"{params['job']}.secret")
            # Supervisors read the secret once, so a new one needs their restart.
            self.secret_changed = self.keep_file(path, params["secret"], 0o600, secret=True)
        self.keep_release()

    def started(self) -> None:
        """Switch to the release and start the unit; leave a unit alone that runs it already."""
        self.run(self.params["unit"], systemd.environment_file(self.params["environment"]), False)

    def rolled_back(self) -> None:
        """Start a release as it ran before; refuse where it had another place in the cluster then."""
        root, release = self.params["root"], self.params["release"]
        kept = job_folders.kept_run(root, release)
        if kept is None:
            self.module.fail_json(msg=f"the release {release} has not run here; deploy its source with playbooks/train.yml instead")
        with open(self.unit_path, encoding="utf-8") as stream:
            now = launch.place(stream.read())
        then = launch.place(kept[0])
        if then != now:
            differ = ", ".join(f"{name} was {then.get(name)} and is {now.get(name)}" for name in sorted(now) if then.get(name) != now[name])
            self.module.fail_json(
                msg=f"the cluster has changed since the release {release} ran: {differ}; deploy its source with playbooks/train.yml instead"
            )
        self.params["unit"] = kept[0]
        self.run(*kept, True)

    def run(self, unit: str, environment_text: str, back: bool) -> None:
        """Switch to the release, write its unit and environment, and start it."""
        params = self.params
        ready = self.wanted(self.unit_path)
        running = self.active() if os.path.exists(self.unit_path) else False
        if ready and running:
            return
        if running:
            self.module.fail_json(
                msg=f"{self.unit_name} runs another release; stop the job on all nodes first (playbooks/stop.yml)"
            )
        if self.module.check_mode:
            self.changes.append(f"start of {self.unit_name}")
            return
        root, release = params["root"], params["release"]
        job_folders.switch(root, release)
        job_folders.keep_run(root, release, unit, environment_text)
        job_folders.remember_start(root, release, back)
        keep = {release, job_folders.previous(job_folders.history(root))}
        job_folders.prune(root, keep, params["keep_releases"])
        self.keep_file(os.path.join(launch.SETTINGS, f"{params['job']}.env"), environment_text, 0o600, secret=True)
        self.keep_file(self.unit_path, unit, 0o644)
        # Also where the file is right already: a run that was killed may have written it and no more.
        self.systemctl("daemon-reload")
        self.systemctl("enable", "--quiet", self.unit_name)
        # Before the start and after it: a unit that cannot start leaves no traces of a run that would be missed later.
        job_past.remember_start(params["job"], unit, params["hosts"], params["accept_lost"], ran=False)
        self.systemctl("start", self.unit_name)
        job_past.remember_start(params["job"], unit, params["hosts"], params["accept_lost"], ran=True)
        self.changes.append(f"start of {self.unit_name}")

    def stopped(self) -> None:
        """Stop the unit; it stays enabled no more, so that a reboot does not start a job that was stopped by hand."""
        if not os.path.exists(self.unit_path):
            return
        enabled = self.systemctl("show", "--property=UnitFileState", "--value", self.unit_name).strip() == "enabled"
        if not self.active() and not enabled:
            return
        self.changes.append(f"stop of {self.unit_name}")
        if not self.module.check_mode:
            self.systemctl("disable", "--quiet", self.unit_name)
            self.systemctl("stop", self.unit_name)

    def fresh(self) -> None:
        """Set the checkpoints aside, never delete them, and forget that the job has finished."""
        root, folder = self.params["root"], self.params["checkpoint_dir"]
        if self.active():
            self.module.fail_json(msg=f"{self.unit_name} runs; stop the job on all nodes first (playbooks/stop.yml)")
        old = job_folders.checkpoints(folder)
        done = os.path.join(root, "state", "done")
        if old:
            self.changes.append(f"{len(old)} files of {folder}")
        if os.path.exists(done):
            self.changes.append(done)
        if self.module.check_mode:
            return
        job_folders.set_aside(folder, old)
        job_past.forget(self.params["job"])
        for path in (done, os.path.join(root, "state", "state.json")):
            if os.path.exists(path):
                os.unlink(path)

    def absent(self) -> None:
        """Remove what the job does not need to be looked at or resumed."""
        self.stopped()
        params = self.params
        leftovers = [self.unit_path, *(os.path.join(launch.SETTINGS, f"{params['job']}.{kind}") for kind in ("env", "secret", "past.json"))]
        leftovers += [os.path.join(params["root"], name) for name in ("current", "releases", "work", "cache", "state")]
        for path in leftovers:
            if not os.path.lexists(path):
                continue
            self.changes.append(f"removal of {path}")
            if self.module.check_mode:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        if self.changes and not self.module.check_mode:
            self.systemctl("daemon-reload")

    def old_secret_runs(self) -> bool:
        """Return whether the running supervisor was given another secret, as after a run that was killed before the switch."""
        texts = []
        for path in (
            os.path.join("/run/credentials", self.unit_name, "secret"),
            os.path.join(launch.SETTINGS, f"{self.params['job']}.secret"),
        ):
            try:
                with open(path, encoding="utf-8") as stream:
                    texts.append(stream.read())
            except OSError:
                return False  # nothing runs
        return texts[0] != texts[1]

    def result(self) -> dict[str, object]:
        """Return what the module tells."""
        params = self.params
        there = os.path.exists(self.unit_path)
        result: dict[str, object] = {
            "changed": bool(self.changes),
            "changes": self.changes,
            "active": self.active() if there else False,
            "current": job_folders.current(params["root"]),
            "finished": bool(params["release"]) and job_folders.finished(params["root"], params["release"]),
        }
        if params["release"]:
            result["source_hash"] = job_folders.staged(params["root"], params["release"]).get("source_hash", "")
        if params["unit"]:
            result["switch"] = self.secret_changed or self.old_secret_runs() or not self.wanted(self.unit_path)
        if self.diff:
            result["diff"] = self.diff
        return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "started", "rolled_back", "stopped", "fresh", "absent"], "default": "present"},
            "job": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "user": {"type": "str", "default": "torchrun"},
            "folders": {"type": "list", "elements": "path", "default": []},
            "checkpoint_dir": {"type": "path", "default": ""},
            "release": {"type": "str", "default": ""},
            "source_path": {"type": "path", "default": ""},
            "source_remote": {"type": "bool", "default": False},
            "source_hash": {"type": "str", "default": ""},
            "archive": {"type": "path", "default": ""},
            "programs": {"type": "dict", "default": {}},
            "unit": {"type": "str", "default": ""},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "secret": {"type": "str", "default": "", "no_log": True},
            "keep_releases": {"type": "int", "default": 3},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "accept_lost": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    node = Node(module)
    try:
        with node_lock.held(f"job-{module.params['job']}", WAIT):
            getattr(node, module.params["state"])()
            result = node.result()
    except node_lock.Busy as error:
        module.fail_json(msg=f"{node.unit_name} cannot be changed: {error}; wait for it to end and run the play again")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
