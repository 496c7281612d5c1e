"""Formulas against figures that were measured elsewhere and published."""

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import bandwidth
from ansible_collections.onprem.torch.plugins.module_utils.bandwidth import Gpu, Nic
from hypothesis import given
from hypothesis import strategies as st

H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 18)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80, 12)
IB400 = Nic("mlx5_0", 400_000, True, 32.0, 16)


def test_bus_bandwidth_of_a_published_row():
    # nccl-tests on 2 H100: 134217728 bytes in 474.8 us: algbw 282.7, busbw 282.7 (two ranks: factor 1).
    assert bandwidth.bus_bandwidth(134217728, 474.8e-6, 2) == pytest.approx(282.7, rel=1e-3)
    # nccl-tests doc/PERFORMANCE.md: S/t * 2(n-1)/n.
    assert bandwidth.bus_bandwidth(10**9, 1.0, 8) == pytest.approx(1.75)
    assert bandwidth.bus_bandwidth(10**9, 1.0, 8, "all_gather") == pytest.approx(0.875)
    assert bandwidth.bus_bandwidth(10**9, 1.0, 1) == pytest.approx(1.0)


@pytest.mark.parametrize(("text", "value"), [(8, 8), ("64K", 65536), ("128M", 2**27), ("4G", 2**32), ("1GiB", 2**30), ("16b", 16)])
def test_sizes_are_read(text, value):
    assert bandwidth.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "eight", "-8", "1.5M", "8T", None])
def test_what_is_no_size_says_so(text):
    with pytest.raises(bandwidth.SizeError, match="no size"):
        bandwidth.parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 64, 2, "float33"), "dtype is 'float33'"),
        ((128, 64, 2, "float32"), "above size_max"),
        ((6, 64, 2, "float32"), "no multiple of 4"),
        ((8, 66, 2, "float32"), "no multiple of 4"),
        ((8, 64, 1, "float32"), "size_factor is 1"),
        ((2, 64, 2, "float32"), "already takes 4"),
    ],
)
def test_wrong_sizes_are_one_sentence(arguments, words):
    with pytest.raises(bandwidth.SizeError, match=words) as caught:
        bandwidth.sizes(*arguments)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 1000), st.integers(0, 10**7), st.integers(2, 10))
def test_sizes_stay_inside_their_bounds(first, more, factor):
    found = bandwidth.sizes(first * 4, first * 4 + more * 4, factor, "float32")
    assert found[0] == first * 4
    assert all(later == earlier * factor for earlier, later in zip(found, found[1:]))
    assert found[-1] <= first * 4 + more * 4 < found[-1] * factor


def test_plateau_ignores_small_sizes_and_a_dip_is_not_the_plateau():
    rows = [(8, 0.001), (1 << 20, 50.0), (1 << 27, 280.0), (1 << 30, 339.0), (1 << 31, 341.0)]
    assert bandwidth.plateau(rows) == (1 << 31, 340.0)
    assert bandwidth.plateau([]) == (0, 0.0)


def test_expected_inside_the_node_prints_its_arithmetic():
    found = bandwidth.inside_node([H100] * 8)
    assert found.value == pytest.approx(370.8)
    assert "18 NVLinks x 20.6 GB/s = 370.8 GB/s" in found.arithmetic
    # Measured on healthy hosts: 8 x A100 232-235, 8 x H100 ring ~370, 2 x H100 341.
    assert bandwidth.inside_node([A100] * 8).minimum < 232 < bandwidth.inside_node([A100] * 8).value
    assert found.minimum < 341


def test_unknown_hardware_is_said_to_be_unknown():
    assert bandwidth.inside_node([Gpu("A card", 0, None)] * 2).value is None
    assert "could not be read" in bandwidth.inside_node([Gpu("A card", 0, None)] * 2).arithmetic
    assert "different GPUs" in bandwidth.inside_node([H100, A100]).arithmetic
    virtual = bandwidth.wire([Nic("host0")])
    assert virtual.value is None and "host0 reports no speed" in virtual.arithmetic


@pytest.mark.parametrize(("capability", "value"), [(60, 18.0), (80, 20.0), (86, 12.0), (89, 20.0), (90, 20.6), (100, 40.1), (103, 40.1)])
def test_the_speed_of_a_link_is_nccl_s(capability, value):
    assert bandwidth.nvlink_bandwidth(capability) == value


def test_a_gpu_newer_than_the_table_is_unknown():
    found = bandwidth.inside_node([Gpu("a newer one", 130, 18)] * 8)
    assert found.value is None and "compute capability 13.0" in found.arithmetic


def test_pcie_cards_only_warn():
    found = bandwidth.inside_node([Gpu("RTX 4090", 89, 0, 16.0, 16)] * 2)
    assert found.value == pytest.approx(24.0) and not found.blocks


def test_expected_on_the_wire():
    found = bandwidth.wire([IB400] * 8)
    assert found.value == pytest.approx(384.0), "each 400 Gb/s port is 50 GB/s, its Gen5 x16 slot 48"
    assert "capped by its PCIe link" in found.arithmetic
    slow = bandwidth.wire([Nic("eth0", 10_000)])
    assert slow.value == pytest.approx(1.25) and slow.blocks and slow.minimum == pytest.approx(1.0)
    fast = bandwidth.wire([Nic("eth0", 100_000)])
    assert not fast.blocks, "TCP at 100 Gb/s reaches 4-6 GB/s of 12.5 on healthy hosts"


def test_the_slower_of_inside_and_wire_decides():
    inside, wire = bandwidth.inside_node([H100] * 8), bandwidth.wire([Nic("mlx5_0", 200_000, True)] * 8)
    assert bandwidth.application(inside, wire, 2, 8).value == pytest.approx(200.0)
    assert bandwidth.application(inside, wire, 1, 8) is inside
    assert bandwidth.application(bandwidth.inside_node([H100]), wire, 2, 1).value == pytest.approx(200.0)
    assert bandwidth.application(inside, bandwidth.wire([Nic("host0")]), 2, 8).value is None


def test_a_row_has_the_shape_of_nccl_tests():
    row = bandwidth.nccl_tests_row(1024, "float32", "sum", 1e-5, 2, 0, 20)
    assert row["count"] == 256 and row["type"] == "float" and row["in_place"]["time"] == pytest.approx(10.0)
    shape = {"size", "count", "type", "redop", "root", "out_of_place", "in_place", "actual_iterations", "experiment_name"}
    assert set(row) == shape and row["out_of_place"] is None
