"""A prefix cache in a folder: the next process skips the picture, and damage is never believed."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import PrefixCache, load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation import disk
from mlx_vlm_edge.generation.disk import DiskStore
from mlx_vlm_edge.loading.load import model_identity

from ..demo import IMAGES, known
from .test_prefix import FAMILIES, family, models, picture  # noqa: F401  (fixtures)

DESCRIBE = known("shapes.png", "Describe the image.")
COUNT = known("shapes.png", "How many circles are there?")
PICTURE = IMAGES / "shapes.png"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def ask(demo, folder, question, monkeypatch=None, **options):
    """(text, positions taken over, pictures encoded) with a cache that knows the disk only."""
    model, processor = demo
    encoded, encode = [], type(model).encode_image
    if monkeypatch is not None:
        monkeypatch.setattr(
            type(model), "encode_image", lambda this, *a: (encoded.append(1), encode(this, *a))[1]
        )
    pieces = list(stream_generate(
        model, processor, question, [PICTURE], prefix_cache=PrefixCache(disk=folder), **options
    ))  # fmt: skip
    return "".join(piece.text for piece in pieces), pieces[-1].reused_tokens, len(encoded)


def entries(folder):
    return sorted(folder.iterdir())


def test_the_next_process_encodes_nothing_and_says_the_same(demo, folder, monkeypatch):
    assert ask(demo, folder, DESCRIBE.question) == (DESCRIBE.answer, 0, 0)
    assert len(entries(folder)) == 2
    text, reused, encoded = ask(demo, folder, DESCRIBE.question, monkeypatch)
    assert (text, encoded) == (DESCRIBE.answer, 0)
    assert reused > 20
    text, reused, encoded = ask(demo, folder, COUNT.question, monkeypatch)
    assert (text, encoded) == (COUNT.answer, 0)
    assert reused > 4


def test_other_weights_settings_and_models_see_nothing(demo, folder):
    ask(demo, folder, DESCRIBE.question)
    other = load("demo", dtype="bfloat16")
    assert other[0].identity != demo[0].identity
    assert ask(other, folder, DESCRIBE.question)[1] == 0


def test_numbers_of_another_device_are_not_taken_over(demo):
    folder, options, cpu, adapters = demo[0].identify.args
    assert model_identity(folder, options, cpu, adapters) == demo[0].identity
    assert model_identity(folder, options, not cpu, adapters) != demo[0].identity
    assert model_identity(folder, options, cpu, ["1 of another"]) != demo[0].identity


@pytest.mark.parametrize(
    "change",
    [{"bits": 4}, {"dtype": "bfloat16"}, {"vision_backend": "coreml"}],
    ids=str,
)
def test_numbers_of_other_settings_are_not_taken_over(demo, change):
    folder, options, *rest = demo[0].identify.args
    assert model_identity(folder, replace(options, **change), *rest) != demo[0].identity


def test_numbers_of_another_version_are_not_taken_over(folder, monkeypatch):
    store = DiskStore(folder)
    store.keep_image("m", b"x", mx.ones((2, 3)))
    store.keep_prompt("m", np.eye(3, dtype=np.int64), [])
    assert store.image("m", b"x") is not None
    monkeypatch.setattr(disk, "FORMAT", disk.FORMAT + 1)
    assert store.image("m", b"x") is None
    assert list(store.prompts("m")) == []


def test_a_model_without_files_keeps_nothing_there(demo, folder, monkeypatch):
    monkeypatch.setattr(demo[0], "identify", None)
    ask(demo, folder, DESCRIBE.question)
    assert entries(folder) == []


@pytest.mark.parametrize("damage", [
    lambda content: content[:-10], lambda content: b"", lambda content: b"x" * len(content),
    lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
], ids=["cut", "empty", "other", "one bit"])  # fmt: skip
def test_a_damaged_entry_is_dropped_with_one_line(demo, folder, damage, capfd):
    ask(demo, folder, DESCRIBE.question)
    for path in entries(folder):
        path.write_bytes(damage(path.read_bytes()))
    capfd.readouterr()
    assert ask(demo, folder, DESCRIBE.question)[:2] == (DESCRIBE.answer, 0)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert all("damaged, and dropped" in line for line in told)
    assert ask(demo, folder, DESCRIBE.question)[1] > 20


def test_mlx_reads_entries_by_name(folder, monkeypatch):
    """A Python file is read by MLX's threads under Python's lock: with the loader's clear_cache in
    another thread both waited for ever."""
    store, asked, load = DiskStore(folder), [], mx.load
    store.keep_image("m", b"x", mx.ones((2, 3)))
    monkeypatch.setattr(mx, "load", lambda file, *more: (asked.append(file), load(file, *more))[1])
    assert store.image("m", b"x").sum().item() == 6
    assert [type(file) for file in asked] == [str]


def test_a_longer_prompt_takes_the_place_of_what_it_continues(folder):
    store, random = DiskStore(folder), np.random.default_rng(0)
    keys = random.integers(0, 9, (30, 3))

    def layers(length):
        return [(mx.zeros((1, 2, length, 4)), mx.ones((1, 2, length, 4)))]

    for length in (10, 20, 15, 30):
        store.keep_prompt("m", keys[:length], layers(32))
    ((path, known),) = list(store.prompts("m"))
    assert np.array_equal(known, keys)
    ((k, v),) = store.layers(path)
    assert k.shape == (1, 2, 30, 4)
    assert v.sum().item() == 240
    assert list(store.prompts("other")) == []


def test_a_prompt_that_cannot_be_written_leaves_what_it_continues(folder, monkeypatch, capfd):
    store, keys = DiskStore(folder), np.arange(90).reshape(30, 3)
    layers = [(mx.zeros((1, 2, 30, 4)), mx.ones((1, 2, 30, 4)))]
    store.keep_prompt("m", keys[:10], layers)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    store.keep_prompt("m", keys, layers)
    assert [len(known) for _, known in store.prompts("m")] == [10]
    assert "No space left" in capfd.readouterr().err


@pytest.fixture
def used(monkeypatch):
    """(what is done with a file, its name) from now on: read whole by us or MLX, or marked."""
    done = []

    def note(module, name):
        own = getattr(module, name)

        def noted(path, *args):
            done.append((name, Path(path).name))
            return own(path, *args)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((Path, "read_bytes"), (mx, "load"), (os, "utime")):
        note(module, name)
    return done


def test_of_what_is_not_used_the_keys_alone_are_read(folder, used):
    store, random = DiskStore(folder), np.random.default_rng(0)
    prompts = [random.integers(-9, 9, (length, 3)) for length in (10, 20, 30)]
    for keys in prompts:
        store.keep_prompt("m", keys, [(mx.ones((1, 2, 32, 4)), mx.ones((1, 2, 32, 4)))])
    assert len(list(store.prompts("m"))) == 3
    known = dict(DiskStore(folder).prompts("m"))
    assert used == []
    assert sorted(map(len, known.values())) == [10, 20, 30]
    for path, keys in known.items():
        assert any(np.array_equal(keys, each) for each in prompts)
        assert store.layers(path) is not None
        assert used == [(do, path.name) for do in ("read_bytes", "utime", "load")]
        used.clear()


def test_a_process_reads_nothing_that_it_wrote_itself(demo, folder, used):
    model, processor = demo
    cache = PrefixCache(disk=folder)
    for question in (DESCRIBE.question, COUNT.question, DESCRIBE.question + " Again, please."):
        list(stream_generate(model, processor, question, [PICTURE], prefix_cache=cache))
    assert [what for what, name in used if name.endswith(".safetensors")] == []


def test_the_files_of_a_model_are_looked_at_once(demo, folder, monkeypatch):
    asked, own = [], demo[0].identify
    monkeypatch.setattr(demo[0], "identify", lambda: asked.append(1) or own())
    monkeypatch.setattr(demo[0], "_identity", None)
    for _ in range(2):
        ask(demo, folder, DESCRIBE.question)
    assert asked == [1]


def test_the_next_best_is_taken_where_the_best_is_damaged(demo, folder):
    model, _ = demo
    ask(demo, folder, COUNT.question)
    (shorter,) = [path for path, _ in DiskStore(folder).prompts(model.identity)]
    ask(demo, folder, DESCRIBE.question)
    (best,) = [path for path, _ in DiskStore(folder).prompts(model.identity) if path != shorter]
    content = bytearray(best.read_bytes())
    content[-5] ^= 1
    best.write_bytes(content)
    text, reused, _ = ask(demo, folder, DESCRIBE.question)
    assert text == DESCRIBE.answer
    assert reused > 4


def test_a_cache_that_cannot_be_written_is_read(demo, folder, monkeypatch, capfd):
    ask(demo, folder, DESCRIBE.question)
    (folder / ".abc.999999999-0.partial").write_bytes(b"half")

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("utime", "unlink", "mkdir"):
            patch.setattr(os, name, refused)
        text, reused, _ = ask(demo, folder, DESCRIBE.question)
    assert text == DESCRIBE.answer
    assert reused > 20
    assert capfd.readouterr().err == ""


def test_the_least_recently_used_leave_when_there_is_too_much(folder):
    store = DiskStore(folder, max_bytes=3 * 4600)
    for index in range(3):
        store.keep_image("m", bytes([index]), mx.zeros((4, 256)))
        (newest,) = [p for p in folder.iterdir() if p.stat().st_mtime > index + 5]
        os.utime(newest, (index, index))
    assert store.image("m", b"\0") is not None  # used again: the second is the oldest now
    store.keep_image("m", b"\3", mx.zeros((4, 256)))
    assert [store.image("m", bytes([i])) is not None for i in range(4)] == [True, False, True, True]


def test_what_a_kill_left_is_removed_and_never_read(folder):
    folder.mkdir()
    (folder / ".abc.999999999-0.partial").write_bytes(b"half")
    own = folder / f".abc.{os.getpid()}-0.partial"
    own.write_bytes(b"being written")
    DiskStore(folder)
    assert entries(folder) == [own]


@pytest.mark.parametrize("step", ["utime", "load", "stat"])
def test_another_process_may_drop_an_entry_at_any_time(step, folder, monkeypatch, capfd):
    store = DiskStore(folder)
    store.keep_image("m", b"\0", mx.ones((4, 8)))

    def dropped(module, name):
        own = getattr(module, name)

        def first(*args, **more):
            for entry in os.listdir(folder):
                os.unlink(folder / entry)
            return own(*args, **more)

        monkeypatch.setattr(module, name, first)

    dropped({"utime": os, "load": mx, "stat": Path}[step], step)
    if step == "stat":
        store._evict()
    else:
        assert store.image("m", b"\0") is None
    assert capfd.readouterr().err == ""


def test_threads_write_the_same_entry_at_once(folder, monkeypatch, capfd):
    store, other = DiskStore(folder), []
    replace = os.replace

    def meanwhile(*args):  # as another thread's write, between two steps of this one's
        if not other:
            other.append(
                Thread(target=store.keep_prompt, args=("m", np.eye(3, dtype=np.int64), []))
            )
            other[0].start()
            other[0].join()
        replace(*args)

    monkeypatch.setattr(os, "replace", meanwhile)
    store.keep_prompt("m", 2 * np.eye(3, dtype=np.int64), [])
    assert len(list(DiskStore(folder).prompts("m"))) == 2
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot keep a cache there"):
        DiskStore(tmp_path / "file")


def test_files_are_the_user_s_own(demo, folder):
    ask(demo, folder, DESCRIBE.question)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in entries(folder))


def test_by_the_command_line(folder):
    command = [
        sys.executable, "-m", "mlx_vlm_edge", "generate", "--model", "demo", "--image",
        str(PICTURE), "--prompt", DESCRIBE.question, "--cache-dir", str(folder), "--json",
    ]  # fmt: skip
    first, second = (subprocess.check_output(command, text=True) for _ in range(2))
    assert '"reused_tokens": 0' in first
    assert '"reused_tokens": 0' not in second
    assert DESCRIBE.answer in second


def test_every_family_goes_on_from_the_disk(family, folder, monkeypatch):  # noqa: F811
    """A question asked again with a cache that the disk alone tells anything."""
    _, model, processor = family
    pictures, text = [picture(1)], "What is this?"

    def ids(cache):
        stream = stream_generate(model, processor, text, pictures, max_tokens=6, prefix_cache=cache)
        return [piece.token for piece in stream]

    cold = ids(None)
    assert ids(PrefixCache(disk=folder)) == cold
    encoded, encode = [], type(model).encode_image
    monkeypatch.setattr(
        type(model), "encode_image", lambda this, *a: (encoded.append(1), encode(this, *a))[1]
    )
    assert ids(PrefixCache(disk=folder)) == cold
    assert encoded == []
