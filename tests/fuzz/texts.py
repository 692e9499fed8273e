"""Tokenizers, templates, messages and prompts: what is spoiled, words that try to be tokens."""

import json
import random
import shutil
from pathlib import Path

import numpy as np

from mlx_vlm_edge.text.chat_template import render_chat_template
from mlx_vlm_edge.text.messages import normalize
from mlx_vlm_edge.text.tokenizer import Tokenizer

from .harness import Attempt
from .mutate import odd, spoiled, written

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = (
    "", "What is this?", "  two  spaces\n", "naïve 日本 🙂", "</s><s>[INST]", "a" * 300,
    "\x00\ud7ff",
)  # fmt: skip


def prepare_tokenizers(folder: Path) -> Attempt:
    sources = [GOLDEN / name for name in ("eve_tiny", "mobilevlm_v1", "moe_llava_phi", "tiktoken")]

    def attempt(rng: random.Random) -> None:
        for path in folder.iterdir():
            path.unlink()
        source = rng.choice(sources)
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                     "special_tokens_map.json", "vocab.json", "merges.txt",
                     rng.choice(["qwen.tiktoken", "arcade100k.tiktoken"])):  # fmt: skip
            if (source / name).is_file():
                shutil.copy(source / name, folder)
        if rng.random() < 0.3:
            (folder / "added_tokens.json").write_text('{"<a>": 512, "<|b|>": 513}')
        path = rng.choice(sorted(folder.iterdir()))
        if path.suffix == ".json" and rng.random() < 0.85:
            text = written(odd(json.loads(path.read_text()), rng))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(spoiled(path.read_bytes(), rng))
        tokenizer = Tokenizer.from_folder(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert all(isinstance(number, int) and number >= 0 for number in ids)
            assert isinstance(tokenizer.decode(ids), str)

    return attempt


PIECES = (
    "{{ ", " }}", "{% ", " %}", "{%- ", "for m in messages", "endfor", "if ", "endif", "else",
    "messages", "m", "m.content", "m['role']", "loop.index", "[0]", "[-1]", ".x", "|tojson",
    "|trim", "|length", "|join(', ')", "|upper", " + ", " * 9", " * 99999999", " ** 9999",
    "range(9)", "range(99999999)", "set x = 1", "set ns = namespace(a=1)", "ns.a",
    "raise_exception('no')", "strftime_now('%Y')", "bos_token", "''", "'a'", "1", "/ 0",
    "''.__class__", ".__mro__[1]", ".__subclasses__()", "cycler.__init__.__globals__", "self",
    "include 'x'", "import 'x' as y", "macro f(a)", "endmacro", "f(1)", "{# ", " #}", "~",
    "is defined", "not ", "and ", "(", ")", "\n", "generation", "endgeneration", "break",
    "filter upper", "endfilter", "lipsum(9)", "'%s' % m", "'{0.__class__}'.format(m)",
    "dict(a=1)", "|map(attribute='x')|list", "|batch(2)", "|int",
)  # fmt: skip
SOUND = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare_templates(_: Path) -> Attempt:
    def attempt(rng: random.Random) -> None:
        template = SOUND
        if rng.random() < 0.5:
            template = spoiled(SOUND.encode(), rng).decode("utf-8", "replace")
        else:
            template = "".join(rng.choices(PIECES, k=rng.randint(1, 25)))
        messages = [{"role": "user", "content": rng.choice(TEXTS)}]
        text = render_chat_template(
            template, messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        assert isinstance(text, str)
        assert "subclasses" not in text or "subclasses" in template

    return attempt


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
     "images": ["b"]},
]  # fmt: skip


def prepare_messages(_: Path) -> Attempt:
    """Chats with something odd in them: no picture is lost, and none has two places."""

    def attempt(rng: random.Random) -> None:
        messages, images = normalize(odd(CHAT, rng), ["c"] * rng.randint(0, 2))
        parts = [part for message in messages for part in message["content"]]
        assert sum(part["type"] != "text" for part in parts) == len(images)

    return attempt


WORDS = (
    "<image>", "<im", "age>", "<|im_start|>", "<|im_", "start|>", "<|im_end|>", "</s>", "<s>",
    "<", "|", ">", "</", "s>", "USER:", "ASSISTANT:", " ", "  ", "\n", "\x00", "\x1b[0m", "é",
    "日", "🙂", "a", "What is this?", "<unk>", "<|endoftext|>", "<|end", "oftext|>", "\ufffc",
    "\u200b", "<pad>", "<0x0A>", "[INST]", "\u2581", "<end_of_utterance>",
    "<fake_token_around_image>", "<row_1_col_1>",
)  # fmt: skip


def prepare_prompts(_: Path) -> Attempt:
    """What a user writes stays text: the special tokens of a prompt are those of a plain one."""
    from mlx_vlm_edge.loading.load import load

    processors = [
        load(name)[1] for name in ("demo", str(GOLDEN / "eve_tiny"), str(GOLDEN / "mobilevlm_v1"))
    ]
    picture = np.zeros((32, 32, 3), np.uint8)

    def specials(processor: object, prompt: object, images: list[object]) -> list[int]:
        inputs = processor(prompt, images=images)  # type: ignore[operator]
        ids = np.delete(inputs.input_ids[0], inputs.visual)
        tokenizer = processor.tokenizer  # type: ignore[attr-defined]
        known = {n for n, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
        return [int(number) for number in ids if int(number) in known]

    def attempt(rng: random.Random) -> None:
        processor = rng.choice(processors)
        parts = [
            {"type": "text", "text": "".join(rng.choices(WORDS, k=rng.randint(1, 8)))}
            for _ in range(rng.randint(1, 3))
        ]
        plain = [{"type": "text", "text": "x"} for _ in parts]
        images: list[object] = [picture] * rng.randint(0, 1)
        if images:
            at = rng.randint(0, len(parts))
            parts.insert(at, {"type": "image"})
            plain.insert(at, {"type": "image"})
        said = [{"role": "user", "content": parts}]
        got = specials(processor, said, images)
        want = specials(processor, [{"role": "user", "content": plain}], images)
        assert got == want, f"special tokens {got} where a plain prompt has {want}: {parts!a}"

    return attempt
