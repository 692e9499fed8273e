"""Names become folders; what is on the machine needs neither network nor huggingface_hub."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_vlm_edge import whole_file
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.cli.flags import default_model
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub import cache as hub_cache
from mlx_vlm_edge.hub import models as hub

REPO = hub.ALIASES["fastvlm-0.5b"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache, with every variable that could name another one unset."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    return folder


CONFIG = json.dumps({"model_type": "llava_qwen2"})
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WHOLE = ("model.safetensors", *TOKENIZER)


def put(cache: Path, repo: str = REPO, reference: str = "main", files=WHOLE) -> Path:
    """A snapshot in the cache's layout, its files links to blobs."""
    home = cache / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (home / "blobs").mkdir(exist_ok=True)
    for name in ("config.json", *files):
        blob = home / "blobs" / f"blob-{name}"
        blob.write_text(CONFIG)
        (snapshot / name).symlink_to(blob)
    path = home / "refs" / reference
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("name", ["fastvlm-0.5b", "FastVLM-0.5B", REPO])
def test_a_model_on_the_machine_is_found_by_alias_and_id(name, cache):
    snapshot = put(cache)
    assert hub.obtain(name) == snapshot
    assert hub.obtain(name, offline=True) == snapshot
    assert hub_cache.local_snapshot(REPO) == snapshot


def test_finding_it_imports_nothing_heavy(cache):
    put(cache)
    program = (
        "import sys; from mlx_vlm_edge.hub.models import obtain; obtain('fastvlm-0.5b'); "
        "print([m for m in ('huggingface_hub', 'mlx', 'numpy', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("revision", ["v1", "refs/pr/11", COMMIT])
def test_revisions(revision, cache):
    snapshot = put(cache, reference="v1" if revision == COMMIT else revision)
    assert hub_cache.local_snapshot(REPO, revision) == snapshot
    assert hub_cache.local_snapshot(REPO, None) is None
    with pytest.raises(UsageError, match="revision"):
        hub_cache.local_snapshot(REPO, "../../x")


def test_the_environment_names_the_cache_as_huggingface_hub_does(cache, tmp_path, monkeypatch):
    assert hub_cache.cache_folder() == cache
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub_cache.cache_folder() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache.cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub_cache.cache_folder() == Path.home() / ".cache" / "huggingface" / "hub"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_incomplete_snapshot_is_not_found(kind, cache):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    shards = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    snapshot = put(cache, files=(*shards, *TOKENIZER))
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (snapshot / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    assert hub_cache.local_snapshot(REPO) == snapshot
    (snapshot / shards[1]).resolve().unlink()  # the link stays, its blob is gone
    assert hub_cache.local_snapshot(REPO) is None
    (snapshot / "config.json").unlink()
    assert not hub_cache.is_complete(snapshot)


def test_a_stale_pytorch_index_beside_safetensors_does_not_count(cache):
    snapshot = put(cache)
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert hub_cache.is_complete(snapshot)


def test_a_config_without_weights_and_a_damaged_index_are_incomplete(cache):
    snapshot = put(cache, files=())
    assert not hub_cache.is_complete(snapshot)
    (snapshot / "model.safetensors.index.json").write_text("{")
    assert not hub_cache.is_complete(snapshot)


def test_a_folder_is_itself_and_must_have_a_model(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        hub.obtain(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert hub.obtain(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="is a file"):
        hub.obtain(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fastvlm-05b", "did you mean fastvlm-0.5b"),
        ("fastvlm", "did you mean"),
        ("llama", "models list --available"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("apple/../x", "no model is called|no such folder"),
        ("", "no model is called"),
        ("x" * 200, "no model is called"),
    ],
)
def test_unknown_names_are_answered_in_one_line(name, said, cache):
    with pytest.raises(UsageError, match=said) as caught:
        hub.obtain(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", [False, True])
def test_offline_names_the_model_the_cause_and_the_remedy(variable, cache, monkeypatch):
    if variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as caught:
        hub.obtain("fastvlm-0.5b", offline=not variable)
    said = str(caught.value)
    assert REPO in said
    assert "downloads are off" in said
    assert "models pull fastvlm-0.5b" in said
    assert not cache.exists()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A stand-in for huggingface_hub's network: two calls, recorded, files as the Hub has them.

    breaks: after how many files the connection does. wrong: files whose bytes come changed, and
    how often. sizes: what it says instead of the truth.
    """

    def __init__(self, cache: Path) -> None:
        self.cache, self.asked, self.sent = cache, {}, []
        self.error: Exception | None = None
        self.breaks, self.wrong, self.sizes = 99, {}, {}
        self.large = {"model.safetensors": b"w" * 1_510_000, "pytorch_model.bin": b"p" * 9}
        small = ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE",
                 "onnx/model.onnx", "fastvithd.mlpackage/data", "picture.png", "merges.txt",
                 "generation_config.json")  # fmt: skip
        self.files = self.large | {name: f'{{"model_type": "{name}"}}'.encode() for name in small}
        self.files["config.json"] = CONFIG.encode()

    def hash(self, name: str) -> str:
        content = self.files[name]
        return hashlib.sha256(content).hexdigest() if name in self.large else git_hash(content)

    def model_info(self, repo, revision=None, files_metadata=False):
        if self.error:
            raise self.error
        siblings = []
        for name, content in self.files.items():
            size, hash = self.sizes.get(name, len(content)), self.hash(name)
            lfs = SimpleNamespace(sha256=hash) if name in self.large else None
            siblings.append(SimpleNamespace(rfilename=name, size=size, blob_id="0" * 40, lfs=lfs))
            if lfs is None:
                siblings[-1].blob_id = hash
        return SimpleNamespace(
            siblings=siblings, sha=COMMIT, tags=["license:other"],
            card_data={"license_name": "apple-amlr"},
        )  # fmt: skip

    def snapshot_download(self, repo, **asked):
        """Blobs by their hash, links to them; what is there already is not sent again."""
        self.asked = asked
        home = self.cache / ("models--" + repo.replace("/", "--"))
        snapshot = home / "snapshots" / COMMIT
        for folder in (snapshot, home / "blobs", home / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)
        for name in asked["allow_patterns"]:
            blob = home / "blobs" / self.hash(name)
            if not blob.exists():
                if len(self.sent) == self.breaks:
                    raise ConnectionError("connection lost")
                self.sent.append(name)
                content = self.files[name]
                if self.wrong.get(name, 0) > 0:
                    self.wrong[name] -= 1
                    content = b"?" + content[1:]
                blob.write_bytes(content)
            if not (snapshot / name).exists():
                (snapshot / name).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def online(cache, monkeypatch) -> Hub:
    import huggingface_hub

    double = Hub(cache)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: double)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", double.snapshot_download)
    return double


def test_a_named_model_is_downloaded_after_saying_how_much(online, cache, capsys):
    folder = hub.obtain("fastvlm-0.5b", revision="main")
    assert hub_cache.is_complete(folder)
    said = capsys.readouterr()
    assert "downloading apple/FastVLM-0.5B: 2 MB, licence apple-amlr" in said.err
    assert said.out == ""
    assert online.asked["revision"] == "main"
    assert set(online.asked["allow_patterns"]) == {
        "config.json", "model.safetensors", *TOKENIZER, "generation_config.json", "README.md",
        "LICENSE", "merges.txt",
    }  # fmt: skip
    online.asked = {}
    hub.obtain("fastvlm-0.5b")
    assert online.asked == {}, "what is here is not asked for again"


@pytest.mark.parametrize("breaks", range(8))
def test_a_download_that_died_is_known_and_resumed(breaks, online, cache, capsys):
    """Wherever it ended: listed, not taken for whole, finished by the same command."""
    online.breaks = breaks
    with pytest.raises(UsageError, match="connection lost"):
        hub.obtain("fastvlm-0.5b")
    assert hub_cache.local_snapshot(REPO) is None
    assert [(m.repo, m.complete) for m in hub_cache.cached_models()] == [(REPO, False)]
    with pytest.raises(UsageError, match="is not all on this machine"):
        hub.obtain("fastvlm-0.5b", offline=True)
    online.breaks = 99
    capsys.readouterr()
    folder = hub.obtain("fastvlm-0.5b")
    assert len(online.sent) == len({*online.sent}) == 8, "nothing is sent twice"
    assert hub_cache.local_snapshot(REPO) == folder
    more = "more of 2 MB" in capsys.readouterr().err
    assert more is (breaks > 0)


@pytest.mark.parametrize("name", ["generation_config.json", "merges.txt", "LICENSE", *WHOLE])
def test_what_the_repository_has_is_part_of_the_whole(name, online):
    folder = hub.obtain("fastvlm-0.5b")
    (folder / name).unlink()
    assert hub_cache.local_snapshot(REPO) is None
    assert hub.obtain("fastvlm-0.5b") == folder
    assert (folder / name).is_file()
    os.truncate(folder / name, 1)  # of another size, then
    assert hub_cache.local_snapshot(REPO) is None
    hub.pull("fastvlm-0.5b")
    assert hub_cache.local_snapshot(REPO) == folder


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_bytes_of_the_right_size_are_fetched_again(name, online, capsys):
    online.wrong = {name: 1}
    folder = hub.obtain("fastvlm-0.5b")
    assert f"{name}: not the Hub's bytes" in capsys.readouterr().err
    assert (folder / name).read_bytes() == online.files[name]
    assert sorted(online.sent).count(name) == 2


def test_wrong_bytes_that_come_again_are_not_kept(online):
    online.wrong = {"model.safetensors": 2}
    with pytest.raises(UsageError, match=r"model\.safetensors does not come as the Hub says"):
        hub.obtain("fastvlm-0.5b")
    assert hub_cache.local_snapshot(REPO) is None
    assert hub_cache.is_complete(hub.obtain("fastvlm-0.5b"))


def test_bytes_that_went_wrong_on_the_disk_heal_at_the_next_pull(online, capsys):
    folder = hub.obtain("fastvlm-0.5b")
    path = folder / "model.safetensors"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    hub.pull("fastvlm-0.5b")
    assert path.read_bytes() == online.files["model.safetensors"]
    assert "is all here: its 2 MB are checked" in capsys.readouterr().err


def test_leftovers_of_files_that_came_are_removed(online):
    online.breaks = 2
    with pytest.raises(UsageError):
        hub.obtain("fastvlm-0.5b")
    blobs = hub_cache.repository_folder(REPO) / "blobs"
    ours = blobs / f"{online.hash('model.safetensors')}.5cd1.incomplete"
    other = blobs / f"{'0' * 64}.5cd1.incomplete"
    ours.touch()
    other.touch()
    online.breaks = 99
    hub.obtain("fastvlm-0.5b")
    assert not ours.exists()
    assert other.exists(), "of another revision, which may be on its way"


def test_ctrl_c_is_answered_while_the_download_goes_on(online, monkeypatch, capsys):
    """Its threads end with their files, which may be gigabytes: nobody waits for them."""
    gone_on = threading.Event()

    def download(repo, **asked):
        online.breaks = 3
        with pytest.raises(ConnectionError):
            online.snapshot_download(repo, **asked)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        gone_on.wait()
        return ""

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(KeyboardInterrupt):
        hub.pull("fastvlm-0.5b")
    gone_on.set()
    assert "of 2 MB are here: the same command goes on" in capsys.readouterr().err
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), sys.exit(code)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(SystemExit):
        main(["models", "pull", "fastvlm-0.5b"])
    assert codes == [130]


def test_what_is_not_a_model_is_said_before_the_download(online):
    del online.files["config.json"]
    with pytest.raises(UsageError, match=r"is not a model: it has no config\.json"):
        hub.pull("fastvlm-0.5b")
    assert online.asked == {}


@pytest.mark.parametrize("name", TOKENIZER[:1])
def test_a_repository_without_a_tokenizer_is_said(name, online):
    del online.files[name]
    with pytest.raises(UsageError, match="not a whole model: a tokenizer"):
        hub.pull("fastvlm-0.5b")


@pytest.mark.parametrize("size", [None, "12", -1, 1.5])
def test_sizes_that_cannot_be(size, online):
    online.sizes = {"config.json": size}
    with pytest.raises(UsageError, match="the Hub's answer cannot be used"):
        hub.pull("fastvlm-0.5b")


@pytest.mark.parametrize(
    "error",
    [json.JSONDecodeError("Expecting value", "<html>", 0), KeyError("id"), TypeError("no list")],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_that_cannot_be_read(error, online):
    online.error = error
    with pytest.raises(UsageError, match="the Hub's answer cannot be used") as caught:
        hub.pull("fastvlm-0.5b")
    assert "\n" not in str(caught.value)


def test_an_update_that_died_leaves_the_older_revision(online, cache, capsys):
    """The branch is moved before the files come; without the network the old ones are there."""
    put(cache, reference="v1")
    older = cache / "models--apple--FastVLM-0.5B" / "snapshots" / ("a" * 40)
    (older.parent / COMMIT).rename(older)
    (older.parents[1] / "refs" / "main").write_text("a" * 40)
    assert hub.obtain("fastvlm-0.5b") == older
    assert default_model() == "fastvlm-0.5b"
    online.breaks = 3
    with pytest.raises(UsageError, match="connection lost"):
        hub.pull("fastvlm-0.5b")
    capsys.readouterr()
    for offline in (True, False):  # and with a connection that breaks again
        assert hub.obtain("fastvlm-0.5b", offline=offline) == older
        line = "its newest revision is not all here; aaaaaaaaaaaa is used"
        assert line in capsys.readouterr().err
    online.asked, online.breaks = {}, 99
    assert default_model() == str(older)  # which nobody named: it is not fetched
    assert "aaaaaaaaaaaa is used" in capsys.readouterr().err
    assert online.asked == {}
    online.error = ValueError("what it says, which is no answer")
    with pytest.raises(UsageError, match="answer cannot be used"):
        hub.obtain("fastvlm-0.5b")
    with pytest.raises(UsageError, match="not all on this machine"):
        hub.obtain("fastvlm-0.5b", offline=True, revision="main")


def test_too_little_disk_is_said_before_the_download(online, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    online.sizes = {"model.safetensors": 1_510_000_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(UsageError, match=r"takes 1\.51 GB, .* has 1\.00 GB free"):
        hub.pull("fastvlm-0.5b")
    assert online.asked == {}


def test_resuming_asks_for_room_for_what_is_missing(online, monkeypatch):
    import shutil

    usage, spare = shutil.disk_usage("/"), 256 << 20
    folder = hub.obtain("fastvlm-0.5b")
    for name, room, enough in (
        ("model.safetensors", 1_509_999, False),
        ("model.safetensors", 1_510_000, True),
        ("LICENSE", len(online.files["LICENSE"]), True),
    ):
        (folder / name).resolve().unlink(missing_ok=True)
        free = usage._replace(free=room + spare)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: free)
        if enough:
            assert hub.obtain("fastvlm-0.5b") == folder
            continue
        with pytest.raises(UsageError, match=r"takes 2 MB more of 2 MB, .* has 270 MB free"):
            hub.obtain("fastvlm-0.5b")


def test_a_place_that_cannot_be_written_is_not_called_the_network(online, cache, monkeypatch):
    def read_only(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache))

    said = "cannot be written .Read-only file system.; HF_HUB_CACHE"
    for owner, method in ((Path, "mkdir"), (whole_file, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, read_only)
            with pytest.raises(UsageError, match=said) as caught:
                hub.pull("fastvlm-0.5b")
        assert str(cache) in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UsageError, match=r"cannot be written .Permission denied"):
            hub.pull("fastvlm-0.5b")
    assert online.asked == {}


def test_errors_of_the_hub_are_one_line_each(online):
    from huggingface_hub import errors

    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    for error, said in (
        (ConnectionError("no route to host"), "cannot be reached .no route to host"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (errors.HfHubHTTPError("502 bad gateway", response=response), "502 bad gateway"),
        (errors.RepositoryNotFoundError("x", response=response), "not on the Hugging Face Hub"),
        (errors.GatedRepoError("x", response=response), "licence to be accepted"),
        (errors.RevisionNotFoundError("x", response=response), "no revision 'v9'"),
    ):
        online.error = error
        with pytest.raises(UsageError, match=said) as caught:
            hub.pull("fastvlm-0.5b", revision="v9")
        assert REPO in str(caught.value)
        assert "\n" not in str(caught.value)


def test_cached_models_lists_ours_alone_with_their_sizes(cache):
    put(cache)
    other = put(cache, repo="someone/llama")
    put(cache, repo="someone/weights", files=()).joinpath("config.json").unlink()
    (other / "config.json").resolve().write_text('{"model_type": "llama"}')
    put(cache, repo="apple/FastVLM-7B", files=())
    found = {model.repo: model for model in hub_cache.cached_models()}
    more = {model.repo for model in hub_cache.cached_models(["someone/weights", "someone/llama"])}
    assert more - set(found) == {"someone/weights"}, "named, and nobody knows what it is"
    assert set(found) == {REPO, "apple/FastVLM-7B"}
    assert found[REPO].complete
    assert not found["apple/FastVLM-7B"].complete
    assert found[REPO].nbytes == 4 * len(CONFIG) + len(COMMIT)
