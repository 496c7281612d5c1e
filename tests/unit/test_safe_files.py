"""What root does in folders that others can write: nothing outside them ever changes. Runs as root, attacks as nobody."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import threading
import time

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import folder_access, job_folders, safe_files
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


def test_a_release_is_for_root_and_the_jobs_user_alone(roots_place, tmp_path):
    from ansible_collections.onprem.torch.plugins.module_utils import source_tree

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


def test_a_unit_that_root_did_not_write_is_never_gone_back_to(roots_place):
    os.makedirs(f"{roots_place}/releases/abc")
    job_folders.keep_run(roots_place, "abc", "unit", "")
    os.chown(f"{roots_place}/releases/abc/unit", ALICE.uid, ALICE.gid)
    assert job_folders.kept_run(roots_place, "abc") is None
    os.chown(f"{roots_place}/releases", ALICE.uid, ALICE.gid)
    with pytest.raises(safe_files.Unsafe):
        job_folders.kept_run(roots_place, "abc")


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


def test_what_a_node_tells_is_json(alice, roots_place):
    for use in ("write", "own", "read", "run", "trust"):
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
