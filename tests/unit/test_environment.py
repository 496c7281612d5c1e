"""An environment is complete or is not used."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import environment

REQUIREMENTS = ["torch==2.13.0", "numpy"]


def installed(folder, *names):
    for name in names:
        (folder / "lib/python3.11/site-packages" / f"{name}.dist-info").mkdir(parents=True)


@pytest.fixture
def complete(tmp_path):
    folder = tmp_path / "environment"
    installed(folder, "torch-2.13.0", "numpy-2.0.0")
    environment.write_record(str(folder), REQUIREMENTS, "3.11.2", {"torch": "2.13.0"})
    return folder


def test_a_complete_environment_is_used(complete):
    assert environment.differences(str(complete), REQUIREMENTS, "3.11.2") == []


def test_what_an_interrupted_installation_left_is_never_used(tmp_path):
    folder = tmp_path / "environment"
    installed(folder, "torch-2.13.0", "numpy-2.0.0")
    assert environment.differences(str(folder), REQUIREMENTS, "3.11.2") == [f"{folder} is incomplete"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"requirements": ["torch'])
def test_half_a_record_is_none(complete, content):
    (complete / environment.RECORD).write_text(content)
    assert environment.record_of(str(complete)) == {}
    assert environment.differences(str(complete), REQUIREMENTS, "3.11.2") == [f"{complete} is incomplete"]


def test_a_folder_that_is_not_there(tmp_path):
    assert environment.differences(str(tmp_path / "x"), REQUIREMENTS, "3.11.2") == [f"{tmp_path / 'x'} does not exist"]


def test_other_requirements_another_python_and_lost_packages_are_told(complete):
    assert environment.differences(str(complete), ["torch==2.12.0"], "3.11.2") == ["it holds torch==2.13.0 numpy"]
    assert environment.differences(str(complete), REQUIREMENTS, "3.11.9") == [
        "it was made with Python 3.11.2, and 3.11.9 is there now"
    ]
    os.rmdir(complete / "lib/python3.11/site-packages/numpy-2.0.0.dist-info")
    assert environment.differences(str(complete), REQUIREMENTS, "3.11.2") == [
        "packages were changed or removed by hand: numpy-2.0.0"
    ]


def test_packages_that_a_person_added_are_left_alone(complete):
    installed(complete, "extra-1.0")
    assert environment.differences(str(complete), REQUIREMENTS, "3.11.2") == []


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "file"
    environment.write_atomically(str(path), "one\n", 0o600)
    environment.write_atomically(str(path), "two\n", 0o640)
    assert path.read_text() == "two\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        environment.write_atomically(str(path), "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_wheels_that_are_cut_short_are_missing(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"12345")
    (tmp_path / "b.whl").write_bytes(b"123")
    assert environment.missing_wheels({"a.whl": 5, "b.whl": 5, "c.whl": 5}, str(tmp_path)) == ["b.whl", "c.whl"]


def test_uv_is_unpacked_once_and_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "uv-0.8.1-py3-none-any.whl", "w") as archive:
        archive.writestr("uv-0.8.1.data/scripts/uv", "#!/bin/sh\necho uv\n")
    target = str(tmp_path / "bin/uv")
    path = environment.unpack_uv(str(tmp_path), target)
    assert path == f"{target}-0.8.1"
    assert os.access(path, os.X_OK)
    before = os.stat(path).st_ino
    assert environment.unpack_uv(str(tmp_path), target) == path
    assert os.stat(path).st_ino == before
    assert os.listdir(tmp_path / "bin") == ["uv-0.8.1"]


def test_without_a_wheel_of_uv_there_is_a_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="no wheel of uv"):
        environment.unpack_uv(str(tmp_path), str(tmp_path / "bin/uv"))


def test_an_existing_environment_is_asked_again_once_its_torch_nccl_or_the_driver_changes(tmp_path):
    packages = tmp_path / "lib/python3.11/site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "torch/version.py").write_text("__version__ = '2.13.0'\n")
    stamps = [environment.existing_stamp(str(tmp_path), "580.105.08")]
    assert environment.existing_stamp(str(tmp_path), "580.105.08") == stamps[0]
    stamps.append(environment.existing_stamp(str(tmp_path), "580.159.03"))
    os.utime(packages / "torch/version.py", ns=(0, 5))
    stamps.append(environment.existing_stamp(str(tmp_path), "580.105.08"))
    (packages / "nvidia_nccl_cu13-2.29.7.dist-info").mkdir()
    stamps.append(environment.existing_stamp(str(tmp_path), "580.105.08"))
    assert len({repr(stamp) for stamp in stamps}) == 4
    record = environment.existing_record("/opt/onprem.torch", "/env/")
    assert record == environment.existing_record("/opt/onprem.torch", "/env") and record.startswith("/opt/onprem.torch/existing/")
    assert json.loads(json.dumps(stamps[0])) == stamps[0], "it is compared with what a file says"
