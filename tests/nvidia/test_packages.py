"""Real apt on booted nodes against a signed repository: versions, holds, interruptions, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import typing as t

import apt_repository
import conftest
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import nvidia
from builders import MANIFEST
from sets import NEW, OLD, PACKAGES, UPDATE, UPGRADE, WHOLE, driver, library, refused, succeeded


def test_install_then_nothing_to_do(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    for planned in succeeded(nodes.bring(driver(source), check=True)):
        shown = {entry["after_header"]: entry["after"] for entry in planned["diff"]}
        assert shown["package nvidia-driver-cuda"] == "580.105.08-*\n"
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files(), "check mode changes nothing"
    succeeded(nodes.bring(driver(source)))
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2
    assert nodes.held() == [WHOLE] * 2
    for text in nodes.run("systemctl is-enabled nvidia-persistenced nvidia-fabricmanager").values():
        assert text.split() == ["enabled", "enabled"]
    for again in succeeded(nodes.bring(driver(source)), changed=False):
        assert again["diff"] == []
    succeeded(nodes.bring(driver(source), check=True), changed=False)
    for path in list(source.repository.folder.iterdir()):
        path.unlink()
    succeeded(nodes.bring(driver(source)), changed=False)  # what is right needs no repository


def test_a_full_upgrade_leaves_the_set_alone(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    succeeded(nodes.bring(driver(source)))
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    nodes.run(f"{UPDATE} && {UPGRADE}")
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2, "pinned and held"
    for text in nodes.run(f"rm /etc/apt/preferences.d/*onprem-torch-* && {UPGRADE}").values():
        assert "kept back" in text
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2, "held alone"
    nodes.run(f"apt-mark showhold | xargs apt-mark unhold && {UPGRADE}")
    assert nodes.versions() == [dict.fromkeys(WHOLE, NEW)] * 2, "without pin and hold the newer one was really on offer"
    succeeded(nodes.bring(driver(source)))
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2 and nodes.held() == [WHOLE] * 2


def test_other_kernel_modules_replace_the_open_ones(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    succeeded(nodes.bring(driver(source)))
    packages = [{"name": name.replace("-open", ""), "version": "580.105.08-*"} for name in PACKAGES]
    for answer in succeeded(nodes.bring(driver(source, packages=packages))):
        assert answer["removed"] == ["nvidia-kernel-open-dkms"]
    assert all("nvidia-kernel-dkms" in held for held in nodes.held())
    # Kind and version at once.
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    for answer in succeeded(nodes.bring(driver(source, NEW.rpartition("-")[0]))):
        assert answer["removed"] == ["nvidia-kernel-dkms"]
    assert nodes.versions() == [dict.fromkeys(WHOLE, NEW)] * 2 and nodes.held() == [WHOLE] * 2


def toolkit(source: conftest.Source) -> dict[str, t.Any]:
    """Return the settings of the toolkit as the plan gives them."""
    settings = nvidia.cuda("13.0", {"cuda_toolkit": True}, source.settings, MANIFEST)["settings"]
    assert settings["name"] == "cuda"
    return settings


def test_sets_beside_each_other_keep_their_own_through_a_full_upgrade(nodes, source):
    nccl, tools = "2.28.9-1+cuda13.0", "13.0.2-1"
    source.repository.offer([*apt_repository.nccl(nccl), *apt_repository.toolkit("13.0", tools)])
    succeeded(nodes.bring(library(source, nccl)))
    succeeded(nodes.bring(toolkit(source)))
    whole = {"libnccl2", "libnccl-dev", "cuda-toolkit-13-0", "cuda-nvcc-13-0"}
    assert nodes.held() == [whole] * 2
    both = {"libnccl2": nccl, "libnccl-dev": nccl, "cuda-toolkit-13-0": tools, "cuda-nvcc-13-0": tools}
    assert nodes.versions() == [both] * 2
    succeeded(nodes.bring(library(source, nccl)), changed=False)
    succeeded(nodes.bring(toolkit(source)), changed=False)
    newer = {"libnccl2": "2.30.1-1+cuda13.0", "libnccl-dev": "2.30.1-1+cuda13.0", "cuda-toolkit-13-0": "13.0.9-1", "cuda-nvcc-13-0": "13.0.9-1"}
    offered = [*apt_repository.nccl(newer["libnccl2"]), *apt_repository.toolkit("13.0", "13.0.9-1")]
    source.repository.offer([*apt_repository.nccl(nccl), *apt_repository.toolkit("13.0", tools), *offered])
    nodes.run(f"{UPDATE} && {UPGRADE}")
    assert nodes.versions() == [both] * 2, "parts of the toolkit too"
    nodes.run(f"apt-mark showhold | xargs apt-mark unhold && rm /etc/apt/preferences.d/*onprem-torch-* && {UPGRADE}")
    assert nodes.versions() == [newer] * 2, "the newer ones were really on offer"


@pytest.mark.parametrize("victim", ["dpkg", "play"])
def test_an_interrupted_installation_heals(nodes, source, victim):
    source.repository.offer(apt_repository.driver(OLD))
    nodes.run("touch /run/slow-build")
    words = nodes.module_words(driver(source))
    command = [str(conftest.ANSIBLE / words[0]), *words[1:]]
    with subprocess.Popen(command, cwd=conftest.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as play:
        deadline = time.monotonic() + 180
        while not all(text.strip() for text in nodes.run("pgrep -f 'nvidia-kernel-open-dkms.postins[t]' || true").values()):
            assert time.monotonic() < deadline and play.poll() is None, "the installation never reached the slow package"
            time.sleep(0.2)
        if victim == "play":
            os.killpg(play.pid, signal.SIGKILL)
            nodes.run("pkill -9 -f '[A]nsiballZ_nvidia_packages' || true")
        # The package's script goes last: dpkg must not see it end.
        nodes.run("pkill -9 -x dpkg; pkill -9 -x apt-get; pkill -9 -f 'nvidia-kernel-open-dkms.postins[t]'; rm -f /run/slow-build")
        play.wait(timeout=180)
    for text in nodes.run("dpkg-query -W -f '${Package} ${db:Status-Status}\\n' | grep half || true").values():
        assert "nvidia-kernel-open-dkms" in text, "the installation was really interrupted"
    for answer in succeeded(nodes.bring(driver(source))):
        assert answer["healed"]
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2 and nodes.held() == [WHOLE] * 2
    assert set(nodes.run("dpkg --audit").values()) == {""}
    succeeded(nodes.bring(driver(source)), changed=False)


def test_another_key_than_the_expected_is_refused(nodes, source, keys):
    source.repository.offer(apt_repository.driver(OLD))
    settings = {**source.settings, "key_fingerprint": keys[1].fingerprint}
    for message in refused(nodes.bring(driver(source, repository=settings))):
        assert keys[0].fingerprint in message and keys[1].fingerprint in message and "refused" in message
    assert "onprem" not in nodes.files()


def test_a_key_that_brings_a_strangers_along_is_refused(nodes, source, keys):
    source.repository.offer(apt_repository.driver(OLD))
    (source.repository.folder / "key.pub").write_bytes(keys[0].public() + keys[1].public())
    for message in refused(nodes.bring(driver(source))):
        assert keys[0].fingerprint in message and keys[1].fingerprint in message and "refused" in message
    assert "onprem" not in nodes.files()


def test_what_a_stranger_signed_is_refused(nodes, source, keys):
    source.repository.sign_with(keys[1])
    source.repository.offer(apt_repository.driver(OLD))
    for message in refused(nodes.bring(driver(source))):
        assert f"the repository {source.settings['url']} cannot be used" in message
        assert keys[1].fingerprint[-16:] in message, "the key that signed is named"
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_an_unreachable_repository_is_named(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    nowhere = f"http://{conftest.BRIDGE}:9/"
    for message in refused(nodes.bring(driver(source, repository={**source.settings, "url": nowhere}))):
        assert f"the repository {nowhere} cannot be used" in message and "cuda_repository_url" in message
    for message in refused(nodes.bring(driver(source, repository={**source.settings, "key_url": f"{nowhere}key.pub"}))):
        assert f"cannot be fetched from {nowhere}key.pub" in message and "cuda_repository_key_url" in message
    assert "onprem" not in nodes.files()


def test_a_repository_without_the_version_says_what_it_has(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    for message in refused(nodes.bring(driver(source, "570.10.01"))):
        assert f"{source.settings['url']} has no nvidia-driver-cuda 570.10.01-* (it has 580.105.08-1)" in message
    packages = [{"name": "linux-headers-0.0.0-nowhere", "version": ""}, *driver(source)["packages"]]
    for message in refused(nodes.bring(driver(source, packages=packages))):
        assert "no linux-headers-0.0.0-nowhere, which DKMS needs for a kernel that is installed; install the newest kernel" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_somebody_elses_hold_is_respected(nodes, source):
    old, new = "2.28.9-1+cuda13.0", "2.29.7-1+cuda12.9"
    source.repository.offer([*apt_repository.nccl(old), *apt_repository.nccl(new)])
    succeeded(nodes.bring(library(source, old)))
    # Without our pins the holds are somebody else's.
    nodes.run("rm /etc/apt/preferences.d/00-onprem-torch-nccl.pref")
    for message in refused(nodes.bring(library(source, new))):
        assert f"libnccl2 is held at {old}, but {new} is wanted" in message and "apt-mark unhold libnccl-dev libnccl2" in message
    assert nodes.versions() == [{"libnccl2": old, "libnccl-dev": old}] * 2


def test_what_a_later_set_needs_is_looked_for_before_anything_changes(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    further = [{"name": "libnccl2", "version": "2.28.9-1+cuda13.0"}]
    for message in refused(nodes.bring(driver(source, further=further))):
        assert f"{source.settings['url']} has no libnccl2 2.28.9-1+cuda13.0 (it has no version of it)" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_a_disk_without_room_is_named_before_anything_is_installed(nodes, source):
    petabyte = [package._replace(size_kib=10**12) if package.name == "nvidia-driver-cuda" else package for package in apt_repository.driver(OLD)]
    source.repository.offer(petabyte)
    for message in refused(nodes.bring(driver(source))):
        assert "/usr has " in message and "976562500 MiB are needed for nvidia_driver; free some space" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_a_module_that_is_not_built_is_named_and_heals_once_it_can_be(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    nodes.run("touch /run/broken-build")
    for message in refused(nodes.bring(driver(source))):
        assert "nvidia-kernel-open-dkms" in message and "see /var/lib/dkms/nvidia/1/build/make.log" in message
    # Nothing tears apart what is there until somebody repairs it.
    assert all("libnvidia-ml1" in held for held in nodes.held())
    for message in refused(nodes.bring(driver(source))):
        assert "nvidia-kernel-open-dkms" in message and "repair them by hand" in message
    nodes.run("rm /run/broken-build")
    succeeded(nodes.bring(driver(source)))
    assert nodes.versions() == [dict.fromkeys(WHOLE, OLD)] * 2 and nodes.held() == [WHOLE] * 2


@pytest.mark.parametrize("kind", [pytest.param("-open", marks=pytest.mark.matrix), ""])
def test_another_version_replaces_a_module_that_is_not_built(nodes, source, kind):
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    nodes.run(f"echo {OLD} >/run/broken-build")
    for message in refused(nodes.bring(driver(source))):
        assert "nvidia-kernel-open-dkms" in message and "see /var/lib/dkms/nvidia/1/build/make.log" in message
    number = NEW.rpartition("-")[0]
    packages = [{"name": name.replace("-open", kind), "version": f"{number}-*"} for name in PACKAGES]
    succeeded(nodes.bring(driver(source, number, packages=packages)))
    whole = (WHOLE - {"nvidia-kernel-open-dkms"}) | {f"nvidia-kernel{kind}-dkms"}
    assert nodes.versions() == [dict.fromkeys(whole, NEW)] * 2 and nodes.held() == [whole] * 2
    succeeded(nodes.bring(driver(source, number, packages=packages)), changed=False)


def test_a_broken_package_of_somebody_else_is_named_before_anything_changes(nodes, source):
    broken = apt_repository.Package("cuda-broken", "1", slow=True)
    source.repository.offer([*apt_repository.driver(OLD), broken])
    fetch = f"/usr/lib/apt/apt-helper download-file {source.settings['url']}cuda-broken_1_all.deb /tmp/cuda-broken.deb"
    nodes.run(f"touch /run/broken-build && {fetch} && dpkg --install /tmp/cuda-broken.deb; rm /tmp/cuda-broken.deb")
    for message in refused(nodes.bring(driver(source))):
        assert "the packages cuda-broken are broken" in message and "repair them by hand" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_an_update_of_the_lists_by_somebody_else_is_waited_for(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    hold = "import fcntl, time; lists = open('/var/lib/apt/lists/lock', 'w'); fcntl.lockf(lists, fcntl.LOCK_EX); time.sleep(25)"
    nodes.run(f'systemd-run --quiet --collect python3 -c "{hold}"; sleep 1')
    # That apt fails is what this shows: only its words count.
    for text in nodes.run("LC_ALL=C apt-get update 2>&1 || true").values():
        assert "Could not get lock /var/lib/apt/lists/lock" in text, "apt itself does not wait"
    succeeded(nodes.bring(driver(source)))
