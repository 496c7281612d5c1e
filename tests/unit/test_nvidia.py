"""What of NVIDIA's software a node gets: hardware x distribution x variables, as tables."""

from __future__ import annotations

import typing as t

import hardware_trees
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import hardware, nvidia
from ansible_collections.onprem.torch.plugins.plugin_utils import manifest

MANIFEST = manifest.load()
A100, H100, B200, L40S, V100, RTX5090 = "0x20b2", "0x2330", "0x2901", "0x26b9", "0x1db5", "0x2b85"
TORCH = "2.13.0"


def machine(tmp_path: t.Any, **shape: t.Any) -> dict[str, t.Any]:
    return hardware.collect(root=str(hardware_trees.machine(tmp_path, **shape)))


def node(found: dict[str, t.Any], distribution: str = "debian-12", **changes: t.Any) -> dict[str, t.Any]:
    name, version = distribution.split("-")
    return {
        "hardware": found,
        "distribution": {"id": name, "version": version, "name": f"{name} {version}"},
        "architecture": "x86_64",
        "kernel": "6.1.0-1-amd64",
        "disk": {},
        **changes,
    }


def decide(found: dict[str, t.Any], distribution: str = "debian-12", changes: t.Any = None, **variables: t.Any) -> tuple[dict[str, t.Any], list[str]]:
    made = {"pytorch_version": TORCH, **variables}
    decisions, problems = nvidia.decide_all({"n1": (node(found, distribution, **(changes or {})), made)}, MANIFEST)
    return decisions["n1"], [problem.sentence() for problem in problems]


def names(packages: list[dict[str, str]]) -> list[str]:
    return [package["name"] for package in packages]


# shape of the machine, distribution, line, kernel modules, packages beside the headers, services beside persistenced
TABLE = [
    ("1xH100", {"gpus": 1, "device": H100}, "debian-12", "13.2", "open", ["nvidia-kernel-open-dkms", "nvidia-driver-cuda"], []),
    ("8xA100", {"gpus": 8, "device": A100, "switches": 6}, "ubuntu-22.04", "13.2", "open", ["nvidia-dkms-open", "libnvidia-compute", "nvidia-fabricmanager"], ["fm"]),
    ("8xH100", {"gpus": 8, "device": H100, "switches": 4}, "debian-13", "13.2", "open", ["nvidia-kernel-open-dkms", "nvidia-driver-cuda", "nvidia-fabricmanager"], ["fm"]),
    ("8xH100", {"gpus": 8, "device": H100, "switches": 4}, "ubuntu-24.04", "13.2", "open", ["nvidia-dkms-open", "libnvidia-compute", "nvidia-fabricmanager"], ["fm"]),
    ("8xB200", {"gpus": 8, "device": B200, "bridges": 4}, "ubuntu-24.04", "13.2", "open", ["nvidia-dkms-open", "libnvidia-compute", "nvidia-fabricmanager", "nvlsm", "libnvsdm"], ["fm"]),
    ("4xL40S", {"gpus": 4, "device": L40S}, "debian-12", "13.2", "open", ["nvidia-kernel-open-dkms", "nvidia-driver-cuda"], []),
    # Volta: no torch for CUDA 13, no open modules, no branch after 580.
    ("4xV100", {"gpus": 4, "device": V100}, "debian-12", "12.6", "proprietary", ["nvidia-kernel-dkms", "nvidia-driver-cuda"], []),
    ("4xV100", {"gpus": 4, "device": V100}, "ubuntu-22.04", "12.6", "proprietary", ["nvidia-dkms-580", "libnvidia-compute-580", "nvidia-utils-580", "nvidia-compute-utils-580"], []),
    ("2x5090", {"gpus": 2, "device": RTX5090}, "ubuntu-24.04", "13.2", "open", ["nvidia-dkms-open", "libnvidia-compute"], []),
]


@pytest.mark.parametrize(("shape", "distribution", "line", "modules", "packages", "services"), [row[1:] for row in TABLE], ids=[f"{row[0]}-{row[2]}" for row in TABLE])
def test_a_bare_node_gets_the_newest_line_that_fits(tmp_path, shape, distribution, line, modules, packages, services):
    decision, problems = decide(machine(tmp_path, **shape), distribution)
    assert problems == []
    assert decision["line"] == line
    assert decision["driver"]["action"] == "install"
    assert decision["driver"]["modules"] == modules
    assert names(decision["driver"]["packages"]) == ["linux-headers-6.1.0-1-amd64", *packages]
    wanted = {"fm": "nvidia-fabricmanager.service"}
    assert decision["driver"]["services"] == ["nvidia-persistenced.service", *(wanted[word] for word in services)]
    version = MANIFEST["lines"][line]["driver"]
    pinned = [package["version"] for package in decision["driver"]["packages"] if package["name"].startswith(("nvidia-", "libnvidia-"))]
    assert set(pinned) == {f"{version}-*"}


def test_a_node_without_a_gpu_gets_nothing(tmp_path):
    decision, problems = decide(machine(tmp_path))
    assert (decision["line"], decision["skip"], decision["driver"]["action"], problems) == ("cpu", True, "none", [])
    assert decision["torch_index"].endswith("/whl/cpu")


def test_a_node_without_a_gpu_gets_the_driver_where_it_is_asked_for(tmp_path):
    decision, problems = decide(machine(tmp_path), cuda_version="13.0", nvidia_driver_without_gpu=True)
    assert decision["driver"]["action"] == "install" and problems == []


@pytest.mark.parametrize(
    ("driver", "variables", "action", "version"),
    [
        ("580.126.09", {}, "keep", "580.126.09"),
        ("580.126.09", {"nvidia_driver_version": "580.95.05"}, "install", "580.95.05"),
        ("580.126.09", {"nvidia_driver_version": "580"}, "install", "580"),
        ("550.54.15", {}, "install", "595.71.05"),
        ("550.54.15", {"cuda_version": "12.6"}, "keep", "550.54.15"),
        ("470.82.01", {"cuda_version": "12.6"}, "install", "580.159.03"),
        ("595.71.05", {}, "install", "595.71.05"),
    ],
)
def test_a_good_driver_is_left_alone(tmp_path, driver, variables, action, version):
    decision, problems = decide(machine(tmp_path, gpus=8, device=H100, switches=4, driver=driver), **variables)
    assert problems == []
    assert (decision["driver"]["action"], decision["driver"]["version"]) == (action, version)
    manager = [package for package in decision["driver"]["packages"] if package["name"] == "nvidia-fabricmanager" or "fabricmanager-" in package["name"]]
    assert [package["version"] for package in manager] == [nvidia.pattern(version)], "the fabric manager has the driver's own version"


def test_only_another_driver_or_nouveau_need_a_reboot(tmp_path):
    fresh = machine(tmp_path / "a", gpus=1)
    assert decide(fresh)[0]["reboot"] is False
    fresh["driver"]["nouveau"] = True
    assert decide(fresh)[0]["reboot"] is True
    old = machine(tmp_path / "b", gpus=1, driver="470.82.01")
    assert decide(old)[0]["reboot"] is True
    right = machine(tmp_path / "c", gpus=1, driver=MANIFEST["lines"]["13.2"]["driver"])
    assert decide(right)[0]["reboot"] is False


@pytest.mark.parametrize(
    ("shape", "variables", "sentence"),
    [
        ({"gpus": 1}, {"cuda_version": "12.7"}, "cuda_version is '12.7', but one of 12.6, 12.8, 13.0, 13.2, cpu was expected; set cuda_version: '12.6', the nearest."),
        ({"gpus": 1}, {"cuda_version": "14.0"}, "cuda_version is '14.0', but one of 12.6, 12.8, 13.0, 13.2, cpu was expected; set cuda_version: '13.0', the nearest."),
        ({"gpus": 1}, {"cuda_version": "12.8"}, "pytorch_version is 2.13.0, which has no wheels for CUDA 12.8; set cuda_version: '13.2' or one of the torch versions 2.11.0, 2.10.0, 2.9.1, 2.8.0."),
        (
            {"gpus": 1, "device": V100},
            {"cuda_version": "13.0"},
            "n1: NVIDIA Tesla V100 SXM2 32GB (compute capability 7.0) is too old for CUDA 13.0, whose torch wheels are built for 7.5 to 12.1; set cuda_version: '12.6'.",
        ),
        (
            {"gpus": 8, "device": B200, "bridges": 4},
            {"cuda_version": "12.6"},
            "n1: NVIDIA B200 (compute capability 10.0) is too new for CUDA 12.6, whose torch wheels are built for 5.0 to 9.0; set cuda_version: '13.2'.",
        ),
        (
            {"gpus": 8, "device": B200, "bridges": 4},
            {"nvidia_driver_modules": "proprietary"},
            "n1: nvidia_driver_modules is proprietary, but blackwell GPUs need the open kernel modules; set nvidia_driver_modules: auto.",
        ),
        (
            {"gpus": 1, "device": H100, "driver": "550.54.15"},
            {"cuda_version": "13.0", "nvidia_driver_manage": False},
            "n1: its NVIDIA driver is 550.54.15, but CUDA 13.0 needs 580.65.06 or newer; let nvidia_driver_manage be true, or update the driver yourself, or cuda_version: '12.8'.",
        ),
        (
            {"gpus": 1, "device": H100},
            {"nvidia_driver_manage": False, "cuda_version": "13.0"},
            "n1: it has no NVIDIA driver and nvidia_driver_manage is false; install a driver or set nvidia_driver_manage: true.",
        ),
        (
            {"gpus": 1, "device": H100},
            {"nvidia_driver_version": "550.54.15", "cuda_version": "13.0"},
            "n1: nvidia_driver_version is 550.54.15, but CUDA 13.0 needs 580.65.06 or newer; set nvidia_driver_version: 580.159.03, or cuda_version: '12.8'.",
        ),
        (
            {"gpus": 1, "device": V100},
            {"nvidia_driver_version": "595.71.05", "cuda_version": "12.6"},
            "n1: nvidia_driver_version is 595.71.05, but branch 580 is the last that knows Volta GPUs; set nvidia_driver_version: 580.159.03.",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, shape, variables, sentence):
    _decision, problems = decide(machine(tmp_path, **shape), **variables)
    assert problems == [sentence]


def test_a_foreign_driver_lowers_the_line_that_is_chosen(tmp_path):
    found = machine(tmp_path, gpus=8, device=H100, driver="550.54.15")
    decision, problems = decide(found, nvidia_driver_manage=False)
    assert (decision["line"], decision["driver"]["action"], problems) == ("12.6", "check", [])


def test_an_unknown_distribution_is_named(tmp_path):
    _decision, problems = decide(machine(tmp_path, gpus=1), "fedora-40")
    assert len(problems) == 1 and "fedora 40 on x86_64 has no repository in the manifest" in problems[0]


def test_no_space_for_the_toolkit_is_named(tmp_path):
    _decision, problems = decide(machine(tmp_path, gpus=1), changes={"disk": {"/usr/local": 10**9}}, cuda_toolkit=True)
    assert problems == ["n1: /usr/local has 1.0 GB free, but cuda-toolkit-13-2 takes about 8 GB; free space, or set cuda_toolkit: false, since torch needs no toolkit."]


@pytest.mark.parametrize(
    ("distribution", "url", "key"),
    [
        ("debian-12", "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/", "3bf863cc.pub"),
        ("debian-13", "https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/", "8793F200.pub"),
        ("ubuntu-22.04", "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2204/x86_64/", "3bf863cc.pub"),
        ("ubuntu-24.04", "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/", "3bf863cc.pub"),
    ],
)
def test_the_repository_follows_the_distribution(tmp_path, distribution, url, key):
    found = machine(tmp_path, gpus=1)
    source = decide(found, distribution)[0]["repository"]
    assert (source["url"], source["key"]) == (url, url + key)
    mirrored = decide(found, distribution, cluster_mirror="http://198.18.0.1/mirror")[0]["repository"]
    assert mirrored["url"] == url.replace("https://", "http://198.18.0.1/mirror/") and mirrored["fingerprint"] == source["fingerprint"]


def test_a_container_keeps_its_hosts_driver(tmp_path):
    hardware_trees.machine(tmp_path, gpus=8, device=H100, switches=4, driver="580.126.09", visible=[3])
    hardware_trees.put(tmp_path, "run/systemd/container", "systemd-nspawn\n")
    decision, problems = decide(hardware.collect(root=str(tmp_path)), cuda_version="13.0")
    assert problems == []
    assert (decision["gpus"], decision["driver"]["action"], decision["fabric_manager"], decision["driver"]["packages"]) == (1, "check", False, [])


def test_the_manifest_is_consistent():
    for name, line in MANIFEST["lines"].items():
        assert nvidia.at_least(line["driver"], line["driver_minimum"]), name
        assert line["toolkit"]["package"] == f"cuda-toolkit-{name.replace('.', '-')}"
        assert line["toolkit"]["version"].startswith(f"{name}.")
        assert line["torch_index"].endswith(f"/cu{name.replace('.', '')}")
        assert line["torch"] and line["capabilities"][0] < line["capabilities"][1]
    for entry in MANIFEST["distributions"].values():
        assert entry["names"] in MANIFEST["names"] and entry["key"] in MANIFEST["repository"]["keys"]
