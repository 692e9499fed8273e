"""Names become folders; what is on the machine needs neither network nor huggingface_hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def put(
    cache: Path, repo: str = REPO, reference: str = "main", files=("model.safetensors",)
) -> Path:
    """A snapshot in the cache's layout, its files links to blobs."""
    home = cache / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (home / "blobs").mkdir(exist_ok=True)
    for name in ("config.json", *files):
        blob = home / "blobs" / f"blob-{name}"
        blob.write_text(json.dumps({"model_type": "llava_qwen2"}))
        (snapshot / name).symlink_to(blob)
    path = home / "refs" / reference
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("name", ["fastvlm-0.5b", "FastVLM-0.5B", REPO])
def test_a_model_on_the_machine_is_found_by_alias_and_id(name, cache):
    snapshot = put(cache)
    assert hub.locate(name) == snapshot
    assert hub.locate(name, offline=True) == snapshot
    assert hub_cache.local_snapshot(REPO) == snapshot


def test_finding_it_imports_nothing_heavy(cache):
    put(cache)
    program = (
        "import sys; from mlx_vlm_edge.hub.models import locate; locate('fastvlm-0.5b'); "
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
    snapshot = put(cache, files=shards)
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
        hub.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert hub.locate(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="is a file"):
        hub.locate(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fastvlm-05b", "did you mean fastvlm-0.5b"),
        ("fastvlm", "did you mean"),
        ("llama", "known are fastvlm-0.5b"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("apple/../x", "no model is called|no such folder"),
        ("", "no model is called"),
    ],
)
def test_unknown_names_are_answered_in_one_line(name, said, cache):
    with pytest.raises(UsageError, match=said) as caught:
        hub.locate(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", [False, True])
def test_offline_names_the_model_the_cause_and_the_remedy(variable, cache, monkeypatch):
    if variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as caught:
        hub.locate("fastvlm-0.5b", offline=not variable)
    said = str(caught.value)
    assert REPO in said
    assert "downloads are off" in said
    assert "models pull fastvlm-0.5b" in said
    assert not cache.exists()


class Hub:
    """A stand-in for huggingface_hub's network: two calls, recorded."""

    sizes: dict[str, int] = {  # noqa: RUF012
        "config.json": 10, "model.safetensors": 1_500_000_000, "pytorch_model.bin": 1_500_000_000,
        "tokenizer.json": 7_000_000, "README.md": 5, "LICENSE": 5, "onnx/model.onnx": 10**10,
        "fastvithd.mlpackage/data": 10**9, "picture.png": 10, "merges.txt": 3,
    }  # fmt: skip

    def __init__(self, cache: Path, error: Exception | None = None) -> None:
        self.cache, self.error, self.asked = cache, error, {}

    def model_info(self, repo, revision=None, files_metadata=False):
        if self.error:
            raise self.error

        class Sibling:
            def __init__(self, name: str, size: int) -> None:
                self.rfilename, self.size = name, size

        class Found:
            siblings = [Sibling(*item) for item in self.sizes.items()]  # noqa: RUF012
            tags = ["license:other"]  # noqa: RUF012
            card_data = {"license_name": "apple-amlr"}  # noqa: RUF012

        return Found()

    def snapshot_download(self, repo, **asked):
        self.asked = asked
        return str(put(self.cache, repo))


@pytest.fixture
def online(cache, monkeypatch) -> Hub:
    import huggingface_hub

    double = Hub(cache)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: double)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", double.snapshot_download)
    return double


def test_a_named_model_is_downloaded_after_saying_how_much(online, cache, capsys):
    folder = hub.locate("fastvlm-0.5b", revision="main")
    assert hub_cache.is_complete(folder)
    said = capsys.readouterr()
    assert "downloading apple/FastVLM-0.5B: 1.51 GB, licence apple-amlr" in said.err
    assert said.out == ""
    assert online.asked["revision"] == "main"
    assert set(online.asked["allow_patterns"]) == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "merges.txt",
    }  # fmt: skip
    online.asked = {}
    hub.locate("fastvlm-0.5b")
    assert online.asked == {}, "what is here is not asked for again"


def test_too_little_disk_is_said_before_the_download(online, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(UsageError, match=r"takes 1\.51 GB, .* has 1\.00 GB free"):
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
    (other / "config.json").resolve().write_text('{"model_type": "llama"}')
    put(cache, repo="apple/FastVLM-7B", files=())
    found = {model.repo: model for model in hub_cache.cached_models()}
    assert set(found) == {REPO, "apple/FastVLM-7B"}
    assert found[REPO].complete
    assert not found["apple/FastVLM-7B"].complete
    assert found[REPO].nbytes == 2 * len('{"model_type": "llava_qwen2"}') + len(COMMIT)
