#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pytorch_environment
short_description: Provide a Python environment with torch on a node
version_added: 0.1.0
description:
  - Builds a virtual environment with uv, from a wheelhouse or from an index, installs the distribution's own package, or
    checks an environment that exists already.
  - An environment is complete or is not used; an interrupted installation is removed and done again.
  - With O(source=wheelhouse) the action plugin of this name downloads the wheels once on the control node and copies to
    a node only those that it lacks, so that the nodes need no network.
options:
  source:
    description: Where torch comes from.
    type: str
    choices: [wheelhouse, index, distribution, existing]
    default: wheelhouse
  environment:
    description: Folder of the virtual environment. Ignored with O(source=distribution).
    type: path
  python:
    description: The Python to build the environment with.
    type: path
    default: /usr/bin/python3
  requirements:
    description: Requirements in pip's syntax, torch among them. With O(source=distribution), names of packages.
    type: list
    elements: str
    default: []
  version:
    description: Version of torch that must be there, without a local part such as C(+cu130). Empty for any.
    type: str
    default: ""
  root:
    description: Folder on the node for wheels, cache and uv.
    type: path
    default: /opt/onprem.torch
  user:
    description:
      - The job's user, with whose rights an environment of somebody else's (O(source=existing)) is tried. Made where it is missing.
    type: str
    default: torchrun
  user_there:
    description: Whether that user was there when the node was looked at. One that cannot be found any more is not made again.
    type: bool
    default: false
  home:
    description: Home of that user where it is made.
    type: path
    default: /var/lib/torchrun/train
  index_url:
    description: Index to install from with O(source=index), or to download from with O(source=wheelhouse).
    type: str
    default: ""
  extra_index_urls:
    description: Further indexes.
    type: list
    elements: str
    default: []
  credentials:
    description: C(user:password) of indexes by URL; set by the action plugin.
    type: dict
    default: {}
  constraints:
    description: Requirements that limit versions and ask for nothing.
    type: list
    elements: str
    default: []
  lock:
    description:
      - Path on the control node of a requirements file with a hash for every package. It replaces O(requirements), and
        a wheel with another hash is refused.
    type: str
    default: ""
  gpus:
    description: C(name) and C(architecture) of each kind of GPU of the node, which torch must have code for.
    type: list
    elements: dict
    default: []
  devices:
    description: The GPUs that the job uses, as nvidia-smi counts them, with commas between. Empty for all.
    type: str
    default: ""
  cuda:
    description: CUDA version that torch must be built for. Empty for any.
    type: str
    default: ""
  oldest_drivers:
    description: The oldest driver for each major version of CUDA.
    type: dict
    default: {}
  wheelhouse:
    description: Folder on the control node that keeps downloaded wheels.
    type: path
    default: ~/.cache/onprem.torch/wheelhouse
  platform:
    description: C(architecture), C(glibc) and C(python) version of the node, which decide the wheels that fit.
    type: dict
    default: {}
  wheels:
    description: Name and size in bytes of each wheel; set by the action plugin.
    type: dict
    default: {}
  run:
    description: The run that this is done for, which must still hold the node; set by the action plugin.
    type: dict
    default: {}
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says whether the environment would be built.
    support: full
  diff_mode:
    description: Tells why the environment would be built.
    support: full
  action:
    description: The action plugin provides the wheels.
    support: full
"""

EXAMPLES = r"""
- name: Provide torch
  onprem.torch.pytorch_environment:
    environment: /opt/onprem.torch/environments/example
    requirements: [torch==2.13.0]
    version: 2.13.0
    platform: {architecture: x86_64, glibc: "2.36", python: 3.11.2}
"""

RETURN = r"""
environment:
  description: Folder of the environment.
  returned: success
  type: str
python:
  description: Its Python executable.
  returned: success
  type: str
versions:
  description: >-
    C(torch), C(cuda), C(nccl) and C(architectures) of the installed torch; empty where it has none, and left out where it
    was not asked. C(nccl) is null where a build for GPUs has none.
  returned: success
  type: dict
missing:
  description: Wheels that the node lacks.
  returned: when the environment has to be built from a wheelhouse
  type: list
  elements: str
"""

import json
import os
import shutil
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import (
    clean_module,
    environment,
    folder_access,
    hardware,
    job_user,
    launch,
    node_facts,
    node_lock,
    run_lease,
    safe_files,
    secret_texts,
    torch_fit,
)

# Time that what a killed run has left behind may take to end, in seconds.
WAIT = 600
# Time for the small computation: a first use of eight GPUs takes a minute, and one that hangs takes for ever.
COMPUTE_SECONDS = 300

# Importing it proves that the installation works, and leaves the byte code that the job's user cannot write.
PROBE = """
import json, torch, torch.distributed, torch.distributed.run, torch.nn.parallel
nccl, built = "", []
if torch.version.cuda:
    nccl = None
    if torch.distributed.is_nccl_available():
        from torch.cuda import nccl as library
        nccl = ".".join(str(part) for part in library.version())
    built = (torch._C._cuda_getArchFlags() or "").split()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "nccl": nccl, "architectures": built}))
"""
# One small computation on each GPU, which also waits for the answer.
COMPUTE = """
import torch
for index in range(torch.cuda.device_count()):
    ones = torch.ones(8, 8, device=f"cuda:{index}")
    if float((ones @ ones).sum()) != 512.0:
        raise SystemExit(f"GPU {index} computes wrong results")
print(torch.cuda.device_count())
"""


def run(module: AnsibleModule, command: t.Sequence[str], who: safe_files.Account | None, seconds: float, shown: t.Mapping[str, str]) -> tuple[int, str, str]:
    """Run an environment's Python: root's own as root, somebody else's with the rights of the job's user."""
    if who is not None:
        return safe_files.run_as(who, command, seconds, shown)
    limited = ["timeout", "--kill-after=10", str(seconds), *command]
    returncode, stdout, stderr = module.run_command(limited, environ_update=dict(shown))
    return returncode, stdout, stderr


def told(found: t.Any) -> bool:
    """Return whether an answer is what PROBE prints; somebody else's Python may print anything."""
    if not isinstance(found, dict) or set(found) != {"torch", "cuda", "nccl", "architectures"}:
        return False
    texts = [found["torch"], found["cuda"], found["nccl"] or ""]
    names = found["architectures"]
    return isinstance(names, list) and all(isinstance(text, str) and len(text) < 100 and text.isprintable() for text in [*texts, *names])


def versions_of(module: AnsibleModule, python: str, *options: str, who: safe_files.Account | None = None) -> dict[str, t.Any]:
    """Import torch and return its versions; fail with a sentence where that does not work."""
    returncode, stdout, stderr = run(module, [python, *options, "-c", PROBE], who, COMPUTE_SECONDS, {})
    if returncode != 0:
        reason = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit status {returncode}"
        module.fail_json(msg=f"torch cannot be imported by {python}: {reason}; repair or remove that environment")
    try:
        found = json.loads(stdout)
    except (ValueError, RecursionError):
        found = None
    if not told(found):
        module.fail_json(msg=f"torch of {python} does not tell its version; repair or remove that environment")
    return found


def check_version(module: AnsibleModule, found: str, where: str) -> None:
    """Fail where another torch is there than the one asked for."""
    wanted = module.params["version"]
    if wanted and found.split("+")[0] != wanted.split("+")[0]:
        module.fail_json(
            msg=f"{where} holds torch {found}, but pytorch_version is {wanted}; correct pytorch_version or install that version"
        )


def check_fit(
    module: AnsibleModule, versions: dict[str, t.Any], python: str, compute: bool, who: safe_files.Account | None = None
) -> None:
    """Fail where torch does not fit the node's GPUs or driver; with ``compute`` every GPU computes something."""
    params = module.params
    driver = hardware.driver()["loaded"]
    text = torch_fit.problem(versions, params["gpus"], driver, params["cuda"], params["oldest_drivers"])
    if text:
        module.fail_json(msg=text)
    # Without a running driver there is nothing to compute with; the role nvidia_driver tells of a pending reboot.
    if not compute or not driver or not params["gpus"]:
        return
    shown = launch.visible_devices(params["devices"])
    returncode, _stdout, stderr = run(module, [python, "-c", COMPUTE], who, COMPUTE_SECONDS, shown)
    if returncode in (124, 137):
        text = f"torch {versions['torch']} has computed nothing on this node's GPUs within {COMPUTE_SECONDS} s"
        module.fail_json(msg=f"{text}; look at nvidia-smi and dmesg")
    if returncode != 0:
        reason = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit status {returncode}"
        module.fail_json(msg=f"torch {versions['torch']} cannot compute on this node's GPUs ({reason}); look at nvidia-smi and dmesg")


def runner(module: AnsibleModule) -> safe_files.Account | None:
    """Return the job's user, with whose rights somebody else's environment runs; it is made where it is missing."""
    name = module.params["user"]
    who = safe_files.account(name)
    if who is None and module.params["user_there"]:
        job_user.lost(module, name)
    if who is None and not module.check_mode:
        who = job_user.make(module, name, module.params["home"])
    if who is not None and who.uid == 0:
        module.fail_json(msg=f"torchrun_user is {name}, who has root's rights; name another user")
    return who


def provide_existing(module: AnsibleModule) -> dict[str, t.Any]:
    """Check an environment that somebody else keeps."""
    only_roots(module, "root")
    folder = module.params["environment"]
    found = node_facts.torch_version(folder)
    python = os.path.join(folder, "bin/python3")
    if not found or not os.path.exists(python):
        module.fail_json(msg=f"{folder} is no Python environment with torch; correct pytorch_environment")
    check_version(module, found, folder)
    versions: dict[str, t.Any] = {"torch": found, **node_facts.torch_build(folder)}
    changed = False
    if module.params["gpus"]:
        # Importing takes seconds, so it is done once for each torch, Python and driver. No byte code is left behind.
        record = environment.existing_record(module.params["root"], folder)
        stamp = environment.existing_stamp(folder, hardware.driver()["loaded"])
        known = environment.read_json(record)
        asked = known.get("stamp") != stamp
        changed = asked and safe_files.account(module.params["user"]) is None
        who = runner(module) if asked else None
        if asked and who is None:  # in check mode, before the job's user exists
            return {"changed": True, "environment": folder, "python": python, "versions": versions}
        versions = versions_of(module, python, "-B", who=who) if asked else known["versions"]
        check_fit(module, versions, python, compute=asked, who=who)
        if asked and not module.check_mode:
            safe_files.make_folder(module.params["root"], None, mend=module.params["root"] in launch.OWN_ROOTS)
            safe_files.make_folder(os.path.dirname(record), None)
            environment.write_atomically(record, json.dumps({"stamp": stamp, "versions": versions}, sort_keys=True) + "\n")
    return {"changed": changed, "environment": folder, "python": python, "versions": versions}


def only_roots(module: AnsibleModule, *names: str) -> None:
    """Fail where others than root can change what root is about to run."""
    for name in names:
        try:
            who = folder_access.changer(module.params[name])
        except OSError as error:
            text = f"pytorch_{name} is {module.params[name]}, which root of the node cannot look at ({error.strerror})"
            module.fail_json(msg=f"{text}; name a path on a local disk")
        if who:
            text = f"pytorch_{name} is {module.params[name]}, but {who} can be changed by others than root, who runs programs from there"
            module.fail_json(msg=f"{text}; name a path that only root can write")


def provide_distribution(module: AnsibleModule) -> dict[str, t.Any]:
    """Install the distribution's packages with apt."""
    only_roots(module, "python")
    python = module.params["python"]
    packages = module.params["requirements"]
    returncode, stdout, _stderr = module.run_command(["dpkg-query", "-W", "-f=${Package} ${db:Status-Abbrev}\n", *packages])
    there = {line.split()[0] for line in stdout.splitlines() if " ii" in line}
    lacking = [name for name in packages if name not in there]
    changed = bool(lacking)
    if lacking and not module.check_mode:
        environ = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        # An interrupted installation of an earlier run is finished first.
        module.run_command(["dpkg", "--configure", "-a", "--force-confold"], environ_update=environ)
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "--no-install-recommends", *lacking]):
            returncode, stdout, stderr = module.run_command(command, environ_update=environ)
            if returncode != 0:
                reason = secret_texts.redacted((stderr.strip() or stdout.strip()).splitlines()[-1])
                module.fail_json(msg=f"{' '.join(command[:2])} failed: {reason}; check the node's apt sources")
    result: dict[str, t.Any] = {"changed": changed, "environment": "/usr", "python": python, "versions": {}}
    if changed and module.check_mode:
        return result
    found = node_facts.torch_version("/usr")
    check_version(module, found, "the package python3-torch")
    versions = versions_of(module, python) if changed else {"torch": found, **node_facts.torch_build("/usr")}
    check_fit(module, versions, python, compute=changed)
    result["versions"] = versions
    return result


def build(module: AnsibleModule, folder: str, python_version: str, lock: int) -> None:
    """Build the environment anew; ``lock`` is handed on to what it runs."""
    params = module.params
    root = params["root"]
    wheels = os.path.join(root, "wheels")
    uv = environment.unpack_uv(wheels, os.path.join(root, "bin/uv"))
    shutil.rmtree(folder, ignore_errors=True)
    python = os.path.join(folder, "bin/python3")
    install = [uv, "pip", "install", "--python", python, "--no-progress"]
    if params["source"] == "wheelhouse":
        install += ["--offline", "--no-index", "--find-links", wheels]
    else:
        # As pip does: the best version of all indexes, since torch's own index has old versions of other packages too.
        install += ["--index-strategy", "unsafe-best-match"]
    scratch = os.path.join(module.tmpdir, "requirements.txt")
    if params["lock"]:
        install += ["--require-hashes", "--requirement", scratch]
    elif params["constraints"]:
        install += ["--constraint", scratch, *params["requirements"]]
    else:
        install += params["requirements"]
    with open(scratch, "w", encoding="utf-8") as stream:
        stream.write(params["lock"] or "\n".join(params["constraints"]) + "\n")
    environ = {"UV_CACHE_DIR": os.path.join(root, "cache"), "UV_PYTHON_DOWNLOADS": "never", "UV_NO_CONFIG": "1"}
    if params["source"] == "index":
        # A command line is for everybody to read, an environment is not.
        index, *extra = [secret_texts.with_credentials(url, params["credentials"]) for url in (params["index_url"], *params["extra_index_urls"])]
        environ.update({**({"UV_DEFAULT_INDEX": index} if index else {}), **({"UV_INDEX": " ".join(extra)} if extra else {})})
    for command in ([uv, "venv", "--no-progress", "--python", params["python"], folder], install):
        returncode, stdout, stderr = module.run_command(command, environ_update=environ, pass_fds=[lock])
        if returncode != 0:
            reason = " ".join((stderr.strip() or stdout.strip()).split())
            for userinfo in params["credentials"].values():
                reason = secret_texts.masked(reason, secret_texts.of_userinfo(userinfo), secret_texts.HIDDEN)
            reason = secret_texts.redacted(reason)[-600:]
            index, status = environment.refused(reason, params["credentials"])
            if index:
                module.fail_json(
                    msg=f"the index {index} refuses the user or password ({status}); correct them in pytorch_index_url or "
                    "pytorch_extra_index_urls, as in https://USER:PASSWORD@HOST/simple"
                )
            module.fail_json(msg=f"uv could not build {folder}: {reason}; nothing uses the half-built environment")
    versions = versions_of(module, python)
    check_version(module, versions["torch"], folder)
    check_fit(module, versions, python, compute=True)
    os.sync()  # the record must not outlive a power loss that the files before it did not
    environment.write_record(folder, params["requirements"], python_version, versions)


def own_folders(root: str) -> None:
    """The folders that root builds in exist, and are root's for everybody to read, whatever an earlier umask was."""
    safe_files.make_folder(root, None, mend=root in launch.OWN_ROOTS)
    with safe_files.pinned(root) as folder:
        for name in ("wheels", "environments", "bin", "cache"):
            path = os.path.join(folder, name)
            if not os.path.isdir(path):
                os.mkdir(path, 0o755)
            elif name == "environments" and os.stat(path).st_mode & 0o755 != 0o755:
                os.chmod(path, 0o755)


def provide_virtual(module: AnsibleModule) -> dict[str, t.Any]:
    """Build a virtual environment where it is not there yet."""
    params = module.params
    only_roots(module, "root", "python")
    folder = params["environment"]
    python_version = node_facts.python_version(params["python"])
    reasons = environment.differences(folder, params["requirements"], python_version)
    result: dict[str, t.Any] = {"changed": bool(reasons), "environment": folder, "python": os.path.join(folder, "bin/python3")}
    if not reasons:
        result["versions"] = environment.record_of(folder)["versions"]
        check_fit(module, result["versions"], result["python"], compute=False)
        return result
    result["diff"] = {"before": "\n".join(reasons) + "\n", "after": f"{folder}: {' '.join(params['requirements'])}\n"}
    result["versions"] = {}
    if module.check_mode:
        return result
    missing = environment.missing_wheels(params["wheels"], os.path.join(params["root"], "wheels"))
    if missing or not params["wheels"]:
        # The action plugin copies what is missing and calls again.
        own_folders(params["root"])
        result.update(changed=False, missing=missing, incomplete=True)
        return result
    try:
        with node_lock.held("pytorch", WAIT) as lock:
            run_lease.require(module.params["run"])
            # An earlier run that was killed may have ended its work meanwhile.
            if environment.differences(folder, params["requirements"], python_version):
                build(module, folder, python_version, lock)
    except (run_lease.Lost, node_lock.Gone) as error:
        module.fail_json(msg=f"{folder} was not built: {error}")
    except node_lock.Busy as error:
        module.fail_json(msg=f"{folder} cannot be built: {error}; wait for it to end and run the play again")
    result["versions"] = environment.record_of(folder)["versions"]
    return result


def main() -> None:
    module = clean_module.CleanModule(
        argument_spec={
            "source": {
                "type": "str",
                "choices": ["wheelhouse", "index", "distribution", "existing"],
                "default": "wheelhouse",
            },
            "environment": {"type": "path"},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "requirements": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str", "default": ""},
            "root": {"type": "path", "default": "/opt/onprem.torch"},
            "user": {"type": "str", "default": "torchrun"},
            "user_there": {"type": "bool", "default": False},
            "home": {"type": "path", "default": "/var/lib/torchrun/train"},
            "index_url": {"type": "str", "default": ""},
            "extra_index_urls": {"type": "list", "elements": "str", "default": []},
            "credentials": {"type": "dict", "default": {}, "no_log": True},
            "constraints": {"type": "list", "elements": "str", "default": []},
            "lock": {"type": "str", "default": ""},
            "gpus": {"type": "list", "elements": "dict", "default": []},
            "devices": {"type": "str", "default": ""},
            "cuda": {"type": "str", "default": ""},
            "oldest_drivers": {"type": "dict", "default": {}},
            "wheelhouse": {"type": "path", "default": "~/.cache/onprem.torch/wheelhouse"},
            "platform": {"type": "dict", "default": {}},
            "wheels": {"type": "dict", "default": {}},
            "run": {"type": "dict", "default": {}},
        },
        required_if=[(("source"), value, ("environment",)) for value in ("wheelhouse", "index", "existing")],
        supports_check_mode=True,
    )
    os.umask(0o022)  # a node's own may hide from the job's user what is there for it
    provide = {"existing": provide_existing, "distribution": provide_distribution}
    try:
        with run_lease.at_work(module.params["run"]):
            result = provide.get(module.params["source"], provide_virtual)(module)
    except node_lock.Busy as error:
        module.fail_json(msg=f"torch was not provided: {error}")
    except safe_files.Unsafe as error:
        module.fail_json(msg=f"{error}; set pytorch_root to a folder that only root can change")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
