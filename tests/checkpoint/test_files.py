"""Which files a model folder is made of: what is read, what is missing, what is fetched."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_vlm_edge.checkpoint import files
from mlx_vlm_edge.checkpoint.config import PREPROCESSOR, read_config
from mlx_vlm_edge.checkpoint.files import SAFETENSORS, TORCH, lacking, needed, weight_files
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import say_once

from ..reference import torchvision_shim

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TORCH_SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


@pytest.fixture(autouse=True)
def every_note_is_said():
    say_once.cache_clear()


def fill(folder, *names, **contents):
    """Files of a few bytes; a JSON file has {} in it."""
    for name in names:
        (folder / name).write_text("{}" if name.endswith(".json") else "x")
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def index(folder, form, shards):
    content = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
    (folder / form.index).write_text(json.dumps(content))


def names(folder) -> list[str]:
    return [path.name for path in weight_files(folder)]


@pytest.mark.parametrize(
    ("present", "read"),
    [
        ([], []),
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", *SHARDS], ["model.safetensors"]),
        (SHARDS, SHARDS),
        (["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"],
         ["model-1.safetensors", "model-2.safetensors"]),
        (["weights.safetensors", "pytorch_model.bin"], ["weights.safetensors"]),
        ([*SHARDS, "adapter_model.safetensors"], SHARDS),
        (["a.safetensors", "adapters.safetensors"], ["a.safetensors"]),
        (["adapter_model.safetensors"], []),
        (["adapter_model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        ([*TORCH_SHARDS, "training_args.bin", "optimizer.pt"], TORCH_SHARDS),
        (["encoder.pth", "scheduler.pt", "mm_projector.bin"], ["encoder.pth"]),
        (["model-00000-of-00002.safetensors", SHARDS[0]],
         ["model-00000-of-00002.safetensors", SHARDS[0]]),
    ],
)  # fmt: skip
def test_weights_without_an_index(present, read, tmp_path):
    fill(tmp_path, *present)
    assert names(tmp_path) == read


@pytest.mark.parametrize(
    ("form", "shards"), [(SAFETENSORS, SHARDS), (TORCH, TORCH_SHARDS)], ids=["safetensors", "torch"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_shard_that_is_missing_is_named(listed, form, shards, tmp_path):
    fill(tmp_path, shards[0])
    if listed:  # partly here, it is an unfinished download, whatever stands beside it
        index(tmp_path, form, shards)
        fill(tmp_path, form.single)
    with pytest.raises(UsageError, match=shards[1]):
        weight_files(tmp_path, [form])


@pytest.mark.parametrize(
    "whole", [["model.safetensors"], ["a-1.safetensors"], TORCH_SHARDS, SHARDS[:0]]
)
def test_an_index_of_another_build(whole, tmp_path, capsys):
    """None of its shards are here: what is complete without it is read, and a line says so."""
    index(tmp_path, SAFETENSORS, SHARDS)
    fill(tmp_path, *whole)
    if not whole:
        with pytest.raises(UsageError, match=SHARDS[0]):
            weight_files(tmp_path)
        return
    assert names(tmp_path) == whole == names(tmp_path)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("names files that are not there") == 1
    fill(tmp_path, "tokenizer.json", "tokenizer_config.json", config={})
    assert lacking(tmp_path) == ""


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../model.safetensors",
        "a/../../b.safetensors",
        "..\\b",
        "\x1b[2Jm",
        "",
        5,
        "a" * 3000,
    ],
    ids=repr,
)
def test_an_index_stays_in_its_folder(name, tmp_path):
    fill(tmp_path, "model.safetensors")
    for form in (SAFETENSORS, TORCH):
        index(tmp_path, form, ["model.safetensors", name])
        with pytest.raises(UsageError) as caught:
            weight_files(tmp_path, [form])
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_cannot_be(tmp_path, text):
    (tmp_path / SAFETENSORS.index).write_text(text)
    with pytest.raises(UsageError):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", SHARDS[0], "pytorch_model.bin"])
def test_a_link_to_nothing_is_named(name, tmp_path):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=f"{name}: links to a file that is not there"):
        weight_files(tmp_path)


WHOLE = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("model_type", "present", "missing"),
    [
        ("llava_qwen2", WHOLE, ""),
        ("llava_qwen2", (*WHOLE[:1], "vocab.json", "merges.txt", *WHOLE[2:]), ""),
        ("mobilevlm", ("pytorch_model.bin", "tokenizer.model", *WHOLE[2:]), ""),
        ("llava_qwen2", WHOLE[1:], "weights"),
        ("llava_qwen2", (*WHOLE[:1], "vocab.json", *WHOLE[2:]), "a tokenizer"),
        ("llava_qwen2", (*WHOLE[:1], *WHOLE[2:]), "a tokenizer"),
        ("llava_qwen2", WHOLE[:2], "tokenizer_config.json"),
        ("llava_qwen2", (SHARDS[0], *WHOLE[1:]), SHARDS[1]),
        ("idefics3", WHOLE, "preprocessor_config.json"),
        ("smolvlm", (*WHOLE, "processor_config.json"), "preprocessor_config.json"),
        ("clip", WHOLE[:1], ""),
    ],
)
def test_what_a_folder_lacks(model_type, present, missing, tmp_path):
    assert lacking(tmp_path) == "config.json"
    fill(tmp_path, *present, config={"model_type": model_type})
    said = lacking(tmp_path)
    assert missing in said
    assert bool(said) is bool(missing)


@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_either_file_tells_about_preprocessing(file, tmp_path):
    settings = {"size": {"longest_edge": 512}}
    written = settings if file == "preprocessor_config" else {"image_processor": settings}
    fill(tmp_path, *WHOLE, config={"model_type": "idefics3"}, **{file: written})
    assert lacking(tmp_path) == ""
    assert read_config(tmp_path)[PREPROCESSOR] == settings


def test_the_processor_s_settings_go_before_an_older_file_s(tmp_path):
    torchvision_shim.install()
    from transformers import CLIPImageProcessor

    kind = {"image_processor_type": "CLIPImageProcessor"}
    older, newer = ({"size": {"shortest_edge": edge}, **kind} for edge in (224, 336))
    fill(tmp_path, preprocessor_config=older, processor_config={"image_processor": newer})
    theirs = CLIPImageProcessor.from_pretrained(tmp_path)
    assert files.read_preprocessor(tmp_path) == newer
    assert theirs.size["shortest_edge"] == 336


def test_a_file_that_is_linked_and_gone_is_missed(tmp_path):
    fill(tmp_path, *WHOLE, config={"model_type": "llava_qwen2"})
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "gone")
    assert lacking(tmp_path) == "generation_config.json"


def test_of_a_repository_the_files_of_a_model(tmp_path):
    repository = [
        *SHARDS, SAFETENSORS.index, *TORCH_SHARDS, TORCH.index, "consolidated.safetensors",
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json",
        "LICENSE", "NOTICE.txt", "README.md", "trainer_state.json", "training_args.bin",
        "modeling_x.py", "picture.png", "onnx/model.onnx", "vision/config.json",
    ]  # fmt: skip
    left = {
        *TORCH_SHARDS, TORCH.index, "consolidated.safetensors", "trainer_state.json",
        "training_args.bin", "modeling_x.py", "picture.png", "onnx/model.onnx",
        "vision/config.json",
    }  # fmt: skip
    assert set(needed(repository)) == {*repository} - left
    only_torch = [name for name in repository if not name.endswith(".safetensors")]
    assert {*TORCH_SHARDS, TORCH.index} < {*needed(only_torch)}
    assert SAFETENSORS.index not in needed(only_torch)


@pytest.mark.parametrize(
    "entry",
    ["text", {"default": "text", "tools": "x"}, [{"name": "default", "template": "text"}, {}]],
    ids=["text", "dict", "list"],
)
def test_chat_templates_of_every_place_and_form(entry, tmp_path):
    assert files.read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert files.read_chat_template(tmp_path) == "text"
    for name, text in (("processor_config.json", "P"), ("chat_template.json", "J")):
        (tmp_path / name).write_text(json.dumps({"chat_template": text}))
        assert files.read_chat_template(tmp_path) == text
    (tmp_path / "chat_template.jinja").write_text("F\u00e9", encoding="utf-8")
    assert files.read_chat_template(tmp_path) == "F\u00e9"


@pytest.mark.parametrize("entry", [5, [5], ["a"], {"default": 3}, [{"name": "default"}, 4]])
def test_a_chat_template_that_is_none(entry, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: chat_template"):
        files.read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"chat_template\.jinja"):
        files.read_chat_template(tmp_path)


def test_asking_imports_nothing_heavy():
    program = (
        "import sys; import mlx_vlm_edge.checkpoint.files; "
        "print([m for m in ('mlx', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_no_other_file_has_a_list_of_its_own():
    """The names stand in checkpoint/files.py alone; elsewhere they are words in a message."""
    root = Path(__file__).parents[2]
    rooms = ("mlx_vlm_edge", "convert", "benchmarks/mlx_vlm_edge_bench")
    owned = {*files._BESIDE, *(form.single for form in files.FORMATS),
             *(form.index for form in files.FORMATS)}  # fmt: skip
    owner = root / "mlx_vlm_edge" / "checkpoint" / "files.py"
    for path in (path for room in rooms for path in (root / room).rglob("*.py")):
        literals = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert path == owner or not literals & owned, f"{path}: {literals & owned}"
