"""What root does in folders that others can write: nothing outside them ever changes. Runs as root, attacks as nobody."""

from __future__ import annotations

import ctypes
import grp
import json
import os
import pathlib
import pwd
import stat
import struct
import threading
import time

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import folder_access, folder_acl, job_folders, safe_files, source_tree
from ansible_collections.onprem.torch.plugins.modules import node_info, pytorch_environment, torchrun_unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ALICE = safe_files.Account("alice", 65534, 65534, (65534,))


@pytest.fixture
def place(tmp_path):
    """A folder that everybody may enter, whatever lies above it: pytest's own is for root alone."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


def tree(folder):
    """Owner, mode and content of everything below a folder."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files, "."]:
            path = os.path.join(here, name)
            status = os.lstat(path)
            text = open(path, "rb").read() if stat.S_ISREG(status.st_mode) else b""
            found[path] = (status.st_uid, status.st_gid, status.st_mode, text)
    return found


def owned(path, who=ALICE):
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, who.uid, who.gid)
    return path


def test_a_child_has_the_users_rights_and_no_way_back():
    def work():
        found = [os.getresuid(), os.getresgid(), os.getgroups(), os.getcwd()]
        with pytest.raises(PermissionError):
            os.setuid(0)
        return found

    assert safe_files.as_user(ALICE, work) == [[65534] * 3, [65534] * 3, [65534], "/"]
    assert os.geteuid() == 0


def test_results_and_errors_come_back(place):
    assert safe_files.as_user(ALICE, lambda: {"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}
    (place / "shut").mkdir(mode=0o700)
    with pytest.raises(PermissionError) as error:
        safe_files.as_user(ALICE, lambda: os.listdir(place / "shut"))
    assert error.value.filename == str(place / "shut")
    with pytest.raises(RuntimeError, match="ValueError: no"):
        safe_files.as_user(ALICE, lambda: (none for none in ()).throw(ValueError("no")))
    with pytest.raises(RuntimeError, match="killed"):
        safe_files.as_user(ALICE, lambda: os.kill(os.getpid(), 9))
    with pytest.raises(RuntimeError, match="larger than 4 MiB"):
        safe_files.as_user(ALICE, lambda: "x" * safe_files.ANSWER)
    assert len(safe_files.as_user(ALICE, lambda: "x" * (safe_files.ANSWER - 100))) == safe_files.ANSWER - 100
    with pytest.raises(RuntimeError, match="TypeError.*not JSON"):
        safe_files.as_user(ALICE, lambda: {1, 2})


def test_rights_that_cannot_be_given_up_are_said_so():
    def again():
        return safe_files.as_user(safe_files.Account("bob", 1234, 1234, ()), os.getuid)

    with pytest.raises(RuntimeError, match="root's rights cannot be given up for those of bob .*not permitted"):
        safe_files.as_user(ALICE, again)


def test_a_pipe_that_nobody_writes_ends_with_the_time_limit(place):
    os.mkfifo(place / "pipe")
    os.chmod(place / "pipe", 0o644)
    with pytest.raises(TimeoutError):
        safe_files.as_user(ALICE, lambda: open(place / "pipe").read(), 0.3)
    with pytest.raises(OSError, match="no regular file"):
        safe_files.read_text(str(place / "pipe"))
    (place / "zero").symlink_to("/dev/zero")
    with pytest.raises(OSError):
        safe_files.read_text(str(place / "zero"))
    with pytest.raises(OSError, match="no regular file"):
        safe_files.read_text(str(place / "zero"), links=True)
    (place / "large").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="larger than 99"):
        safe_files.read_text(str(place / "large"), 99)
    assert safe_files.read_text(str(place / "large"), 100) == "x" * 100


def test_a_program_runs_with_the_users_rights_an_own_environment_and_a_time_limit(monkeypatch):
    monkeypatch.setenv("SECRET", "planted")
    status, output, _errors = safe_files.run_as(ALICE, ["/bin/sh", "-c", "id -u; id -G; pwd; env"], 20, {"SHOWN": "1"})
    assert status == 0
    assert output.split()[:3] == ["65534", "65534", "/"]
    assert "SHOWN=1" in output and "planted" not in output
    started = time.monotonic()
    assert safe_files.run_as(ALICE, ["/bin/sh", "-c", "sleep 60 & wait"], 0.3)[0] == 124
    assert time.monotonic() - started < 20
    assert safe_files.run_as(ALICE, ["/no/such/program"], 1)[0] == 127
    assert len(safe_files.run_as(ALICE, ["/bin/sh", "-c", "yes | head -c 30000000"], 60)[1]) < 2 * safe_files.ANSWER


def test_a_link_is_followed_only_where_nobody_but_root_can_have_made_it(place):
    os.chmod(place, 0o755)
    (place / "real").mkdir()
    safe = place / "safe"
    safe.mkdir(mode=0o755)
    (safe / "link").symlink_to("../real")
    found = safe_files.reach("/etc")
    os.close(found.handle)
    assert found.roots and not found.missing
    home = owned(place / "home")
    (home / "link").symlink_to("../real")
    with pytest.raises(safe_files.Unsafe, match="home/link is a link"):
        safe_files.reach(str(home / "link" / "x"))
    (home / "loop").symlink_to("loop")
    with pytest.raises(safe_files.Unsafe):
        safe_files.reach(str(home / "loop"))
    (home / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        safe_files.reach(str(home / "file" / "x"))


NAMES = st.lists(st.sampled_from(["a", "b", "c", "..", ".", "link", "out", "file", ""]), max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
def test_no_path_through_a_users_folder_leads_root_outside(place, names):
    outside = place / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept").write_text("kept")
    home = owned(place / "home")
    for name in ("a", "b"):
        owned(home / name)
    for link, target in ((home / "link", outside), (home / "a" / "out", "../../outside"), (home / "b" / "c", "/etc")):
        if not link.is_symlink():
            link.symlink_to(target)
    (home / "file").write_text("")
    # "..", written in a variable, is the operator's word; what is tried here are the user's folders.
    path = os.path.join(home, *[name for name in names if name != ".."])
    before = tree(outside)
    try:
        safe_files.make_folder(path, ALICE, mend=True)
    except (OSError, safe_files.Unsafe):
        pass
    assert tree(outside) == before
    assert os.stat("/etc").st_uid == 0


def test_a_folder_that_is_there_keeps_owner_and_mode(place):
    home = place / "data"
    home.mkdir(mode=0o700)
    os.chown(home, 1234, 1234)
    assert safe_files.make_folder(str(home), ALICE) == ""
    assert safe_files.make_folder(str(home), ALICE, mend=True) == ""
    assert (home.stat().st_uid, home.stat().st_mode & 0o777) == (1234, 0o700)


@pytest.fixture
def roots_place():
    """A folder below folders of root's alone."""
    folder = f"/var/lib/onprem-torch-test-{os.getpid()}"
    os.mkdir(folder, 0o755)
    yield folder
    job_folders.shutil.rmtree(folder)


def test_below_folders_of_roots_a_new_folder_is_the_users(roots_place):
    path = f"{roots_place}/x/y"
    assert safe_files.make_folder(path, ALICE, look=True) == "made" and not os.path.exists(path)
    assert safe_files.make_folder(path, ALICE) == "made"
    assert os.stat(path).st_uid == ALICE.uid and os.stat(f"{roots_place}/x").st_uid == 0
    os.chmod(f"{roots_place}/x", 0o700)
    assert safe_files.make_folder(f"{roots_place}/x", None, mend=True) == "mended"
    assert os.stat(f"{roots_place}/x").st_mode & 0o777 == 0o755
    assert safe_files.make_folder(f"{roots_place}/x", None, mend=True) == ""
    os.mkdir(f"{roots_place}/left", 0o700)
    assert safe_files.make_folder(f"{roots_place}/left", ALICE, mend=True) == "mended"
    assert (os.stat(f"{roots_place}/left").st_uid, os.stat(f"{roots_place}/left").st_mode & 0o777) == (ALICE.uid, 0o755)


def test_below_a_users_folder_the_user_makes_it(roots_place):
    os.chown(roots_place, ALICE.uid, ALICE.gid)
    assert safe_files.make_folder(f"{roots_place}/x/y", ALICE) == "made"
    assert os.stat(f"{roots_place}/x").st_uid == ALICE.uid
    os.chown(roots_place, 1234, 1234)
    with pytest.raises(PermissionError):
        safe_files.make_folder(f"{roots_place}/z", ALICE)


# --- who else can change a folder ---

PERSON, SERVICE = 1000, 102


@pytest.mark.parametrize(
    ("gid", "members", "primary", "expected"),
    [
        (0, {}, {"root": 0}, safe_files.ROOT),
        (0, {"root": 0}, {"sync": 5, "halt": 7}, safe_files.ROOT),
        (0, {"alice": PERSON}, {"root": 0}, safe_files.OTHERS),
        (50, {}, {}, safe_files.ROOT),
        (50, {"alice": PERSON}, {}, safe_files.OTHERS),
        (50, {}, {"alice": PERSON}, safe_files.OTHERS),
        (50, {"gone": None}, {}, safe_files.OTHERS),
        (100, {}, {}, safe_files.OTHERS),
        (100, {}, {"alice": PERSON}, safe_files.OTHERS),
        (998, {}, {}, safe_files.OTHERS),
        (998, {"alice": PERSON}, {}, safe_files.OTHERS),
        (998, {"www-data": 33}, {}, safe_files.OTHERS),
        (104, {}, {"syslog": SERVICE}, safe_files.SERVICES),
        (104, {"www-data": 33}, {"syslog": SERVICE}, safe_files.SERVICES),
        (104, {"alice": PERSON}, {"syslog": SERVICE}, safe_files.OTHERS),
        (104, {}, {"syslog": SERVICE, "alice": PERSON}, safe_files.OTHERS),
        (1000, {}, {"www-data": 33}, safe_files.OTHERS),
        (777, None, {}, safe_files.OTHERS),
    ],
)
def test_a_group_counts_by_who_is_in_it(monkeypatch, gid, members, primary, expected):
    uids = {name: uid for name, uid in {**(members or {}), **primary}.items() if uid is not None}
    users = {name: pwd.struct_passwd((name, "x", uid, gid if name in primary else 65000, "", "/", "")) for name, uid in uids.items()}
    groups = {gid: grp.struct_group(("group", "x", gid, list(members)))} if members is not None else {}
    monkeypatch.setattr(safe_files.grp, "getgrgid", groups.__getitem__)
    monkeypatch.setattr(safe_files.pwd, "getpwall", lambda: list(users.values()))
    monkeypatch.setattr(safe_files.pwd, "getpwnam", users.__getitem__)
    assert safe_files.writers_of(gid) == expected


def reached(path, who=None):
    found = safe_files.reach(path, who)
    os.close(found.handle)
    return found


@pytest.mark.parametrize("gid", [100, 60123])
def test_what_a_group_of_people_can_write_is_no_folder_of_roots(roots_place, gid):
    os.chown(roots_place, 0, gid)
    os.chmod(roots_place, 0o2775)
    found = reached(f"{roots_place}/torch")
    assert not found.roots and not found.systems and found.changer.startswith(f"{roots_place} (the group ")
    assert folder_access.changer(f"{roots_place}/torch") == found.changer
    os.mkdir(f"{roots_place}/torch", 0o755)
    assert not reached(f"{roots_place}/torch").systems, "its name can be given to another folder"
    os.chown(f"{roots_place}/torch", 0, 0)
    assert safe_files.make_folder(f"{roots_place}/torch/x", None) == "made"
    with pytest.raises(PermissionError):
        safe_files.make_folder(f"{roots_place}/torch/job", ALICE)


def test_a_group_without_anybody_and_links_below_it_are_roots(roots_place):
    """As Debian has it: /usr/local is root:staff, 2775."""
    os.chown(roots_place, 0, 50)
    os.chmod(roots_place, 0o2775)
    os.mkdir(f"{roots_place}/real", 0o755)
    os.symlink("real", f"{roots_place}/link")
    assert reached(f"{roots_place}/link").roots
    assert folder_access.changer(f"{roots_place}/link/x") == ""


def test_a_services_folder_is_fine_for_a_job_but_not_for_what_root_runs(roots_place, monkeypatch):
    monkeypatch.setattr(safe_files, "writers_of", lambda gid: safe_files.SERVICES if gid == 104 else safe_files.OTHERS)
    os.chown(roots_place, 0, 104)
    os.chmod(roots_place, 0o775)
    assert reached(roots_place, ALICE).systems and not reached(roots_place, ALICE).roots
    assert folder_access.changer(f"{roots_place}/python3") == f"{roots_place} (the group {safe_files.group_of(104)})"
    assert not reached(roots_place, ALICE._replace(groups=(65534, 104))).systems, "the job's user is no service"
    assert not reached(roots_place, ALICE._replace(gid=104)).systems


def test_an_access_control_list_counts_as_others(roots_place):
    """The group's bits are then the most that anybody in the list may do: the mode reads root:root, 0775."""
    entries = ((1, 7, folder_acl.NO_ID), (2, 7, PERSON), (4, 5, folder_acl.NO_ID), (0x10, 7, folder_acl.NO_ID), (0x20, 5, folder_acl.NO_ID))
    try:
        os.setxattr(roots_place, folder_acl.ATTRIBUTE, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))
    except OSError:
        pytest.skip("the file system has no access control lists")
    assert os.stat(roots_place).st_gid == 0 and os.stat(roots_place).st_mode & 0o020
    found = reached(roots_place)
    assert not found.systems and found.changer == f"{roots_place} (whoever its access control list names)"


@pytest.mark.parametrize("theirs", ["first", "middle", "last", "last/env", "last/env/bin", "last/env/bin/python3", ""])
def test_root_runs_nothing_that_anybody_on_the_way_can_change(alice, roots_place, theirs):
    """Links lead from first by middle to last; whoever has one of these folders gives root another program."""
    os.makedirs(f"{roots_place}/last/env/bin")
    for name in ("first", "middle"):
        os.mkdir(f"{roots_place}/{name}")
    os.symlink(f"{roots_place}/middle/cur", f"{roots_place}/first/torch")
    os.symlink("../last/env", f"{roots_place}/middle/cur")
    pathlib.Path(f"{roots_place}/last/env/bin/python3").write_text("")
    python = f"{roots_place}/first/torch/bin/python3"
    if theirs:
        os.chown(f"{roots_place}/{theirs}", PERSON, PERSON)
    found = sentences(folder_access.look("pytorch_python", python, "trust", "alice"))
    found += sentences(folder_access.look("pytorch_root", f"{roots_place}/first/torch", "trust", "alice")) if "bin" not in theirs else []
    assert len(found) == (0 if not theirs else 1 if "bin" in theirs else 2)
    assert all(f"{roots_place}/{theirs} ({safe_files.name_of(PERSON)}) can be changed by others than root" in sentence for sentence in found)


def test_what_root_cannot_look_at_is_said(alice, roots_place):
    entry = folder_access.look("pytorch_root", f"{roots_place}/x", "trust", "alice")
    entry["error"] = "Permission denied"
    (sentence,) = sentences(entry)
    assert f"pytorch_root names {roots_place}/x, but root of the node cannot look at it (Permission denied)" in sentence


# --- a network file system on which root is nobody, and one that is read-only ---


class Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def squashed(work):
    """Do something as a root without rights of its own, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, and return the result."""

    def without():
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (Capabilities * 2)()
        assert libc.capget(header, data) == 0
        data[0].effective &= ~0b110
        data[0].permitted &= ~0b110
        assert libc.capset(header, data) == 0
        return work()

    return safe_files.as_user(None, without, 60)


def own_home(roots_place):
    """A home that is its user's alone."""
    home = f"{roots_place}/alice"
    os.mkdir(home, 0o700)
    os.chown(home, ALICE.uid, ALICE.gid)
    return home


def test_in_a_private_folder_where_root_is_nobody_the_user_decides(alice, roots_place):
    home = own_home(roots_place)
    for path, use in ((f"{home}/ckpt", "write"), (f"{home}/a/b", "write"), (f"{home}/data", "read"), (f"{home}/project", "source")):
        variable = {"write": "torchrun_checkpoint_dir", "read": "torchrun_data_paths", "source": "torchrun_source"}[use]
        if use != "write":
            os.mkdir(path, 0o700)
            os.chown(path, ALICE.uid, ALICE.gid)
        assert sentences(squashed(lambda: folder_access.look(variable, path, use, "alice"))) == []
    os.chmod(f"{home}/data", 0)
    (sentence,) = sentences(squashed(lambda: folder_access.look("torchrun_data_paths", f"{home}/data", "read", "alice")))
    assert "the job's user alice cannot open and list it (Permission denied)" in sentence
    os.symlink("/etc", f"{home}/link")
    (sentence,) = sentences(squashed(lambda: folder_access.look("torchrun_checkpoint_dir", f"{home}/link", "write", "alice")))
    assert "leads to /etc" in sentence


def test_where_root_is_nobody_the_user_makes_its_folders(roots_place):
    home = own_home(roots_place)
    os.mkdir(f"{home}/x", 0o700)
    os.chown(f"{home}/x", ALICE.uid, ALICE.gid)
    path = f"{home}/x/y/z"
    assert squashed(lambda: safe_files.make_folder(path, ALICE, look=True)) == "made" and not os.path.exists(path)
    assert squashed(lambda: safe_files.make_folder(path, ALICE)) == "made"
    assert os.stat(path).st_uid == ALICE.uid
    assert squashed(lambda: safe_files.make_folder(path, ALICE)) == ""
    with pytest.raises(PermissionError):
        squashed(lambda: safe_files.make_folder(f"{path}/roots", None))


def test_paths_are_looked_for_as_the_user_and_what_nobody_may_know_is_not_said(roots_place):
    home = own_home(roots_place)
    os.makedirs(f"{home}/data/shut")
    for name in ("data", "data/shut"):
        os.chown(f"{home}/{name}", ALICE.uid, ALICE.gid)
    os.chmod(f"{home}/data/shut", 0o700)
    paths = [f"{home}/data", f"{home}/none", f"{home}/data/shut/x", roots_place]
    assert squashed(lambda: node_info.there(paths, ALICE)) == {f"{home}/data": True, f"{home}/none": False, f"{home}/data/shut/x": False, roots_place: True}
    os.chown(f"{home}/data/shut", 1234, 1234)
    assert f"{home}/data/shut/x" not in squashed(lambda: node_info.there(paths, ALICE))
    assert squashed(lambda: node_info.there(paths, None)) == {roots_place: True}
    assert node_info.there(paths, None) == {f"{home}/data": True, f"{home}/none": False, f"{home}/data/shut/x": False, roots_place: True}


def test_a_jobs_folder_in_which_root_is_nobody_is_told_before_anything_changes(alice, roots_place):
    home = own_home(roots_place)
    os.chmod(home, 0o755)
    for made in (False, True):
        entries = [
            squashed(lambda use=use, path=path: folder_access.look(variable, f"{home}/train/{path}", use, "alice"))
            for variable, path, use in (("torchrun_root", "work", "own"), ("torchrun_root", "state", "own"), ("torchrun_checkpoint_dir", "checkpoints", "own"))
        ]
        (sentence,) = sentences(*entries)
        assert sentence == (
            f"n1: torchrun_root leads to {home}/train/work, but root of the node cannot write in {home}{'/train' if made else ''} "
            "(root_squash of a network file system?), where it keeps the job's releases; set torchrun_root to a folder on a local disk."
        )
        assert not sentences(folder_access.look("torchrun_root", f"{home}/train/work", "own", "alice")), "on a local disk root may"
        safe_files.make_folder(f"{home}/train/work", ALICE)
    os.chmod(home, 0o700)
    (sentence,) = sentences(squashed(lambda: folder_access.look("torchrun_root", f"{home}/train/work", "own", "alice")))
    assert f"root of the node cannot write in {home}" in sentence


@pytest.mark.parametrize("user", ["alice", "bob"])
@pytest.mark.parametrize(("use", "start"), [("own", "torchrun_root leads to"), ("write", "torchrun_log_root names")])
def test_what_root_cannot_make_on_a_read_only_file_system_is_told(alice, roots_place, monkeypatch, user, use, start):
    variable = start.split()[0]
    assert not sentences(folder_access.look(variable, f"{roots_place}/a/b", use, user))
    monkeypatch.setattr(folder_access.os, "access", lambda path, _mode: False)
    monkeypatch.setattr(folder_access.os, "statvfs", lambda path: type("Found", (), {"f_flag": os.ST_RDONLY}))
    (sentence,) = sentences(folder_access.look(variable, f"{roots_place}/a/b", use, user))
    assert start in sentence and f"{roots_place} (its file system is read-only)" in sentence


@pytest.mark.parametrize("name", ["", "releases"])
def test_errors_name_folders_by_their_paths(roots_place, name):
    os.makedirs(f"{roots_place}/releases")
    real = os.path.join(roots_place, name).rstrip("/")
    with pytest.raises(FileNotFoundError) as error, safe_files.pinned(roots_place, *filter(None, [name])) as here:
        os.rename(f"{here}/a", f"{here}/b")
    assert (error.value.filename, error.value.filename2) == (f"{real}/a", f"{real}/b")
    with pytest.raises(source_tree.SourceError) as error, safe_files.pinned(roots_place, *filter(None, [name])) as here:
        source_tree.files(f"{here}/project")
    assert str(error.value) == f"{real}/project does not exist"


# --- while another one changes names ---


def swapping(folder, target, until):
    """As the user, give a folder's name to a link and back, again and again."""
    while not until.is_set():
        try:
            os.rename(folder, f"{folder}.away")
            os.symlink(target, folder)
            os.unlink(folder)
            os.rename(f"{folder}.away", folder)
        except OSError:
            pass


def test_while_the_user_swaps_a_folder_for_a_link_nothing_outside_changes(roots_place):
    home, outside = f"{roots_place}/home", f"{roots_place}/outside"
    os.mkdir(home)
    os.mkdir(outside, 0o755)
    with open(f"{outside}/kept", "w") as stream:
        stream.write("kept")
    os.mkdir(f"{home}/job")
    os.chown(home, ALICE.uid, ALICE.gid)
    before, ended = tree(outside), threading.Event()
    attacker = threading.Thread(target=swapping, args=(f"{home}/job", outside, ended))
    attacker.start()
    done = 0
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                with safe_files.pinned(f"{home}/job") as here:
                    safe_files.write_new(f"{here}/new", "x", 0o600)
                    os.unlink(f"{here}/new")
                    done += 1
                safe_files.make_folder(f"{home}/job", ALICE, mend=True)
                job_folders.remove(f"{home}/job", "kept")
            except (OSError, safe_files.Unsafe):
                pass
    finally:
        ended.set()
        attacker.join()
    assert done, "root never got into the folder"
    assert tree(outside) == before


def test_new_files_never_follow_or_overwrite(place):
    (place / "victim").write_text("kept")
    (place / "config").symlink_to(place / "victim")
    with pytest.raises(FileExistsError):
        safe_files.write_new(str(place / "config"), "x", 0o600)
    assert (place / "victim").read_text() == "kept"
    safe_files.write_new(str(place / "new"), "x", 0o640)
    assert os.stat(place / "new").st_mode & 0o777 == 0o640


# --- checkpoints ---


def set_aside(folder, pattern="step-*.pt"):
    return safe_files.as_user(ALICE, lambda: job_folders.set_aside(str(folder), pattern))


def test_only_checkpoints_move_and_as_the_user(place):
    folder, outside = owned(place / "ckpt"), place / "outside"
    outside.mkdir()
    (outside / "step-9.pt").write_text("kept")
    for name in ("step-1.pt", "step-2.pt", "notes.txt", ".bashrc", "sub/step-3.pt"):
        owned((folder / name).parent)
        (folder / name).write_text(name)
    (folder / "step-link.pt").symlink_to("/etc/passwd")
    (folder / "away").symlink_to(outside)
    assert set_aside(folder, "**/step-*.pt") == 4
    assert sorted(name for name in os.listdir(folder) if not name.startswith("set-aside")) == [".bashrc", "away", "notes.txt", "sub"]
    (target,) = [name for name in os.listdir(folder) if name.startswith("set-aside")]
    assert (folder / target / "sub" / "step-3.pt").read_text() == "sub/step-3.pt"
    assert (folder / target).stat().st_uid == ALICE.uid
    assert (outside / "step-9.pt").read_text() == "kept"
    assert set_aside(folder, "**/step-*.pt") == 0, "what was set aside stays there"


def test_names_that_a_job_has_taken_are_refused_not_followed(place, monkeypatch):
    folder, outside = owned(place / "ckpt"), place / "outside"
    owned(outside)
    moment = time.gmtime()
    monkeypatch.setattr(job_folders.time, "gmtime", lambda: moment)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", moment)
    (folder / f"set-aside-{stamp}").symlink_to(outside)
    (folder / f"set-aside-{stamp}-1").write_text("a file")
    (folder / "step-1.pt").write_text("1")
    assert set_aside(folder) == 1
    assert os.listdir(outside) == []
    assert (folder / f"set-aside-{stamp}-2" / "step-1.pt").read_text() == "1"


def test_two_nodes_share_a_folder(place):
    folder = owned(place / "ckpt")
    for number in range(40):
        (folder / f"step-{number}.pt").write_text(str(number))
    threads = [threading.Thread(target=job_folders.set_aside, args=(str(folder), "step-*.pt")) for _mover in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list(folder.glob("set-aside-*/step-*.pt"))
    assert len(found) == 40 and not list(folder.glob("step-*.pt"))


def test_an_odd_mark_is_no_end(roots_place):
    os.mkdir(f"{roots_place}/state")
    mark = f"{roots_place}/state/done"
    assert not job_folders.finished(roots_place, "abc")
    for text, done in (('{"release": "abc"}', True), ("[1]", False), ("[" * 100_000, False), ("", False)):
        with open(mark, "w") as stream:
            stream.write(text)
        assert job_folders.finished(roots_place, "abc") is done
    os.unlink(mark)
    os.mkfifo(mark)
    assert not job_folders.finished(roots_place, "abc")


# --- releases ---


@pytest.mark.parametrize("how", ["a link of the user's", "releases of the user's", "releases that are a file", "nothing"])
def test_folders_that_a_user_has_replaced_are_said_and_end_no_look(place, how):
    root = owned(place / "home") / "job"
    releases = root / "releases"
    if how == "a link of the user's":
        releases = owned(place / "home" / "elsewhere") / "releases"
        releases.mkdir()
        root.symlink_to(place / "home" / "elsewhere")
        os.lchown(root, ALICE.uid, ALICE.gid)
    elif how != "nothing":
        root.mkdir()
        releases.mkdir() if how == "releases of the user's" else releases.write_text("")
        os.chown(releases, ALICE.uid, ALICE.gid)
    assert job_folders.current(str(root)) == "" and job_folders.history(str(root)) == []
    assert job_folders.staged(str(root), "abc", ALICE) == {}
    assert job_folders.kept_place(str(root), "abc") == {"kept": False, "checkpoints": [], "place": {}}
    assert bool(job_folders.unsafe(str(root))) == (how != "nothing")


def test_a_release_is_for_root_and_the_jobs_user_alone(roots_place, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".env").write_text("TOKEN=planted")
    (tmp_path / "p" / "run.sh").write_text("")
    os.chmod(tmp_path / "p" / "run.sh", 0o755)
    members = source_tree.files(str(tmp_path / "p"))
    source_tree.pack(members, str(tmp_path / "a.tar.gz"))
    expected = source_tree.tree_hash(members)
    os.mkdir(f"{roots_place}/releases")
    for name in ("work", "state"):
        safe_files.make_folder(f"{roots_place}/{name}", ALICE)
    job_folders.stage(roots_place, "abc", str(tmp_path / "a.tar.gz"), "", {"supervisor.py": "x"}, expected, ALICE)
    assert job_folders.staged(roots_place, "abc", ALICE)["source_hash"] == expected
    release = f"{roots_place}/releases/abc"
    assert safe_files.as_user(ALICE, lambda: open(f"{release}/source/.env").read()) == "TOKEN=planted"
    assert os.access(f"{release}/source/run.sh", os.X_OK)
    colleague = safe_files.Account("bob", 65533, ALICE.gid, ALICE.groups)  # at many sites all share one primary group
    for path in (release, f"{release}/source/.env"):
        with pytest.raises(PermissionError):
            safe_files.as_user(colleague, lambda path=path: os.listdir(path) if path == release else open(path).read())
    os.chmod(release, 0o755)
    assert job_folders.shield_all(roots_place, ALICE, True) and os.stat(release).st_mode & 0o777 == 0o755
    assert job_folders.shield_all(roots_place, ALICE, False) and os.stat(release).st_mode & 0o777 == 0o750
    assert not job_folders.shield_all(roots_place, ALICE, False)
    job_folders.switch(roots_place, "abc", ALICE)
    assert job_folders.current(roots_place) == "abc"
    assert os.lstat(f"{roots_place}/work/run.sh").st_uid == ALICE.uid
    job_folders.keep_run(roots_place, "abc", "unit", "environment")
    assert job_folders.kept_run(roots_place, "abc") == ("unit", "environment")
    assert os.stat(f"{release}/unit").st_mode & 0o777 == 0o600
    job_folders.remember_start(roots_place, "abc", False)
    assert [start["kept"] for start in job_folders.history(roots_place)] == [True]
    for name in ("current", "releases", "work", "state"):
        job_folders.remove(roots_place, name)
    assert os.listdir(roots_place) == []


@pytest.fixture
def project(roots_place):
    """A project on the node, and a job's folder beside it."""
    folder = f"{roots_place}/project"
    os.makedirs(f"{folder}/pkg")
    os.makedirs(f"{roots_place}/job/releases")
    for name in ("train.py", "pkg/model.py"):
        pathlib.Path(folder, name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("name", "mode"), [("", 0o700), ("", 0o744), ("pkg", 0o700), ("pkg", 0o744), ("pkg/model.py", 0o600), ("train.py", 0o600), ("../project", 0)]
)
def test_a_source_on_the_node_is_staged_whole_or_not_at_all(project, roots_place, name, mode):
    job = f"{roots_place}/job"
    job_folders.stage(job, "a11", "", project, {}, "", ALICE)
    whole = job_folders.staged(job, "a11", ALICE)["source_hash"]
    os.chmod(f"{project}/{name}", mode)
    with pytest.raises(source_tree.SourceError, match=r"project.* cannot be read \(Permission denied\), as alice reads it"):
        job_folders.stage(job, "b22", "", project, {}, "", ALICE)
    assert not os.path.exists(f"{job}/releases/b22") and job_folders.staged(job, "a11", ALICE) == {}
    os.chmod(f"{project}/{name}", 0o755)
    assert whole == source_tree.tree_hash(source_tree.files(project)) or name.endswith(".py")


def test_a_source_on_the_node_that_is_gone_or_late_is_said_so(project, roots_place, monkeypatch):
    job = f"{roots_place}/job"
    job_folders.stage(job, "abc", "", project, {}, "", ALICE)
    monkeypatch.setattr(job_folders, "SECONDS", 0.2)
    monkeypatch.setattr(job_folders.source_tree, "files", lambda _source: time.sleep(60))
    for work in (lambda: job_folders.stage(job, "def", "", project, {}, "", ALICE), lambda: job_folders.staged(job, "abc", ALICE)):
        with pytest.raises(TimeoutError, match="it was not read within") as error:
            work()
        assert error.value.filename == project
    monkeypatch.undo()
    with pytest.raises(source_tree.SourceError, match="none does not exist, as alice reads it"):
        job_folders.stage(job, "def", "", f"{roots_place}/none", {}, "", ALICE)


def released(root, name):
    """A release's folder, as much of it as tells what it is; what was staged in part, or is half removed, tells nothing."""
    os.makedirs(f"{root}/releases/{name}/source")
    if "." not in name:
        pathlib.Path(root, "releases", name, "release.json").write_text(json.dumps({"release": name, "source_hash": "x"}))


def test_what_was_staged_or_removed_in_part_is_no_release_and_goes(roots_place):
    names = ["a", "b", "c", "d", "e.partial", "f.partial", "f.gone"]
    for age, name in enumerate(names):
        released(roots_place, name)
        os.utime(f"{roots_place}/releases/{name}", (1e9 + age, 1e9 + age))
    job_folders.prune(roots_place, {"a"}, 2)
    assert sorted(os.listdir(f"{roots_place}/releases")) == ["a", "c", "d"]


def strange(folder, what):
    """Put into a folder of root's what the product has not put there; return its name."""
    name = "abc"
    if what == "a private folder of another user's":
        owned(folder / (name := "alice")).chmod(0o700)
    elif what == "a folder of root's":
        (folder / name).mkdir()
    elif what == "a record of another release":
        (folder / name).mkdir()
        (folder / name / "release.json").write_text('{"release": "abd"}')
    elif what in ("a record that is no object", "a record that another user wrote", "a record that is a link"):
        (folder / name).mkdir()
        record = folder / name / "release.json"
        record.write_text("[" * 100_000 if "no object" in what else '{"release": "abc"}')
        if "user" in what:
            os.chown(record, ALICE.uid, ALICE.gid)
        if "link" in what:
            record.rename(folder.parent / "elsewhere")
            record.symlink_to(folder.parent / "elsewhere")
    elif what == "a release that another user can write":
        released(str(folder.parent), name)
        (folder / name).chmod(0o777)
    elif what == "a folder in part, of another user's":
        owned(folder / (name := "abc.partial"))
    elif what == "a folder with another name in part":
        (folder / (name := "notes.partial")).mkdir()
    elif what == "a link":
        (folder / name).symlink_to("/etc")
    elif what == "a file":
        (folder / (name := "notes.txt")).write_text("")
    return name


STRANGE = (
    "a private folder of another user's", "a folder of root's", "a record of another release", "a record that is no object",
    "a record that another user wrote", "a record that is a link", "a release that another user can write",
    "a folder in part, of another user's", "a folder with another name in part", "a link", "a file",
)  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_another_folder_under_the_releases_name_is_refused_untouched(roots_place, mode, what):
    """Whoever owns ROOT can rename a folder of root's to releases, such as lost+found with others' files in it."""
    releases = pathlib.Path(roots_place, "releases")
    for name in ("a", "b", "c", "c.partial"):
        released(roots_place, name)
    name = strange(releases, what)
    releases.chmod(mode)
    os.chown(roots_place, ALICE.uid, ALICE.gid)
    before = tree(roots_place)
    node = torchrun_unit.Node(Module(root=roots_place))
    for work in (
        lambda: node.keep_releases_folder(roots_place),
        lambda: job_folders.shield_all(roots_place, ALICE, False),
        lambda: job_folders.prune(roots_place, (), 0),
        lambda: job_folders.remember_start(roots_place, "a", False),
        lambda: job_folders.stage(roots_place, "c", "", "/usr/lib/os-release", {}, "", ALICE),
    ):
        with pytest.raises(safe_files.Unsafe, match=f"{roots_place}/releases holds '{name}', which is none of the product's") as error:
            work()
        assert f"move {roots_place}/releases away" in error.value.cure and tree(roots_place) == before
    assert f"holds '{name}'" in job_folders.unsafe(roots_place) and job_folders.history(roots_place) == [] and node.changes == []


def test_the_products_own_releases_are_known_however_a_run_was_killed(roots_place):
    for name in ("a", "b.partial", "c.gone"):
        released(roots_place, name)
    folder = pathlib.Path(roots_place, "releases")
    for name in ("history.json", ".x1_y2z3w", ".nfs00000000a1b2"):
        (folder / name).write_text("[]")
    folder.chmod(0o700)
    folder_acl.let_in(str(folder / "a"), ALICE.uid, ALICE.gid)
    node = torchrun_unit.Node(Module(root=roots_place))
    node.keep_releases_folder(roots_place)
    assert node.changes == [f"mode of {roots_place}/releases"] and stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert job_folders.unsafe(roots_place) == ""


def test_a_removal_that_was_killed_leaves_what_is_known_and_goes(roots_place, monkeypatch):
    """A release's record may be the first that is removed."""
    for name in ("a", "b"):
        released(roots_place, name)
    monkeypatch.setattr(job_folders.shutil, "rmtree", lambda path, **_options: pathlib.Path(path, "release.json").unlink(missing_ok=True))
    job_folders.prune(roots_place, {"b"}, 0)
    monkeypatch.undo()
    assert job_folders.unsafe(roots_place) == ""
    job_folders.prune(roots_place, {"b"}, 0)
    assert os.listdir(f"{roots_place}/releases") == ["b"]


@pytest.mark.parametrize(
    ("name", "what"),
    [*(("releases", what) for what in STRANGE), *((name, what) for name in ("work", "cache", "state", "current") for what in STRANGE[:2])],
)
def test_a_removal_takes_no_folder_of_roots_that_is_none_of_the_jobs(roots_place, name, what):
    """Whoever owns ROOT has given the name of one of the job's folders to another one of root's."""
    job = owned(pathlib.Path(roots_place, "job"))
    os.makedirs(job / "releases")
    strange(job / "releases", what)
    (job / "releases").rename(job / name)
    before = tree(job / name)
    with pytest.raises((safe_files.Unsafe, OSError)) as error:
        job_folders.remove(str(job), name)
    left = tree(next(path for path in job.iterdir() if path.name == name or path.name.endswith(".removed")))
    assert sorted(left.values()) == sorted(before.values()) and (name == "releases") == isinstance(error.value, safe_files.Unsafe)


@pytest.mark.parametrize("owner", [ALICE, safe_files.Account("root", 0, 0, (0,))])
def test_a_job_is_removed_whole_whoever_owns_its_folder(roots_place, owner):
    job = owned(pathlib.Path(roots_place, "job"), owner)
    for name in ("a", "b.partial", "c.gone"):
        released(str(job), name)
    (job / "releases" / "history.json").write_text("[]")
    for name in ("work", "cache", "state"):
        owned(job / name)
        safe_files.as_user(ALICE, lambda name=name: os.makedirs(job / name / "x" / "y"))
    (job / "current").symlink_to("releases/a")
    for name in ("current", "releases", "work", "cache", "state"):
        job_folders.remove(str(job), name)
    assert os.listdir(job) == []


def test_releases_that_a_user_has_put_in_their_place_go_with_that_users_rights(roots_place):
    job = owned(pathlib.Path(roots_place, "job"))
    owned(job / "releases" / "x")
    os.chown(job / "releases", ALICE.uid, ALICE.gid)
    job_folders.remove(str(job), "releases")
    assert os.listdir(job) == []


def test_a_unit_that_root_did_not_write_is_never_gone_back_to(roots_place):
    released(roots_place, "abc")
    job_folders.keep_run(roots_place, "abc", "unit", "")
    os.chown(f"{roots_place}/releases/abc/unit", ALICE.uid, ALICE.gid)
    assert job_folders.kept_run(roots_place, "abc") is None
    os.chown(f"{roots_place}/releases", ALICE.uid, ALICE.gid)
    with pytest.raises(safe_files.Unsafe):
        job_folders.kept_run(roots_place, "abc")


# --- a job's folder that somebody has made first ---

MALLORY = safe_files.Account("mallory", 1234, 1234, (1234,))


def listed(path, *entries):
    """Give something an access control list that lets others write: (tag, id)."""
    others = [(0x01, 7, 0xFFFFFFFF), (0x04, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 5, 0xFFFFFFFF)]
    wanted = sorted([*others, *((tag, 7, who) for tag, who in entries)])
    os.setxattr(path, folder_acl.ATTRIBUTE, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in wanted))


def jobs_folder(path, how):
    """Make a job's folder in a folder of everybody's, as somebody has left it."""
    os.mkdir(path, 0o755)
    os.chown(path, *{"m": (MALLORY.uid, MALLORY.gid), "r": (0, 0), "a": (ALICE.uid, ALICE.gid)}[how[0]])
    if how[1:].isdigit():
        os.chmod(path, int(how[1:], 8))
    elif how[1:] == " list of mallory":
        listed(path, (0x02, MALLORY.uid))
    elif how[1:] == " list of a group":
        listed(path, (0x08, 60123))
    elif how[1:] == " list of alice":
        listed(path, (0x02, ALICE.uid))
    elif how[1:] == " group of people":
        os.chown(path, -1, 60123)
        os.chmod(path, 0o775)


@pytest.mark.parametrize(
    ("how", "whose"),
    [
        ("m755", "belongs to 1234"), ("m777", "belongs to 1234"), ("m700", "belongs to 1234"), ("r777", "can be written by all users"),
        ("r1777", "can be written by all users"), ("a777", "can be written by all users"), ("a1777", "can be written by all users"),
        ("a group of people", "can be written by the group 60123"), ("r group of people", "can be written by the group 60123"),
        ("a list of mallory", "can be written by 1234"), ("r list of a group", "can be written by the group 60123"),
        ("r755", ""), ("a755", ""), ("a700", ""), ("r775", ""), ("r list of alice", ""),
    ],
)  # fmt: skip
def test_a_jobs_folder_that_another_user_can_change_is_refused_before_anything_changes(alice, roots_place, how, whose):
    os.chmod(roots_place, 0o1777)
    root = f"{roots_place}/t2"
    jobs_folder(root, how)
    before = tree(roots_place)
    node = torchrun_unit.Node(Module(root=root, user="alice"))
    found = sentences(*(folder_access.look("torchrun_root", f"{root}/{name}", "own", "alice") for name in ("work", "state")))
    if whose:
        with pytest.raises(safe_files.Unsafe) as error:
            node.keep_job_folder(root)
        assert str(error.value) == f"torchrun_root leads to {root}, which {whose}: whoever that is can give the job other code"
        assert found == [f"n1: {error.value}; {error.value.cure}."] and error.value.cure.endswith("remove it or name another folder")
        assert tree(roots_place) == before and node.changes == []
        node.wanted, node.active, node.unit_path = lambda _path: False, lambda: False, f"{roots_place}/none"
        node.params.update(release="abc", keep_releases=3)
        with pytest.raises(safe_files.Unsafe, match="can give the job other code"):
            node.run("", "", False)
    else:
        node.keep_job_folder(root)
        assert os.listdir(root) == ["releases"] and not any("can give the job other code" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("name", "gid", "members", "primary", "alone"),
    [
        ("alice", 1001, [], ["alice"], True), ("alice", 1001, ["alice", "root"], [], True), ("alice", 1001, ["bob"], ["alice"], False),
        ("alice", 1001, [], ["alice", "bob"], False), ("users", 1001, [], ["alice"], False), ("bob", 1002, [], [], False),
    ],
)  # fmt: skip
def test_a_users_own_group_is_that_users_while_nobody_else_is_in_it(monkeypatch, tmp_path, name, gid, members, primary, alone):
    who = safe_files.Account("alice", 1001, 1001, (1001,))
    entries = {user: pwd.struct_passwd((user, "x", uid, 1001 if user in primary else 1, "", "/", "/bin/sh")) for user, uid in (("alice", 1001), ("bob", 1002))}
    monkeypatch.setattr(safe_files.grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))
    monkeypatch.setattr(safe_files.pwd, "getpwall", lambda: list(entries.values()))
    monkeypatch.setattr(safe_files.pwd, "getpwnam", lambda user: entries[user])
    os.chown(tmp_path, who.uid, gid)
    os.chmod(tmp_path, 0o775)
    expected = "" if alone else f"can be written by the group {name}"
    assert safe_files.strangers(str(tmp_path), os.stat(tmp_path), who) == expected
    assert safe_files.strangers(str(tmp_path), os.stat(tmp_path), None).startswith("belongs to")


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("above", ["jobs", "."])
def test_a_folder_above_in_which_everybody_can_rename_is_refused(alice, roots_place, above, made):
    root = f"{roots_place}/jobs/t2"
    os.makedirs(root if made else os.path.dirname(root))
    os.chown(os.path.dirname(root), ALICE.uid, ALICE.gid)
    shared = os.path.normpath(f"{roots_place}/{above}")
    os.chmod(shared, 0o777)
    node = torchrun_unit.Node(Module(root=root, user="alice"))
    with pytest.raises(safe_files.Unsafe, match=f"torchrun_root leads to {root}, but all users can rename what lies in {shared}, ") as error:
        node.keep_job_folder(root)
    entries = [folder_access.look("torchrun_root", f"{root}/{name}", "own", "alice") for name in ("work", "state")]
    assert sentences(*entries) == [f"n1: {error.value}; {error.value.cure}."] and os.path.exists(root) == made
    os.chmod(shared, 0o1777)
    assert not folder_access.look("torchrun_root", f"{root}/work", "own", "alice")["refused"]
    node.keep_job_folder(root)
    assert os.listdir(root) == ["releases"]


@pytest.mark.parametrize("variable", ["torchrun_checkpoint_dir", "torchrun_log_root"])
@pytest.mark.parametrize("above", ["ckpt", "."])
@pytest.mark.parametrize("owner", [MALLORY, ALICE])
def test_checkpoints_that_everybody_can_replace_are_refused_and_shared_ones_are_not(alice, roots_place, owner, above, variable):
    """A colleague's folder, or one of a group's, is fine: whoever made it that way trusts its members."""
    folder = f"{roots_place}/ckpt"
    os.mkdir(folder)
    os.chown(folder, owner.uid, ALICE.gid)
    os.chmod(folder, 0o2775)
    assert not sentences(folder_access.look(variable, folder, "write", "alice"))
    shared = os.path.normpath(f"{roots_place}/{above}")
    os.chmod(shared, 0o777)
    (sentence,) = sentences(folder_access.look(variable, folder, "write", "alice"))
    assert sentence.startswith(f"n1: {folder} is the job's to write, but all users can replace what lies in {shared}; take their right away")
    with pytest.raises(safe_files.Unsafe):
        job_folders.refuse_open(folder, ALICE)
    os.chmod(shared, 0o1777)
    assert not sentences(folder_access.look(variable, folder, "write", "alice"))
    job_folders.refuse_open(folder, ALICE)


def test_the_plan_tells_what_lies_among_the_releases(alice, roots_place):
    root = f"{roots_place}/job"
    os.makedirs(f"{root}/releases/lost")
    entries = [folder_access.look("torchrun_root", f"{root}/{name}", "own", "alice") for name in ("work", "state")]
    (sentence,) = sentences(*entries)
    assert f"{root}/releases holds 'lost', which is none of the product's; move" in sentence


# --- what the plan hears ---


@pytest.mark.parametrize(
    ("variable", "path"),
    [
        ("torchrun_root", "/"), ("torchrun_root", "//"), ("torchrun_root", "/etc"), ("torchrun_root", "/var/../etc/"),
        ("torchrun_checkpoint_dir", "/etc/x"), ("torchrun_checkpoint_dir", "/tmp/ckpt"), ("torchrun_checkpoint_dir", "/home/alice"),
        ("torchrun_checkpoint_dir", "/home/alice/"), ("torchrun_log_root", "/tmp"), ("torchrun_data_paths", "/root"),
        ("torchrun_data_paths", "/dev/sda"), ("pytorch_root", "/usr"), ("torchrun_checkpoint_dir", "/var/tmp/x"), ("pytorch_root", "/bin/x"),
    ],
)  # fmt: skip
def test_folders_of_the_system_and_homes_are_refused(variable, path):
    text, cure = folder_access.forbidden(variable, path)
    assert text.startswith(f"{variable} names {path}") and cure


@pytest.mark.parametrize(
    ("variable", "path"),
    [
        ("torchrun_root", "/var/lib/torchrun"), ("torchrun_root", "/var/lib"), ("torchrun_log_root", "/var/log"),
        ("torchrun_checkpoint_dir", "/home/alice/ckpt"), ("torchrun_checkpoint_dir", "/mnt/nfs"), ("pytorch_root", "/opt/onprem.torch"),
        ("torchrun_data_paths", "/data"), ("torchrun_data_paths", "/usr/local/share/data"), ("torchrun_root", "/bindings"),
    ],
)  # fmt: skip
def test_other_folders_are_fine(variable, path):
    assert folder_access.forbidden(variable, path) is None


@pytest.fixture
def alice(monkeypatch):
    monkeypatch.setattr(safe_files, "account", lambda name: ALICE if name == "alice" else None)


def sentences(*entries):
    return [problem.sentence() for problem in folder_access.problems("n1", entries)]


def test_the_users_own_rights_decide(alice, roots_place):
    folder = f"{roots_place}/ckpt"
    os.mkdir(folder, 0o755)
    entry = folder_access.look("torchrun_checkpoint_dir", folder, "write", "alice")
    (sentence,) = sentences(entry)
    assert sentence == (
        f"n1: torchrun_checkpoint_dir names {folder}, but the job's user alice cannot make files in it (Permission denied); "
        "let alice write there (chown it, or setfacl -m u:alice:rwx), or name another folder."
    )
    os.chown(folder, ALICE.uid, ALICE.gid)
    assert not sentences(folder_access.look("torchrun_checkpoint_dir", folder, "write", "alice"))
    assert os.listdir(folder) == []
    assert not sentences(folder_access.look("torchrun_checkpoint_dir", f"{roots_place}/new", "write", "alice")), "root makes it"
    shut = f"{roots_place}/shut"
    os.mkdir(shut, 0o700)
    (sentence,) = sentences(folder_access.look("torchrun_data_paths", shut, "read", "alice"))
    assert "cannot open and list it (Permission denied)" in sentence
    os.chmod(shut, 0o755)
    assert not sentences(folder_access.look("torchrun_data_paths", shut, "read", "alice"))


def test_before_the_user_exists_owner_and_mode_decide(alice, roots_place):
    folder = f"{roots_place}/ckpt"
    os.mkdir(folder, 0o755)
    (sentence,) = sentences(folder_access.look("torchrun_checkpoint_dir", folder, "write", "bob"))
    assert "the job's user bob (yet to be made) will not be able to make files in it" in sentence
    assert "belongs to root with the mode 0755" in sentence
    os.chmod(folder, 0o1777)
    assert not sentences(folder_access.look("torchrun_checkpoint_dir", folder, "write", "bob"))
    assert not sentences(folder_access.look("torchrun_data_paths", folder, "read", "bob"))


def test_links_are_judged_by_what_they_lead_to(alice, roots_place):
    home = f"{roots_place}/home"
    os.mkdir(home)
    os.chown(home, ALICE.uid, ALICE.gid)
    os.symlink("/etc", f"{home}/ckpt")
    (sentence,) = sentences(folder_access.look("torchrun_checkpoint_dir", f"{home}/ckpt", "write", "alice"))
    assert f"torchrun_checkpoint_dir names {home}/ckpt, which leads to /etc" in sentence


def test_an_environment_that_the_user_cannot_enter(alice, roots_place):
    os.makedirs(f"{roots_place}/env/bin")
    os.symlink("/usr/bin/python3", f"{roots_place}/env/bin/python3")
    python = f"{roots_place}/env/bin/python3"
    assert not sentences(folder_access.look("pytorch_environment", python, "run", "alice"))
    os.chmod(roots_place, 0o700)
    (sentence,) = sentences(folder_access.look("pytorch_environment", python, "run", "alice"))
    assert "cannot run it (Permission denied)" in sentence
    (sentence,) = sentences(folder_access.look("pytorch_environment", python, "run", "bob"))
    assert "will not be able to run it" in sentence


def test_root_runs_nothing_that_others_can_change(alice, roots_place):
    assert folder_access.changer("/usr/bin/python3") == ""
    os.makedirs(f"{roots_place}/env/bin")
    os.chown(f"{roots_place}/env", 1234, 1234)
    (sentence,) = sentences(folder_access.look("pytorch_python", f"{roots_place}/env/bin/python3", "trust", "alice"))
    assert f"{roots_place}/env (1234) can be changed by others than root" in sentence


def test_a_source_on_the_node_is_tried_too(alice, roots_place):
    variables = {"torchrun_root": "/srv/t", "torchrun_source": f"remote:{roots_place}"}
    (question,) = [each for each in folder_access.questions(variables, "train") if each["variable"] == "torchrun_source"]
    assert not sentences(folder_access.look(**question, user="alice"))
    os.chmod(roots_place, 0o700)
    (sentence,) = sentences(folder_access.look(**question, user="alice"))
    assert f"torchrun_source names {roots_place}, but the job's user alice cannot open and list it (Permission denied)" in sentence
    (sentence,) = sentences(folder_access.look(**question, user="bob"))
    assert "bob (yet to be made) will not be able to open and list it" in sentence
    assert not [each for each in folder_access.questions({"torchrun_source": "/here"}, "train") if each["variable"] == "torchrun_source"]


class Ended(Exception):
    """A module that ended with a sentence."""


class Module:
    """As much of an AnsibleModule as these functions use; it makes nobody."""

    check_mode = False

    def __init__(self, **params):
        self.params = {"user": "nosuchuser", "user_there": True, "job": "train", "root": "/nowhere", "home": "/nowhere", **params}

    def fail_json(self, msg):
        raise Ended(msg)

    def run_command(self, command, **_options):
        raise Ended(f"would run {command[0]}")


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("work", [lambda module: torchrun_unit.Node(module).keep_user(), pytorch_environment.runner])
def test_a_user_that_was_there_is_not_made_again(work, check_mode):
    module = Module()
    module.check_mode = check_mode
    with pytest.raises(Ended, match="nosuchuser was there when the node was looked at and cannot be found now; .*sssd"):
        work(module)
    module.params["user_there"] = False
    if not check_mode:
        with pytest.raises(Ended, match="would run useradd"):
            work(module)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            source_tree.SourceError("/p/x cannot be read (Permission denied), as alice reads it"),
            "the release abc cannot be staged (/p/x cannot be read (Permission denied), as alice reads it); "
            "let nosuchuser read all of it (setfacl -R -m u:nosuchuser:rX), or look at its file system, and run the play again",
        ),
        (
            TimeoutError(110, "it was not read within 120 s", "/p"),
            "the release abc cannot be staged (/p: it was not read within 120 s); "
            "let nosuchuser read all of it (setfacl -R -m u:nosuchuser:rX), or look at its file system, and run the play again",
        ),
    ],
)
def test_a_release_that_cannot_be_staged_says_why(monkeypatch, error, sentence):
    def fails(*_arguments):
        raise error

    node = torchrun_unit.Node(Module(release="abc", source_remote=True))
    monkeypatch.setattr(torchrun_unit.job_folders, "staged", fails)
    with pytest.raises(Ended) as ended:
        node.keep_release()
    assert str(ended.value) == sentence


def test_the_checkpoints_of_a_user_that_cannot_be_found_are_not_taken_for_none():
    node = torchrun_unit.Node(Module(checkpoint_dir="/nowhere"))
    node.active = lambda: False
    with pytest.raises(Ended, match="cannot be found now"):
        node.fresh()


def test_what_a_node_tells_is_json(alice, roots_place):
    for use in ("write", "own", "read", "source", "run", "trust"):
        json.dumps(folder_access.look("torchrun_root", f"{roots_place}/a/b/c", use, "alice"))


def test_a_tree_of_any_depth_is_removed_and_what_others_make_meanwhile_blocks_nobody(roots_place):
    """3,000 folders deep, beyond what Python's rmtree bears; the user makes another one wherever it still can."""
    os.makedirs(f"{roots_place}/run/x")

    def spoil():
        handle = os.open(f"{roots_place}/run/x", os.O_RDONLY)
        for _depth in range(3000):
            os.mkdir("d", dir_fd=handle)
            inner = os.open("d", os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = inner
        os.close(handle)

    os.chown(f"{roots_place}/run/x", ALICE.uid, ALICE.gid)
    safe_files.as_user(ALICE, spoil, 60)
    os.symlink("/etc", f"{roots_place}/run/link")
    assert safe_files.remove_tree(roots_place, "run") and os.listdir(roots_place) == [] and os.path.exists("/etc/passwd")
    assert safe_files.remove_tree(roots_place, "run"), "what is not there is gone"
    os.symlink("/etc", f"{roots_place}/run")
    assert safe_files.remove_tree(roots_place, "run") and os.listdir(roots_place) == [] and os.path.exists("/etc/passwd")


def test_a_name_that_cannot_be_moved_keeps_no_other_and_no_folder_stands_for_a_mark(roots_place):
    tmp_path = pathlib.Path(roots_place)
    folder, state = tmp_path / "checkpoints", tmp_path / "state"
    for path in (folder / "a.pt", state / "done" / "x"):
        path.mkdir(parents=True)
    (folder / "a.pt" / "shard").write_text("")
    for name in ("b.pt", "keep.txt"):
        (folder / name).write_text("")
    for path in (tmp_path, folder, state, *tmp_path.rglob("*")):
        os.chown(path, ALICE.uid, ALICE.gid)
    os.chmod(tmp_path, 0o755)
    os.chmod(folder / "a.pt", 0o000)  # a folder is renamed by who may write in it
    with pytest.raises(PermissionError):
        safe_files.as_user(ALICE, lambda: job_folders.set_aside(str(folder), "*.pt"))
    assert sorted(path.name for path in folder.iterdir() if "set-aside" not in path.name) == ["a.pt", "keep.txt"]
    safe_files.as_user(ALICE, lambda: job_folders.forget(str(tmp_path)))
    assert job_folders.end_marks(str(tmp_path)) == []


def test_of_what_a_program_prints_only_the_beginning_is_read():
    """A journal's lines are as long as a job makes them; nobody waits for the end of the last one."""
    assert safe_files.printed(["echo", "one"]) == "one\n"
    assert safe_files.printed(["yes"], 1000) == "y\n" * 500
    assert safe_files.printed(["sh", "-c", "echo begun; exec sleep 600"], seconds=1) == "begun\n"
    assert safe_files.printed(["sh", "-c", r"printf '\303'; exec yes"], 2) == "\ufffdy"
    assert safe_files.printed(["/nonexistent/program"]) == ""
