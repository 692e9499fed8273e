"""The conversation that Vicuna, and the families built on it, were trained on.

"<system> USER: <words> ASSISTANT: <answer></s>USER: <words> ASSISTANT:", after one BOS.
Source: LLaVA and EVE, conversation.py ("vicuna_v1"); lm-sys/FastChat.
"""

import numpy as np

from .. import prompt

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def render(messages: list[prompt.Message], turn_end: str) -> str:
    """The prompt's text up to where the answer begins; `turn_end` closes an assistant's turn."""
    text = SYSTEM
    if messages[0]["role"] == "system":
        text, messages = prompt.join_parts(messages[0]["content"]), messages[1:]
    text = f"{text} "
    for message in messages:
        answer = message["role"] == "assistant"
        words = prompt.join_parts(message["content"])
        text += f"ASSISTANT: {words}{turn_end}" if answer else f"USER: {words} "
    return f"{text}ASSISTANT:"


def with_bos(ids: list[int], visual: np.ndarray, bos: int) -> tuple[list[int], np.ndarray]:
    """Ids and visual positions with BOS in front, unless it is there already or nothing is."""
    if not ids or ids[0] == bos:
        return ids, visual
    return [bos, *ids], visual + 1
