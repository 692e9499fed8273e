"""Chat templates of model folders: published ones change no prompt, a fine-tune's own is used."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

import mlx_vlm_edge
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.models import fastvlm, idefics3, llava, llava_onevision
from mlx_vlm_edge.text.prompt import Processor
from mlx_vlm_edge.text.tokenizer import Tokenizer
from mlx_vlm_edge.wording import say_once

DEMO = Path(mlx_vlm_edge.__file__).parent / "demo"
DEMOS = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]
IMAGES = (
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>IMG' }}"
    "{% endfor %}"
)
TEXTS = (
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ 'BEFORE' + "
    "c['text'] + 'AFTER' }}{% endfor %}"
)


def parts(image="", before="", after=""):
    """A message's parts as transformers' conversions write them: pictures first."""
    texts = TEXTS.replace("BEFORE", before).replace("AFTER", after)
    return IMAGES.replace("IMG", image) + texts


def qwen(system, open_turn=r"\n", close=r" + '\n'", body=None):
    begins = (
        r"{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        + system
        + r"<|im_end|>\n' }}{% endif %}"
    )
    return (
        "{% for message in messages %}"
        + (begins if system else "")
        + "{{'<|im_start|>' + message['role'] + '"
        + open_turn
        + "'}}"
        + (body or "{{ message['content'] }}")
        + "{{'<|im_end|>'"
        + close
        + r"}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


HELPFUL = "You are a helpful assistant."
FAST_VLM = qwen(HELPFUL, body=parts(before=r"\n"))  # transformers' conversion
QWENS = [
    DEMOS, qwen(HELPFUL), qwen("You are a helpful assistant"),
    qwen(f"You are Qwen, created by Alibaba Cloud. {HELPFUL}"),
]  # fmt: skip
ONEVISION = [
    qwen("", body=parts(image=r"\n")),
    qwen("", open_turn=" ", close="", body=parts(before=r"\n")),
]
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    + parts(image=r"\n", after=" ")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (
    "{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]"
    "['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] "
    "%}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}"
    "{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IMPORTED = IDEFICS.replace("message['role'] | capitalize", "message['role'].capitalize()")
FRENCH = "Answer in French."
CASES = {
    "fastvlm": (fastvlm, "fastvlm-0.5b", [*QWENS, FAST_VLM], qwen(FRENCH)),
    "onevision": (llava_onevision, "llava-onevision-0.5b", [*QWENS, *ONEVISION], qwen(FRENCH)),
    "llava": (llava, "llava-1.5-7b", [VICUNA], "{{ 'Answer in French. ' }}" + VICUNA),
    "idefics3": (
        idefics3, "smolvlm2-500m", [IDEFICS, "<|im_start|>" + IDEFICS, IMPORTED],
        "<|im_start|>System: Answer in French.<end_of_utterance>\n" + IDEFICS,
    ),
}  # fmt: skip
WORDS, IMAGE = {"type": "text", "text": "What?"}, {"type": "image"}
CHATS = [
    [{"role": "user", "content": [IMAGE, WORDS]}],
    [{"role": "user", "content": [WORDS]}],
    [
        {"role": "user", "content": [IMAGE, WORDS]},
        {"role": "assistant", "content": [WORDS]},
        {"role": "user", "content": [WORDS]},
    ],
]


def processor(family, template):
    module, alias, _, _ = CASES[family]
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.add_special_tokens(["<image>", "<fake_token_around_image>", "<end_of_utterance>"])
    named = {"bos_token": "<|im_start|>"} if family == "idefics3" else {}
    tokenizer = Tokenizer(backend, {**named, "chat_template": template})
    return module.Processor(module.Config.from_dict(configs.read(alias)), tokenizer)


@pytest.mark.parametrize("family", CASES)
def test_published_templates_change_no_prompt(family):
    bare = processor(family, None)
    for template in CASES[family][2]:
        got = processor(family, template)
        assert [got.render(chat) for chat in CHATS] == [bare.render(chat) for chat in CHATS]


@pytest.mark.parametrize("family", CASES)
def test_a_fine_tunes_own_words_are_used(family):
    """They were read and passed over: FastVLM's and OneVision's all, LLaVA's and Idefics3's where
    they had a word of the family's."""
    got = processor(family, CASES[family][3])
    for chat in CHATS:
        assert FRENCH in got.render(chat)
        assert got.render(chat) == got.by_template(chat)
    assert HELPFUL not in got.render(CHATS[0])


@pytest.mark.parametrize(
    ("family", "template"),
    [("fastvlm", DEMOS), ("onevision", DEMOS), ("idefics3", "<|im_start|>" + IDEFICS)],
)
def test_the_usual_templates_are_known_without_jinja(family, template, monkeypatch):
    monkeypatch.delattr(Processor, "by_template")
    assert not processor(family, template).own_words


NO_PICTURE = {
    "text alone": qwen("", body="{% for c in message['content'] %}{{ c['text'] }}{% endfor %}"),
    "Qwen2-VL's": qwen(HELPFUL, body=parts().replace("<image>", "<|vision_start|><|image_pad|>")),
    "raises": "{{ raise_exception('no pictures') }}",
    "broken": "{% for message in messages %}",
}


@pytest.mark.parametrize("template", NO_PICTURE.values(), ids=NO_PICTURE)
@pytest.mark.parametrize("family", ["fastvlm", "onevision"])
def test_a_template_without_pictures_is_left_aside_with_a_line(family, template, capsys):
    """It took the place of ChatML, and no question could be asked."""
    say_once.cache_clear()
    bare, got = processor(family, None), processor(family, template)
    assert [got.render(chat) for chat in CHATS] == [bare.render(chat) for chat in CHATS]
    line = capsys.readouterr().err
    assert line.startswith("the model's chat template is not used")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "words"), [("llava", "ASSISTANT:"), ("idefics3", "<end_of_utterance>")]
)
def test_another_language_models_template_is_never_left_aside(family, words):
    assert processor(family, NO_PICTURE["text alone"]).own_words
    assert not processor(family, "{{ raise_exception('no') }}" + words).own_words


def test_no_template_of_eves_is_looked_at(monkeypatch):
    monkeypatch.setattr(llava.Processor, "own_template", False)
    monkeypatch.delattr(llava.Processor, "vicuna")
    assert not processor("llava", VICUNA).own_words
