"""A published model, tried on this machine -> a report that its owner can paste: no paths in it.

No checkpoint of a published model was ever run by this project: such reports are how one will be.
"""

import getpass
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten

from ..checkpoint.config import read_config
from ..errors import UsageError
from ..generation.loop import generate
from ..hub.cache import cache_folder
from ..hub.verify import changed, damages, known_files
from ..loading import memory
from ..loading.cost import native
from ..loading.load import load
from ..paths import expand
from .selftest import PICTURES

if TYPE_CHECKING:
    from ..models.base import VisionLanguageModel

QUESTIONS = {
    "hello.png": "What does the text in the image say?",
    "shapes.png": "How many circles are in the image, and of what color?",
    "position.png": "Describe this image in one sentence.",
}
TOKENS = 64  # of an answer, at most


def report(name: str, folder: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Files, keys, answers and times of a model that is here; "problems" is empty when all is well.

    A problem ends what comes after it: what is not whole is not loaded.
    """
    files = known_files(folder)
    problems = [*changed(folder, files), *damages(folder, as_published=bool(files))]
    told: dict[str, Any] = {
        "model": name,
        "commit": folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None,
        "files held to the Hub's hashes": len(files),
        "machine": dict(machine),
        "problems": problems,
    }
    if not problems:
        try:
            told |= _run(name, folder)
        except UsageError as error:
            problems.append(str(error))
    cleaned: dict[str, Any] = without_paths(told)
    return cleaned


def _run(name: str, folder: Path) -> dict[str, Any]:
    """Load a model, every weight of it used, and ask it three questions; a first one warms up."""
    needed = memory.needed(native(read_config(folder)))
    memory.fit(name, needed, memory.usable())
    model, processor = load(str(folder))
    pictures = {picture: PICTURES / picture for picture in QUESTIONS}
    generate(model, processor, "?", images=[next(iter(pictures.values()))], max_tokens=1)
    answers = []
    for picture, question in QUESTIONS.items():
        result = generate(
            model, processor, question, images=[pictures[picture]], max_tokens=TOKENS, full=True
        )
        answers.append(
            {
                "picture": picture,
                "question": question,
                "answer": result.text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
                "visual_tokens": result.visual_tokens,
                "ttft_e2e": round(result.ttft_e2e, 4),
                "generation_tps": round(result.generation_tps, 2),
                "peak_memory": round(result.peak_memory, 3),
            }
        )
    estimate = needed.memory(needed.prompt_tokens + memory.ANSWER)
    return {**keys(model), "estimated_memory": estimate, "answers": answers}


def keys(model: "VisionLanguageModel") -> dict[str, Any]:
    """How many weights the loaded model has, all of them filled, and a hash of names and shapes."""
    named = sorted(f"{name} {array.shape}" for name, array in tree_flatten(model.parameters()))
    whole = hashlib.sha256("\n".join(named).encode()).hexdigest()
    return {"weights": len(named), "weights_sha256": whole}


def without_paths(value: Any) -> Any:
    """A report's texts without this user's folders, name and machine."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return _without_paths(value) if isinstance(value, str) else value


def _without_paths(text: str) -> str:
    personal = {str(cache_folder()): "HUB", str(expand("~")): "~", os.getcwd(): "."}
    for path, short in sorted(personal.items(), key=lambda item: -len(item[0])):
        text = text.replace(path, short) if len(path) > 1 else text
    for word in {_user(), platform.node()} - {"", "root", "localhost"}:
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "...", text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # of a process without a name
        return ""
