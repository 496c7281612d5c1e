"""Whether an installed torch fits GPUs and driver; which environment a node gets; what a lock may be."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import node_facts, pytorch_plan, torch_fit
from builders import node

OLDEST = {"12": "525.60.13", "13": "580.65.06"}
H100 = [{"name": "NVIDIA H100", "architecture": "sm_90"}]
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
HASH = "--hash=sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("built", "architecture", "runs"),
    [
        (["sm_80"], "sm_80", True),
        (["sm_80"], "sm_86", True),
        (["sm_86"], "sm_80", False),
        (["sm_80"], "sm_90", False),
        (["sm_80", "compute_80"], "sm_90", True),
        (["sm_90a"], "sm_90", True),
        (["sm_90a"], "sm_91", False),
        (["sm_100"], "sm_103", True),
        (["compute_90a"], "sm_100", False),
        ([], "sm_90", False),
    ],
)
def test_which_gpus_run_which_code(built, architecture, runs):
    assert torch_fit.has_code(built, architecture) is runs


@pytest.mark.parametrize(
    ("versions", "gpus", "driver", "cuda", "words"),
    [
        ({"torch": "2.13.0+cu130", "cuda": "13.0", "architectures": BUILT}, H100, "580.105.08", "13.0", ""),
        ({"torch": "2.13.0+cpu", "cuda": ""}, [], "", "", ""),
        ({"torch": "2.13.0"}, H100, "580.105.08", "", ""),
        ({"torch": "2.13.0+cpu", "cuda": ""}, H100, "580.105.08", "", "torch 2.13.0+cpu is a build for CPUs, but the node has NVIDIA H100; "),
        ({"torch": "2.13.0", "cuda": "13.0"}, H100, "580.105.08", "12.9", "is built for CUDA 13.0, but cuda_version is 12.9; "),
        ({"torch": "2.13.0", "cuda": "13.0", "nccl": None}, H100, "580.105.08", "", "torch 2.13.0 is built without NCCL"),
        ({"torch": "2.13.0", "cuda": "13.0", "nccl": ""}, H100, "580.105.08", "", ""),
        ({"torch": "2.13.0", "cuda": "13.0"}, H100, "570.86.15", "", "needs the driver 580.65.06 or newer, but 570.86.15 runs; "),
        ({"torch": "2.13.0", "cuda": "12.6"}, H100, "550.54.14", "", ""),
        ({"torch": "2.13.0", "cuda": "13.0", "architectures": ["sm_75", "sm_100"]}, H100, "", "", "no code for NVIDIA H100 (sm_90), only for sm_75, sm_100; "),
    ],
)
def test_what_does_not_fit_is_one_sentence(versions, gpus, driver, cuda, words):
    text = torch_fit.problem(versions, gpus, driver, cuda, OLDEST)
    assert words in text and bool(words) is bool(text)


def test_the_build_of_an_environment_is_read_without_importing_it(tmp_path):
    packages = tmp_path / "lib/python3.12/site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "torch/version.py").write_text("__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    (packages / "nvidia_nccl_cu13-2.29.7.dist-info").mkdir()
    assert node_facts.torch_version(str(tmp_path)) == "2.13.0+cu130"
    assert node_facts.torch_build(str(tmp_path)) == {"cuda": "13.0", "nccl": "2.29.7"}
    (packages / "torch/version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert node_facts.torch_build(str(tmp_path)) == {"cuda": "", "nccl": ""}
    assert node_facts.torch_build(str(tmp_path / "nothing")) == {"cuda": "", "nccl": ""}


def test_the_distributions_torch_tells_its_build_too(tmp_path):
    packages = tmp_path / "lib/python3/dist-packages/torch"
    packages.mkdir(parents=True)
    (packages / "version.py").write_text("__version__ = '2.6.0+debian'\ncuda: Optional[str] = None\n")
    assert node_facts.torch_build(str(tmp_path)) == {"cuda": "", "nccl": ""}


def environment(lock=pytorch_plan.Lock(), line=None, **variables):
    return pytorch_plan.environment({"pytorch_version": "2.13.0", **variables}, node(), line or {"name": "cpu", "torch_index": "https://x/whl/cpu"}, lock)


def test_constraints_and_a_lock_make_an_environment_of_their_own():
    folders = {
        environment()["environment"],
        environment(pytorch_constraints=["numpy<2.3"])["environment"],
        environment(pytorch_plan.Lock("/l", "torch==2.13.0"))["environment"],
        environment(pytorch_plan.Lock("/l", "torch==2.13.0 "))["environment"],
    }
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("variables", "index", "extra"),
    [
        ({}, "", ["https://x/whl/cpu"]),
        ({"pytorch_extra_index_urls": ["https://y"]}, "", ["https://x/whl/cpu", "https://y"]),
        ({"pytorch_index_url": "https://z"}, "https://z", []),
        ({"cluster_mirror": "https://m/"}, "https://m/pypi/simple", ["https://m/pytorch/cpu"]),
        ({"cluster_mirror": "/srv/mirror"}, "file:///srv/mirror/pypi/simple", ["file:///srv/mirror/pytorch/cpu"]),
        ({"cluster_mirror": "https://m", "pytorch_index_url": "https://z"}, "https://z", []),
    ],
)
def test_where_wheels_come_from(variables, index, extra):
    found = environment(**variables)
    assert (found["index_url"], found["extra_index_urls"]) == (index, extra)


@pytest.mark.parametrize(
    ("text", "variables", "words"),
    [
        (f"torch==2.13.0 \\\n    {HASH}\n# a comment\nnumpy==2.2 {HASH} # via torch\n", {}, []),
        (f"--index-url https://x\ntorch==2.13.0+cu130 {HASH}\n", {}, []),
        (f"torch==2.13.0+cu130 {HASH}\n", {"pytorch_version": "2.13.0+cu130"}, []),
        (f"torch==2.13.0+cu130 {HASH}\n", {"pytorch_version": "2.13.0+cu126"}, ["torch 2.13.0+cu130, but pytorch_version is 2.13.0+cu126"]),
        (f"torch==2.13.0 {HASH}\n", {"pytorch_version": "2.13.0+cu126"}, []),
        (f"torch==2.12.0 {HASH}\n", {}, ["torch 2.12.0, but pytorch_version is 2.13.0", "pytorch_version: 2.12.0"]),
        (f"torch==2.13.0 {HASH}\nnumpy==2.2\n", {}, ["numpy==2.2 has no hash", "--generate-hashes"]),
        (f"numpy==2.2 {HASH}\n", {}, ["no line torch==VERSION"]),
        (f"torch==2.13.0 {HASH}\n", {"pytorch_packages": ["numpy"]}, ["pytorch_packages is set, but pytorch_lock decides"]),
        (f"torch==2.13.0 {HASH}\n", {"pytorch_constraints": ["numpy<3"]}, ["pytorch_constraints is set"]),
        (f"torch==2.13.0 {HASH}\n", {"pytorch_source": "distribution"}, ["pytorch_source is distribution"]),
    ],
)
def test_a_lock_that_cannot_be_used_is_named(text, variables, words):
    lock = pytorch_plan.Lock("/home/me/torch.lock", text)
    problems = pytorch_plan.lock_problems({"pytorch_lock": "torch.lock", "pytorch_version": "2.13.0", **variables}, lock)
    assert len(problems) == bool(words), problems
    assert all(word in problems[0].sentence() for word in words)
