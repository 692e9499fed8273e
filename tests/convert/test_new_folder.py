"""A folder appears whole or not at all, whatever happens, and takes no one else's place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_vlm_edge_convert import new_folder as module
from mlx_vlm_edge_convert.new_folder import new_folder

from mlx_vlm_edge.errors import UsageError


def listed(_folder):
    return ("config", "weights")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fail_while_writing(target, error: BaseException, **options) -> None:
    with new_folder(target, listed=listed, **options) as partial:
        (partial / "config").touch()
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("x"), OSError(28, "full")])
def test_nothing_is_left_after_a_failure(error, tmp_path):
    raised = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised):
        fail_while_writing(tmp_path / "deep" / "out", error)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_of_ours_is_replaced_or_stays(swap, tmp_path, monkeypatch):
    if not swap:
        monkeypatch.setattr(module, "_swap", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config").touch()
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(out, KeyboardInterrupt(), overwrite=True)
    assert (names(tmp_path), names(out)) == ({"out"}, {"config"})
    with new_folder(out, overwrite=True, listed=listed) as partial:
        (partial / "weights").touch()
    assert (names(tmp_path), names(out)) == ({"out"}, {"weights"})


@pytest.mark.parametrize("name", ["thesis.txt", "deep/config", "weights.txt"])
def test_a_folder_with_other_things_stays(name, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    (tmp_path / "out" / "config").touch()
    with pytest.raises(UsageError, match=rf"other things than a model of ours in it \({name}\)"):
        fail_while_writing(tmp_path / "out", AssertionError("written"), overwrite=True)
    assert path.read_text() == "years of work"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", ["here", "above", "mounted"])
def test_a_folder_that_cannot_be_exchanged_is_refused_first(case, overwrite, tmp_path, monkeypatch):
    """A shell would be left in a folder that is no more."""
    here = tmp_path / "out" / "deep"
    here.mkdir(parents=True)
    target = {"here": here, "above": here.parent, "mounted": tmp_path / "disk"}[case]
    target.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    if case == "mounted":
        monkeypatch.setattr("os.path.ismount", lambda path: target.samefile(path))
    said = {"here": "the current folder", "above": "above the current folder",
            "mounted": "where a disk is mounted"}[case]  # fmt: skip
    for name in (target, Path(os.path.relpath(target))):
        with pytest.raises(UsageError, match=f"is {said}.*: name a folder in it"):
            module.check_target(name, overwrite=overwrite, listed=listed)
    with pytest.raises(UsageError, match=said):
        fail_while_writing(target, AssertionError("written"), overwrite=overwrite)
    with new_folder(target / "new", listed=listed) as partial:
        (partial / "config").touch()
    assert names(target) >= {"new"}
    assert Path.cwd().samefile(here)


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_a_folder_that_was_there_keeps_its_permissions_and_group(mode, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if os.getuid() == 0:
        os.chown(out, 54321, 54322)
    out.chmod(mode)
    before = out.stat()
    for name in ("config", "weights"):
        with new_folder(out, overwrite=True, listed=listed) as partial:
            (partial / name).touch()
        after = out.stat()
        assert names(out) == {name}
        assert (after.st_mode, after.st_uid, after.st_gid) == (
            before.st_mode, before.st_uid, before.st_gid,
        )  # fmt: skip
        assert (out / name).stat().st_gid == (before.st_gid if mode & 0o2000 else os.getgid())


def test_of_two_that_write_to_one_place_one_says_so(tmp_path):
    with new_folder(tmp_path / "out", listed=listed) as partial:
        (partial / "config").write_text("first")
        with pytest.raises(UsageError, match="is being written by another process"):
            fail_while_writing(tmp_path / "out", AssertionError("written"))
    assert (tmp_path / "out" / "config").read_text() == "first"
    assert names(tmp_path) == {"out"}


# Ends a forked child before each of its operations on files, one after the other, as kill -9 would.
KILLED = """
import json, os, pathlib, shutil, sys
from mlx_vlm_edge_convert import new_folder as module

root, swap, was_there = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
if not swap:
    module._swap = lambda *_: False
target, left, armed = root / "out", 0, False

def hook(event, args):
    global left
    inside = event in ("os.remove", "os.rmdir") or str(root) in repr(args)
    if armed and inside and (event.startswith("os.") or event == "open"):
        left -= 1
        if left == 0:
            os._exit(9)

def write(content):
    listed = lambda _: ("config", "weights")
    with module.new_folder(target, overwrite=True, listed=listed) as partial:
        for name in ("config", "weights"):
            (partial / name).write_text(content)

def state():
    if not target.exists():
        return "none"
    return "+".join(path.read_text() for path in sorted(target.iterdir()))

sys.addaudithook(hook)
seen = []
for point in range(1, 1000):
    shutil.rmtree(root)
    root.mkdir()
    if was_there:
        write("old")
    child = os.fork()
    if child == 0:
        left, armed = point, True
        write("new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    after = state()
    write("next")
    seen.append([code, after, state(), sorted(path.name for path in root.iterdir())])
    if code == 0:
        break
print(json.dumps(seen))
"""


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_killed_at_any_point_nothing_half_written_is_taken_for_whole(swap, was_there, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "root"), str(swap), str(was_there)]
    (tmp_path / "root").mkdir()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) >= 8
    before = "old+old" if was_there else "none"
    moved_aside = {"none"} if not swap else set()  # for a moment, until the next run
    for code, after, finished, left in seen:
        assert code in (0, 9)
        assert after in {before, "new+new"} | moved_aside
        assert (finished, left) == ("next+next", ["out"])
    assert seen[-1][:2] == [0, "new+new"]


def test_a_folder_moved_aside_by_a_killed_run_is_put_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "config").write_text("old")
    with pytest.raises(UsageError, match="is not empty"):
        fail_while_writing(tmp_path / "out", AssertionError("written"))
    assert (tmp_path / "out" / "config").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_where_permissions_cannot_be_set_a_replaced_folder_is_its_owner_s_alone(
    tmp_path, monkeypatch
):
    target = tmp_path / "model"
    target.mkdir(0o750)

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    with new_folder(target, overwrite=True, listed=listed) as partial:
        (partial / "config").touch()
    assert (names(target), target.stat().st_mode & 0o777) == ({"config"}, 0o700)
