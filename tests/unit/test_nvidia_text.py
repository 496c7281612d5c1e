"""What a person reads of the decisions."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import nvidia_text


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ({}, "-"),
        ({"action": "none", "version": ""}, "-"),
        ({"action": "keep", "version": "580.159.04"}, "580.159.04 kept"),
        ({"action": "check", "version": "550.90.07"}, "550.90.07 not managed"),
        ({"action": "install", "version": "580.105.08", "kernel_modules": "open", "reboot": "once"}, "580.105.08 open"),
        (
            {"action": "install", "version": "580.105.08", "kernel_modules": "open", "gpudirect": "dma-buf", "reboot_expected": True, "reboot": "once"},
            "580.105.08 open, dma-buf, reboot once",
        ),
        (
            {"action": "install", "version": "1", "kernel_modules": "open", "reboot_expected": True, "reboot": "by hand, since nvidia_driver_reboot is false"},
            "1 open, reboot by hand",
        ),
    ],
)
def test_the_driver_in_a_few_words(driver, words):
    assert nvidia_text.driver_word(driver) == words


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        ({"source": "wheelhouse", "version": "2.13.0"}, "2.13.0 from wheelhouse"),
        ({"source": "index", "version": ""}, "newest from index"),
        ({"source": "wheelhouse", "version": "2.13.0", "lock": "/l"}, "2.13.0 from lock"),
        ({"source": "existing", "environment": "/env"}, "existing /env"),
        ({"source": "distribution"}, "distribution's package"),
    ],
)
def test_torch_in_a_few_words(torch, words):
    assert nvidia_text.torch_word(torch) == words


def test_nodes_that_get_the_same_share_a_line():
    settings = {"packages": [{"name": "libnccl2", "version": "2.28.9-1+cuda13.0"}, {"name": "headers", "version": ""}]}
    stack = {"nccl": {"settings": settings}, "advice": ["do this"]}
    plan = {"nodes": {"n1": {"nvidia": stack}, "n2": {"nvidia": stack}, "n3": {"nvidia": {}}, "n4": {}}}
    assert nvidia_text.package_lines(plan) == ["installs on n1, n2: libnccl2=2.28.9-1+cuda13.0 headers"]
    assert nvidia_text.advice_lines(plan) == ["advice for n1, n2: do this"]
