"""What lies above and beside a machine's own root file system in its nodes."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import host_root, nspawn
from hypothesis import given
from hypothesis import strategies as st

MOUNTS = """\
25 30 254:0 / / rw,relatime - ext4 /dev/vda rw
26 25 0:5 / /proc rw - proc proc rw
31 25 254:16 / /usr/local/nvidia ro,nosuid,nodev - squashfs /dev/vdb ro
32 25 8:1 / /opt rw - ext4 /dev/sda1 rw
33 25 8:2 / /data\\040one rw - ext4 /dev/sdb1 rw
"""


def test_only_mounts_that_hold_what_is_needed_are_bound():
    needed = ["/usr/local/nvidia/lib64/libcuda.so.580.159.04", "/usr/bin/python3.12", "/opt/torch/.venv"]
    assert host_root.binds(MOUNTS, needed) == ["/opt", "/usr/local/nvidia"]
    without_driver = "\n".join(line for line in MOUNTS.splitlines() if "nvidia" not in line)
    assert host_root.binds(without_driver, ["/data one/env"]) == ["/data one"]
    assert host_root.binds(without_driver, ["/usr/bin/python3", "/optional/env"]) == []


def test_files_of_the_driver_that_a_container_engine_has_mounted_are_bound():
    mounts = MOUNTS + "40 25 8:9 /x /usr/lib/x86_64-linux-gnu/libcuda.so.580.1 ro - ext4 /dev/sda1 rw\n"
    assert host_root.binds(mounts, []) == ["/usr/lib/x86_64-linux-gnu/libcuda.so.580.1", "/usr/local/nvidia"]


def test_a_mount_below_another_one_that_is_bound_needs_no_bind_of_its_own():
    mounts = MOUNTS + "41 32 8:3 / /opt/torch rw - ext4 /dev/sdc1 rw\n"
    assert host_root.binds(mounts, ["/opt/torch/.venv", "/opt/other"]) == ["/opt", "/usr/local/nvidia"]


def test_a_library_that_the_machine_has_is_not_unpacked_but_the_rest_of_its_package_is():
    names = ["usr/lib/x86_64-linux-gnu/libkrb5.so.3", "usr/lib/x86_64-linux-gnu/libkrb5.so.3.3", "etc/krb5.conf", "usr/share/doc/libkrb5-3/copyright"]
    assert host_root.wanted_members(names, lambda path: False) == names[:3]
    assert host_root.wanted_members(names, lambda path: path == names[0]) == ["etc/krb5.conf"]


def test_private_libraries_of_programs_are_always_unpacked():
    names = ["usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so", "usr/sbin/nft"]
    assert host_root.wanted_members(names, lambda path: True) == names


@pytest.mark.parametrize(
    ("member", "path"),
    [
        ("./lib/systemd/system/ssh.service", "usr/lib/systemd/system/ssh.service"),
        ("./sbin/ip", "usr/sbin/ip"),
        ("./usr/bin/ssh", "usr/bin/ssh"),
        ("./etc/ssh/moduli", "etc/ssh/moduli"),
        ("./library/x", "library/x"),
    ],
)
def test_paths_of_packages_follow_the_merged_usr(member, path):
    assert host_root.merged(member) == path


PASSWD = "root:x:0:0:root:/root:/bin/bash\nmessagebus:x:999:999::/:/usr/sbin/nologin\n"
GROUP = "root:x:0:\nmessagebus:x:999:\nsystemd-journal:x:998:"


def test_accounts_are_added_beside_the_machines_own():
    made = host_root.accounts(PASSWD, GROUP, "root:*:1::::::\n", "ops")
    assert made.passwd.startswith(PASSWD) and made.group.startswith(GROUP)
    assert host_root.names_of(made.passwd) == {"root", "messagebus", "sshd", "systemd-network", "ops"}
    assert "ops:x:2000:2000::/home/ops:/bin/bash" in made.passwd.splitlines()
    assert made.group.count("messagebus") == made.group.count("systemd-journal") == 1


@given(st.sets(st.integers(min_value=100, max_value=2010)))
def test_accounts_never_share_a_number(taken):
    passwd = "".join(f"u{number}:x:{number}:{number}::/:/bin/sh\n" for number in taken)
    group = "".join(f"u{number}:x:{number}:\n" for number in taken)
    try:
        made = host_root.accounts(passwd, group, "", "ops")
    except ValueError:
        assert len(taken) > 800
        return
    numbers = [line.split(":")[2] for line in made.passwd.splitlines()]
    assert len(numbers) == len(set(numbers))
    again = host_root.accounts(made.passwd, made.group, made.shadow, "ops")
    assert again == made


def test_gpus_are_divided_evenly_and_in_order(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia10", "nvidia2", "nvidia0", "nvidiactl", "nvidia-uvm", "nvidia1"):
        (tmp_path / "dev" / name).touch()
    files = host_root.gpu_files(str(tmp_path))
    assert [path.rsplit("/", 1)[1] for path in files] == ["nvidia0", "nvidia1", "nvidia2", "nvidia10"]
    assert host_root.share(files, 2, 1) == files[2:]
    assert host_root.share([], 2, 1) == []
    assert [host_root.share(files[:2], 4, index) for index in range(4)] == [files[:1], files[:1], files[1:2], files[1:2]], "shared"
    with pytest.raises(ValueError, match="4 GPUs cannot be divided evenly among 3 nodes"):
        host_root.share(files, 3, 0)


@given(st.integers(1, 8), st.integers(0, 8))
def test_every_gpu_belongs_to_exactly_one_node(nodes, each):
    devices = [f"/dev/nvidia{number}" for number in range(nodes * each)]
    assert [device for index in range(nodes) for device in host_root.share(devices, nodes, index)] == devices


def test_the_drivers_files_are_read_from_what_a_process_has_loaded():
    maps = (
        "7f0 r-xp 0 fe:10 12 /usr/local/nvidia/lib64/libcuda.so.580.159.04\n"
        "7f1 r--p 0 fe:10 12 /usr/local/nvidia/lib64/libcuda.so.580.159.04\n"
        "7f2 r--p 0 fe:00 13 /usr/lib/x86_64-linux-gnu/libc.so.6\n"
        "7f3 rw-p 0 00:00 0\n"
    )
    assert host_root.loaded_paths(maps, ["libcuda.so", "libnvidia-ml.so"]) == ["/usr/local/nvidia/lib64/libcuda.so.580.159.04"]


def test_a_node_with_devices_of_its_own_cannot_make_those_of_others():
    words = nspawn.nspawn_words("m", "n", "/d", "br0", ["/dev/nvidia1"], ["/opt"], {})
    assert "--bind=/dev/nvidia1" in words and "--bind-ro=/opt" in words and "--drop-capability=CAP_MKNOD" in words
    assert "--drop-capability=CAP_MKNOD" not in nspawn.nspawn_words("m", "n", "/d", "br0", [], [], {})
