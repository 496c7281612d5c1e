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

OLD, NEW = "580.105.08-1", "580.159.03-1ubuntu1"
PACKAGES = ("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager")
FAMILY = ["nvidia-*", "libnvidia-*", "libcuda1", "firmware-nvidia-*"]
WHOLE = {package.name for package in apt_repository.driver(OLD)} - {"nvidia-kernel-dkms"}


def driver(source: conftest.Source, version: str = "580.105.08", **changes: t.Any) -> dict[str, t.Any]:
    """Return the settings of the driver as the plan gives them."""
    return {
        "name": "nvidia_driver",
        "repository": source.settings,
        "packages": [{"name": name, "version": f"{version}-*"} for name in PACKAGES],
        "pins": [{"packages": FAMILY, "version": f"{version}-*"}],
        "files": {"/etc/modprobe.d/onprem-torch-nouveau.conf": "blacklist nouveau\n"},
        "services": ["nvidia-persistenced.service", "nvidia-fabricmanager.service"],
        **changes,
    }


def library(source: conftest.Source, version: str) -> dict[str, t.Any]:
    """Return the settings of NCCL as the plan gives them."""
    names = ["libnccl2", "libnccl-dev"]
    packages = [{"name": name, "version": version} for name in names]
    return {"name": "nccl", "repository": source.settings, "packages": packages, "pins": [{"packages": names, "version": version}]}


def succeeded(answer: dict[str, t.Any]) -> dict[str, t.Any]:
    assert not answer.get("failed"), answer.get("msg")
    return answer


def refused(answer: dict[str, t.Any]) -> str:
    assert answer.get("failed"), answer
    assert "Traceback" not in answer["msg"]
    return str(answer["msg"])


def test_install_then_nothing_to_do(node, source):
    source.repository.offer(apt_repository.driver(OLD))
    planned = succeeded(node.bring(driver(source), check=True))
    assert planned["changed"]
    shown = {entry["after_header"]: entry["after"] for entry in planned["diff"]}
    assert shown["package nvidia-driver-cuda"] == "580.105.08-*\n"
    assert node.versions() == {}, "check mode changes nothing"
    assert "onprem" not in node.run("ls /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/preferences.d")
    answer = succeeded(node.bring(driver(source)))
    assert answer["changed"] and set(node.versions()) == WHOLE and set(node.versions().values()) == {OLD}
    assert node.held() == WHOLE
    assert node.run("systemctl is-enabled nvidia-persistenced nvidia-fabricmanager").split() == ["enabled", "enabled"]
    again = succeeded(node.bring(driver(source)))
    assert not again["changed"] and again["diff"] == []
    assert not succeeded(node.bring(driver(source), check=True))["changed"]


def test_a_full_upgrade_leaves_the_set_alone(node, source):
    source.repository.offer(apt_repository.driver(OLD))
    succeeded(node.bring(driver(source)))
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    node.run("apt-get update")
    upgrade = "DEBIAN_FRONTEND=noninteractive apt-get --yes full-upgrade"
    node.run(upgrade)
    assert set(node.versions().values()) == {OLD}, "pinned and held"
    node.run("rm /etc/apt/preferences.d/onprem-torch-*")
    assert "kept back" in node.run(upgrade)
    assert set(node.versions().values()) == {OLD}, "held alone"
    node.run("apt-mark showhold | xargs apt-mark unhold")
    node.run(upgrade)
    assert set(node.versions().values()) == {NEW}, "without pin and hold the newer one was really on offer"
    succeeded(node.bring(driver(source)))
    assert set(node.versions().values()) == {OLD} and node.held() == WHOLE


def test_one_variable_upgrades_and_downgrades(node, source):
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    for wanted, version in (("580.105.08", OLD), ("580.159.03", NEW), ("580.105.08", OLD)):
        succeeded(node.bring(driver(source, wanted)))
        assert (set(node.versions().values()), node.held()) == ({version}, WHOLE)
        assert not succeeded(node.bring(driver(source, wanted)))["changed"]


def test_other_kernel_modules_replace_the_open_ones(node, source):
    source.repository.offer(apt_repository.driver(OLD))
    succeeded(node.bring(driver(source)))
    packages = [{"name": name.replace("-open", ""), "version": "580.105.08-*"} for name in PACKAGES]
    answer = succeeded(node.bring(driver(source, packages=packages)))
    assert answer["removed"] == ["nvidia-kernel-open-dkms"] and "nvidia-kernel-dkms" in node.held()


def test_sets_beside_each_other_keep_their_own(node, source):
    nccl, toolkit = "2.28.9-1+cuda13.0", "13.0.2-1"
    source.repository.offer([*apt_repository.nccl(nccl), *apt_repository.nccl("2.29.7-1+cuda12.9"), *apt_repository.toolkit("13.0", toolkit)])
    wanted = library(source, nccl)
    succeeded(node.bring(wanted))
    pins = [{"packages": ["cuda-toolkit-13-0"], "version": "13.0.2-*"}]
    tools = {"name": "cuda", "repository": source.settings, "packages": [{"name": "cuda-toolkit-13-0", "version": "13.0.2-*"}], "pins": pins}
    succeeded(node.bring(tools))
    assert node.held() == {"libnccl2", "libnccl-dev", "cuda-toolkit-13-0"}
    assert node.versions() == {"libnccl2": nccl, "libnccl-dev": nccl, "cuda-toolkit-13-0": toolkit, "cuda-nvcc-13-0": toolkit}
    assert not succeeded(node.bring(wanted))["changed"]


@pytest.mark.parametrize("victim", ["dpkg", "play"])
def test_an_interrupted_installation_heals(node, source, victim):
    source.repository.offer(apt_repository.driver(OLD))
    node.run("touch /run/slow-build")
    words = node.module_words(driver(source))
    with subprocess.Popen([str(conftest.ANSIBLE / words[0]), *words[1:]], cwd=conftest.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as play:
        deadline = time.monotonic() + 60
        while not node.run("pgrep -f 'nvidia-kernel-open-dkms.postinst' || true").strip():
            assert time.monotonic() < deadline and play.poll() is None, "the installation never reached the slow package"
            time.sleep(0.2)
        if victim == "play":
            os.killpg(play.pid, signal.SIGKILL)
            node.run("pkill -9 -f AnsiballZ_nvidia_package[s] || true")
        node.run("pkill -9 -x dpkg; pkill -9 -x apt-get; true")
        play.wait(timeout=60)
    node.run("rm -f /run/slow-build; pkill -9 -f 'nvidia-kernel-open-dkms.postins[t]' || true")
    broken = node.run("dpkg --audit; dpkg-query -W -f '${Package} ${db:Status-Status}\\n' | grep half || true")
    assert "nvidia-kernel-open-dkms" in broken, "the installation was really interrupted"
    answer = succeeded(node.bring(driver(source)))
    assert answer["healed"] and set(node.versions()) == WHOLE and node.held() == WHOLE
    assert node.run("dpkg --audit") == ""
    assert not succeeded(node.bring(driver(source)))["changed"]


def test_another_key_than_the_expected_is_refused(node, source, keys):
    source.repository.offer(apt_repository.driver(OLD))
    settings = {**source.settings, "key_fingerprint": keys[1].fingerprint}
    message = refused(node.bring(driver(source, repository=settings)))
    assert keys[0].fingerprint in message and keys[1].fingerprint in message and "refused" in message
    assert "onprem" not in node.run("ls /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/preferences.d")


def test_what_a_stranger_signed_is_refused(node, source, keys):
    source.repository.sign_with(keys[1])
    source.repository.offer(apt_repository.driver(OLD))
    message = refused(node.bring(driver(source)))
    assert f"the repository {source.settings['url']} cannot be used" in message and "NO_PUBKEY" in message or "Missing key" in message
    assert node.versions() == {} and "onprem" not in node.run("ls /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/preferences.d")
    node.run("apt-get update")


def test_an_unreachable_repository_is_named(node, source):
    source.repository.offer(apt_repository.driver(OLD))
    nowhere = f"http://{conftest.BRIDGE}:9/"
    message = refused(node.bring(driver(source, repository={**source.settings, "url": nowhere})))
    assert f"the repository {nowhere} cannot be used" in message and "cuda_repository_url" in message
    assert "onprem" not in node.run("ls /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/preferences.d")
    message = refused(node.bring(driver(source, repository={**source.settings, "key_url": f"{nowhere}key.pub"})))
    assert f"cannot be fetched from {nowhere}key.pub" in message and "cuda_repository_key_url" in message


def test_a_repository_without_the_version_says_what_it_has(node, source):
    source.repository.offer(apt_repository.driver(OLD))
    message = refused(node.bring(driver(source, "570.10.01")))
    assert f"{source.settings['url']} has no nvidia-driver-cuda 570.10.01-* (it has 580.105.08-1)" in message
    assert node.versions() == {}


def test_somebody_elses_hold_is_respected(node, source):
    old, new = "2.28.9-1+cuda13.0", "2.29.7-1+cuda12.9"
    source.repository.offer([*apt_repository.nccl(old), *apt_repository.nccl(new)])
    succeeded(node.bring(library(source, new)))
    succeeded(node.bring(library(source, old)))
    # Without our pins the holds are somebody else's.
    node.run("rm /etc/apt/preferences.d/onprem-torch-nccl.pref")
    message = refused(node.bring(library(source, new)))
    assert f"libnccl2 is held at {old}, but {new} is wanted" in message and "apt-mark unhold libnccl-dev libnccl2" in message
    assert node.versions() == {"libnccl2": old, "libnccl-dev": old}
