"""What is reported with advice and never changed."""

from __future__ import annotations

import hardware_trees as trees
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import hardware, host_settings

GIB = 1024**3


def capabilities(*entries):
    """Return a configuration space with extended capabilities: id and the 16 bits of a control register each."""
    config = bytearray(4096)
    offset = 0x100
    for index, (number, control) in enumerate(entries):
        following = offset + 0x20 if index + 1 < len(entries) else 0
        config[offset : offset + 4] = (number | 1 << 16 | following << 20).to_bytes(4, "little")
        config[offset + 6 : offset + 8] = control.to_bytes(2, "little")
        offset += 0x20
    return bytes(config)


@pytest.mark.parametrize(
    ("config", "redirects"),
    [
        (capabilities((0x000D, 0x1D)), True),
        (capabilities((0x0001, 0xFFFF), (0x000D, 0x04)), True),
        (capabilities((0x000D, 0x01)), False),
        (capabilities((0x000D, 0x00)), False),
        (capabilities((0x0001, 0xFFFF)), False),
        (capabilities((0x000D, 0x1D))[:256], False),
        (b"", False),
    ],
)
def test_acs_redirects_are_read_from_the_control_register(config, redirects):
    assert host_settings.acs_redirects(config) is redirects


def test_a_list_of_capabilities_that_bites_its_tail_ends():
    config = bytearray(capabilities((0x0001, 0)))
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    assert host_settings.acs_redirects(bytes(config)) is False


def test_bridges_with_acs_are_named(tmp_path):
    trees.machine(tmp_path, gpus=2)
    bridge = tmp_path / "sys/bus/pci/devices/0000:10:01.0"
    (bridge / "config").write_bytes(capabilities((0x000D, 0x1D)))
    found = hardware.collect(str(tmp_path))
    assert found["settings"]["acs_bridges"] == ["0000:10:01.0"]


def advice(memory=2048, **changes):
    gpu = {"pci": "0000:13:00.0", "pcie_width": 16, "pcie_max_width": 16}
    settings = {"iommu": "", "acs_bridges": [], "governor": "performance", "secure_boot": False, "shm_bytes": 1024 * GIB, "container": False}
    nic = {"interface": "ib0", "rdma": [{"device": "mlx5_0"}], "virtual": False, "pcie_width": 16, "pcie_max_width": 16}
    hardware_found = {
        "usable_gpus": changes.pop("gpus", [gpu, gpu]),
        "nics": changes.pop("nics", [nic]),
        "fabric": {"required": changes.pop("switched", False)},
        "settings": {**settings, **changes},
    }
    return host_settings.advice(hardware_found, memory * GIB)


def test_a_good_node_is_told_nothing():
    assert advice() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iommu": "on"}, "iommu=pt"),
        ({"acs_bridges": ["a", "b"]}, "at 2 bridges"),
        ({"governor": "powersave"}, "governor is powersave"),
        ({"secure_boot": True}, "mokutil"),
        ({"shm_bytes": 64 * 1024**2}, "nccl_shm_gib: 1024"),
        ({"gpus": [{"pci": "0000:13:00.0", "pcie_width": 8, "pcie_max_width": 16}]}, "GPU 0000:13:00.0 uses 8 of its 16 PCIe lanes; look again while it works"),
        ({"nics": [{"interface": "ib3", "rdma": [], "virtual": False, "pcie_width": 4, "pcie_max_width": 16}]}, "adapter ib3 uses 4 of its 16"),
    ],
)
def test_advice_names_what_is_found_and_what_to_do(changes, words):
    (line,) = advice(**changes)
    assert words in line


@pytest.mark.parametrize(
    "changes",
    [
        {"iommu": "pt"},
        {"iommu": "on", "nics": [], "switched": True},  # the GPUs talk over NVSwitches alone
        {"acs_bridges": ["a"], "container": True},
        {"governor": ""},
        {"gpus": [], "governor": "powersave", "iommu": "on"},
    ],
)
def test_what_does_no_harm_is_not_spoken_of(changes):
    assert advice(**changes) == []
