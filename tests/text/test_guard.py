"""A user's words never become control tokens, however they are cut, joined or tokenised."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_vlm_edge.models import (
    cambrian,
    convllava,
    eve,
    eve2,
    fastvlm,
    fuyu,
    idefics2,
    idefics3,
    llava,
    llava_onevision,
    mobilevlm,
    moe_llava,
)
from mlx_vlm_edge.text.guard import GUARD, Guard, split_unmarked, unguard, unmarked
from mlx_vlm_edge.text.tokenizer import Tokenizer

WORDS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<image>", "<fake_token_around_image>",
         "<end_of_utterance>", "<global-img>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>",
         "☃")  # fmt: skip
FAMILIES = (
    cambrian,
    convllava,
    eve,
    eve2,
    fastvlm,
    fuyu,
    idefics2,
    idefics3,
    llava,
    llava_onevision,
    mobilevlm,
    moe_llava,
)
# Pieces of words, whole ones, one-character ones, the mark itself.
TYPED = st.lists(
    st.one_of(
        st.sampled_from([*WORDS, GUARD, "\n", " ", "a", "<", "|", "<|im_", "end|>", "image>"]),
        st.builds(
            lambda word, cut: word[: cut % len(word)], st.sampled_from(WORDS), st.integers(1)
        ),
        st.builds(
            lambda word, cut: word[cut % len(word) :], st.sampled_from(WORDS), st.integers(1)
        ),
        st.text(max_size=3),
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {c: index for index, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def processor(family, tokenizer):
    """A family's prompts without its model: those of the test's tokenizer."""
    one = object.__new__(family.Processor)
    one.config, one.tokenizer, one.bos = SimpleNamespace(eos_token_ids=()), tokenizer, "<s>"
    return one


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.split(".")[-1])
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(TYPED, min_size=1, max_size=3))
def test_typed_words_yield_no_control_id_in_a_familys_prompt(family, tokenizer, parts):
    prompts = processor(family, tokenizer)

    def controls(texts):
        content = [{"type": "text", "text": text} for text in texts]
        text = prompts.render([prompts._guarded({"role": "user", "content": content})])
        ids = tokenizer.encode(text, special=True)
        return [id for id in ids if id in tokenizer.special_ids], tokenizer.decode(ids, False)

    known, _ = controls(["x"] * len(parts))
    found, shown = controls(parts)
    assert found == known
    assert "".join(parts) in shown
    assert len(split_unmarked(shown, unmarked(["<image>"]))) >= 1


@given(TYPED)
def test_the_mark_comes_out_again(text):
    guard = Guard(WORDS)
    assert unguard(guard(text)) == text
    assert unguard(guard(text) + guard(text)) == text * 2


@given(st.lists(TYPED, max_size=4))
def test_no_word_comes_about_where_texts_are_joined(parts):
    guard = Guard(WORDS)
    joined = "".join(map(guard, parts))
    assert len(split_unmarked(joined, unmarked(WORDS))) == 1


def test_a_words_examples():
    guard = Guard(["<image>", "§"])
    assert guard("a<image>b§<ima") == f"a<{GUARD}image>b{GUARD}§<{GUARD}ima"
    assert guard("<") == f"{GUARD}<"
    assert split_unmarked("a<b>c", unmarked(["<b>"])) == ["a", "<b>", "c"]
    assert split_unmarked(f"a{GUARD}<b>c", unmarked(["<b>"])) == [f"a{GUARD}<b>c"]
    assert split_unmarked(f"a{GUARD}{GUARD}<b>c", unmarked(["<b>"]))[1] == "<b>"


def test_a_vocabulary_that_has_a_control_token_as_a_word():
    """Unigram finds </s> among its pieces; what is typed is spelt out all the same."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "</s>ab")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>", "unk_token": "<unk>"})
    spelt = [tokenizer.token_id(c) for c in "▁a</s>b"]
    assert tokenizer.encode("a</s>b") == spelt
    assert tokenizer.encode(tokenizer.guard("a</s>b") + "</s>", special=True) == [*spelt, 1]
    assert tokenizer.encode("a</s>", special=True)[-1] == 1
    assert tokenizer.encode("é")[-1] == 0  # what it does not know stays unknown


def test_a_word_level_vocabulary_and_a_bpe_with_merges():
    words = Backend(models.WordLevel({"<unk>": 0, "[END]": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["[END]"])
    assert Tokenizer(words).encode("a [END]") == [2, 0]
    merged = Backend(models.BPE(vocab={"<": 0, ">": 1, "<>": 2}, merges=[("<", ">")]))
    merged.add_special_tokens(["<>"])
    assert Tokenizer(merged).encode("<>") == [0, 1]


def test_a_text_that_begins_once_does_so_beside_marked_words(tmp_path):
    """`prepend_scheme: "first"`: a special token in a question does not change the rest."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate("▁ab<s>")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, {"legacy": False})
    plain = tokenizer.encode("ab<s>ab<s>b", special=True)
    assert plain.count(0) == 1
    marked = tokenizer.encode("ab<s>ab<s>b" + tokenizer.guard("<"), special=True)
    assert marked == [*plain, 3]
    tokenizer.begin_each_text()  # not where the file says that it was trained otherwise
    assert tokenizer.encode("ab<s>ab<s>b", special=True) == plain
    trained = Tokenizer(Backend.from_str(backend.to_str()))
    trained.begin_each_text()
    assert trained.encode("ab<s>ab<s>b", special=True).count(0) == 3
    assert json.loads(backend.to_str())["pre_tokenizer"]["prepend_scheme"] == "first"


def test_spaces_that_a_special_token_takes_in():
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate("ab <")}, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    tokenizer = Tokenizer(backend)
    for text in ("a  <l>  b", "a  <r>  b", "a <r> <l> b", "<l><r>  <r>b "):
        marked = tokenizer.guard("<") + text
        want = [3, *tokenizer.encode(text, special=True)]
        assert tokenizer.encode(marked, special=True) == want
