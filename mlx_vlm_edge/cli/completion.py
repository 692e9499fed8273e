"""`mlx-vlm-edge completion bash | zsh | fish`: what a shell needs to complete verbs and flags."""

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

HELP = (
    "Print a shell's completion. bash: source <(mlx-vlm-edge completion bash); zsh: the same after "
    "compinit; fish: mlx-vlm-edge completion fish | source."
)
NAMED = ("--model", "-m", "source", "model", "name")  # arguments that are a model's name
BASH = """_mlx_vlm_edge() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{verbs}"
  else
    case "${{COMP_WORDS[1]}} $prev" in
{values}
      *) case "$cur" in -*) case "${{COMP_WORDS[1]}}" in
{flags}
      esac ;; esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o bashdefault -o default -F _mlx_vlm_edge mlx-vlm-edge"""
ZSH = "autoload -U +X bashcompinit && bashcompinit"


class Verb(NamedTuple):
    """flags: each with its help. values: words that may follow a flag, or the verb itself."""

    name: str
    help: str
    flags: dict[str, str]
    values: dict[str, list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    verbs = list(_verbs())
    print("\n".join(_fish(verbs)) if args.shell == "fish" else _bash(verbs, args.shell == "zsh"))
    return 0


def _verbs() -> Iterator[Verb]:
    from . import VERBS, Parser

    for name, text in VERBS.items():
        parser = Parser(prog=name)
        import_module(f".{name}", __package__).add_arguments(parser)
        verb = Verb(name, text, {}, {})
        _collect(parser, name, verb)
        yield verb


def _collect(parser: argparse.ArgumentParser, before: str, verb: Verb) -> None:
    """A parser's flags and values, and those of its own verbs."""
    from ..hub.models import ALIASES, DEMO

    for action in parser._actions:
        words = [] if action.choices is None else [str(choice) for choice in action.choices]
        if action.dest in NAMED or set(action.option_strings) & set(NAMED):
            words = [*ALIASES, DEMO]
        if action.help is not argparse.SUPPRESS:
            verb.flags.update((flag, action.help or "") for flag in action.option_strings)
        for flag in action.option_strings or [before]:
            if words:
                verb.values[flag] = words
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                _collect(below, name, verb)


def _bash(verbs: list[Verb], zsh: bool) -> str:
    values = [
        f'      "{verb.name} {before}") words="{" ".join(words)}" ;;'
        for verb in verbs
        for before, words in verb.values.items()
    ]
    flags = [f'        {verb.name}) words="{" ".join(verb.flags)}" ;;' for verb in verbs]
    script = BASH.format(
        verbs=" ".join(verb.name for verb in verbs), values="\n".join(values),
        flags="\n".join(flags),
    )  # fmt: skip
    return f"{ZSH}\n{script}" if zsh else script


def _fish(verbs: list[Verb]) -> Iterator[str]:
    start = "complete -c mlx-vlm-edge"
    for verb in verbs:
        yield f"{start} -n __fish_use_subcommand -f -a {verb.name} -d {_quoted(verb.help)}"
        after = f"{start} -n '__fish_seen_subcommand_from {verb.name}'"
        for flag, text in verb.flags.items():
            kind = "-l" if flag.startswith("--") else "-s"
            words = verb.values.get(flag)
            value = f" -r -a {_quoted(' '.join(words))}" if words else ""
            yield f"{after} {kind} {flag.lstrip('-')}{value} -d {_quoted(text.replace('%%', '%'))}"
        if verb.name in verb.values:
            yield f"{after} -a {_quoted(' '.join(verb.values[verb.name]))}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
