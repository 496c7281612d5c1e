"""The supervisor's command: what it looks at before every start, in its own words."""

from __future__ import annotations

import pathlib

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import launch
from supervisor_support import load

ROLES = pathlib.Path(__file__).parents[2] / "roles"

JOB = {"root": "/var/lib/torchrun/train", "release": "abc", "checkpoint_dir": "/ckpt", "shm_free_mib": 64, "disk_free_mib": 1024}


def test_devices_are_counted_as_nvidia_smi_counts_them():
    assert launch.visible_devices("1,2") == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,2"}
    assert launch.visible_devices("") == {}


def node(gpus=0, devices=None):
    return {"hardware": {"usable_gpus": [{}] * gpus}, "devices": devices}


@pytest.mark.parametrize(
    ("job", "place", "expected"),
    [
        ({}, node(), ["release=/var/lib/torchrun/train/current:abc", "shm=67108864", "disk=/ckpt:1073741824"]),
        ({"shm_free_mib": 0, "disk_free_mib": 0}, node(), ["release=/var/lib/torchrun/train/current:abc"]),
        ({"shm_free_mib": 0, "disk_free_mib": 0}, node(8), ["release=/var/lib/torchrun/train/current:abc", "gpus=8"]),
        ({"shm_free_mib": 0, "disk_free_mib": 0}, node(8, "0,3"), ["release=/var/lib/torchrun/train/current:abc", "gpus=2"]),
    ],
)
def test_checks(job, place, expected):
    found = launch.checks({**JOB, **job}, place)
    assert found == expected
    for check in found:
        load().parse_check(check)  # the supervisor understands each


def test_the_place_of_a_unit_in_the_cluster():
    unit = (
        "ExecStart=python3 supervisor --node-rank 9 --nnodes 9 -- \\\n    python -m torch.distributed.run "
        "--nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 a.py --nnodes=7\n"
    )
    assert launch.place(unit) == {"nnodes": "2", "node-rank": "1", "master-addr": "10.0.0.1", "master-port": "29500"}


@pytest.mark.parametrize(
    ("environment", "program"),
    [
        ("/opt/onprem.torch/environments/abc", ["-m", "torch.distributed.run"]),
        ("/usr", ["/folder/torchrun_without_libuv.py"]),
        ("/usr/", ["/folder/torchrun_without_libuv.py"]),
        ("/usr/local/env", ["-m", "torch.distributed.run"]),
    ],
)
def test_only_a_distributions_torch_may_lack_libuv(environment, program):
    place = {"python": "/a/python3", "pytorch": {"environment": environment}}
    assert launch.torchrun_program(place, "/folder") == ["/a/python3", *program]


def test_the_program_for_a_torch_without_libuv_is_shipped():
    assert (ROLES / "torchrun/files" / launch.WITHOUT_LIBUV).is_file()
