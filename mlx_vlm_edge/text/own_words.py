"""Whether a folder's chat template writes what its family does: a fine-tuned model has words of its
own, and is asked in these.

One question with a picture is written by both and compared without white space. What a base model's
tokenizer brings along is no fine-tune's, nor is a template that writes no picture.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..wording import printable, say_once
from .messages import Message
from .prompt import MARKER, chatml

if TYPE_CHECKING:
    from .prompt import Processor

ASKED: list[Message] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
]
# System turns that Qwen 1.5, 2 and 2.5 begin with by themselves.
QWENS = (
    "You are a helpful assistant",
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
# Published templates, which need not be run to be known: running one costs the import of Jinja.
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def has_own_words(
    processor: "Processor", family: Iterable[str], published: Collection[str] = (), mark: str = ""
) -> bool:
    """Whether the folder's chat template is to be used in the family's place.

    family: the forms in which that may write ASKED. published: templates known to write one. mark:
    words that are in any template for the family's language model; another's is always used, one
    with them only where it writes a place for the picture.
    """
    template = processor.tokenizer.chat_template
    if not template:
        return False
    bos = processor.tokenizer.named.get("bos_token", "")
    if _bare(template, bos) in {_bare(known, bos) for known in published}:
        return False
    try:
        written = processor.by_template(ASKED)
        wrong = "" if written.count(MARKER) == 1 else "it does not write one place for a picture"
    except UsageError as error:
        written, wrong = "", str(error)
    if wrong and mark in template:
        note = f"the model's chat template is not used, but its family's prompt: {wrong}"
        say_once(printable(note, lines=False))
        return False
    return _bare(written, bos) not in {_bare(form, bos) for form in family}


def chatml_forms() -> list[str]:
    """ASKED as ChatML, with each of the system turns that Qwen's own tokenizers write."""
    return [chatml(ASKED, system) for system in QWENS]


def _bare(text: str, bos: str) -> str:
    return "".join(text.removeprefix(bos).split())
