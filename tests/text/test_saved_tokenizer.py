"""A folder's tokenizer files: added tokens, templates, and what is wrong with some of them."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text import saved_tokenizer
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..reference import tokenizer as tiny


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """tokenizer.json and tokenizer_config.json."""
    tiny.save(tmp_path)
    return tmp_path


@pytest.fixture
def old_folder(tmp_path):
    """vocab.json and merges.txt as transformers before 4.34 saved them, without
    added_tokens_decoder; case 15 of the replayed reports."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    write(tmp_path, "vocab.json", vocab)
    write(tmp_path, "merges.txt", "#version: 0.2\n")
    write(tmp_path, "tokenizer_config.json",
          {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"})  # fmt: skip
    added = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<tool>": 259}
    write(tmp_path, "added_tokens.json", added)
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    return tmp_path


def test_added_tokens_json_is_read_where_the_config_lists_none(old_folder):
    tokenizer = Tokenizer.from_folder(old_folder)
    ids = tokenizer.encode("<|im_start|>hi<|im_end|><tool>", special=True)
    assert ids[0] == 257
    assert ids[-2:] == [258, 259]
    assert tokenizer.eos_ids == {258}
    assert set(tokenizer.special) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    write(old_folder, "tokenizer_config.json",
          {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {}})  # fmt: skip
    assert not Tokenizer.from_folder(old_folder).special


def test_many_added_tokens_are_added_in_one_go(monkeypatch):
    """6,415 of Gemma 3's took 42 s, one at a time and each with a look at all."""
    calls = []

    class Counted:
        def __init__(self, backend):
            self._backend = backend

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self._backend, name)

    wanted = {301 + i: {"content": f"<unused{i}>", "special": i % 2} for i in range(500)}
    backend = tiny.build()
    saved_tokenizer.add_tokens(Counted(backend), wanted, "here")
    assert calls.count("add_tokens") == calls.count("get_added_tokens_decoder") == 1
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("<unused7><unused499>", special=True) == [308, 800]
    assert "<unused7>" in tokenizer.special
    assert "<unused8>" not in tokenizer.special


@pytest.mark.parametrize(
    ("added", "match"),
    [
        ({"298": "<x>"}, "'content'"),
        ({"298": {"special": True}}, "'content'"),
        ({"298": {"content": 5}}, "'content'"),
        ({"abc": {"content": "<x>"}}, "abc"),
        ([{"content": "<x>"}], "added_tokens_decoder"),
        ("<x>", "added_tokens_decoder"),
        ({"-1": {"content": "<x>"}}, "should have id -1"),
        ({"301": {"content": ""}}, "should have id 301"),
    ],
)
def test_malformed_added_tokens(folder, added, match):
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": added})
    refuse(folder, match)


def refuse(folder, match):
    with pytest.raises(UsageError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eos", [["</s>"], 5, {"text": "</s>"}, {"content": 5}, True])
def test_a_token_that_is_no_text(folder, eos):
    write(folder, "tokenizer_config.json", {"eos_token": eos})
    refuse(folder, "eos_token must be")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template is neither"),
        ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}, "is neither text"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is neither"),
        (
            "tokenizer_config.json",
            {"chat_template": {"default": ["x"]}},
            "chat_template is neither",
        ),
        ("chat_template.json", "[]", "not a JSON object"),
        ("special_tokens_map.json", {"eos_token": 7}, "eos_token must be"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "damaged"),
    ],
)
def test_malformed_files(folder, name, content, match):
    if name != "tokenizer_config.json":
        write(folder, "tokenizer_config.json", {})
    write(folder, name, content)
    refuse(folder, match)


def test_a_malformed_added_tokens_json(old_folder):
    for content in ({"<x>": "abc"}, {"<x>": [1]}, {"<x>": 999}):
        write(old_folder, "added_tokens.json", content)
        refuse(old_folder, "added_tokens.json")


def test_a_template_that_is_not_utf_8(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refuse(folder, r"chat_template\.jinja.*utf-8")


def test_named_templates_as_an_object_and_the_processors_own(folder):
    write(folder, "tokenizer_config.json", {"chat_template": {"default": "D", "tools": "T"}})
    assert Tokenizer.from_folder(folder).chat_template == "D"
    write(folder, "processor_config.json", {"chat_template": "P"})
    assert Tokenizer.from_folder(folder).chat_template == "P"
    write(folder, "processor_config.json", {})
    write(folder, "tokenizer_config.json", {"chat_template": {"tools": "T"}})
    assert Tokenizer.from_folder(folder).chat_template is None


def test_an_added_token_with_letters_of_the_byte_alphabet():
    """Case 16 of the replayed reports: "đem" came out as "\\x11em"."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ("đem", "<café>", "Začnimo")
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer = Tokenizer(backend)
    for text in (*words, "né đem<café> 日"):
        ids, pieces = tokenizer.encode(text), tokenizer.detokenizer()
        assert tokenizer.decode(ids) == text
        assert "".join([*map(pieces.add, ids), pieces.finish()]) == text


def test_codegens_two_files_are_gpt2s(golden):
    """Phi-2 has no tokenizer.json: ids by its original class, in the golden MoE-LLaVA's prompt."""
    tokenizer = Tokenizer.from_folder(golden.parent / "moe_llava_phi")
    word = tokenizer.encode("USER: it's 25,  \n\nnot")
    assert tokenizer.decode(word) == "USER: it's 25,  \n\nnot"
    spaced = [tokenizer.backend.id_to_token(id) for id in tokenizer.encode("a  b")]
    assert spaced == ["a", "Ġ", "Ġb"]
    assert tokenizer.special == {"<|endoftext|>": 328, "<|extra_0|>": 329}
    assert tokenizer.encode("<|endoftext|>", special=True) == [328]
    assert 328 not in tokenizer.encode("<|endoftext|>")
