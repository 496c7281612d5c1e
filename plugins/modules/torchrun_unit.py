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
      - V(fresh) sets the checkpoints of a stopped job aside, as the job's user, so that it starts from nothing.
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
  user_there:
    description: Whether that user was there when the node was looked at. One that cannot be found any more is not made again.
    type: bool
    default: false
  folders:
    description:
      - Folders that the job's user writes to. Those that are missing are made; those that are there keep owner and mode, but for
        the ones directly in O(root), which are the job's own.
    type: list
    elements: path
    default: []
  checkpoint_dir:
    description: Folder of the checkpoints, for V(fresh).
    type: path
    default: ""
  checkpoint_glob:
    description: Pattern of the checkpoints' names, for V(fresh). Nothing else is moved.
    type: str
    default: "*"
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
    description: Text of the file with the user's environment variables; set by the action plugin, which reads them.
    type: str
    default: ""
  secret:
    description: The secret that the supervisors share. Empty keeps the one that is there.
    type: str
    default: ""
  keep_releases:
    description: Number of releases that are kept for a roll-back.
    type: int
    default: 3
  run:
    description: The run that this is done for, which must still hold the node; set by the action plugin.
    type: dict
    default: {}
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

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import (
    clean_module,
    environment,
    job_folders,
    job_past,
    job_user,
    launch,
    looks,
    needrestart,
    node_lock,
    run_lease,
    safe_files,
    source_tree,
)

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
        self.who = safe_files.account(self.params["user"])
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
        """The job's user exists."""
        name = self.params["user"]
        self.who = safe_files.account(name)
        if self.who:
            if self.who.uid == 0:
                self.module.fail_json(msg=f"torchrun_user is {name}, who has root's rights; name another user")
            return
        if self.params["user_there"]:
            job_user.lost(self.module, name)
        self.changes.append(f"user {name}")
        if not self.module.check_mode:
            self.who = job_user.make(self.module, name, self.params["root"])

    def job_user(self) -> safe_files.Account:
        """Return the job's user where it has to exist."""
        found = safe_files.account(self.params["user"])
        if found is None and self.params["user_there"]:
            job_user.lost(self.module, self.params["user"])
        if found is None:
            self.module.fail_json(msg=f"there is no user {self.params['user']}; provision the nodes first (playbooks/provision.yml)")
        return found

    def keep_folder(self, path: str, who: safe_files.Account | None, own: bool) -> None:
        """A folder exists; ``own`` says that it is the product's, with an owner and a mode that are put right."""
        look = self.module.check_mode
        done = safe_files.make_folder(path, who, mend=own, look=look)
        if done:
            self.changes.append(f"{'owner and mode of ' if done == 'mended' else ''}folder {path}")

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
        try:
            self.stage()
        except (OSError, source_tree.SourceError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
            user = self.params["user"]
            cure = f"let {user} read all of it (setfacl -R -m u:{user}:rX), or look at its file system, and " if self.params["source_remote"] else ""
            self.module.fail_json(msg=f"the release {self.params['release']} cannot be staged ({reason}); {cure}run the play again")

    def stage(self) -> None:
        """Stage the release where it is not."""
        root, release = self.params["root"], self.params["release"]
        if job_folders.staged(root, release, self.who):
            return
        if self.module.check_mode:
            self.changes.append(f"release {release}")
            return
        if not self.params["source_remote"] and not self.params["archive"]:
            # The action plugin copies the source and calls again.
            self.module.exit_json(changed=bool(self.changes), needs_archive=True)
        self.changes.append(f"release {release}")
        remote = self.params["source_path"] if self.params["source_remote"] else ""
        job_folders.stage(root, release, self.params["archive"], remote, self.params["programs"], self.params["source_hash"], self.job_user())

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
        root = params["root"]
        self.keep_folder(launch.SETTINGS, None, True)
        if os.path.dirname(root) in launch.OWN_ROOTS:
            self.keep_folder(os.path.dirname(root), None, True)
        # Below a folder of a user's, that user makes the job's folder too.
        self.keep_job_folder(root)
        for path in params["folders"]:
            log_root = os.path.dirname(path)
            if log_root in launch.OWN_ROOTS:
                self.keep_folder(log_root, None, True)
            job_folders.refuse_open(path, self.who)
            self.keep_folder(path, self.who, os.path.dirname(path) in (root, *launch.OWN_ROOTS))
        self.keep_folder(needrestart.FOLDER, None, False)  # also where needrestart is not installed yet
        self.keep_file(needrestart.PATH, needrestart.TEXT, 0o644)
        if self.who and job_folders.shield_all(root, self.who, self.module.check_mode):
            self.changes.append(f"modes of {root}/releases")
        if params["secret"]:
            path = os.path.join(launch.SETTINGS, f"{params['job']}.secret")
            # Supervisors read the secret once, so a new one needs their restart.
            self.secret_changed = self.keep_file(path, params["secret"], 0o600, secret=True)
        self.keep_release()

    def keep_job_folder(self, root: str) -> None:
        """The job's folder and that of its releases are root's; where somebody else's folder is above, only the second is."""
        try:
            found = safe_files.reach(root, self.who)
            os.close(found.handle)
        except OSError as error:
            self.module.fail_json(msg=f"{root} cannot be made ({error.strerror}); correct torchrun_root")
        job_folders.refuse_strangers(root, self.who)
        self.keep_folder(root, None if found.systems else self.who, found.systems)
        # Once more, should somebody have been faster.
        job_folders.refuse_strangers(root, self.who)
        if not self.module.check_mode or os.path.isdir(root):
            self.keep_releases_folder(root)

    def keep_releases_folder(self, root: str) -> None:
        """The folder of the releases is root's, also in a folder that others can write."""
        with safe_files.pinned(root) as job:
            path = os.path.join(job, "releases")
            if not os.path.lexists(path):
                self.changes.append(f"folder {root}/releases")
                if self.module.check_mode:
                    return
                os.mkdir(path, 0o755)
        # Another folder of root's under this name is refused before anything of it changes.
        with job_folders.opened_releases(root) as folder:
            if os.stat(folder).st_mode & 0o7777 != 0o755:
                self.changes.append(f"mode of {root}/releases")
                if not self.module.check_mode:
                    os.chmod(folder, 0o755)

    def started(self) -> None:
        """Switch to the release and start the unit; leave a unit alone that runs it already."""
        self.run(self.params["unit"], self.params["environment"], False)

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
            # Nothing begins anew, and yet what a person has accepted as lost is not asked about again.
            if params["accept_lost"] and not self.module.check_mode:
                job_past.remember_start(params["job"], unit, params["hosts"], True, ran=True)
            return
        if running:
            self.module.fail_json(
                msg=f"{self.unit_name} runs another release; stop the job on all nodes first (playbooks/stop.yml)"
            )
        if self.module.check_mode:
            self.changes.append(f"start of {self.unit_name}")
            return
        root, release = params["root"], params["release"]
        job_folders.refuse_strangers(root, self.job_user())
        job_folders.switch(root, release, self.job_user())
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
        who = safe_files.account(self.params["user"])
        if who is None:
            if self.params["user_there"]:
                job_user.lost(self.module, self.params["user"])
            return  # a job that has never run here
        pattern = self.params["checkpoint_glob"]
        old = safe_files.as_user(who, lambda: job_folders.checkpoints(folder, pattern), job_folders.SECONDS)
        marks = safe_files.as_user(who, lambda: job_folders.end_marks(root))
        if old:
            self.changes.append(f"{len(old)} checkpoints of {folder}")
        self.changes += marks
        if self.module.check_mode:
            return
        try:
            safe_files.as_user(who, lambda: job_folders.set_aside(folder, pattern), job_folders.SECONDS)
            safe_files.as_user(who, lambda: job_folders.forget(root))
            # Last, since what could not be set aside is still the job's past.
            job_past.forget(self.params["job"])
        except OSError as error:
            where = error.filename or folder
            self.module.fail_json(msg=f"{who.name} cannot set the checkpoints aside ({where}: {error.strerror}); let {who.name} write in {folder}")

    def absent(self) -> None:
        """Remove what the job does not need to be looked at or resumed."""
        self.stopped()
        params = self.params
        # In folders of root's alone.
        leftovers = [] if needrestart.jobs_left(UNITS, self.unit_name) else [needrestart.PATH]
        leftovers += [self.unit_path, *(os.path.join(launch.SETTINGS, f"{params['job']}.{kind}") for kind in ("env", "secret", "past.json"))]
        for path in leftovers:
            if os.path.lexists(path):
                self.changes.append(f"removal of {path}")
                if not self.module.check_mode:
                    os.unlink(path)
        for name in ("current", "releases", "work", "cache", "state"):
            path = os.path.join(params["root"], name)
            if not os.path.lexists(path):
                continue
            self.changes.append(f"removal of {path}")
            if not self.module.check_mode:
                job_folders.remove(params["root"], name)
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

    def source_hash(self) -> str:
        """Return the hash of the staged release's source; empty where it is not whole, or is not read in time."""
        try:
            return str(job_folders.staged(self.params["root"], self.params["release"], self.who).get("source_hash", ""))
        except TimeoutError:
            return ""

    def result(self) -> dict[str, object]:
        """Return what the module tells."""
        params = self.params
        there = os.path.exists(self.unit_path)
        reader = looks.reader(params["user"])
        result: dict[str, object] = {
            "changed": bool(self.changes),
            "changes": self.changes,
            "active": self.active() if there else False,
            # Whatever was asked for is done by now: a file system that hangs must not take that back.
            "current": looks.Looks(None).at(params["root"], lambda: job_folders.current(params["root"]), ""),
            "finished": bool(params["release"])
            and looks.Looks(reader).at(params["root"], lambda: job_folders.finished(params["root"], params["release"]), False),
        }
        if params["release"]:
            result["source_hash"] = self.source_hash()
        if params["unit"]:
            result["switch"] = self.secret_changed or self.old_secret_runs() or not self.wanted(self.unit_path)
        if self.diff:
            result["diff"] = self.diff
        return result


def main() -> None:
    module = clean_module.CleanModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "started", "rolled_back", "stopped", "fresh", "absent"], "default": "present"},
            "job": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "user": {"type": "str", "default": "torchrun"},
            "user_there": {"type": "bool", "default": False},
            "folders": {"type": "list", "elements": "path", "default": []},
            "checkpoint_dir": {"type": "path", "default": ""},
            "checkpoint_glob": {"type": "str", "default": "*"},
            "release": {"type": "str", "default": ""},
            "source_path": {"type": "path", "default": ""},
            "source_remote": {"type": "bool", "default": False},
            "source_hash": {"type": "str", "default": ""},
            "archive": {"type": "path", "default": ""},
            "programs": {"type": "dict", "default": {}},
            "unit": {"type": "str", "default": ""},
            # One text: Ansible takes hidden values out of all that a module tells, and a value such as 1 stands everywhere.
            "environment": {"type": "str", "default": "", "no_log": True},
            "secret": {"type": "str", "default": "", "no_log": True},
            "keep_releases": {"type": "int", "default": 3},
            "run": {"type": "dict", "default": {}},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "accept_lost": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)  # a node's own may hide from the job's user what is there for it
    node = Node(module)
    try:
        with node_lock.held(f"job-{module.params['job']}", WAIT), run_lease.at_work(module.params["run"]):
            getattr(node, module.params["state"])()
            result = node.result()
    except (run_lease.Lost, node_lock.Gone) as error:
        module.fail_json(msg=f"{node.unit_name} was not changed: {error}")
    except node_lock.Busy as error:
        module.fail_json(msg=f"{node.unit_name} cannot be changed: {error}; wait for it to end and run the play again")
    except safe_files.Unsafe as error:
        module.fail_json(msg=f"{error}; {error.cure}")
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        module.fail_json(msg=f"{node.unit_name} cannot be brought to the state {module.params['state']} ({reason}); look at that path and run the play again")
    except (RuntimeError, RecursionError) as error:
        module.fail_json(msg=f"{node.unit_name} cannot be brought to the state {module.params['state']} ({error}); run the play again")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
