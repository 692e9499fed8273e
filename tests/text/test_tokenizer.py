"""Encoding, guarded text and streaming decoding against whole decoding, on tokenizers made here."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text.chat_template import render_chat_template
from mlx_vlm_edge.text.guard import GUARD
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..reference import tokenizer as tiny
from ..reference import torchvision_shim

TEXTS = [
    "What are these?",
    "  two  spaces\n\n\nlines ",
    "naïve café — 東京 🙂👩‍👩‍👧",
    "",
    "\n",
    "it's 1234 + é\u0301",
]


@pytest.fixture(scope="module")
def byte_level():
    backend = tiny.build()
    backend.add_tokens(["hé llo"])  # an added token that is not special
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama's kind: "▁" for the space, byte tokens for what is not in the vocabulary."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += ["▁", *"abehilmnost.,", "é", "▁t", "▁th", "he", "▁a"]
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e"), ("▁", "a")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(vocab)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend)


# Streaming


def stream(tokenizer, ids, skip_special=True):
    detokenizer = tokenizer.detokenizer(skip_special)
    pieces = [detokenizer.add(token) for token in ids]
    return [*pieces, detokenizer.finish()]


# Ids of any token, and beyond; of parts of characters more often than chance has them.
IDS = st.lists(
    st.one_of(
        st.integers(0, 310), st.sampled_from(["🙂", "東", "é", "\n", "�", "the"]), st.just("  ")
    ),
    max_size=16,
)


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=300, deadline=None)
@given(parts=IDS)
def test_pieces_join_to_the_whole_decode(kind, skip_special, request, parts):
    tokenizer = request.getfixturevalue(kind)
    ids = [
        token
        for part in parts
        for token in ([part] if isinstance(part, int) else tokenizer.encode(part))
    ]
    pieces = stream(tokenizer, ids, skip_special)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_text_streams_in_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "the naïve 🙂 in 東京 — the\ufffdtea 👩‍👩‍👧, at last"
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == 1  # the one in the text
    assert sum(bool(piece) for piece in pieces) > 15  # it did stream
    emoji = [piece for piece in pieces if "🙂" in piece]
    assert len(emoji) == 1


def test_half_a_character_is_held_and_flushed(byte_level):
    first, *rest = byte_level.encode("🙂")
    assert stream(byte_level, [first, *rest[:-1]]) == ["", "", "", "\ufffd"]
    assert stream(byte_level, [first, *rest]) == ["", "", "", "🙂", ""]
    broken = stream(byte_level, [first, *byte_level.encode("a")])
    assert broken == ["", "\ufffda", ""]
    assert stream(byte_level, [first, tiny.STOP, *rest]) == ["", "", "", "", "🙂", ""]


def test_long_broken_streams_stay_fast(byte_level, sentencepiece):
    import time

    started = time.perf_counter()
    stream(byte_level, [byte_level.encode("🙂")[0]] * 20_000)
    stream(sentencepiece, [sentencepiece.token_id("<0xFF>")] * 20_000)
    stream(sentencepiece, sentencepiece.encode("the ") * 5_000)
    assert time.perf_counter() - started < 3


# Encoding


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text
    assert byte_level.encode(text) == byte_level.encode(text, special=True)


def test_special_tokens_count_only_when_asked_for(byte_level):
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = byte_level.encode(text, special=True)
    assert ids[0] == tiny.TURN
    assert ids[-1] == tiny.STOP
    plain = byte_level.encode(text)
    assert not {tiny.TURN, tiny.STOP} & set(plain)
    assert byte_level.decode(plain) == text
    assert byte_level.decode(ids) == "user\nhi"
    assert byte_level.decode(ids, skip_special=False) == text
    assert byte_level.encode(text, special=True) == ids  # the plain call left no trace


def test_guarded_words_are_plain_text_beside_real_special_tokens(byte_level):
    typed = f"a<|im_end|>b<image><|im_start|>{GUARD}<|im"
    text = f"<|im_start|>{byte_level.guard(typed)}<|im_end|>"
    ids = byte_level.encode(text, special=True)
    assert ids[0] == tiny.TURN
    assert ids[-1] == tiny.STOP
    assert ids[1:-1] == byte_level.encode(typed)
    assert "<image>" not in byte_level.guard("<image>")
    assert "MARK" not in byte_level.guard("a MARK", "MARK")
    with_guard = "<|im_start|>user\nhello  there\n" + byte_level.guard("<|im_end|> bye")
    expected = [tiny.TURN, *byte_level.encode("user\nhello  there\n<|im_end|> bye")]
    assert byte_level.encode(with_guard, special=True) == expected


def test_ids(byte_level):
    assert byte_level.token_id("<|im_end|>") == tiny.STOP
    assert byte_level.token_id("no such token") is None
    assert byte_level.vocab_size == 302
    assert byte_level.special["<image>"] == tiny.IMAGE


def test_threads_do_not_mix_plain_and_special(byte_level):
    from concurrent.futures import ThreadPoolExecutor

    def lengths(special):
        return {len(byte_level.encode("<|im_end|>", special=special)) for _ in range(300)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lengths, [True, False] * 4)) == [{1}, {9}] * 4


# Files


def test_from_folder_reads_tokenizer_json_and_its_settings(tmp_path):
    backend = tiny.save(tmp_path)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("quite a long text")) > 5
    assert tokenizer.eos_ids == {tiny.STOP}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_start|>"}}')
    assert Tokenizer.from_folder(tmp_path).eos_ids == {tiny.TURN}
    assert tokenizer.chat_template is None


def test_tokens_named_only_in_the_config_are_added(tmp_path):
    """Apple's app export has <image> in tokenizer_config.json's added_tokens_decoder alone."""
    tiny.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {
        "298": {"content": "<|im_start|>", "special": True},
        "301": {"content": "<extra>", "special": True},
    }
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<extra>", special=True) == [301]
    config["added_tokens_decoder"] = {"400": {"content": "<far>", "special": True}}
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="<far>"):
        Tokenizer.from_folder(tmp_path)


@pytest.fixture
def qwen2_files(tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json, without tokenizer.json."""
    backend = tiny.build()
    backend.model.save(str(tmp_path))
    added = {
        str(297 + index): {"content": content, "special": True, "lstrip": False, "rstrip": False,
                           "normalized": False, "single_word": False}
        for index, content in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_vocab_and_merges_make_transformers_tokenizer(qwen2_files):
    torchvision_shim.install()
    from transformers import Qwen2Tokenizer

    ours = Tokenizer.from_folder(qwen2_files)
    theirs = Qwen2Tokenizer.from_pretrained(qwen2_files)
    chat = "<|im_start|>user\nWhat's in\n\n the\tpicture?  12345<|im_end|>\n"
    for text in [*TEXTS, chat]:
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_ids == {299}


def test_folders_that_have_no_usable_tokenizer(qwen2_files, tmp_path_factory):
    def refuse(folder, match):
        with pytest.raises(UsageError, match=match) as caught:
            Tokenizer.from_folder(folder)
        assert "\n" not in str(caught.value)

    empty = tmp_path_factory.mktemp("empty")
    refuse(empty, r"tokenizer\.json")
    (empty / "tokenizer.json").write_text("{")
    refuse(empty, "damaged")
    (empty / "tokenizer_config.json").write_text("[1]")
    refuse(empty, "not a JSON object")
    (qwen2_files / "merges.txt").write_text("not merges")
    refuse(qwen2_files, "damaged")
    (qwen2_files / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    refuse(qwen2_files, "GPT2Tokenizer")


# Chat templates


def test_chat_templates_come_from_any_of_their_places(tmp_path):
    tiny.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert Tokenizer.from_folder(tmp_path).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(tmp_path).chat_template == "F"


IDEFICS3 = (
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_render_chat_template():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    rendered = render_chat_template(IDEFICS3, messages, add_generation_prompt=True)
    assert rendered == "User:<image>Hi<end_of_utterance>\nAssistant:"
    assert render_chat_template("{{ x | tojson }}", [], x={"é": "<b>"}) == '{"é": "<b>"}'
    year = render_chat_template("{{ strftime_now('%Y') }}", [])
    assert year.isdigit()
    loop = "{% for m in messages %}{% if m.role == 'b' %}{% break %}{% endif %}{{ m.role }}"
    loop += "{% endfor %}"
    assert render_chat_template(loop, [{"role": role} for role in "abc"]) == "a"


def test_templates_that_refuse_or_break_or_try_to_escape():
    for template, match in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "chat template"),
    ):
        with pytest.raises(UsageError, match=match):
            render_chat_template(template, [])
