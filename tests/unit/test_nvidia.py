"""Every decision: hardware × distribution × variables → packages, services, reboot, problems."""

from __future__ import annotations

import hardware_trees as trees
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, gpu_names, hardware, nvidia, nvidia_facts, pytorch_plan
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from builders import MANIFEST, RELEASE, host, node

DEBIAN = {"id": "debian", "version": "12", "name": "Debian GNU/Linux 12 (bookworm)"}
TRIXIE = {"id": "debian", "version": "13", "name": "Debian GNU/Linux 13 (trixie)"}
JAMMY = {"id": "ubuntu", "version": "22.04", "name": "Ubuntu 22.04.5 LTS"}
NOBLE = {"id": "ubuntu", "version": "24.04", "name": "Ubuntu 24.04.3 LTS"}
ROCKY = {"id": "rocky", "version": "9.5", "name": "Rocky Linux 9.5"}
H100 = {"gpus": 8, "device": "0x2330", "switches": 4}
A100 = {"gpus": 8, "device": "0x20b2", "switches": 6}
B200 = {"gpus": 8, "device": "0x2901", "bridges": 4}
L40S = {"gpus": 4, "device": "0x26b9"}
V100 = {"gpus": 4, "device": "0x1db5"}
K80 = {"gpus": 2, "device": "0x102d"}


def found(folder, machine, distribution=None, **changes):
    made = node(distribution=distribution or DEBIAN, architecture="x86_64", kernel="6.1.0-30-amd64")
    made["hardware"] = {**hardware.collect(str(trees.machine(folder, **machine))), **changes}
    return made


def decide(findings, **variables):
    variables = host("n1", found=findings, **variables).variables
    line, decisions, problems = nvidia.decide_all([("n1", variables, findings)], MANIFEST, {"n1": "ib0"})
    return line, decisions.get("n1", {}), [problem.sentence() for problem in problems]


def planned(findings, **variables):
    """Return the problems of the whole plan."""
    return [problem.sentence() for problem in planning.make("train", [host("n1", found=findings, **variables)], RELEASE, MANIFEST)[1]]


def names(decision):
    return [entry["name"] for entry in decision["driver"]["settings"]["packages"]]


@pytest.mark.parametrize(
    ("machine", "distribution", "modules", "packages", "fabric"),
    [
        (H100, DEBIAN, "open", ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager"], True),
        (A100, TRIXIE, "open", ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager"], True),
        (L40S, DEBIAN, "open", ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"], False),
        (V100, DEBIAN, "proprietary", ["nvidia-driver-cuda", "nvidia-kernel-dkms", "nvidia-persistenced"], False),
        (
            H100,
            NOBLE,
            "open",
            ["nvidia-headless-580-open", "nvidia-utils-580", "nvidia-compute-utils-580", "nvidia-persistenced", "nvidia-fabricmanager"],
            True,
        ),
        (
            B200,
            NOBLE,
            "open",
            ["nvidia-headless-580-open", "nvidia-utils-580", "nvidia-compute-utils-580", "nvidia-persistenced", "nvidia-fabricmanager", "nvlsm"],
            True,
        ),
        (V100, JAMMY, "proprietary", ["nvidia-headless-580", "nvidia-utils-580", "nvidia-compute-utils-580", "nvidia-persistenced"], False),
    ],
)
def test_a_bare_node_gets_the_driver_of_its_gpus_and_distribution(tmp_path, machine, distribution, modules, packages, fabric):
    _line, decision, problems = decide(found(tmp_path, machine, distribution))
    assert problems == []
    assert decision["driver"]["action"] == "install"
    assert decision["driver"]["kernel_modules"] == modules
    assert names(decision) == ["linux-headers-6.1.0-30-amd64", *packages]
    settings = decision["driver"]["settings"]
    versions = {entry["version"] for entry in settings["packages"] if entry["name"].startswith("nvidia")}
    version = "590.48.01-*" if distribution == TRIXIE else "580.105.08-*"
    assert versions == {version}
    assert settings["pins"][0]["version"] == version
    assert ("nvidia-fabricmanager.service" in settings["services"]) is fabric
    folder = {"12": "debian12", "13": "debian13", "22.04": "ubuntu2204", "24.04": "ubuntu2404"}[distribution["version"]]
    assert settings["repository"]["url"] == f"https://developer.download.nvidia.com/compute/cuda/repos/{folder}/x86_64/"


@pytest.mark.parametrize(
    ("running", "images", "headers"),
    [
        ("6.1.0-30-amd64", [], ["6.1.0-30-amd64"]),
        ("6.1.0-30-amd64", ["6.1.0-28-amd64", "6.1.0-30-amd64", "amd64"], ["6.1.0-30-amd64", "amd64"]),
        ("6.1.0-9-amd64", ["6.1.0-10-amd64"], ["6.1.0-9-amd64", "6.1.0-10-amd64"]),
        ("6.12.48+deb13-cloud-amd64", ["6.12.57+deb13-cloud-amd64", "cloud-amd64"], ["6.12.48+deb13-cloud-amd64", "6.12.57+deb13-cloud-amd64", "cloud-amd64"]),
        ("6.8.0-45-generic", ["6.8.0-90-generic", "generic-hwe-24.04"], ["6.8.0-45-generic", "6.8.0-90-generic", "generic-hwe-24.04"]),
        ("6.8.0-45-generic", ["unsigned-6.8.0-90-generic", "6.8.0-90-generic-dbg"], ["6.8.0-45-generic"]),
        ("6.1.0-30-amd64", ["6.1.0-31-amd64-unsigned"], ["6.1.0-30-amd64"]),
    ],
)
def test_kernels_that_boot_later_get_their_headers_too(tmp_path, running, images, headers):
    findings = found(tmp_path, L40S)
    entry = {"version": "1", "want": "install", "flag": "ok", "state": "installed"}
    findings.update(kernel=running, packages={f"linux-image-{name}": entry for name in images})
    _line, decision, problems = decide(findings)
    assert problems == []
    assert [name for name in names(decision) if name.startswith("linux-")] == [f"linux-headers-{name}" for name in headers]


@pytest.mark.parametrize(
    ("machine", "variables", "line"),
    [
        (H100, {}, "13.0"),
        (B200, {}, "13.0"),
        # torch 2.11 left Volta out of the builds for 12.8 and 12.9.
        (V100, {}, "12.6"),
        (V100, {"pytorch_version": ""}, "12.6"),
        (V100, {"pytorch_version": "2.11.0"}, "12.6"),
        (V100, {"pytorch_version": "2.10.0"}, "12.9"),
        (H100, {"pytorch_version": "2.13.0+cu126"}, "12.6"),
        (H100, {"pytorch_version": "2.13.0+cu130"}, "13.0"),
        (V100, {"pytorch_index_url": "https://own/simple"}, "12.9"),
        (H100, {"pytorch_version": "2.14.0"}, "13.0"),
        ({"gpus": 1, "device": "0x15f8"}, {}, "12.6"),
        (H100, {"cuda_version": "12.6"}, "12.6"),
        (H100, {"pytorch_version": "2.6.0"}, "12.6"),
        (H100, {"pytorch_version": "2.7.1"}, "12.8"),
        ({}, {}, "cpu"),
    ],
)
def test_the_newest_line_that_fits_is_taken(tmp_path, machine, variables, line):
    chosen, _decision, problems = decide(found(tmp_path, machine), **variables)
    assert problems == []
    assert chosen["name"] == line
    assert chosen["torch_index"].endswith("cpu" if line == "cpu" else "cu" + line.replace(".", ""))


@pytest.mark.parametrize(
    ("machine", "variables", "words"),
    [
        (H100, {"cuda_version": "12.7"}, ["cuda_version is '12.7'", "13.0, 12.9, 12.8, 12.6, cpu", "nearest"]),
        (V100, {"cuda_version": "13.0"}, ["n1: ", "V100", "sm_70", "not supported", "cuda_version: '12.6'"]),
        (V100, {"cuda_version": "12.9"}, ["V100", "not supported by torch 2.13.0 for CUDA 12.9", "cuda_version: '12.6'"]),
        (V100, {"cuda_version": "13.0", "pytorch_version": "2.9.0"}, ["cuda_version: '12.9'"]),
        (B200, {"cuda_version": "12.6", "pytorch_version": "2.6.0"}, ["torch 2.6.0", "cuda_version: '13.0' and a pytorch_version from 2.9.0 on"]),
        (H100, {"cuda_version": "12.9", "pytorch_version": "2.14.0"}, ["2.8.0 to 2.13.0", "cuda_version: '13.0'"]),
        (B200, {"cuda_version": "12.6"}, ["B200", "sm_100", "cuda_version: '13.0'"]),
        (
            H100,
            {"pytorch_version": "2.13.0+cu126", "cuda_version": "13.0"},
            ["2.13.0+cu126", "the line is 13.0", "cu130", "cuda_version: '12.6', or leave +cu126 out"],
        ),
        (H100, {"pytorch_version": "2.13.0+cpu"}, ["2.13.0+cpu", "cuda_version: 'cpu', or leave +cpu out"]),
        (K80, {}, ["n1: ", "Tesla K80 (sm_37)", "any CUDA line", "take the host out of the group"]),
        ({"gpus": 1, "device": "0x06d1"}, {"cuda_version": "12.6"}, ["Fermi or older (sm_20)", "take the host out of the group"]),
        (H100, {"cuda_version": "12.8"}, ["pytorch_version is 2.13.0", "2.7.0 to 2.11.0", "cuda_version: '13.0'"]),
        (H100, {"nvidia_driver_manage": False}, ["no driver", "nvidia_driver_manage: true"]),
        (H100, {"nvidia_driver_version": "580"}, ["nvidia_driver_version is '580'", "all of its numbers"]),
        (H100, {"nvidia_driver_version": "570.86.15", "cuda_version": "13.0"}, ["570.86.15", "CUDA 13.0 needs 580.65.06"]),
        (V100, {"nvidia_driver_version": "590.44.01"}, ["590.44.01", "last one", "sm_70"]),
        (B200, {"nvidia_driver_version": "550.90.07", "cuda_version": "12.9"}, ["Blackwell", "570"]),
        (V100, {"nvidia_driver_kernel_modules": "open"}, ["open modules need Turing", "proprietary"]),
        (B200, {"nvidia_driver_kernel_modules": "proprietary"}, ["Blackwell", "open modules only"]),
        (H100, {"cuda_repository_key_fingerprint": "abc"}, ["40 hexadecimal digits"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, machine, variables, words):
    _line, _decision, problems = decide(found(tmp_path, machine), **variables)
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems[0]
    assert problems[0].count("\n") == 0 and problems[0].endswith(".")


HERE = "NVIDIA's repository for Debian GNU/Linux"
OWN = {"cuda_repository_url": "http://own/"}


@pytest.mark.parametrize(
    ("machine", "distribution", "architecture", "variables", "version", "words"),
    [
        (H100, TRIXIE, "x86_64", {}, "590.48.01", []),
        (H100, TRIXIE, "aarch64", {}, "595.71.05", []),
        (H100, DEBIAN, "aarch64", {}, "590.48.01", []),
        (H100, DEBIAN, "x86_64", {}, "580.105.08", []),
        (V100, DEBIAN, "x86_64", {}, "580.105.08", []),
        (H100, NOBLE, "aarch64", {}, "580.105.08", []),
        (V100, TRIXIE, "x86_64", {}, "", [f"{HERE} 13 (trixie) on x86_64 begins with the driver branch 590, but 580 is the last one for", "use Debian 12"]),
        (V100, TRIXIE, "x86_64", {"nvidia_driver_version": "580.105.08"}, "", ["begins with the driver branch 590", "nvidia_driver_manage: false"]),
        (V100, DEBIAN, "aarch64", {}, "", [f"{HERE} 12 (bookworm) on aarch64 begins with the driver branch 590"]),
        (H100, TRIXIE, "x86_64", {"nvidia_driver_version": "580.105.08"}, "", [f"is 580.105.08, but {HERE} 13", "branch 590; remove it for 590.48.01"]),
        (H100, TRIXIE, "aarch64", {"nvidia_driver_version": "590.48.01"}, "", ["begins with the branch 595; remove it for 595.71.05"]),
        (H100, DEBIAN, "x86_64", {"nvidia_driver_version": "535.54.03", "cuda_version": "12.9"}, "", ["branch 545; remove it for 580.105.08"]),
        # A repository of the user's own may hold anything.
        (H100, TRIXIE, "x86_64", {**OWN, "nvidia_driver_version": "580.105.08"}, "580.105.08", []),
        (H100, TRIXIE, "x86_64", {"cluster_mirror": "/srv/m", "nvidia_driver_version": "580.105.08"}, "580.105.08", []),
        (V100, TRIXIE, "x86_64", {**OWN, "nvidia_driver_version": "580.105.08"}, "580.105.08", []),
        (V100, TRIXIE, "x86_64", OWN, "", ["the driver would be 590.48.01, but the branch 580 is the last one", "set nvidia_driver_version: 580.105.08"]),
    ],
)
def test_the_driver_is_one_that_the_distributions_repository_has(tmp_path, machine, distribution, architecture, variables, version, words):
    findings = {**found(tmp_path, machine, distribution), "architecture": architecture}
    _line, decision, problems = decide(findings, **variables)
    assert len(problems) == bool(words) and all(word in problems[0] for word in words), problems
    assert words or decision["driver"]["settings"]["pins"][0]["version"] == f"{version}-*"


def test_a_good_driver_that_the_repository_does_not_have_is_left_alone(tmp_path):
    for name, machine in (("a", L40S), ("b", V100)):
        findings = found(tmp_path / name, {**machine, "driver": "580.159.04"}, TRIXIE)
        _line, decision, problems = decide(findings)
        assert problems == [] and decision["driver"]["action"] == "keep"


@pytest.mark.parametrize(
    ("distribution", "variables", "refused"),
    [
        (TRIXIE, {}, True),
        (TRIXIE, {"cuda_version": "12.9"}, True),
        (TRIXIE, {"cuda_toolkit": False}, False),
        (TRIXIE, OWN, False),
        (DEBIAN, {}, False),
        (NOBLE, {}, False),
    ],
)
def test_a_toolkit_that_the_distributions_repository_lacks_is_refused(tmp_path, distribution, variables, refused):
    findings = found(tmp_path, H100, distribution)
    _line, _decision, problems = decide(findings, **{"cuda_toolkit": True, **variables})
    name = variables.get("cuda_version", "13.0")
    assert problems == [
        f"n1: cuda_toolkit is true for CUDA {name}, but {HERE} 13 (trixie) begins with the toolkit 13.1; "
        "set cuda_toolkit: false (training needs no toolkit), or set cuda_repository_url to a repository that has it."
    ] * refused


def test_all_that_is_wrong_with_a_node_is_said_at_once(tmp_path):
    findings = found(tmp_path, B200)
    findings["disk"]["/usr/local"] = 1024**3
    variables = {"nvidia_driver_version": "520.61.05", "nvidia_driver_kernel_modules": "proprietary", "cluster_mirror": "mirror"}
    variables.update(cuda_version="12.9", cuda_toolkit=True, cuda_repository_key_fingerprint="abc")
    problems = planned(findings, **variables)
    words = ["cluster_mirror", "CUDA 12.9 needs 575.51.03", "Blackwell GPUs need the branch 570", "open modules only", "1.0 GiB free", "40 hexadecimal"]
    assert len(problems) == len(words) and all(any(word in problem for problem in problems) for word in words), problems


def test_beside_an_unknown_line_all_that_is_wrong_anyway_is_said(tmp_path):
    findings = found(tmp_path, B200)
    findings["disk"]["/usr/local"] = 1024**3
    variables = {"nvidia_driver_kernel_modules": "proprietary", "cuda_toolkit": True, "cuda_repository_key_fingerprint": "abc"}
    problems = planned(findings, cuda_version="12.7", **variables)
    words = ["'12.7'", "open modules only", "1.0 GiB free", "40 hexadecimal"]
    assert len(problems) == len(words) and all(any(word in problem for problem in problems) for word in words), problems


@pytest.mark.parametrize(
    ("torch", "machine", "variables", "line", "sentence"),
    [
        ("2.13.0+cu130", H100, {}, "13.0", ""),
        ("2.13.0+cu126", H100, {"pytorch_version": ""}, "12.6", ""),
        ("2.13.0", V100, {}, "12.6", ""),
        (
            "2.13.0+cu130",
            H100,
            {"cuda_version": "12.6"},
            "12.6",
            "pytorch_lock has torch 2.13.0+cu130, but the line is 12.6, whose builds are cu126; "
            "set cuda_version: '13.0', or make the lock anew from https://download.pytorch.org/whl/cu126.",
        ),
        (
            "2.12.0",
            H100,
            {"cuda_version": "12.8", "pytorch_version": ""},
            "12.8",
            "pytorch_lock has torch 2.12.0, but https://download.pytorch.org/whl/cu128 has 2.7.0 to 2.11.0; "
            "set cuda_version: '13.0', or make the lock anew with another torch.",
        ),
    ],
)
def test_the_torch_of_a_lock_has_to_fit_the_line(tmp_path, torch, machine, variables, line, sentence):
    each = host("n1", found=found(tmp_path, machine), pytorch_lock="torch.lock", **variables)
    lock = pytorch_plan.Lock("/home/me/torch.lock", f"torch=={torch} --hash=sha256:{'0' * 64}\n")
    plan, problems = planning.make("train", [each], RELEASE, MANIFEST, lock)
    assert [problem.sentence() for problem in problems] == [f"n1: {sentence}"] * bool(sentence)
    assert plan["cuda_version"] == line


def test_a_lock_for_another_line_than_the_gpus_is_refused(tmp_path):
    """A V100 needs 12.6, and the lock is for 13.0."""
    lock = pytorch_plan.Lock("/home/me/torch.lock", f"torch==2.13.0+cu130 --hash=sha256:{'0' * 64}\n")
    each = host("n1", found=found(tmp_path, V100), pytorch_lock="torch.lock")
    (problem,) = planning.make("train", [each], RELEASE, MANIFEST, lock)[1]
    assert problem.sentence().endswith(
        "(sm_70) is not supported by torch 2.13.0+cu130 for CUDA 13.0; "
        "set cuda_version: '12.6', and make the lock anew from https://download.pytorch.org/whl/cu126."
    )


def test_grace_hopper_has_open_modules_only(tmp_path):
    findings = found(tmp_path, {"gpus": 1, "device": "0x2342"})
    assert decide(findings)[1]["driver"]["kernel_modules"] == "open"
    (problem,) = decide(findings, nvidia_driver_kernel_modules="proprietary")[2]
    assert "Grace Hopper works with the open modules only" in problem


def with_old_card(folder, **changes):
    """Return a node whose first card is a Kepler for the monitor, beside four L40S."""
    findings = found(folder, {**L40S, **changes})
    card = {**findings["hardware"]["usable_gpus"][0], **dict(zip(("name", "generation", "architecture"), gpu_names.lookup(0x102D)))}
    findings["hardware"]["usable_gpus"][0] = card
    return findings


def test_a_card_that_the_job_leaves_out_decides_nothing(tmp_path):
    findings = with_old_card(tmp_path)
    (problem,) = decide(findings)[2]
    assert "Tesla K80 (sm_37)" in problem and problem.endswith("name the host's other GPUs in torchrun_devices.")
    line, decision, problems = decide(findings, torchrun_devices="1, 2,3")
    assert problems == [] and line["name"] == "13.0" and decision["driver"]["kernel_modules"] == "open"
    torch = pytorch_plan.environment(host("n1", found=findings, torchrun_devices="1, 2,3").variables, findings, line)
    assert [gpu["architecture"] for gpu in torch["gpus"]] == ["sm_89"] and torch["devices"] == "1,2,3"


def test_devices_by_uuid_are_found(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "580.105.08"})
    cards = nvidia_facts.chosen_gpus({"torchrun_devices": "GPU-00000002,0"}, findings)
    assert [gpu["minor"] for gpu in cards] == [0, 2]


def broken(folder, **changes):
    findings = found(folder, {**L40S, "driver": "580.105.08"})
    findings["hardware"]["usable_gpus"][1].update(changes)
    return findings


LOOK = "look for NVRM and Xid in dmesg, reset the GPU or reboot the node"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answers": False}, f"the GPU 0000:23:00.0 (NVIDIA GPU) is missing in nvidia-smi; {LOOK}, or leave it out with torchrun_devices."),
        (
            {"mig": True},
            "the GPU 0000:23:00.0 (NVIDIA GPU) is cut into instances (MIG), but each process of a job needs a whole GPU; "
            "switch MIG off (nvidia-smi -i 0000:23:00.0 -mig 0), or leave it out with torchrun_devices.",
        ),
    ],
)
def test_a_gpu_that_a_job_cannot_work_with_is_named_unless_it_is_left_out(tmp_path, change, sentence):
    findings = broken(tmp_path, **change)
    assert decide(findings)[2] == [f"n1: {sentence}"] == decide(findings, nvidia_driver_manage=False)[2]
    assert decide(findings, torchrun_devices="0,2,3")[2] == []
    # The driver that is installed with a reboot may be the cure.
    assert decide(findings, nvidia_driver_version="580.159.04")[2] == []
    assert decide(findings, cuda_version="cpu")[2] == []


@pytest.mark.parametrize("text", ["does not answer within 60 s", "fails (No devices were found)"])
def test_nvidia_smi_that_hangs_or_fails_is_named(tmp_path, text):
    findings = found(tmp_path, {**L40S, "driver": "580.105.08"})
    findings["hardware"]["driver"]["nvidia_smi"] = text
    assert decide(findings)[2] == [f"n1: nvidia-smi {text}, so that a job would hang or fail; {LOOK}."]
    findings["hardware"]["settings"]["container"] = True
    assert decide(findings)[2] == [], "a container need not have all that nvidia-smi wants"
    findings["hardware"]["driver"]["nvidia_smi_hangs"] = True
    assert len(decide(findings)[2]) == 1
    findings["hardware"]["driver"]["mismatch"] = True
    assert decide(findings)[2] == [], "the driver is installed anew"


def test_a_gpu_that_the_driver_does_not_run_is_named(tmp_path):
    made = {**L40S, "driver": "580.105.08"}
    trees.machine(tmp_path, **made)
    (tmp_path / "proc/driver/nvidia/gpus/0000:33:00.0/information").unlink()
    findings = node(distribution=DEBIAN, architecture="x86_64", kernel="6.1.0-30-amd64", hardware=hardware.collect(str(tmp_path)))
    assert len(findings["hardware"]["usable_gpus"]) == 3
    assert decide(findings)[2] == [
        f"n1: the driver 580.105.08 does not run the GPU 0000:33:00.0 (NVIDIA L40S); {LOOK}, or name the other GPUs in torchrun_devices."
    ]
    assert decide(findings, torchrun_devices="0,1,2")[2] == []
    for changes in ({"settings": {"container": True}}, {"gpus": [{**gpu, "bound": "vfio-pci"} for gpu in findings["hardware"]["gpus"]]}):
        other = {**findings, "hardware": {**findings["hardware"], **changes}}
        assert decide(other)[2] == [], "a container has some of its host's, and virtual machines have theirs"


def test_the_distributions_torch_is_refused_where_gpus_are(tmp_path):
    (problem,) = decide(found(tmp_path / "a", H100), pytorch_source="distribution")[2]
    assert "pytorch_source is distribution, whose torch is built for CPUs, but the node has NVIDIA H100" in problem
    assert decide(found(tmp_path / "b", {}), pytorch_source="distribution")[2] == []


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [("12.7", "12.8"), ("13.1", "13.0"), ("14.0", "13.0"), ("11.8", "12.6"), ("12", "12.9"), ("12.9.1", "12.9"), ("cu128", "12.8"), ("newest", "13.0")],
)
def test_the_nearest_line_is_offered_for_an_unknown_one(tmp_path, wanted, nearest):
    _line, decision, problems = decide(found(tmp_path, H100), cuda_version=wanted)
    assert len(problems) == 1 and f"set cuda_version: '{nearest}', the nearest one" in problems[0], problems
    assert decision == {}, "nothing is decided on a guess"


@pytest.mark.parametrize(
    ("driver", "variables", "words"),
    [
        # torch 2.13 exists for CUDA 12.6, 12.9 and 13.0; a driver of 2021 runs none of them.
        ("470.82.01", {}, ["470.82.01", "or newer", "upgrade the driver"]),
        ("550.90.07", {"cuda_version": "13.0"}, ["550.90.07", "580.65.06", "set cuda_version: '12.9', or upgrade the driver"]),
        (
            "550.90.07",
            {"pytorch_source": "existing", "pytorch_environment": "/env"},
            ["torch 2.13.0+cu130 is built for CUDA 13.0", "580.65.06", "550.90.07", "pytorch_environment"],
        ),
    ],
)
def test_a_torch_newer_than_the_driver_allows_is_named(tmp_path, driver, variables, words):
    findings = found(tmp_path, {**L40S, "driver": driver})
    findings.update(torch={"/env": "2.13.0+cu130"}, torch_builds={"/env": {"cuda": "13.0", "nccl": "2.28.9"}})
    _line, _decision, problems = decide(findings, nvidia_driver_manage=False, **variables)
    assert len(problems) == 1 and problems[0].startswith("n1: ") and all(word in problems[0] for word in words), problems


def test_an_unknown_distribution_is_told_of_the_way_out(tmp_path):
    _line, _decision, problems = decide(found(tmp_path, H100, ROCKY))
    assert len(problems) == 1 and "Rocky Linux" in problems[0] and "nvidia_driver_manage: false" in problems[0]


def test_an_unknown_distribution_with_a_good_driver_is_fine(tmp_path):
    _line, decision, problems = decide(found(tmp_path, {**H100, "driver": "580.65.06"}, ROCKY))
    assert problems == []
    assert decision["driver"]["action"] == "keep"


def test_a_good_driver_is_left_alone(tmp_path):
    _line, decision, problems = decide(found(tmp_path, {**L40S, "driver": "580.159.04"}))
    assert problems == []
    assert (decision["driver"]["action"], decision["driver"]["wanted"]) == ("keep", False)


OURS = ["nvidia-driver*", "nvidia-kernel*", "nvidia-fabricmanager*", "libnvidia-ml*"]


@pytest.mark.parametrize("running", ["580.105.08", "580.159.04"])
@pytest.mark.parametrize("machine", [L40S, H100], ids=["pcie", "nvswitch"])
def test_our_own_driver_is_kept_in_shape_at_its_version(tmp_path, machine, running):
    findings = found(tmp_path, {**machine, "driver": running})
    findings["own_pins"] = OURS
    _line, decision, problems = decide(findings)
    assert problems == [] and decision["driver"]["wanted"] and not decision["driver"]["reboot_expected"]
    pins = decision["driver"]["settings"]["pins"]
    assert pins == [{"packages": MANIFEST["driver_family"], "version": f"{running}-*"}], "fewer pins would release the rest of the family"


@pytest.mark.parametrize("pins", [[], ["libnccl2", "libnccl-dev"], ["nvidia-fabricmanager"]])
def test_a_driver_of_the_manifests_version_that_somebody_else_installed_is_left_alone(tmp_path, pins):
    findings = found(tmp_path, {**L40S, "driver": MANIFEST["driver"]["version"]})
    findings["own_pins"] = pins
    assert (decide(findings)[1]["driver"]["action"], decide(findings)[1]["driver"]["wanted"]) == ("keep", False)


def test_a_driver_that_is_asked_for_by_version_replaces_a_good_one(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, {**L40S, "driver": "580.159.04"}), nvidia_driver_version="580.105.08")
    assert decision["driver"]["wanted"] and decision["driver"]["reboot_expected"]


def test_the_driver_of_a_virtual_gpu_is_never_replaced(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "550.90.07"})
    findings["hardware"]["driver"]["vgpu"] = True
    (problem,) = decide(findings)[2]
    assert "virtual GPU with the driver 550.90.07" in problem and "nvidia_driver_manage: false" in problem
    assert decide(findings, nvidia_driver_manage=False)[2] == []
    findings["hardware"]["driver"].update(loaded="580.65.06", version="580.65.06")
    assert decide(findings)[2] == [], "a good one is kept"


@pytest.mark.parametrize("state", ["old", "mismatch"])
def test_an_old_or_torn_driver_is_replaced(tmp_path, state):
    findings = found(tmp_path, {**L40S, "driver": "535.54.03" if state == "old" else "580.65.06"})
    findings["hardware"]["driver"]["mismatch"] = state == "mismatch"
    _line, decision, problems = decide(findings)
    assert problems == []
    assert decision["driver"]["wanted"] and decision["driver"]["reboot_expected"]


def test_proprietary_modules_on_blackwell_are_replaced(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, {**B200, "driver": "590.44.01", "open_modules": False}))
    assert decision["driver"]["action"] == "install" and decision["driver"]["kernel_modules"] == "open"


def test_somebody_elses_driver_is_checked_only(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "550.90.07"})
    line, decision, problems = decide(findings, nvidia_driver_manage=False)
    # 550 runs every line of CUDA 12 by minor-version compatibility, which is worth saying.
    assert problems == [] and line["name"] == "12.9"
    assert decision["driver"]["action"] == "check" and not decision["driver"]["wanted"]
    assert "minor-version" in decision["advice"][0]


def test_a_driver_of_somebody_else_that_is_too_old_is_named_with_a_line_that_fits(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "550.90.07"})
    _line, _decision, problems = decide(findings, nvidia_driver_manage=False, cuda_version="13.0")
    assert len(problems) == 1 and "550.90.07" in problems[0] and "580.65.06" in problems[0] and "'12.9'" in problems[0]


def test_nouveau_means_a_reboot(tmp_path):
    findings = found(tmp_path, L40S)
    findings["hardware"]["driver"]["nouveau"] = True
    _line, decision, _problems = decide(findings)
    assert decision["driver"]["reboot_expected"] and "nouveau" in decision["advice"][0]


def test_a_good_driver_gets_the_fabric_manager_of_its_own_version_and_nothing_else(tmp_path):
    findings = found(tmp_path, {**H100, "driver": "580.159.04"})
    _line, decision, _problems = decide(findings)
    assert (decision["driver"]["action"], decision["driver"]["version"]) == ("keep", "580.159.04")
    settings = decision["driver"]["settings"]
    assert settings["packages"] == [{"name": "nvidia-fabricmanager", "version": "580.159.04-*"}]
    assert settings["pins"] == [{"packages": ["nvidia-fabricmanager"], "version": "580.159.04-*"}]
    assert settings["services"] == ["nvidia-fabricmanager.service"]
    findings["hardware"]["fabric"]["manager_running"] = True
    assert not decide(findings)[1]["driver"]["wanted"]
    findings["packages"] = {"nvidia-fabricmanager": {"version": "580.105.08-1", "want": "install", "flag": "ok", "state": "installed"}}
    assert decide(findings)[1]["driver"]["wanted"], "another version than the driver's"


def test_a_stopped_fabric_manager_beside_somebodys_driver_is_advice_and_a_problem_once_the_fabric_says_so(tmp_path):
    findings = found(tmp_path, {**H100, "driver": "580.159.04"})
    _line, decision, problems = decide(findings, nvidia_driver_manage=False)
    assert problems == [] and "fabric manager" in decision["advice"][0]
    findings["hardware"]["fabric"]["state"] = "In Progress"
    _line, _decision, problems = decide(findings, nvidia_driver_manage=False)
    assert len(problems) == 1 and "'In Progress'" in problems[0] and "nvidia-fabricmanager 580.159.04" in problems[0]


def test_the_fabric_manager_follows_the_variable(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, H100), nvidia_driver_fabric_manager="absent")
    assert "nvidia-fabricmanager" not in names(decision)
    assert decision["driver"]["settings"]["disabled"] == ["nvidia-fabricmanager.service"]
    assert decide(found(tmp_path / "b", H100))[1]["driver"]["settings"]["disabled"] == []


PACKAGES = ["cuda-drivers=580.65.06-1", "linux-headers-amd64"]


def test_packages_of_the_users_choice(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, H100), nvidia_driver_version="580.65.06", nvidia_driver_packages=PACKAGES)
    assert decision["driver"]["settings"]["packages"] == [
        {"name": "cuda-drivers", "version": "580.65.06-1"},
        {"name": "linux-headers-amd64", "version": ""},
    ]
    # They may be the distribution's, whose packages are kept away otherwise.
    assert not decision["driver"]["settings"]["refuse_distribution"]
    assert decide(found(tmp_path / "other", H100))[1]["driver"]["settings"]["refuse_distribution"]


@pytest.mark.parametrize(
    ("packages", "version", "cure"),
    [
        (["cuda-drivers=580.65.06-1", "linux-headers-amd64"], "", "set nvidia_driver_version: 580.65.06."),
        (["cuda-drivers=580.65.06-*"], "580.159.03", "set nvidia_driver_version: 580.65.06."),
        (["nvidia-open=580.*"], "580.159.03", "give the package's full version and set nvidia_driver_version to it."),
        (["cuda-drivers=580.65.06-1"], "580.65.06", ""),
        (["cuda-drivers=580.105.08*", "nvidia-open=580.105.08-0ubuntu1"], "", ""),
        (["cuda-drivers"], "580.159.03", ""),
        (["linux-headers-amd64=6.1.1", "nvlsm=2025.1-1"], "", ""),
    ],
)
def test_packages_of_another_version_than_the_drivers_are_refused(tmp_path, packages, version, cure):
    problems = decide(found(tmp_path, H100), nvidia_driver_packages=packages, nvidia_driver_version=version)[2]
    wanted = version or "580.105.08"
    assert problems == [f"n1: nvidia_driver_packages has {packages[0]}, but the driver is to be {wanted}; {cure}"] * bool(cure)


def test_a_cpu_cluster_is_asked_for_nothing(tmp_path):
    line, decision, problems = decide(found(tmp_path, {}), cuda_toolkit=True, nccl_library=True)
    assert problems == [] and line["torch_index"] == "https://download.pytorch.org/whl/cpu"
    assert not any(decision[role]["wanted"] for role in ("driver", "cuda", "nccl"))


def test_the_toolkit_and_nccl_of_the_line(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, H100), cuda_version="12.9", cuda_toolkit=True, nccl_library=True)
    assert decision["cuda"]["settings"]["packages"] == [{"name": "cuda-toolkit-12-9", "version": "12.9.1-*"}]
    assert {entry["version"] for entry in decision["nccl"]["settings"]["packages"]} == {"2.29.7-1+cuda12.9"}
    assert decision["cuda"]["settings"]["pins"] == [
        {"packages": ["cuda-toolkit-12-9"], "version": "12.9.1-*"},
        {"packages": ["cuda-*-12-9*", "lib*-12-9", "gds-tools-12-9"], "version": ""},
    ]


def test_the_subnet_manager_of_nvlink_5_is_held_at_its_own_version(tmp_path):
    pins = decide(found(tmp_path, B200, NOBLE))[1]["driver"]["settings"]["pins"]
    assert pins[1:] == [{"packages": ["nvlsm"], "version": ""}]
    assert len(decide(found(tmp_path / "b", H100))[1]["driver"]["settings"]["pins"]) == 1


@pytest.mark.parametrize("driver", ["", "580.159.04"], ids=["bare", "kept"])
def test_nvlink_5_gets_the_module_through_which_its_switches_are_reached(tmp_path, driver):
    path = "/etc/modules-load.d/onprem-torch-nvlink.conf"
    settings = decide(found(tmp_path / "a", {**B200, "driver": driver}))[1]["driver"]["settings"]
    assert settings["modules"] == ["ib_umad"] and settings["files"][path].splitlines()[-1] == "ib_umad"
    settings = decide(found(tmp_path / "b", {**H100, "driver": driver}))[1]["driver"]["settings"]
    assert settings["modules"] == [] and path not in settings["files"]
    without = decide(found(tmp_path / "c", B200), nvidia_driver_fabric_manager="absent")[1]["driver"]["settings"]
    assert without["modules"] == [] and path not in without["files"]


def test_nccl_conf_names_the_training_interface_unless_the_user_does(tmp_path):
    findings = found(tmp_path, H100)
    _line, decision, _problems = decide(findings, nccl_configuration={"NCCL_IB_HCA": "mlx5"})
    text = decision["nccl"]["settings"]["files"]["/etc/nccl.conf"]
    assert "NCCL_IB_HCA=mlx5\nNCCL_SOCKET_IFNAME==ib0\n" in text
    _line, decision, _problems = decide(findings, nccl_configuration={"NCCL_SOCKET_IFNAME": "eth9"})
    assert "NCCL_SOCKET_IFNAME=eth9\n" in decision["nccl"]["settings"]["files"]["/etc/nccl.conf"]


def test_one_old_gpu_decides_the_line_of_the_whole_cluster(tmp_path):
    new, old = found(tmp_path / "a", H100), found(tmp_path / "b", V100)
    nodes = [(name, host(name, found=each).variables, each) for name, each in (("n1", new), ("n2", old))]
    line, _decisions, problems = nvidia.decide_all(nodes, MANIFEST, {})
    assert problems == [] and line["name"] == "12.6"


@pytest.mark.parametrize("wanted", ["", "13.0", "12.6"])
def test_gpus_that_no_line_has_code_for_together_are_not_sent_from_one_line_to_the_other(tmp_path, wanted):
    nodes = []
    for name, machine in (("n1", V100), ("n2", B200), ("n3", B200)):
        each = found(tmp_path / name, machine)
        nodes.append((name, host(name, found=each, cuda_version=wanted).variables, each))
    problems = [problem.sentence() for problem in nvidia.decide_all(nodes, MANIFEST, {})[2]]
    assert problems and all("no line of this torch has code for all its GPUs" in problem for problem in problems), problems
    older = [(name, {**variables, "pytorch_version": "2.10.0", "cuda_version": ""}, each) for name, variables, each in nodes]
    line, _decisions, problems = nvidia.decide_all(older, MANIFEST, {})
    assert problems == [] and line["name"] == "12.9"


def test_the_plan_carries_line_and_decision(tmp_path):
    each = host("n1", found=found(tmp_path, H100))
    plan, problems = planning.make("train", [each], RELEASE, MANIFEST)
    assert problems == []
    assert plan["nodes"]["n1"]["nvidia"]["driver"]["action"] == "install"
    assert plan["nodes"]["n1"]["pytorch"]["extra_index_urls"] == ["https://download.pytorch.org/whl/cu130"]
    assert plan["nodes"]["n1"]["nproc"] == 8


def test_every_line_of_the_manifest_is_whole():
    for name, line in MANIFEST["lines"].items():
        assert line["torch_index"].endswith("cpu" if name == "cpu" else "cu" + name.replace(".", ""))
        if name != "cpu":
            assert nvidia.numbers(line["compatible_driver"]) <= nvidia.numbers(line["minimum_driver"])
            assert nvidia.numbers(line["minimum_driver"]) <= nvidia.numbers(MANIFEST["driver"]["version"])
            assert line["nccl_version"].split("+cuda")[1] == name


INFINIBAND = [{"interface": "ib0", "rdma": [{"device": "mlx5_0"}], "virtual": False}]


@pytest.mark.parametrize(
    ("machine", "kernel", "peer_memory", "variables", "path", "advised"),
    [
        (H100, "6.1.0-30-amd64", False, {}, "dma-buf", False),
        (H100, "6.1.0-30-amd64", True, {}, "dma-buf", False),
        (H100, "5.10.0-8-amd64", True, {}, "peermem", False),
        (H100, "5.10.0-8-amd64", False, {}, "", True),
        (V100, "6.1.0-30-amd64", False, {}, "", True),
        (V100, "6.1.0-30-amd64", True, {}, "peermem", False),
        (H100, "6.1.0-30-amd64", False, {"nvidia_driver_peermem": "present"}, "peermem", False),
        (H100, "5.10.0-8-amd64", True, {"nvidia_driver_peermem": "absent"}, "", False),
    ],
)
def test_how_adapters_reach_gpu_memory(tmp_path, machine, kernel, peer_memory, variables, path, advised):
    findings = found(tmp_path, machine, nics=INFINIBAND)
    findings["kernel"] = kernel
    findings["hardware"]["driver"]["peer_memory"] = peer_memory
    _line, decision, problems = decide(findings, **variables)
    settings = decision["driver"]["settings"]
    assert problems == [] and decision["driver"]["gpudirect"] == path
    assert settings["modules"] == (["nvidia-peermem"] if path == "peermem" else [])
    file = "/etc/modules-load.d/onprem-torch-peermem.conf"
    assert (file in settings["files"]) is (path == "peermem") and settings["absent_files"] == [file] * (path != "peermem")
    assert any("DOCA-OFED" in line for line in decision["advice"]) is advised


def test_without_rdma_adapters_nothing_reaches_into_gpu_memory(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, H100))
    assert decision["driver"]["gpudirect"] == "" and not any("GPUDirect" in line for line in decision["advice"])


@pytest.mark.parametrize(
    ("changes", "variables", "word"),
    [
        ({}, {}, "once"),
        ({}, {"nvidia_driver_reboot": False}, "by hand, since nvidia_driver_reboot is false"),
        ({"control_node": True}, {}, "by hand, since this is the machine that Ansible runs on, which is never rebooted"),
    ],
)
def test_who_reboots(tmp_path, changes, variables, word):
    findings = {**found(tmp_path, {**L40S, "driver": "535.54.03"}), **changes}
    _line, decision, _problems = decide(findings, **variables)
    assert decision["driver"]["reboot_expected"] and decision["driver"]["reboot"] == word


def test_the_other_kind_of_kernel_modules_means_a_reboot(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "580.105.08", "open_modules": False})
    findings["own_pins"] = OURS
    assert decide(findings)[1]["driver"]["reboot_expected"]
    assert not decide(findings, nvidia_driver_kernel_modules="proprietary")[1]["driver"]["reboot_expected"]


@pytest.mark.parametrize(
    ("variables", "url", "key_url"),
    [
        ({"cluster_mirror": "http://m/x/"}, "http://m/x/nvidia/debian12/x86_64/", "http://m/x/nvidia/debian12/x86_64/3bf863cc.pub"),
        ({"cluster_mirror": "/srv/m"}, "file:///srv/m/nvidia/debian12/x86_64/", "file:///srv/m/nvidia/debian12/x86_64/3bf863cc.pub"),
        ({"cluster_mirror": "/srv/m", "cuda_repository_url": "http://own"}, "http://own/", "http://own/3bf863cc.pub"),
        ({"cuda_repository_url": "http://own/", "cuda_repository_key_url": "http://k/key.asc"}, "http://own/", "http://k/key.asc"),
    ],
)
def test_where_packages_come_from(tmp_path, variables, url, key_url):
    _line, decision, problems = decide(found(tmp_path, H100), **variables)
    source = decision["driver"]["settings"]["repository"]
    assert problems == [] and (source["url"], source["key_url"]) == (url, key_url)
    assert source["key_fingerprint"] == "EB693B3035CD5710E231E123A4B469963BF863CC"


def test_a_mirror_that_is_no_place_is_named(tmp_path):
    _line, _decision, problems = decide(found(tmp_path, H100), cluster_mirror="mirror")
    assert len(problems) == 1 and "cluster_mirror is 'mirror'" in problems[0]


def test_no_room_for_the_toolkit_is_named_before_anything_changes(tmp_path):
    findings = found(tmp_path, H100)
    findings["disk"].update({"/usr/local": 3 * 1024**3, "/var/cache/apt": 50 * 1024**3})
    assert planned(findings, cuda_toolkit=True) == [
        "n1: /usr/local has 3.0 GiB free, but 7 GiB are needed for the CUDA toolkit; "
        "free some space or set cuda_toolkit: false (training needs no toolkit)."
    ]
    assert planned(findings) == []
    findings["packages"] = {"cuda-toolkit-13-0": {"version": "13.0.2-1", "want": "hold", "flag": "ok", "state": "installed"}}
    findings["own_pins"] = ["cuda-toolkit-13-0"]
    assert planned(findings, cuda_toolkit=True) == []


@pytest.mark.parametrize(("free", "enough"), [(24, False), (25, True)])
def test_what_shares_a_file_system_is_added_up(tmp_path, free, enough):
    findings = found(tmp_path, H100)
    paths = ["/opt/onprem.torch", "/usr/local", "/var/cache/apt"]
    findings.update(disk={path: free * 1024**3 for path in paths}, file_systems={path: 2049 for path in paths})
    problems = planned(findings, cuda_toolkit=True)
    assert problems == [] if enough else problems == [
        "n1: one file system has 24.0 GiB free, but 25 GiB are needed: 14 for torch in /opt/onprem.torch, 7 for the CUDA toolkit "
        "in /usr/local, 4 for the CUDA toolkit's archives in /var/cache/apt; free some space or set pytorch_root to a larger file "
        "system or set cuda_toolkit: false (training needs no toolkit)."
    ]


@pytest.mark.parametrize(
    ("own", "want", "version", "count"),
    [
        ([], "hold", "580.65.06-1", 1),
        (["nvidia-driver*"], "hold", "580.65.06-1", 0),
        ([], "install", "580.65.06-1", 0),
        ([], "hold", "580.105.08-1", 0),
    ],
)
def test_what_somebody_else_holds_is_named_before_anything_changes(tmp_path, own, want, version, count):
    findings = found(tmp_path, H100)
    findings["packages"] = {"nvidia-driver-cuda": {"version": version, "want": want, "flag": "ok", "state": "installed"}}
    findings["own_pins"] = own
    problems = decide(findings)[2]
    assert len(problems) == count
    if count:
        assert problems == [
            "n1: nvidia-driver-cuda is held at 580.65.06-1 by somebody else, but 580.105.08-* is wanted; release it on the node "
            "(apt-mark unhold nvidia-driver-cuda), or set nvidia_driver_version to the version that it is held at."
        ]


def test_what_an_interruption_left_is_told_and_no_problem(tmp_path):
    findings = found(tmp_path, H100)
    findings["packages"] = {"nvidia-driver-cuda": {"version": "580.105.08-1", "want": "install", "flag": "ok", "state": "half-configured"}}
    _line, decision, problems = decide(findings)
    assert problems == [] and "nvidia-driver-cuda half done" in decision["advice"][-1]


def existing(tmp_path, cuda, **changes):
    findings = found(tmp_path, {**L40S, "driver": "570.86.15"})
    findings.update(torch={"/env": "2.9.0"}, torch_builds={"/env": {"cuda": cuda, "nccl": ""}}, **changes)
    return decide(findings, pytorch_source="existing", pytorch_environment="/env", nvidia_driver_manage=False)


def test_an_existing_environment_decides_the_line(tmp_path):
    line, _decision, problems = existing(tmp_path, "12.8")
    assert problems == [] and line["name"] == "12.8"


def test_an_existing_environment_newer_than_the_wanted_lines_driver_is_named(tmp_path):
    findings = found(tmp_path, {**L40S, "driver": "575.57.08"})
    findings.update(torch={"/env": "2.9.0"}, torch_builds={"/env": {"cuda": "13.0", "nccl": ""}})
    variables = {"pytorch_source": "existing", "pytorch_environment": "/env"}
    (problem,) = decide(findings, cuda_version="12.9", **variables)[2]
    assert "cuda_version is 12.9, whose driver may be too old for torch 2.9.0 in /env, built for CUDA 13.0" in problem
    line, decision, problems = decide(findings, **variables)
    assert problems == [] and line["name"] == "13.0" and decision["driver"]["action"] == "install"


@pytest.mark.parametrize(("cuda", "words"), [("13.0", "driver"), ("", "build for CPUs")])
def test_an_existing_environment_that_cannot_work_is_named(tmp_path, cuda, words):
    problems = existing(tmp_path, cuda)[2]
    assert problems and all("n1: " in problem for problem in problems)
    assert any(words in problem for problem in problems)


def test_existing_environments_with_another_nccl_than_the_others_are_named(tmp_path):
    variables = {"pytorch_source": "existing", "pytorch_environment": "/env"}
    nodes = []
    for name, version in (("n1", "2.28.9"), ("n2", "2.28.9"), ("n3", "2.27.5"), ("n4", "")):
        findings = found(tmp_path / name, {**L40S, "driver": "580.105.08"})
        findings.update(torch={"/env": "2.13.0"}, torch_builds={"/env": {"cuda": "13.0", "nccl": version}})
        nodes.append((name, host(name, found=findings, **variables).variables, findings))
    problems = [problem.sentence() for problem in nvidia.decide_all(nodes, MANIFEST, {})[2]]
    assert problems == [
        "n3: /env has NCCL 2.27.5, but n1 has 2.28.9, and all nodes need the same; install the same torch and NCCL in all environments."
    ]
    assert nvidia.decide_all(nodes[:2], MANIFEST, {})[2] == []


def test_what_later_sets_need_is_looked_for_before_the_first_one_changes_anything(tmp_path):
    _line, decision, _problems = decide(found(tmp_path, H100), cuda_toolkit=True, nccl_library=True)
    library = decision["nccl"]["settings"]["packages"]
    assert decision["driver"]["settings"]["further"] == [*decision["cuda"]["settings"]["packages"], *library]
    assert decision["cuda"]["settings"]["further"] == library and len(library) == 2
    assert "further" not in decision["nccl"]["settings"]


def test_limits_are_set_on_nodes_with_gpus_only_and_shm_where_asked(tmp_path):
    limits, logind, shm = "/etc/security/limits.d/onprem-torch.conf", "/etc/systemd/logind.conf.d/onprem-torch.conf", "onprem-torch-shm.service"
    settings = decide(found(tmp_path / "a", H100))[1]["nccl"]["settings"]
    assert "memlock unlimited" in settings["files"][limits] and "RemoveIPC=no" in settings["files"][logind] and settings["services"] == []
    assert settings["absent_files"] == []
    settings = decide(found(tmp_path / "b", H100), nccl_limits=False, nccl_shm_gib=64)[1]["nccl"]["settings"]
    assert settings["absent_files"] == [limits, logind], "those of an earlier run"
    assert limits not in settings["files"] and "size=64g" in settings["files"][f"/etc/systemd/system/{shm}"] and settings["services"] == [shm]
    assert settings["sizes"] == {shm: {"path": "/dev/shm", "gib": 64}}
    assert not decide(found(tmp_path / "c", {}))[1]["nccl"]["wanted"]


@pytest.mark.parametrize(
    ("version", "distribution", "name"),
    [("580.105.08", DEBIAN, "nvidia-fabricmanager"), ("575.57.08", NOBLE, "nvidia-fabricmanager-575"), ("590.44.01", NOBLE, "nvidia-fabricmanager")],
)
def test_the_fabric_manager_has_the_name_and_version_of_its_driver(tmp_path, version, distribution, name):
    _line, decision, problems = decide(found(tmp_path, H100, distribution), nvidia_driver_version=version, cuda_version="12.9")
    assert problems == [] and {"name": name, "version": f"{version}-*"} in decision["driver"]["settings"]["packages"]


@pytest.mark.parametrize(
    ("version", "packages"),
    [
        ("570.211.01", ["nvidia-headless-570-open", "nvidia-utils-570", "nvidia-compute-utils-570"]),
        ("580.105.08", ["nvidia-headless-580-open", "nvidia-utils-580", "nvidia-compute-utils-580", "nvidia-persistenced"]),
        ("595.71.05", ["nvidia-headless-open", "nvidia-modprobe", "nvidia-persistenced"]),
    ],
)
def test_ubuntus_packages_have_the_names_of_their_branch(tmp_path, version, packages):
    _line, decision, problems = decide(found(tmp_path, L40S, NOBLE), nvidia_driver_version=version, cuda_version="12.6")
    assert problems == [] and names(decision) == ["linux-headers-6.1.0-30-amd64", *packages]


@pytest.mark.parametrize(
    ("running", "variables", "refused"),
    [
        ("535.54.03", {}, True),
        ("580.159.04", {"nvidia_driver_version": "580.105.08"}, True),
        ("580.159.04", {}, False),
        ("535.54.03", {"nvidia_driver_manage": False, "cuda_version": "12.6"}, False),
    ],
)
@pytest.mark.parametrize("library", ["libnvidia-ml1", "libnvidia-compute-535", "libnvidia-tesla-535-ml1"])
def test_a_driver_that_no_package_has_brought_is_not_overwritten(tmp_path, running, variables, refused, library):
    findings = found(tmp_path, {**L40S, "driver": running})
    findings["hardware"]["driver"]["installed"] = running
    _line, _decision, problems = decide(findings, **variables)
    assert ["was not installed as packages" in problem and "nvidia-uninstall" in problem for problem in problems] == [True] * refused
    # With packages it is an older driver like any other.
    findings["packages"] = {library: {"version": f"{running}-1", "want": "install", "flag": "ok", "state": "installed"}}
    assert decide(findings, **variables)[2] == []


FAMILY = {
    # As NVIDIA's repositories have them (Debian's of 560, Ubuntu's of 595), but for programs with a desktop.
    "firmware-nvidia-gsp libegl-nvidia0 libgl1-nvidia-glvnd-glx libgles-nvidia1 libgles-nvidia2 libglx-nvidia0 libnvidia-allocator1 libnvidia-cfg1 "
    "libnvidia-eglcore libnvidia-encode1 libnvidia-fbc1 libnvidia-glcore libnvidia-glvkspirv libnvidia-gpucomp libnvidia-ml1 libnvidia-nvvm4 "
    "libnvidia-opticalflow1 libnvidia-pkcs11 libnvidia-ptxjitcompiler1 libnvidia-rtcore libnvidia-vksc-core nvidia-cuda-mps nvidia-driver "
    "nvidia-driver-bin nvidia-driver-cuda nvidia-driver-libs nvidia-egl-common nvidia-egl-icd nvidia-kernel-open-dkms nvidia-kernel-dkms "
    "nvidia-kernel-support nvidia-modprobe nvidia-opencl-icd nvidia-persistenced nvidia-smi nvidia-suspend-common nvidia-vdpau-driver "
    "nvidia-vulkan-common nvidia-vulkan-icd nvidia-xconfig xserver-xorg-video-nvidia libcuda1 cuda-drivers nvidia-open": True,
    "nvidia-kernel-source nvidia-kernel-source-open nvidia-kernel-common-580 nvidia-dkms nvidia-dkms-open nvidia-firmware nvidia-driver-open nvidia-drivers "
    "nvidia-driver-580-open nvidia-headless nvidia-headless-open nvidia-headless-no-dkms-open libnvidia-compute libnvidia-gl libnvidia-decode "
    "libnvidia-common libnvidia-extra libnvidia-nscq libnvsdm nvidia-fabricmanager nvidia-fabricmanager-dev nvidia-imex nvlink5": True,
    # Versions of their own, or nothing to do with the driver.
    "nvidia-driver-pinning-580 nvidia-driver-pinning-580.105.08 nvidia-driver-assistant firmware-nvidia-graphics nvidia-kernel-common nvlsm libxnvctrl0 "
    "libnvidia-container1 libnvidia-container-tools nvidia-container-toolkit libnvidia-egl-wayland1 libnvidia-egl-gbm1 nvidia-support nvidia-fs nvidia-gds "
    "nvidia-vaapi-driver datacenter-gpu-manager": False,
}


@pytest.mark.parametrize(("packages", "member"), FAMILY.items(), ids=["debian", "ubuntu", "others"])
def test_who_belongs_to_the_drivers_family(packages, member):
    state = {name: {"want": "install", "flag": "ok", "state": "installed", "version": "1"} for name in packages.split()}
    mine = apt_state.family(state, [{"packages": MANIFEST["driver_family"], "version": "580.105.08-*"}])
    assert set(mine) == (set(state) if member else set())


@pytest.mark.parametrize("distribution", [DEBIAN, TRIXIE, JAMMY, NOBLE], ids=lambda entry: entry["version"])
@pytest.mark.parametrize("machine", trees.MACHINES)
def test_every_known_machine_on_every_distribution_has_a_plan(tmp_path, machine, distribution):
    line, decision, problems = decide(found(tmp_path, trees.MACHINES[machine], distribution), nccl_library=True)
    assert problems == []
    gpus = trees.MACHINES[machine].get("gpus", 0)
    assert line["name"] == ("13.0" if gpus else "cpu")
    assert decision["driver"]["wanted"] is decision["nccl"]["wanted"] is bool(gpus)
    if gpus:
        switched = bool(trees.MACHINES[machine].get("switches") or trees.MACHINES[machine].get("bridges"))
        assert any("fabricmanager" in name for name in names(decision)) is switched
        assert ("nvlsm" in names(decision)) is bool(trees.MACHINES[machine].get("bridges"))


def test_environments_with_different_nccls_are_one_problem_of_the_plan(tmp_path):
    hosts = []
    for number, version in enumerate(("2.28.9", "2.27.5"), start=1):
        findings = found(tmp_path / str(number), {**L40S, "driver": "580.105.08"})
        findings.update({key: value for key, value in node(number).items() if key in ("machine_id", "interfaces")})
        findings.update(torch={"/env": "2.13.0"}, torch_builds={"/env": {"cuda": "13.0", "nccl": version}})
        hosts.append(host(f"n{number}", number, findings, pytorch_source="existing", pytorch_environment="/env"))
    problems = [problem.sentence() for problem in planning.make("train", hosts, RELEASE, MANIFEST)[1]]
    assert len(problems) == 1 and "/env has NCCL 2.27.5, but n1 has 2.28.9" in problems[0], problems
