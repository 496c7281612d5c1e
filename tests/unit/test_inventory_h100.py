"""The example that people copy: Ansible reads it, and it plans two nodes of eight H100 without a problem."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hardware_trees as trees
import pytest
from ansible.parsing.dataloader import DataLoader
from ansible_collections.onprem.torch.plugins.module_utils import hardware, job_state
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog
from builders import MANIFEST, RELEASE, interface, node, reader

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = ROOT / "inventories" / "h100"


@pytest.fixture(scope="module")
def hosts() -> dict:
    """Return each host's variables as Ansible reads them."""
    program = Path(sys.executable).parent / "ansible-inventory"
    words = [str(program), "-i", str(INVENTORY), "--list"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "WARNING" not in answer.stderr
    found = json.loads(answer.stdout)
    assert found["train"]["hosts"] == ["gpu1", "gpu2"]
    return found["_meta"]["hostvars"]


@pytest.fixture
def planned(hosts, tmp_path) -> dict:
    """Return the plan over two bare nodes."""
    source = reader(hosts)
    made = []
    for number, name in enumerate(hosts, start=1):
        host, problems = source.host(name)
        assert problems == []
        found = node(number, interfaces=[
            interface("lo", "127.0.0.1/8"),
            interface("eth0", f"10.10.0.1{number}/24"),
            interface("ib0", f"10.20.0.1{number}/24"),
        ])
        found["hardware"] = hardware.collect(str(trees.machine(tmp_path / name, **trees.MACHINES["8x H100"])))
        host.node = found
        made.append(host)
    plan, problems = planning.make("train", made, RELEASE, MANIFEST)
    assert [problem.sentence() for problem in problems] == []
    return plan


def test_its_names_are_those_of_the_roles(hosts):
    known = catalog.load(DataLoader()).specs
    own = {name for name in hosts["gpu1"] if not name.startswith("ansible_")}
    assert own and own <= set(known)


def test_two_nodes_of_eight_gpus_train_over_infiniband(planned):
    assert planned["job"]["world_size"] == 16
    assert planned["job"]["master_addr"] == "10.20.0.11"
    assert {entry["interface"] for entry in planned["nodes"].values()} == {"ib0"}
    assert planned["cuda_version"] == "13.0"


def test_bare_nodes_get_driver_fabric_manager_and_nccls_configuration(planned):
    for entry in planned["nodes"].values():
        stack = entry["nvidia"]
        names = [package["name"] for package in stack["driver"]["settings"]["packages"]]
        assert stack["driver"]["kernel_modules"] == "open" and stack["driver"]["gpudirect"] == "dma-buf"
        assert "nvidia-kernel-open-dkms" in names and "nvidia-fabricmanager" in names
        # With the equals sign, since mlx5_1 alone is a prefix of mlx5_10 (NCCL, "NCCL_IB_HCA").
        assert "NCCL_IB_HCA==mlx5_0,mlx5_1" in stack["nccl"]["settings"]["files"]["/etc/nccl.conf"]
        assert "NCCL_SOCKET_IFNAME==ib0\n" in stack["nccl"]["settings"]["files"]["/etc/nccl.conf"]
        assert not stack["cuda"]["wanted"]
        assert entry["pytorch"]["extra_index_urls"] == ["https://download.pytorch.org/whl/cu130"]


def test_the_plan_says_what_is_installed_where(planned):
    text = "\n".join(job_state.plan_lines(planned))
    assert "580.105.08 open, dma-buf" in text
    assert "installs on gpu1, gpu2: linux-headers-6.1.0 nvidia-driver-cuda=580.105.08-*" in text
    assert "CUDA line 13.0" in text
