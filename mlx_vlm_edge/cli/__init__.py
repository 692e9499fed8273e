"""The command line: `mlx-vlm-edge VERB ...`, a verb's module imported when it is asked for.

stdout carries answers and nothing else; notes, progress and errors go to stderr. A mistake of the
user's is one line and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__, blas
from ..errors import UsageError
from ..wording import printable
from . import habits, streams

PROGRAM = "mlx-vlm-edge"
BROKEN_PIPE = 141  # exit code
WIDE = 90  # columns from which flags have a wider margin
VERBS = {
    "generate": "answer a question about images",
    "chat": "talk with a model about images",
    "serve": "serve a model over HTTP, with a page to try it on",
    "batch": "ask the same questions about many pictures",
    "estimate": "what a model would take on a chip, without running it",
    "models": "list, pull, show, verify and remove models",
    "bench": "measure time to first token, and the paper's claims",
    "convert": "convert a checkpoint to the MLX layout, optionally quantised",
    "export": "export a model to Core ML packages for an app",
    "doctor": "check this machine, its arithmetic, or a published model",
    "completion": "print what bash, zsh or fish needs to complete",
}


class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, up to 100, with the default where there is one."""

    def __init__(self, prog: str) -> None:
        from shutil import get_terminal_size  # which brings decompressors along

        width = min(100, get_terminal_size().columns)
        super().__init__(prog, max_help_position=36 if width > WIDE else 28, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default in (None, False, []) or "default" in (action.help or "")
        return (action.help or "") + (
            "" if told or action.nargs == 0 else " (default: %(default)s)"
        )


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The same, a flag that is not known told before what is missing."""
        arguments: Sequence[str] = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # whose own parsers see what follows their name
            try:
                habits.check_flags(arguments, self._option_string_actions)
                arguments = habits.joined(arguments, self._several())
            except UsageError as error:
                self.error(str(error))
        return super().parse_known_args(arguments, namespace)

    def _several(self) -> set[str]:
        """The flags that take several numbers, which their metavar shows."""
        actions = self._option_string_actions.items()
        return {flag for flag, action in actions if str(action.metavar).endswith(",...")}

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _help() -> str:
    verbs = "\n".join(f"  {name:10} {text}" for name, text in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB [options]\n\n"
        "Run vision-language models on Apple silicon.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"  {PROGRAM} VERB --help   the options of a verb\n"
        f"  {PROGRAM} --version     {__version__}\n\n"
        f'example: {PROGRAM} generate --image photo.jpg --prompt "What is this?"'
    )


def _dispatch(arguments: list[str]) -> int:
    if sys.stdout is None:
        raise UsageError("standard output is closed: there is nowhere to write the answer")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if verb not in VERBS:
        raise habits.no_verb(PROGRAM, verb, VERBS)
    blas.check()
    module = import_module(f".{verb}", __name__)
    parser = Parser(prog=f"{PROGRAM} {verb}", description=module.HELP)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(rest)))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with streams.safe():
        code = _coded(sys.argv[1:] if arguments is None else arguments)
    if code == BROKEN_PIPE and sys.stderr is not None:
        sys.stderr.close()  # or Python reports the lost end of our stdout there
    return code


def _coded(arguments: list[str]) -> int:
    """`_dispatch`, whatever goes wrong in it turned into one line and an exit code."""
    try:
        return _dispatch(arguments)
    except UsageError as error:
        print(f"{PROGRAM}: error: {printable(str(error), lines=False)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return streams.INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away
        return BROKEN_PIPE
    except OSError as error:  # a full disk under stdout, say; files of the user's are UsageErrors
        print(f"{PROGRAM}: error: {error.strerror or error}", file=sys.stderr)
        return 2
