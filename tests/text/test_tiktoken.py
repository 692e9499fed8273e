"""tiktoken files: ids of the tiktoken library on tiny rank files, special tokens, damage."""

import base64
import json
import shutil
import unicodedata

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text import saved_tokenizer, tiktoken
from mlx_vlm_edge.text.tokenizer import Tokenizer

NAMES = ("qwen", "arcade100k")


@pytest.fixture(params=NAMES)
def case(request, golden, tmp_path):
    """A folder with one tiktoken file, and what the library makes of some texts."""
    source = golden.parent / "tiktoken"
    shutil.copy(source / f"{request.param}.tiktoken", tmp_path)
    return tmp_path, json.loads((source / f"{request.param}.json").read_text())


def test_ids_are_the_librarys(case):
    folder, expected = case
    tokenizer = Tokenizer.from_folder(folder)
    for text in expected["cases"]:
        ids = tokenizer.encode(text["text"], special=True)
        assert ids == text["ids"], text["text"]
        assert tokenizer.decode(ids, skip_special=False) == unicodedata.normalize(
            "NFC", text["text"]
        )


def test_special_tokens_have_the_published_ids(case):
    folder, expected = case
    tokenizer = Tokenizer.from_folder(folder)
    first = expected["first_special_id"]
    published = {token: first + place for place, token in enumerate(expected["special_tokens"])}
    assert tokenizer.special == published
    assert expected["pattern"] == tiktoken.PATTERN


def test_what_a_user_types_is_no_special_token(case):
    folder, _ = case
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("<|endoftext|>")
    assert max(ids) < 1000
    assert tokenizer.decode(ids) == "<|endoftext|>"


def test_tokenizer_json_is_written_with_the_same_ids_and_no_bos(case, tmp_path):
    folder, expected = case
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    target = tmp_path / "written"
    target.mkdir()
    assert saved_tokenizer.write_json(folder, target)
    tokenizer = Tokenizer.from_folder(target)
    for text in expected["cases"]:
        assert tokenizer.encode(text["text"], special=True) == text["ids"]
        assert tokenizer.backend.encode(text["text"]).ids == text["ids"]


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTES = b"".join(line(bytes([byte]), byte) for byte in range(256))


def test_the_lowest_rank_is_merged_first(tmp_path):
    """And of pairs that make one token every one counts: abc is ab + c, and a + bc."""
    ranks = BYTES + line(b"bc", 256) + line(b"ab", 257) + line(b"abc", 258)
    (tmp_path / "qwen.tiktoken").write_bytes(ranks)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("abcx") == [258, ord("x")]
    assert tokenizer.encode("xabx") == [ord("x"), 257, ord("x")]
    pairs = list(tiktoken.merges(tiktoken.ranks(ranks)))
    assert pairs == [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"a", b"bc")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not base64 at all\n",
        BYTES[:-8],
        BYTES + line(b"ab", 5),
        BYTES + b"YWI= x\n",
        BYTES + b"YWI=\n",
        BYTES + line(b"ab", 151643),
        BYTES + line(b"a" * 2000, 256),
        b"\xff" * 64,
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(UsageError, match=r"qwen\.tiktoken: is damaged.*fetch it again") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
