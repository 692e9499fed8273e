"""A file that takes another's place is as private as that was, and a mounted one is filled."""

import errno
import os
from pathlib import Path

import pytest

from mlx_vlm_edge import whole_file


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444, 0o664])
def test_a_file_that_is_there_keeps_its_permissions_owner_and_group(kept, tmp_path):
    path = tmp_path / "saved.json"
    path.write_text("old")
    if os.getuid() == 0:
        os.chown(path, 54321, 54322)
    path.chmod(kept)
    before = path.stat()
    for asked in (0o666, 0o600):
        whole_file.write(path, "new", mode=asked)
        after = path.stat()
        assert path.read_text() == "new"
        assert mode(path) == kept
        assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert [*tmp_path.iterdir()] == [path]


def test_what_takes_a_private_file_s_place_is_never_open_to_others(tmp_path):
    path = tmp_path / "saved.json"
    path.touch(0o600)
    with whole_file.replacing(path) as put:
        (partial,) = set(tmp_path.iterdir()) - {path}
        assert mode(partial) == 0o600
        put(b"secret")
    assert mode(path) == 0o600


@pytest.mark.parametrize("asked", [0o666, 0o600])
def test_a_new_file_has_the_permissions_that_were_asked_for(asked, tmp_path):
    mask = os.umask(0o022)
    try:
        whole_file.write(tmp_path / "new.json", "x", mode=asked)
    finally:
        os.umask(mask)
    assert mode(tmp_path / "new.json") == asked & ~0o022


def test_a_file_that_is_mounted_is_filled(tmp_path, monkeypatch):
    """As a container has one: its name is busy."""
    path = tmp_path / "bound.json"
    path.write_text("of the old one, which is longer")
    inode = path.stat().st_ino

    def busy(_, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))

    monkeypatch.setattr(Path, "replace", busy)
    whole_file.write(path, "new")
    assert (path.read_text(), path.stat().st_ino) == ("new", inode)
    assert [*tmp_path.iterdir()] == [path]
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        whole_file.write(path, "newer")
    assert path.read_text() == "new"


def test_where_permissions_cannot_be_set_it_is_its_owner_s_alone(tmp_path, monkeypatch):
    """As on some mounted shares."""
    path = tmp_path / "saved.json"
    path.write_text("old")
    path.chmod(0o644)

    def refused(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refused)
    whole_file.write(path, "new")
    assert (path.read_text(), mode(path)) == ("new", 0o600)
