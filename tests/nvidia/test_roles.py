"""The roles on booted nodes: one variable decides, one reboot at most, and what lies on the node in the end."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
import typing as t

import apt_repository
import conftest
import pytest
import stack

DISTRIBUTION = {"nv12": "debian-12", "nv13": "debian-13"}
LINES = {"13.0": ("13.0.2-1", "2.28.9-1+cuda13.0"), "12.9": ("12.9.1-1", "2.29.7-1+cuda12.9")}
DRIVERS = ("580.105.08-1", "580.159.03-1", "590.48.01-1")
# The manifest's by node: NVIDIA's repository for Debian 13 begins later.
DEFAULT = {"nv12": "580.105.08-1", "nv13": "590.48.01-1"}


@pytest.fixture
def offered(source):
    """Offer what two CUDA lines and two drivers need."""
    packages = apt_repository.headers(platform.release())
    for version in DRIVERS:
        packages += apt_repository.driver(version)
    for line, (toolkit, nccl) in LINES.items():
        packages += [*apt_repository.toolkit(line, toolkit), *apt_repository.nccl(nccl)]
    source.repository.offer(packages)
    return source


class Play:
    """The roles, run over plans."""

    def __init__(self, source: conftest.Source, folder: t.Any) -> None:
        self.variables = {
            "cuda_repository_url": source.settings["url"],
            "cuda_repository_key_url": source.settings["key_url"],
            "cuda_repository_key_fingerprint": source.settings["key_fingerprint"],
            "cuda_toolkit": True,
            "nccl_library": True,
        }
        self.file = folder / "plan.json"

    def play(self, playbook: str, facts: t.Optional[t.Mapping[str, t.Any]] = None, tags: str = "all", **variables: t.Any) -> t.Any:
        """Run a playbook over a plan and return the finished process; what it printed is in C(text)."""
        of_hosts = {name: {**self.variables, **variables, "lab_distribution": DISTRIBUTION[name]} for name in conftest.NAMES}
        self.file.write_text(json.dumps({"cluster_plan": stack.plan(of_hosts, **(facts or {})), **variables}))
        done = conftest.ansible("ansible-playbook", playbook, "-i", str(conftest.INVENTORY), "-e", f"@{self.file}", "--tags", tags)
        self.text = done.stdout
        return done

    def run(self, facts: t.Optional[t.Mapping[str, t.Any]] = None, **variables: t.Any) -> dict[str, dict[str, int]]:
        """Run the roles and return Ansible's counts by host; what it printed is in C(text)."""
        done = self.play("tests/nvidia/roles.yml", facts, **variables)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        counts = {}
        for name, words in re.findall(r"^(\S+)\s+: (ok=.*)$", done.stdout, re.MULTILINE):
            counts[name] = {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", words)}
        assert set(counts) == set(conftest.NAMES)
        return counts


@pytest.fixture
def play(offered, nodes, tmp_path):
    return Play(offered, tmp_path)


def boots(nodes) -> dict[str, str]:
    """Return when systemd was started on each node."""
    return nodes.run("systemctl show --value --property=UserspaceTimestampMonotonic && stat --format %Z /proc/1")


def changes(counts) -> set[int]:
    return {count["changed"] for count in counts.values()}


def versions(nodes, *names: str) -> list[list[str]]:
    return [[found.get(name, "") for name in names] for found in nodes.versions()]


KEY = ("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-fabricmanager", "libnccl2", "cuda-toolkit-13-0")


def test_bare_nodes_become_right_ones_with_one_reboot_and_stay_so(nodes, play):
    nodes.run("touch /etc/asks-for-reboot")
    before = boots(nodes)
    play.run()
    first = boots(nodes)
    assert all(first[name] != before[name] for name in conftest.NAMES), "rebooted"
    assert play.text.count("Reboot into the driver") >= 1
    assert versions(nodes, *KEY) == [[*[DEFAULT[name]] * 3, "2.28.9-1+cuda13.0", "13.0.2-1"] for name in conftest.NAMES]
    assert changes(play.run()) == {0}, "nothing to do"
    assert boots(nodes) == first, "and no further reboot"
    for text in nodes.run("cat /etc/nccl.conf /etc/modprobe.d/onprem-torch-nouveau.conf").values():
        assert "NCCL_SOCKET_IFNAME==host0\n" in text and "blacklist nouveau\n" in text
    units = "nvidia-persistenced nvidia-fabricmanager onprem-torch-gpu-devices"
    for text in nodes.run(f"systemctl is-enabled {units}").values():
        assert text.split() == ["enabled"] * 3
    # What counts is what a login and logind make of the files.
    for text in nodes.run("busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager RemoveIPC").values():
        assert text.split() == ["b", "false"]
    # This machine may let no node raise the limit, so that a new login shows a lower one from the same line.
    limits = "/etc/security/limits.d/onprem-torch.conf"
    for text in nodes.run(f"cat {limits}; sed --in-place 's/unlimited/4096/' {limits}").values():
        assert "* - memlock unlimited\n" in text
    for name in conftest.NAMES:
        words = ["ssh", "-F", str(conftest.STATE / "ssh_config"), "-o", "BatchMode=yes", "-o", "ControlPath=none", name, "ulimit -l"]
        assert subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip() == "4096"
    assert changes(play.run()) == {1}, "a file that was changed by hand is put right"


def test_one_variable_upgrades_and_downgrades_the_set_and_the_line(nodes, play):
    play.run()
    # No package asks for a reboot, and a container has no kernel of its own: none happens.
    start = boots(nodes)
    play.run(nvidia_driver_version="580.159.03")
    assert versions(nodes, *KEY[:3]) == [["580.159.03-1"] * 3] * 2
    assert changes(play.run(nvidia_driver_version="580.159.03")) == {0}
    play.run(nvidia_driver_version="580.105.08")
    assert versions(nodes, *KEY[:3]) == [["580.105.08-1"] * 3] * 2
    play.run(cuda_version="12.9")
    assert versions(nodes, "libnccl2", "cuda-toolkit-12-9") == [["2.29.7-1+cuda12.9", "12.9.1-1"]] * 2
    assert all("cuda-toolkit-12-9" in held and "cuda-toolkit-13-0" not in held for held in nodes.held()), "what is not wanted is not held"
    play.run(cuda_version="13.0")
    assert versions(nodes, *KEY) == [[*[DEFAULT[name]] * 3, "2.28.9-1+cuda13.0", "13.0.2-1"] for name in conftest.NAMES]
    assert changes(play.run(cuda_version="13.0")) == {0}
    assert boots(nodes) == start


@pytest.mark.parametrize(
    ("facts", "variables", "word"),
    [
        ({}, {"nvidia_driver_reboot": False}, "nvidia_driver_reboot is false"),
        pytest.param({"control_node": True}, {}, "the machine that Ansible runs on, which is never rebooted", marks=pytest.mark.matrix),
    ],
)
def test_a_reboot_that_is_not_ours_to_make_is_pending(nodes, play, facts, variables, word):
    nodes.run("touch /etc/asks-for-reboot")
    before = boots(nodes)
    variables = {**variables, "cuda_toolkit": False, "nccl_library": False}
    play.run(facts, **variables)
    assert boots(nodes) == before
    for name in conftest.NAMES:
        assert f"{name}: a reboot is pending (nvidia-kernel-open-dkms asked for it), by hand, since" in " ".join(play.text.split())
    assert word in " ".join(play.text.split())
    # Nothing is verified or trained until then.
    done = play.play("tests/nvidia/verified.yml", facts, tags="nvidia_driver", **variables)
    assert done.returncode != 0 and "everything is installed, so reboot it and run this again" in " ".join(done.stdout.split())
    assert "Verify the all-reduce" not in done.stdout and boots(nodes) == before
    counts = play.run(facts, **variables)
    assert changes(counts) == {0} and "a reboot is pending" in play.text, "it is said again until it is done"


def test_shm_has_the_size_that_was_asked_for_after_a_reboot_too(nodes, play):
    asked = {"nccl_shm_gib": 3, "nccl_library": False, "cuda_toolkit": False}
    play.run(**asked)
    size = "df --block-size=1G --output=size /dev/shm | tail -1"
    assert {text.strip() for text in nodes.run(size).values()} == {"3"}
    before = boots(nodes)
    nodes.run("systemctl --no-block reboot", check=False)
    deadline = time.monotonic() + 180
    while True:
        try:
            now = boots(nodes)
            if all(now[name] != before[name] for name in conftest.NAMES):
                break
        except AssertionError:
            pass
        assert time.monotonic() < deadline, "the nodes do not come back"
        time.sleep(1)
    nodes.run("systemctl is-system-running --wait || true")
    assert {text.strip() for text in nodes.run(size).values()} == {"3"}
    assert changes(play.run(**asked)) == {0}
    # Another size counts at once, and so it does where a run was killed before it could.
    asked["nccl_shm_gib"] = 5
    assert changes(play.run(**asked)) == {1}
    assert {text.strip() for text in nodes.run(size).values()} == {"5"}
    assert changes(play.run(**asked)) == {0}
    nodes.run("mount -o remount,size=3g /dev/shm")
    assert changes(play.run(**asked)) == {1}
    assert {text.strip() for text in nodes.run(size).values()} == {"5"}


def test_what_a_variable_turned_off_is_gone(nodes, play):
    few = {"nccl_library": False, "cuda_toolkit": False}
    play.run(nvidia_driver_peermem="present", **few)
    ours = "/etc/modules-load.d/onprem-torch-peermem.conf", "/etc/security/limits.d/onprem-torch.conf", "/etc/systemd/logind.conf.d/onprem-torch.conf"
    nodes.run(f"ls {' '.join(ours)} && systemctl start nvidia-fabricmanager")
    off = {"nvidia_driver_peermem": "absent", "nccl_limits": False, "nvidia_driver_fabric_manager": "absent", **few}
    play.run(**off)
    nodes.run(" && ".join(f"[ ! -e {path} ]" for path in ours))
    for text in nodes.run("systemctl show --property=UnitFileState,ActiveState nvidia-fabricmanager").values():
        assert sorted(text.split()) == ["ActiveState=inactive", "UnitFileState=disabled"]
    for text in nodes.run("busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager RemoveIPC").values():
        assert text.split() == ["b", "true"]
    assert changes(play.run(**off)) == {0}
    play.run(**few)
    for text in nodes.run("systemctl is-enabled nvidia-fabricmanager; ls /etc/security/limits.d").values():
        assert "enabled" in text.split() and "onprem-torch.conf" in text


PROVISION = "playbooks/parts/provision.yml"


def test_the_first_node_is_back_with_its_driver_before_the_next_one_gets_it(nodes, play):
    nodes.run("touch /etc/asks-for-reboot")
    before = boots(nodes)
    done = play.play(PROVISION, tags="nvidia_driver")
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(boots(nodes)[name] != before[name] for name in conftest.NAMES), "each was rebooted"
    # Both nodes have the clock of one kernel.
    first, last = conftest.NAMES
    back = int(nodes.run("date --date \"$(systemctl show --value --property=UserspaceTimestamp)\" +%s")[first])
    began = int(nodes.run("stat --format %Y /etc/apt/preferences.d/00-onprem-torch-nvidia_driver.pref")[last])
    assert began >= back, "the second node waited"


def test_a_first_node_that_fails_keeps_the_others_as_they_are(nodes, play):
    nodes.run("[ $(hostname) != nv12 ] || touch /run/broken-build")
    before = boots(nodes)
    done = play.play(PROVISION, tags="nvidia_driver")
    assert done.returncode != 0 and "nvidia-kernel-open-dkms" in done.stdout
    assert nodes.versions()[0] and not nodes.versions()[1], "the second node was not touched"
    assert "onprem" not in nodes.run("ls /etc/apt/preferences.d /etc/apt/sources.list.d")["nv13"]
    assert boots(nodes) == before


@pytest.mark.usefixtures("lab")
def test_a_node_is_told_from_the_machine_that_ansible_runs_on():
    """The lab's nodes have the kernel of this machine, and are other machines nevertheless."""
    found = {}
    for pattern, options in (("train", ["-i", str(conftest.INVENTORY)]), ("localhost", ["-i", "localhost,", "-c", "local"])):
        done = conftest.ansible("ansible", pattern, *options, "-m", "onprem.torch.node_info", **conftest.JSON_OUTPUT)
        for name, answer in json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"].items():
            found[name] = answer["node"]["control_node"]
    assert found == {"nv12": False, "nv13": False, "localhost": True}
