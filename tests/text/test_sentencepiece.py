"""tokenizer.model -> the ids of the `sentencepiece` package, and of LLaMA's original tokenizer."""

import random
import struct

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text import saved_tokenizer, sentencepiece
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..reference import torchvision_shim

GOLDEN = "mobilevlm_v2"
TEXTS = [
    "",
    " ",
    "   ",
    "Hello there.",
    " leading",
    "   three leading spaces",
    "trailing  ",
    "two  spaces   three",
    "\n",
    "\nWhat is it?",
    "a\n\n\tb\r\n c",
    "1234567890 3.14 007",
    "😀 👩‍👩‍👧 🏳️‍🌈",
    "naïve café e\u0301 Ω 日本語 مرحبا",
    "a\u200bb\u00a0c\ufeff",
    "\x00\x01",
    "▁already▁marked ▁",
    "</s> <s> <unk> <0x0A> <image>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the theatre, the other; then there",
    "x" * 300,
]


def corpus():
    """Sentences for a tokenizer, of words made up from syllables."""
    chosen = random.Random(0)
    syllables = ["the", "in", "er", "an", "on", "st", "ing", "ou", "a", "é", "日", "12", "Qu", "x"]
    words = ["".join(chosen.choices(syllables, k=chosen.randint(1, 4))) for _ in range(800)]
    return [" ".join(chosen.choices(words, k=12)) + "." for _ in range(1500)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.model trained as LLaMA's was: BPE, bytes, split digits, text left alone."""
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(prefix),
        vocab_size=1200,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module", params=["golden", "trained"])
def path(request, golden):
    """A tokenizer.model."""
    if request.param == "golden":
        return golden.parent / GOLDEN / "tokenizer.model"
    return request.getfixturevalue("trained")


@pytest.fixture(scope="module")
def pair(path):
    """Our tokenizer and sentencepiece's of the same file."""
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    return Tokenizer.from_folder(path.parent), spm.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_sentencepieces(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def test_ids_of_random_texts(pair):
    ours, theirs = pair
    chosen = random.Random(1)
    parts = [*"abehinorst \n\t.,'é日😀▁", "  ", "the ", "ing", "aaaa", "12", "<0x0A>", "</s>"]
    for _ in range(2000):
        text = "".join(chosen.choices(parts, k=chosen.randint(1, 40)))
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_every_piece_has_its_id(pair):
    ours, theirs = pair
    assert ours.vocab_size == theirs.vocab_size()
    for index in range(ours.vocab_size):
        assert ours.token_id(theirs.id_to_piece(index)) == index


def test_special_tokens_are_split_off_and_each_rest_begins_anew(pair):
    """LLaMA's tokenizer in its original ("legacy") behaviour: </s> is 2, and what follows it
    begins with the word mark again. sentencepiece alone takes </s> for four characters."""
    ours, theirs = pair
    want = [*theirs.encode("yes"), 2, *theirs.encode("USER: no"), 1, *theirs.encode(" x")]
    assert ours.encode("yes</s>USER: no<s> x", special=True) == want
    assert 2 not in theirs.encode("yes</s>USER")
    guarded = ours.guard("a</s>b")
    assert ours.encode(f"{guarded}</s>", special=True) == [*theirs.encode("a</s>b"), 2]


def test_pieces_of_an_answer_make_the_whole_text(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = [*theirs.encode(text), 2]
        detokenizer = ours.detokenizer()
        pieces = [detokenizer.add(index) for index in ids]
        assert "".join(pieces) + detokenizer.finish() == ours.decode(ids)


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 1000, -1, -3])
def test_a_truncated_file_is_refused(golden, tmp_path, cut):
    data = (golden.parent / GOLDEN / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:cut])
    with pytest.raises(UsageError, match=r"tokenizer\.model: (is damaged|a model|not a BPE)"):
        Tokenizer.from_folder(tmp_path)


def test_other_bytes_are_refused(tmp_path):
    for data in (b"hello world", b"\x0a\x05abc", bytes(100), b"\xff" * 100):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(UsageError, match=r"tokenizer\.model"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes its text"),
        ({"remove_extra_whitespaces": True}, "changes its text"),
        ({"user_defined_symbols": ["<a>"]}, "symbols of its users"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path, options, message):
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **options,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()[:200]), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=120, hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_worked_example_of_a_varint():
    assert sentencepiece._varint(b"\xac\x02", 0) == (300, 2)


def test_without_a_dummy_prefix_text_begins_as_it_is(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()[:400]), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    ours = Tokenizer.from_folder(tmp_path)
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


# A file of our own making: real vocabularies cannot be trained in a test


def varint(number):
    rest, byte = divmod(number, 128)
    return bytes([byte | 128]) + varint(rest) if rest else bytes([byte])


def field(number, value):
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


# BPE with bytes; text is left alone.
TRAINED = field(2, field(3, 2) + field(35, 1)) + field(3, field(3, 1) + field(4, 0) + field(5, 1))


def written(path, scored):
    """A BPE model with these pieces (text, score) after the special ones and the 256 bytes."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, score, 1) for piece, score in scored]
    data = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + field(3, kind))
        for piece, score, kind in pieces
    )
    path.write_bytes(data + TRAINED)
    return path


# Runs of spaces have one score, as in LLaMA's and Mistral's files.
SPACES = [("▁" * length, -1e9) for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)]
LETTERS = [("▁a", -30.0), ("▁", -1e9), *((letter, -41.0) for letter in "abr:et\n")]


@pytest.mark.parametrize("between", ["{}", "a{}b", "b:\n{}ret", "{}\n{}a"])
def test_runs_of_spaces_are_sentencepieces(tmp_path, between):
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    path = written(tmp_path / "tokenizer.model", SPACES + LETTERS)
    ours, theirs = Tokenizer.from_folder(tmp_path), spm.SentencePieceProcessor(str(path))
    for length in range(80):
        text = between.replace("{}", " " * length)
        assert ours.encode(text) == theirs.encode(text), length


def test_a_json_of_the_same_tokenizer_has_the_same_ids(pair, path, tmp_path):
    """What `convert` writes beside a tokenizer.model, which is read faster."""
    ours, theirs = pair
    assert saved_tokenizer.write_json(path.parent, tmp_path)
    assert not saved_tokenizer.write_json(tmp_path, tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    for text in [*TEXTS, *corpus()[:200]]:
        assert saved.encode(text) == theirs.encode(text)
    assert saved.special == ours.special
    chat = "USER: a</s>USER: b"
    assert saved.encode(chat, special=True) == ours.encode(chat, special=True)


def test_others_are_told_of_the_token_that_begins_a_text(golden, tmp_path):
    torchvision_shim.install()
    from transformers import PreTrainedTokenizerFast

    saved_tokenizer.write_json(golden.parent / GOLDEN, tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    assert theirs.encode("a b") == [1, *ours.encode("a b")]


def test_files_that_are_malformed_in_odd_ways(tmp_path):
    """Each is one line; none takes longer for being long."""
    path = tmp_path / "tokenizer.model"

    def refuse(data, match="damaged"):
        path.write_bytes(data + TRAINED)
        with pytest.raises(UsageError, match=match) as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)

    refuse(b"\x80" * 3_000_000, "no number")
    refuse(field(1, field(2, 0.0)))  # a piece without a text
    refuse(field(1, field(1, 5)))  # with a number for a text
    refuse(field(1, field(1, b"\xff")))  # not UTF-8
    refuse(field(1, 7))
    refuse(field(1, field(1, b"a")), "unknown")
    refuse(written(path, [("a", -1.0), ("a", -2.0)]).read_bytes(), "twice")
    refuse(written(path, [("a" * 1_000_000, -1.0)]).read_bytes(), "no word")
    refuse(written(path, [("a", float("nan"))]).read_bytes(), "no number")
    refuse(b"IQ== 0\nIg== 1\nIw== 2\n", "tiktoken")


def test_transformers_saved_tokenizer_gives_way_to_the_file_it_came_from(tmp_path):
    """It says that the word mark stands at the beginning alone, and merges (▁,▁) first."""
    from tokenizers import normalizers, pre_tokenizers

    written(tmp_path / "tokenizer.model", SPACES + LETTERS)
    right = Tokenizer.from_folder(tmp_path)
    saved = sentencepiece.backend(tmp_path / "tokenizer.model")
    saved.normalizer = normalizers.Sequence([])
    saved.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    saved.add_special_tokens(["<image>"])
    saved.save(str(tmp_path / "tokenizer.json"))
    text = "a</s>a  b<image>a"
    got = Tokenizer.from_folder(tmp_path)
    assert got.encode("a</s>a  b", special=True) == right.encode("a</s>a  b", special=True)
    assert got.token_id("<image>") == saved.token_to_id("<image>")
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "tokenizer.json").rename(alone / "tokenizer.json")
    only = Tokenizer.from_folder(alone)
    assert only.encode(text, special=True) != got.encode(text, special=True)
    only.begin_each_text()  # a family that was trained so
    assert only.encode(text, special=True) == got.encode(text, special=True)
    (alone / "tokenizer.model").write_bytes(b"IQ== 0\n")  # of no use: tokenizer.json is read
    assert Tokenizer.from_folder(alone).vocab_size == got.vocab_size
