"""The hardware reader, on a recorded machine and on built ones."""

from __future__ import annotations

import time

import hardware_trees as trees
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import gpu_names, hardware, nvidia_smi


def test_a_recorded_h100(tmp_path):
    found = hardware.collect(str(tmp_path), trees.recorded(tmp_path, "h100_1x_recorded"))
    (gpu,) = found["gpus"]
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"
    assert (gpu["generation"], gpu["architecture"]) == ("Hopper", "sm_90")
    assert gpu["uuid"] == "GPU-d1ece0c1-a0aa-e50e-6534-3833a7d30970"
    assert (gpu["minor"], gpu["nvlinks"], gpu["numa"]) == (0, 0, None)
    assert (gpu["pcie_width"], gpu["pcie_speed_gts"]) == (16, 32.0)
    assert gpu["memory_bytes"] == 81559 * 1024**2
    assert found["usable_gpus"] == [gpu]
    assert found["driver"]["loaded"] == "580.159.04"
    assert found["driver"]["open"] is True
    assert not found["driver"]["mismatch"]
    assert found["fabric"]["required"] is False
    (nic,) = found["nics"]
    assert (nic["interface"], nic["driver"], nic["virtual"], nic["speed_mbits"]) == ("eth0", "virtio_net", True, None)


def test_a_recorded_h200_tells_that_it_is_whole_and_who_drives_it(tmp_path):
    found = hardware.collect(str(tmp_path), trees.recorded(tmp_path, "h200_1x_recorded"))
    (gpu,) = found["gpus"]
    assert (gpu["name"], gpu["architecture"], gpu["memory_bytes"]) == ("NVIDIA H200", "sm_90", 143771 * 1024**2)
    assert (gpu["mig"], gpu["bound"], gpu["answers"], gpu["excluded"]) == (False, "nvidia", True, False)
    assert found["usable_gpus"] == [gpu] and found["driver"]["nvidia_smi"] == ""


@pytest.mark.parametrize(
    ("options", "generation", "architecture", "required"),
    [
        ({"gpus": 8, "device": "0x20b2", "switches": 6, "nics": 8}, "Ampere", "sm_80", True),
        ({"gpus": 8, "device": "0x2330", "switches": 4, "nics": 8}, "Hopper", "sm_90", True),
        ({"gpus": 8, "device": "0x2901", "bridges": 4, "nics": 8}, "Blackwell", "sm_100", True),
        ({"gpus": 4, "device": "0x26b9", "nics": 1}, "Ada", "sm_89", False),
        ({"gpus": 1, "device": "0x1db5"}, "Volta", "sm_70", False),
    ],
)
def test_machines_without_a_driver_are_known_from_sysfs(tmp_path, options, generation, architecture, required):
    found = hardware.collect(str(trees.machine(tmp_path, **options)))
    assert len(found["gpus"]) == options["gpus"] == len(found["usable_gpus"])
    assert {gpu["generation"] for gpu in found["gpus"]} == {generation}
    assert {gpu["architecture"] for gpu in found["gpus"]} == {architecture}
    assert found["nvswitches"] == options.get("switches", 0)
    assert found["fabric"]["required"] is required
    assert found["driver"]["version"] == ""
    assert len([nic for nic in found["nics"] if nic["interface"]]) == options.get("nics", 0)


def test_adapters_tell_speed_socket_and_way_to_each_gpu(tmp_path):
    found = hardware.collect(str(trees.machine(tmp_path, gpus=8, switches=4, nics=8)))
    first = found["nics"][0]
    assert (first["interface"], first["driver"], first["virtual"]) == ("ib0", "mlx5_core", False)
    assert (first["speed_mbits"], first["numa"], first["pcie_width"]) == (400000, 0, 16)
    assert first["rdma"] == [{"device": "mlx5_0", "link_layer": "InfiniBand", "mbits": 400000}]
    ways = [first["gpu_distance"][gpu["pci"]] for gpu in found["gpus"]]
    assert ways == ["PIX", "NODE", "NODE", "NODE", "SYS", "SYS", "SYS", "SYS"]


def test_a_container_may_use_the_gpus_whose_device_files_it_has(tmp_path):
    found = hardware.collect(str(trees.machine(tmp_path, gpus=8, driver="580.95.05", visible=[2, 5])))
    assert [gpu["minor"] for gpu in found["usable_gpus"]] == [2, 5]
    assert len(found["gpus"]) == 8


def test_a_container_without_a_driver_may_use_none(tmp_path):
    trees.machine(tmp_path, gpus=2)
    trees.put(tmp_path, "run/systemd/container", "systemd-nspawn")
    assert hardware.collect(str(tmp_path))["usable_gpus"] == []


def test_no_gpu_is_a_clean_answer(tmp_path):
    found = hardware.collect(str(tmp_path))
    assert (found["gpus"], found["usable_gpus"], found["nics"], found["nvswitches"]) == ([], [], [], 0)
    assert found["driver"] == {
        "version": "",
        "loaded": "",
        "installed": "",
        "open": None,
        "mismatch": False,
        "nouveau": False,
        "peermem": False,
        "peer_memory": False,
        "vgpu": False,
        "nvidia_smi": "",
        "nvidia_smi_hangs": False,
    }


def test_libraries_newer_than_the_loaded_module_are_a_mismatch(tmp_path):
    trees.machine(tmp_path, gpus=1, driver="580.65.06", open_modules=False)
    trees.put(tmp_path, "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.95.05")
    found = hardware.driver(str(tmp_path))
    assert (found["loaded"], found["installed"], found["mismatch"], found["open"]) == ("580.65.06", "580.95.05", True, False)


def test_the_driver_of_a_virtual_gpu_is_told_by_its_licence_daemon(tmp_path):
    trees.put(tmp_path, "usr/bin/nvidia-gridd")
    assert hardware.driver(str(tmp_path))["vgpu"] is True


def test_nouveau_is_seen(tmp_path):
    trees.put(tmp_path, "sys/module/nouveau/refcnt", "1")
    assert hardware.driver(str(tmp_path))["nouveau"] is True


def test_the_slower_end_of_a_pcie_link_counts(tmp_path):
    trees.machine(tmp_path, gpus=1, speed="32.0 GT/s PCIe")
    folder = next((tmp_path / "sys/devices").glob("**/0000:12:00.0"))
    (folder / "max_link_speed").write_text("16.0 GT/s PCIe\n")
    assert hardware.collect(str(tmp_path))["gpus"][0]["pcie_speed_gts"] == 16.0


def test_active_nvlinks_are_counted_by_gpu():
    text = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
    )
    assert hardware.parse_nvlinks(text) == {"GPU-aa": 2, "GPU-bb": 1}


def test_nvidia_smi_that_answers_nonsense_adds_nothing(tmp_path):
    trees.machine(tmp_path, gpus=1, driver="580.95.05")
    found = hardware.collect(str(tmp_path), lambda _words: "Unable to determine the device handle: Unknown Error\n")
    assert found["gpus"][0]["memory_bytes"] is None
    assert found["gpus"][0]["nvlinks"] is None


def test_every_named_product_has_a_generation():
    assert all(gpu_names.lookup(device).architecture.startswith("sm_") for device in gpu_names.NAMES)
    assert list(gpu_names.NAMES) == sorted(gpu_names.NAMES)


@pytest.mark.parametrize(
    ("device", "name", "architecture"),
    [
        (0x1380, "", "sm_50"),  # GeForce GTX 750 Ti
        (0x17FD, "", "sm_52"),  # Tesla M40
        (0x15C2, "", "sm_60"),  # CMP 100-100, a GP100 outside its block
        (0x15F7, "Tesla P100 PCIe 12GB", "sm_60"),
        (0x1B38, "Tesla P40", "sm_61"),
        (0x1DF6, "Tesla V100S PCIe 32GB", "sm_70"),
        (0x1EB8, "Tesla T4", "sm_75"),
        (0x2184, "", "sm_75"),  # GeForce GTX 1660
        (0x20B7, "A30 PCIe", "sm_80"),
        (0x2237, "A10G", "sm_86"),
        (0x25B6, "A2 / A16", "sm_86"),
        (0x27B8, "L4", "sm_89"),
        (0x2329, "H20", "sm_90"),
        (0x23F0, "", "sm_90"),  # a GH100 above its usual block
        (0x2348, "GH200 144GB HBM3e", "sm_90"),
        (0x2941, "GB200", "sm_100"),
        (0x29BC, "B100", "sm_100"),
        (0x2BB4, "RTX PRO 6000 Blackwell Max-Q Workstation Edition", "sm_120"),
        (0x2D04, "", "sm_120"),  # GeForce RTX 5060 Ti
        (0x2E12, "GB10", "sm_121"),
        (0x2F04, "", "sm_120"),  # GeForce RTX 5070
        (0x31C3, "GB300", "sm_103"),
        (0x3021, "", ""),  # GR100
    ],
)
def test_which_product_a_device_id_means(device, name, architecture):
    found = gpu_names.lookup(device)
    assert (found.name, found.architecture) == (f"NVIDIA {name}" if name else "", architecture)


def test_unknown_products_of_a_known_chip_tell_their_generation():
    assert gpu_names.lookup(0x237E) == ("", "Hopper", "sm_90")
    assert gpu_names.lookup(0x0001) == gpu_names.lookup(0x4000) == ("", "", "")
    assert gpu_names.lookup(0x102D) == ("NVIDIA Tesla K80", "Kepler", "sm_37")
    assert gpu_names.lookup(0x15F8).architecture == "sm_60", "a P100 between two blocks of Maxwell"
    assert {gpu_names.lookup(device).architecture for device in (0x0FF6, 0x1023, 0x1180, 0x1287)} <= {"sm_30", "sm_35"}


def test_the_blocks_of_chips_follow_each_other():
    ends = [edge for first, last, _generation, _architecture in gpu_names.CHIPS for edge in (first, last + 1)]
    assert ends == sorted(ends)


def test_this_machine_answers_quickly():
    hardware.collect()
    times = []
    for _round in range(5):
        before = time.process_time()
        hardware.collect()
        times.append(time.process_time() - before)
    assert min(times) < 0.02 or hardware.collect()["gpus"]


def bus(index):
    return f"00000000:{0x10 * (index + 1) + 3:02X}:00.0"


def smi(*indices, cut=()):
    """Return an nvidia-smi that lists some GPUs of a built machine, of which some are cut into instances."""
    lists = "".join(f"{bus(index)}, NVIDIA H100 80GB HBM3, 81559, 9.0\n" for index in indices)
    modes = "".join(f"{bus(index)}, {'Enabled' if index in cut else 'Disabled'}\n" for index in indices)
    return lambda words: lists if words == hardware.QUERY else modes if words == hardware.QUERY_MIG else ""


def test_gpus_that_nvidia_smi_leaves_out_or_that_are_cut_are_told(tmp_path):
    found = hardware.collect(str(trees.machine(tmp_path, gpus=4, driver="580.95.05")), smi(0, 1, 3, cut=[3]))
    assert [gpu["answers"] for gpu in found["gpus"]] == [True, True, False, True]
    assert [gpu["mig"] for gpu in found["gpus"]] == [False, False, None, True]


def test_gpus_that_cannot_be_cut_tell_nothing_of_it():
    assert hardware.parse_mig("00000000:01:00.0, [N/A]\nField \"mig.mode.current\" is not a valid field to query.\n") == {}


def test_an_excluded_gpu_is_of_no_use(tmp_path):
    trees.machine(tmp_path, gpus=2, driver="580.95.05")
    path = tmp_path / "proc/driver/nvidia/gpus/0000:13:00.0/information"
    path.write_text(path.read_text() + "GPU Excluded:\t Yes\n")
    found = hardware.collect(str(tmp_path))
    assert [gpu["pci"] for gpu in found["usable_gpus"]] == ["0000:23:00.0"]


def test_a_bare_node_does_not_use_what_it_keeps_for_virtual_machines(tmp_path):
    trees.machine(tmp_path, gpus=2)
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    trees.link(tmp_path, "sys/bus/pci/devices/0000:13:00.0/driver", str(tmp_path / "sys/bus/pci/drivers/vfio-pci"))
    assert [gpu["pci"] for gpu in hardware.collect(str(tmp_path))["usable_gpus"]] == ["0000:23:00.0"]


def program(tmp_path, script):
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return nvidia_smi.NvidiaSmi(str(path), seconds=0.5)


def test_nvidia_smi_that_hangs_is_given_up_once_and_for_all(tmp_path):
    # A shell that waits for a child which keeps the pipes open is not over when it is killed, as with a dead GPU.
    asked = program(tmp_path, "sleep 30 & wait")
    before = time.monotonic()
    assert asked(["-q"]) == asked(["-q"]) == ""
    assert time.monotonic() - before < 5
    assert asked.hangs and asked.problem == "does not answer within 0.5 s"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo Unable to determine the device handle for GPU0000:66:00.0: Unknown Error; exit 255",
         "fails (Unable to determine the device handle for GPU0000:66:00.0: Unknown Error)"),
        ("exit 9", "fails (exit status 9)"),
        ("echo fine", ""),
    ],
)
def test_why_nvidia_smi_does_not_answer(tmp_path, script, problem):
    asked = program(tmp_path, script)
    assert asked(["-q"]) == ("" if problem else "fine\n")
    assert asked.problem == problem and not asked.hangs


def test_no_nvidia_smi_is_no_problem():
    asked = nvidia_smi.NvidiaSmi("")
    assert asked(["-q"]) == asked.problem == ""
    assert nvidia_smi.NvidiaSmi("/no/such/program").problem == ""


def test_what_nvidia_smi_says_of_itself_is_the_drivers_state(tmp_path):
    trees.machine(tmp_path, gpus=1, driver="580.95.05")
    broken = program(tmp_path, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    state = hardware.collect(str(tmp_path), broken)["driver"]
    assert state["mismatch"] and "version mismatch" in state["nvidia_smi"]
    odd = program(tmp_path, f'case "$1" in --query-gpu=*compute_cap) echo "{bus(0)}, NVIDIA H100, 81559, 9.0";; *) exit 3;; esac')
    assert hardware.collect(str(tmp_path), odd)["driver"]["nvidia_smi"] == "", "no links to tell of"


@pytest.mark.parametrize(
    ("states", "worst"),
    [(["Completed", "Completed"], "Completed"), (["Completed", "In Progress"], "In Progress"), (["N/A"], ""), ([], "")],
)
def test_the_fabric_is_as_far_as_its_last_gpu(states, worst):
    block = "GPU 00000000:1B:00.0\n    Fabric\n        State                             : {0}\n        Status                            : Success\n"
    assert hardware.parse_fabric("".join(block.format(state) for state in states)) == worst


def test_peer_memory_is_the_rdma_stacks(tmp_path):
    trees.put(tmp_path, "proc/kallsyms", "0000000000000000 T ib_register_peer_memory_client\t[ib_core]\n")
    assert hardware.peer_memory(str(tmp_path)) is False, "no adapter"
    trees.put(tmp_path, "sys/class/infiniband/mlx5_0/node_type", "1: CA")
    assert hardware.peer_memory(str(tmp_path)) is True
