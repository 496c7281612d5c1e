"""What lies on a node after the roles, as its administrator sees it."""

from __future__ import annotations

import pytest

# The manifest's driver by the distribution's release, and a newer one that the mirror has.
DRIVERS = {"12": ("580.105.08-1", "580.159.03-1"), "13": ("590.48.01-1", "595.71.05-1")}
DRIVER = ("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager", "libcuda1")
PACKAGES = {
    "cuda-toolkit-13-0": "13.0.2-1",
    "libnccl2": "2.28.9-1+cuda13.0",
    "libnccl-dev": "2.28.9-1+cuda13.0",
}


def drivers(host):
    return DRIVERS[host.system_info.release.split(".")[0]]


@pytest.mark.parametrize("name", [*DRIVER, *PACKAGES])
def test_packages_have_their_exact_version_and_are_held(host, name):
    assert host.package(name).version == PACKAGES.get(name, drivers(host)[0])
    assert name in host.check_output("apt-mark showhold").split()


def test_apt_prefers_the_pinned_version(host):
    text = host.check_output("apt-cache policy nvidia-driver-cuda")
    wanted, newer = drivers(host)
    assert f"Candidate: {wanted}" in text and newer in text, "a newer one is on offer"


def test_the_repository_is_signed_by_a_key_of_its_own(host):
    text = host.file("/etc/apt/sources.list.d/onprem-torch-nvidia.sources").content_string
    assert "URIs: file:///srv/mirror/nvidia/debian" in text and "Signed-By: /etc/apt/keyrings/onprem-torch-nvidia." in text


@pytest.mark.parametrize("unit", ["nvidia-persistenced", "nvidia-fabricmanager", "onprem-torch-gpu-devices"])
def test_services_start_at_boot(host, unit):
    assert host.service(unit).is_enabled


def test_nccl_gets_the_training_interface(host):
    assert "NCCL_SOCKET_IFNAME==host0\n" in host.file("/etc/nccl.conf").content_string


def test_nouveau_is_kept_out(host):
    assert "blacklist nouveau\n" in host.file("/etc/modprobe.d/onprem-torch-nouveau.conf").content_string
