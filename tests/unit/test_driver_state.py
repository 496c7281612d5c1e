"""When a reboot is needed."""

from __future__ import annotations

import shutil
import subprocess

import hardware_trees as trees
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import driver_state
from ansible_collections.onprem.torch.plugins.module_utils.driver_state import Kernel


@pytest.mark.parametrize(
    ("found", "asked", "reason"),
    [
        (Kernel(False, "580.105.08", True, False), [], ""),
        (Kernel(False, "580.105.08", True, False), ["nvidia-kernel-open-dkms"], ""),  # it runs already
        (Kernel(False, "", None, False), [], ""),  # loading it may do
        (Kernel(False, "", None, True), [], "the kernel runs nouveau"),
        (Kernel(False, "570.86.15", True, False), [], "the kernel runs nvidia 570.86.15, but 580.105.08 is installed"),
        (Kernel(False, "580.105.08", False, False), [], "the kernel runs the proprietary modules of nvidia, but the open ones are installed"),
        (Kernel(False, "580.105.08", None, False), [], ""),
        (Kernel(True, "570.86.15", True, True), [], ""),  # a container has its host's kernel
        (Kernel(True, "", None, False), ["a", "b"], "a, b asked for it"),
    ],
)
def test_a_reboot_is_needed_where_the_kernel_says_so(found, asked, reason):
    assert driver_state.reboot_reason("nvidia", "580.105.08", "open", found, asked) == reason


def test_the_kernel_is_read_from_its_files(tmp_path):
    assert driver_state.kernel("nvidia", str(tmp_path)) == Kernel(False, "", None, False)
    trees.machine(tmp_path, gpus=1, driver="580.105.08", open_modules=False)
    trees.put(tmp_path, "sys/module/nvidia/version", "580.105.08\n")
    trees.put(tmp_path, "sys/module/nouveau/refcnt", "0")
    trees.put(tmp_path, "run/systemd/container", "systemd-nspawn")
    assert driver_state.kernel("nvidia", str(tmp_path)) == Kernel(True, "580.105.08", False, True)


def test_packages_that_ask_for_a_reboot(tmp_path):
    assert driver_state.asking(str(tmp_path)) == []
    trees.put(tmp_path, "run/reboot-required.pkgs", "linux-base\nnvidia-kernel-open-dkms\nlinux-base\n")
    assert driver_state.asking(str(tmp_path)) == ["linux-base", "nvidia-kernel-open-dkms"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("modprobe: FATAL: Module nvidia not found in directory /lib/modules/6.1.0-30-amd64\n", ["/lib/modules/6.1.0-30-amd64", "DKMS", "make.log"]),
        ("modprobe: ERROR: could not insert 'nvidia': Key was rejected by service\n", ["Secure Boot", "mokutil --import"]),
        ("modprobe: ERROR: could not insert 'nvidia': No such device\n", []),
        ("", []),
    ],
)
def test_a_module_that_no_reboot_would_bring_is_told_at_once(error, words):
    text = driver_state.refusal("nvidia", error)
    assert bool(text) is bool(words) and all(word in text for word in words)


@pytest.mark.skipif(not shutil.which("modprobe"), reason="kmod is needed to ask it")
def test_modprobe_really_says_so():
    error = subprocess.run(["modprobe", "--dry-run", "onprem_torch_none"], capture_output=True, text=True, check=False).stderr
    assert "DKMS has not built it" in driver_state.refusal("onprem_torch_none", error)


@pytest.mark.parametrize(
    ("load", "file", "active", "runs", "sized", "words"),
    [
        ("loaded", "disabled", "inactive", True, True, ["enable", "start"]),
        ("loaded", "disabled", "inactive", True, False, ["enable", "start"]),
        ("loaded", "enabled", "failed", True, True, ["start"]),
        ("loaded", "enabled", "active", True, True, []),
        ("loaded", "enabled", "active", True, False, ["restart"]),
        ("loaded", "linked", "active", False, False, ["enable"]),
        ("loaded", "enabled", "inactive", False, True, []),
        ("not-found", "", "inactive", True, False, []),
    ],
)
def test_what_a_unit_needs_to_run_as_its_file_says(load, file, active, runs, sized, words):
    fields = {"LoadState": load, "UnitFileState": file, "ActiveState": active}
    assert driver_state.service_words(fields, runs, sized) == words


@pytest.mark.parametrize(
    ("load", "file", "active", "words"),
    [
        ("loaded", "enabled", "active", ["disable", "stop"]),
        ("loaded", "enabled", "failed", ["disable"]),
        ("loaded", "disabled", "activating", ["stop"]),
        ("loaded", "disabled", "inactive", []),
        ("not-found", "", "inactive", []),
    ],
)
def test_what_a_unit_needs_to_be_off(load, file, active, words):
    assert driver_state.disabling_words({"LoadState": load, "UnitFileState": file, "ActiveState": active}) == words


def test_the_size_of_a_file_system(tmp_path):
    assert driver_state.gib(str(tmp_path)) > 0 and driver_state.gib(str(tmp_path / "nothing")) == 0
