"""What hands type that know other tools: a wrong verb or flag -> the right one, in one line."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError

# ollama's, mlx-lm's and mlx-vlm's verbs -> what does the same here.
VERBS = {
    "run": "chat --model NAME",
    "pull": "models pull NAME",
    "list": "models list",
    "ls": "models list",
    "rm": "models rm NAME",
    "show": "models show NAME",
    "verify": "models verify NAME",
    "quantize": "convert NAME --bits 4 -o DIR",
    "chat_ui": "serve",
    "server": "serve",
}
# Flags of mlx-vlm, mlx-lm and llama.cpp -> ours, where a verb has that one.
FLAGS = {
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--ctx-size": "--max-kv-size",
    "--extra-eos-token": "--eos-tokens",
    "--quantize": "--bits",
    "--q-bits": "--bits",
    "--model-path": "--model",
    "--image-size": "--resolution",
}
NUMBERS = r"\d+(x\d+)?(,\d+(x\d+)?)*"  # of one flag
NEEDLESS = {
    "--trust-remote-code": "leave it out: no code of a checkpoint is ever run",
    "--force-download": "`mlx-vlm-edge models pull NAME` mends a download",
    "--chat": "the verb is chat",
}


def no_verb(program: str, verb: str, known: Iterable[str]) -> UsageError:
    """What to say of a verb that there is none of."""
    if verb in VERBS:
        return UsageError(f"no verb {verb!r}: it is `{program} {VERBS[verb]}`")
    names = list(known)
    if near := _nearest(verb, [*names, *VERBS]):
        meant = VERBS.get(near, near)
        return UsageError(f"no verb {verb!r}; did you mean `{program} {meant}`?")
    return UsageError(f"no verb {verb!r}; the verbs are {', '.join(names)}")


def check_flags(arguments: Sequence[str], known: Iterable[str]) -> None:
    """Raises UsageError for the first flag that is not known, with what was meant where it shows.

    check_flags(["--promt", "Why?"], ["--prompt"]) raises "... did you mean --prompt?"
    """
    flags = [flag for flag in known if flag.startswith("--")]
    for argument in arguments:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if not flag.startswith("--") or flag in flags or " " in argument:
            continue
        raise UsageError(f"unrecognized arguments: {flag}{_meant(flag, flags)}")


def joined(arguments: Sequence[str], several: Iterable[str]) -> list[str]:
    """The numbers or sizes behind a flag that takes several, as one word.

    joined(["--context", "1024", "4096", "x"], ["--context"]) is ["--context", "1024,4096", "x"].
    """
    flags, words = {*several}, list[str]()
    for argument in arguments:
        follows = len(words) > 1 and words[-2] in flags and re.fullmatch(NUMBERS, words[-1])
        if follows and re.fullmatch(NUMBERS, argument):
            words[-1] += f",{argument}"
        else:
            words.append(argument)
    return words


def _meant(flag: str, known: Sequence[str]) -> str:
    if flag in NEEDLESS:
        return f"; {NEEDLESS[flag]}"
    if FLAGS.get(flag) in known:
        return f"; it is {FLAGS[flag]}"
    near = _nearest(flag, known)
    return f"; did you mean {near}?" if near else ""


def _nearest(word: str, known: Sequence[str]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


class ResizeShape(argparse.Action):
    """mlx-vlm's --resize-shape as --resolution, where both are one side of a square."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(set(values)) > 1 or len(values) > 2:
            raise UsageError(
                f"{option_string} {' '.join(map(str, values))}: pictures are not distorted here; "
                f"give the one side of --resolution, such as {max(values)}"
            )
        if namespace.resolution not in (None, values[0]):
            raise UsageError(f"{option_string} is --resolution: leave one of them out")
        namespace.resolution = values[0]
        print(f"note: {option_string} is --resolution {values[0]} here", file=sys.stderr)
