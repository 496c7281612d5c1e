"""The driver on a kernel of its own: built by DKMS against real headers, loaded, rebooted into, upgraded with the kernel."""

from __future__ import annotations

import pytest
from conftest import BROKEN, NEW, OLD

GPU = "/sys/bus/pci/devices/0001:00:00.0"


def number(version: str) -> str:
    """Return a package's version without Debian's revision."""
    return version.rpartition("-")[0]


def test_a_bare_machine_runs_nouveau_and_the_plan_says_what_will_be(site):
    # The kernel found the GPU, udev loaded what the kernel brings for it.
    assert site.guest.shell(f"cat {GPU}/vendor {GPU}/class").split() == ["0x10de", "0x030200"]
    assert site.guest.shell("ls -d /sys/module/nouveau").strip() == "/sys/module/nouveau"
    assert site.loaded() == ""
    text = site.playbook("plan")
    assert "580.105.08" in text and "nouveau is loaded and gives way to NVIDIA's driver with the reboot" in text
    assert not site.guest.shell("ls /usr/src | grep nvidia || true").strip(), "the plan changes nothing"


def test_one_run_with_one_reboot_makes_it_right(site):
    boots = site.guest.boots
    kernel = site.guest.shell("uname -r").strip()
    text = site.playbook("provision")
    assert site.guest.boots == boots + 1, "one reboot"
    assert "Reboot into the driver" in text
    kernels = site.guest.shell("ls /boot | grep vmlinuz-; uname -r").split()
    assert kernels == [f"vmlinuz-{kernel}", kernel], "the newest headers bring no newer kernel along"
    assert site.loaded() == number(OLD) and site.loaded("nvidia_uvm") == number(OLD)
    assert site.guest.shell("ls -d /sys/module/nouveau 2>/dev/null || true") == "", "nouveau gave way"
    assert site.guest.shell(f"basename $(readlink {GPU}/driver)").strip() == "nvidia", "the driver has the GPU"
    # DKMS has built it with the headers of the running kernel, which came from Debian's archive.
    assert site.guest.shell("modinfo -F filename nvidia").strip() == f"/lib/modules/{kernel}/updates/dkms/nvidia.ko"
    assert f"nvidia/{number(OLD)}, {kernel}, x86_64: installed" in site.guest.shell("dkms status")
    assert site.guest.shell(f"dpkg-query -W -f $\\{{db:Status-Status\\}} linux-headers-{kernel} linux-headers-amd64") == "installed" * 2
    assert "onprem-torch-nouveau.conf" in site.guest.shell("lsinitramfs /initrd.img")


def test_the_second_run_changes_nothing(site):
    boots = site.guest.boots
    text = site.playbook("provision")
    assert site.changed(text) == 0, text
    assert site.guest.boots == boots


def test_a_module_that_does_not_compile_is_named_and_nothing_reboots(site):
    boots = site.guest.boots
    text = " ".join(site.attempt("provision", nvidia_driver_version=number(BROKEN)).split())
    assert "a kernel module was not built, see /var/lib/dkms/nvidia/580.159.99/build/make.log" in text, text[-4000:]
    assert "too new for this driver" in site.guest.shell("cat /var/lib/dkms/nvidia/580.159.99/build/make.log")
    assert site.guest.boots == boots and site.loaded() == number(OLD), "what runs goes on"


@pytest.mark.parametrize("modules", ["proprietary", "open"])
def test_one_variable_changes_version_and_kind_with_one_reboot(site, modules):
    """The first run comes from the driver that did not compile."""
    boots = site.guest.boots
    version = {"proprietary": NEW, "open": OLD}[modules]
    site.playbook("provision", nvidia_driver_version=number(version), nvidia_driver_kernel_modules=modules)
    assert site.guest.boots == boots + 1
    assert site.loaded() == number(version)
    assert ("Open Kernel Module" in site.guest.shell("cat /proc/driver/nvidia/version")) is (modules == "open")


def test_a_kernel_upgrade_brings_the_driver_along(site):
    before = site.guest.shell("uname -r").strip()
    upgrade = "export DEBIAN_FRONTEND=noninteractive; apt-get --quiet=2 update && apt-get --quiet=2 --yes full-upgrade"
    site.guest.shell(upgrade, timeout=1800)
    if len(site.guest.shell("ls /boot | grep vmlinuz-").split()) < 2:
        pytest.skip("Debian has no newer kernel among its security updates now")
    site.guest.reboot()
    assert site.guest.shell("uname -r").strip() != before, "the newer kernel runs"
    assert site.loaded() == number(OLD), "with the driver that was built for it"
    assert site.changed(site.playbook("provision")) == 0
