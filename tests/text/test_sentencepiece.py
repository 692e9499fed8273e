"""tokenizer.model -> the ids of the `sentencepiece` package, and of LLaMA's original tokenizer."""

import random

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text import sentencepiece
from mlx_vlm_edge.text.tokenizer import Detokenizer, Tokenizer

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
def pair(request, golden):
    """Our tokenizer and sentencepiece's of the same file."""
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    if request.param == "golden":
        path = golden.parent / GOLDEN / "tokenizer.model"
    else:
        path = request.getfixturevalue("trained")
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
        detokenizer = Detokenizer(ours)
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
