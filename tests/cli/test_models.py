"""`models list | pull | show | verify | rm`, and what each prints where."""

import hashlib
import io
import json
import re
import shutil

import mlx.core as mx
import pytest

from mlx_vlm_edge.checkpoint.licence import licence
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub import models as hub
from mlx_vlm_edge.hub import published
from mlx_vlm_edge.hub.published import PublishedFile

from ..reference import tokenizer

REPO = hub.ALIASES["fastvlm-0.5b"]


@pytest.fixture
def cached(golden, tmp_path, monkeypatch):
    """A Hub cache with the golden model in Apple's layout, as apple/FastVLM-0.5B."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / ("models--" + REPO.replace("/", "--"))
    snapshot = home / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    shutil.copyfile(golden / "config_apple_llava.json", snapshot / "config.json")
    shutil.copyfile(golden / "model_apple_llava.safetensors", snapshot / "model.safetensors")
    tokenizer.save(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apple-amlr\ntags: []\n---\n# FastVLM\n")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("c0ffee")
    return home


def test_list(cached, capsys):
    assert main(["models", "list"]) == 0
    shown = capsys.readouterr()
    (name, size, unit), (bundled, *_, word) = (line.split() for line in shown.out.splitlines())
    assert (name, unit) == ("fastvlm-0.5b", "MB")
    assert int(size) == 2
    assert (bundled, word) == ("demo", "bundled")
    assert "to pull: fastvlm-1.5b, fastvlm-7b" in shown.err
    assert main(["models", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["repo"], row["complete"]) for row in rows] == [(REPO, True), (None, True)]


def test_list_on_a_fresh_machine(tmp_path, capsys, monkeypatch):
    """There is a model to try, and the answer says so where answers are."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert main(["models", "list"]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"demo +\d+ MB  bundled\n", shown.out)
    assert "to pull: fastvlm-0.5b" in shown.err


def test_a_download_that_died_before_the_config_is_listed_and_removed(cached, capsys):
    shutil.rmtree(cached / "snapshots")
    assert main(["models", "list"]) == 0
    assert "fastvlm-0.5b" in (shown := capsys.readouterr().out)
    assert "incomplete: pull it again" in shown
    assert main(["models", "rm", "fastvlm-0.5b", "--yes"]) == 0
    assert not cached.exists()


def test_verify(cached, capsys):
    """By the hashes that name the blobs of a cache that others filled, and by our own record."""
    snapshot = cached / "snapshots" / "c0ffee"
    assert main(["models", "verify", "fastvlm-0.5b"]) == 0
    assert "no hashes to hold it to; its weights are finite" in capsys.readouterr().out
    (cached / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        path.symlink_to(path.rename(cached / "blobs" / sha))
    assert main(["models", "verify", "fastvlm-0.5b"]) == 0
    assert "5 files are the Hub's; its weights are finite" in capsys.readouterr().out
    files = {path.name: (path.stat().st_size, path.resolve().name) for path in snapshot.iterdir()}
    published.write(snapshot, files | {"generation_config.json": (2, "")})
    readme = snapshot / "README.md"
    readme.write_text(readme.read_text().replace("FastVLM", "fastvlm"))
    assert main(["models", "verify", "fastvlm-0.5b"]) == 1
    shown = capsys.readouterr()
    assert shown.out == (
        "README.md: not the bytes of the Hub\ngeneration_config.json: missing or cut off\n"
    )
    assert "models pull fastvlm-0.5b` mends it" in shown.err
    assert main(["models", "verify", "fastvlm-0.5b", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
    assert main(["models", "list"]) == 0
    assert "incomplete" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_reads_the_weights(value, cached, capsys):
    path = cached / "snapshots" / "c0ffee" / "model.safetensors"
    weights = mx.load(str(path))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(weights[name].size).reshape(weights[name].shape) == 77,
                             value, weights[name])  # fmt: skip
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    assert main(["models", "verify", str(path.parent)]) == 1
    assert f"model.safetensors: {name} has values that are not finite" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["models", "verify", str(path.parent)]) == 1
    assert "truncated" in capsys.readouterr().out


def test_verify_of_the_demo_and_of_what_is_not_here(cached, capsys):
    assert main(["models", "verify", "demo"]) == 0
    assert main(["models", "verify", "fastvlm-7b"]) == 2
    assert "not on this machine" in capsys.readouterr().err


def test_list_says_what_is_incomplete(cached, capsys):
    (cached / "snapshots" / "c0ffee" / "model.safetensors").unlink()
    assert main(["models", "list"]) == 0
    assert "incomplete" in capsys.readouterr().out


def test_show_of_a_model_that_is_here(cached, capsys):
    assert main(["models", "show", "fastvlm-0.5b", "--offline"]) == 0
    shown = capsys.readouterr().out
    for said in ("llava_qwen2", "2 layers, width 64, 4 heads (2", "192 x 192", "apple-amlr"):
        assert said in shown
    assert main(["models", "show", "fastvlm-0.5b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens per image"] == 9
    assert 2e6 < facts["size"] < 3e6
    assert facts["quantisation"] == "none"
    needed = facts["memory"]
    parts = ("weights", "cache", "activations", "program")
    assert needed["total"] == sum(needed[part] for part in parts)
    assert "for a short question about a picture: weights " in shown


def test_an_older_revision_that_is_whole_is_here_while_an_update_is_not(
    cached, capsys, monkeypatch
):
    from mlx_vlm_edge.loading import fitting, memory
    from mlx_vlm_edge.loading.cost import known_config
    from mlx_vlm_edge.loading.load import LoadOptions

    monkeypatch.setattr(memory, "usable", lambda: 9000)  # bytes, which are shown
    command = ["models", "show", "fastvlm-0.5b", "--offline"]
    assert main(command) == 0
    whole, known = capsys.readouterr(), known_config("fastvlm-0.5b")
    (cached / "refs" / "main").write_text("b" * 40)
    (cached / "snapshots" / ("b" * 40)).mkdir()
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == whole.out
    assert shown.err == f"{REPO}: its newest revision is not all here; c0ffee is used\n"
    assert known_config("fastvlm-0.5b") == known
    snapshot = cached / "snapshots" / "c0ffee"
    assert fitting._folder("fastvlm-0.5b", LoadOptions()) == snapshot
    assert fitting._folder("fastvlm-0.5b", LoadOptions(revision="main")) is None


def test_show_and_the_list_of_what_is_available_give_one_figure(cached, capsys, monkeypatch):
    from mlx_vlm_edge.cli import available

    monkeypatch.setattr(available, "ALIASES", {"fastvlm-7b": hub.ALIASES["fastvlm-7b"]})
    (listed,) = available.models()
    assert main(["models", "show", "fastvlm-7b", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["total"] == listed.memory


TOWERS = [
    "timm/ViT-SO400M-14-SigLIP-384", "openai/clip-vit-large-patch14-336", "facebook/dinov2-giant",
    "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
]  # fmt: skip


def test_towers_of_other_repositories_are_named(cached, tmp_path, capsys, monkeypatch):
    """By `show`, and by `pull` those that are not here; of a tower itself nothing is said."""
    from mlx_vlm_edge.checkpoint import configs

    assert main(["models", "show", "cambrian-8b", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vision towers of"] == ", ".join(TOWERS)
    published = {k: v for k, v in configs.read("cambrian-8b").items() if k != "text_config"}
    folders = {name: tmp_path / name for name in ("cambrian", "tower", "bare")}
    for folder, config in zip(
        folders.values(), (published, {"model_type": "dinov2"}), strict=False
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    folders["bare"].mkdir()
    monkeypatch.setattr("mlx_vlm_edge.cli.models.fetched", lambda name, revision: folders[name])
    here = [TOWERS[1]]
    monkeypatch.setattr(
        "mlx_vlm_edge.cli.models.usable_snapshot", lambda name: name in here or None
    )
    for name, missing in (("cambrian", [*TOWERS[:1], *TOWERS[2:]]), ("tower", []), ("bare", [])):
        assert main(["models", "pull", name]) == 0
        said = capsys.readouterr()
        assert said.out == f"{folders[name]}\n"
        assert [line.split("`")[1] for line in said.err.splitlines() if "tower" in line] == [
            f"mlx-vlm-edge models pull {repo}" for repo in missing
        ]


def test_show_of_a_converted_folder(cached, tmp_path, capsys):
    from mlx_vlm_edge_convert import convert

    out = convert(REPO, tmp_path / "out", bits=4, group_size=32)
    assert main(["models", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "4 bits, groups of 32" in shown
    assert "layers [1, 2, 1, 1, 1], widths [16, 32, 32, 64, 128]" in shown
    assert "apple-amlr" in shown  # README.md came along


def test_show_of_a_model_that_is_not_here(cached, capsys, monkeypatch):
    from mlx_vlm_edge.hub import download

    assert main(["models", "show", "some/model", "--offline"]) == 2
    assert "not on this machine" in capsys.readouterr().err
    weights = PublishedFile(15_500_000_000, "")
    remote = download.Remote("apple/FastVLM-7B", "c0ffee", {"a": weights}, "apple-amlr")
    monkeypatch.setattr(download, "describe", lambda repo, revision: remote)
    assert main(["models", "show", "fastvlm-7b"]) == 0
    shown = capsys.readouterr().out
    assert "15.50 GB" in shown
    assert "apple-amlr" in shown
    assert "models pull fastvlm-7b" in shown
    assert main(["models", "show", "fastvlm-7b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download"] == 15_500_000_000


def test_show_of_an_alias_needs_nobody(cached, capsys, monkeypatch):
    """Its config is shipped: what only the Hub knows is missing, and a line says why."""
    from mlx_vlm_edge.hub import download

    def unreachable(repo, revision):
        raise UsageError("the Hub cannot be reached")

    monkeypatch.setattr(download, "describe", unreachable)
    for name in ("fastvlm-7b", "apple/FastVLM-7B"):
        assert main(["models", "show", name]) == 0
        shown = capsys.readouterr()
        assert re.search("tokens per image: +256", shown.out)
        assert "size and licence are not known: the Hub cannot be reached" in shown.err
    assert main(["models", "show", "some/model"]) == 2


# Of 640 x 480, 1920 x 1080 and 1024 x 1024 pixels; one number where they are the same.
IDEFICS3, SMOLVLM, SMOLVLM_2B = (2197, 2197, 2873), (832, 832, 1088), (1053, 1053, 1377)
CAMBRIAN = (450, 350, 600)
TOKENS = {
    "fastvlm-0.5b": 256, "fastvlm-1.5b": 256, "fastvlm-7b": 256,
    "llava-1.5-7b": 576, "llava-1.5-13b": 576, "sharegpt4v-7b": 576, "sharegpt4v-13b": 576,
    "convllava-7b-768": 144, "convllava-7b-1024": 256, "convllava-7b-1536": 576,
    "cambrian-8b": CAMBRIAN, "cambrian-13b": CAMBRIAN, "cambrian-34b": CAMBRIAN,
    "mobilevlm-1.7b": 144, "mobilevlm-3b": 144,
    "mobilevlm-v2-1.7b": 144, "mobilevlm-v2-3b": 144, "mobilevlm-v2-7b": 144,
    "moe-llava-stablelm-1.6b": 576, "moe-llava-qwen-1.8b": 576, "moe-llava-phi2-2.7b": 576,
    "moe-llava-stablelm-1.6b-384": 728, "moe-llava-phi2-2.7b-384": 728,
    "llava-onevision-0.5b": (2929, 7269, 7371),
    "idefics2-8b": 320, "idefics3-8b": IDEFICS3,
    "smolvlm-256m": SMOLVLM, "smolvlm-500m": SMOLVLM, "smolvlm-2.2b": SMOLVLM_2B,
    "smolvlm2-256m": SMOLVLM, "smolvlm2-500m": SMOLVLM, "smolvlm2-2.2b": SMOLVLM_2B,
    "eve-7b": (451, 351, 601), "eve-7b-hd": (1765, 1373, 2353), "eve-7b-hd-v2": (2597, 2585, 2551),
    "fuyu-8b": (368, 2340, 1260),
}  # fmt: skip


@pytest.mark.parametrize("alias", hub.ALIASES)
def test_show_knows_the_visual_tokens_of_every_alias(alias, cached, capsys):
    """From its shipped config, with nothing downloaded and nobody asked."""
    assert main(["models", "show", alias, "--offline", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tokens per image"]
    wanted = 9 if alias == "fastvlm-0.5b" else TOKENS[alias]  # that one is here, and small
    assert (found if isinstance(found, int) else tuple(found.values())) == wanted


def test_show_says_what_each_of_several_towers_sees(cached, capsys):
    assert main(["models", "show", "cambrian-8b", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image size"] == (
        "384 x 384, 336 x 336, 378 x 378, 1024 x 1024"
    )


def test_pull_prints_the_folder(cached, capsys, monkeypatch):
    from mlx_vlm_edge.hub import download

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []
    monkeypatch.setattr(download, "download", lambda *args: asked.append(args) or cached)
    assert main(["models", "pull", "fastvlm-0.5b", "--revision", "v1"]) == 0
    assert asked == [(REPO, "v1")]
    assert capsys.readouterr().out == f"{cached}\n"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["models", "pull", "fastvlm-0.5b"]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code", "kept"), [("y\n", 0, False), ("\n", 1, True)])
def test_rm_asks(answer, code, kept, cached, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert main(["models", "rm", "fastvlm-0.5b"]) == code
    assert "remove apple/FastVLM-0.5B (2 MB)? [y/N]" in capsys.readouterr().err
    assert cached.exists() is kept


def test_rm_with_yes_and_of_what_is_not_there(cached, capsys):
    assert main(["models", "rm", REPO, "--yes"]) == 0
    assert not cached.exists()
    assert main(["models", "rm", REPO, "--yes"]) == 2
    assert "not among the downloaded models" in capsys.readouterr().err


def test_rm_takes_what_is_no_text_for_no(cached, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert main(["models", "rm", "fastvlm-0.5b"]) == 1
    monkeypatch.setattr("sys.stdin", None)
    assert main(["models", "rm", "fastvlm-0.5b"]) == 1
    assert cached.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["frob"], ["show", "nosuchmodel"], ["pull"], ["show", "demo", "--revision", "nonsense"],
        ["list", "--coreml", "--available"],
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(arguments, cached, capsys):
    assert main(["models", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mlx-vlm-edge: error:")
    assert "\n" not in error


def test_licences(tmp_path):
    assert licence(tmp_path) == "not stated in its files"
    (tmp_path / "LICENSE").write_text("\n   Apache License\n Version 2.0\n")
    assert licence(tmp_path) == "LICENSE: Apache License"
    (tmp_path / "README.md").write_text("---\nlicense_name: own\nlicense: other\n---\nx")
    assert licence(tmp_path) == "own"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\nx")
    assert licence(tmp_path) == "apple-amlr"
