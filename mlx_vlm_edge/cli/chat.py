"""`mlx-vlm-edge chat`: talk with a model about pictures; from a pipe, one answer."""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import streams
from .flags import (
    add_model_group,
    add_picture_arguments,
    add_sampling_arguments,
    sampling_options,
)
from .progress import Shown, shown

if TYPE_CHECKING:
    from ..generation.answer import GenerationResult
    from ..generation.conversation import Conversation

HELP = (
    "Talk with a model about pictures. At a terminal, question after question; piped standard "
    "input is one question."
)
COMMANDS = {
    "/image PATH...": "add pictures to the next question (paths or URLs); - drops those that wait",
    "/clear": "forget the conversation and its pictures",
    "/system [TEXT]": "set the system prompt, or show it; - removes it",
    "/undo": "forget the last question and its answer",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a conversation from a file",
    "/help": "this list",
    "/exit": "leave (also Ctrl-D)",
}
EXTRA = "chat needs prompt_toolkit: pip install prompt_toolkit"
Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--image FILE ...] [--model NAME] [options]"
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="pictures or their URLs for the first question",
    )  # fmt: skip
    group.add_argument(
        "--system", "--system-prompt", dest="system", metavar="TEXT", help="the system prompt"
    )
    group.add_argument("--load", metavar="FILE", help="go on with a saved conversation")
    add_model_group(parser)
    add_picture_arguments(parser.add_argument_group("pictures"))
    add_sampling_arguments(parser.add_argument_group("generation"))


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    terminal = not streams.input_closed() and sys.stdin.isatty()
    ask = _prompter() if terminal else None
    question = None if terminal else _piped()
    images = _checked(args)
    chat = _conversation(args, options)
    session = Session(chat, images, _note)
    if args.load:
        session.command(f"/load {shlex.quote(args.load)}")
    if ask is None:
        session.ask(question or "", decorated=False)
        return 0
    _note(f"{args.model or 'model'} ready; /help lists the commands, Ctrl-D leaves")
    return _talk(session, ask)


def _piped() -> str:
    if streams.input_closed():
        raise UsageError("standard input is closed: there is no question to read")
    text = streams.piped_text().strip()
    if not text:
        raise UsageError("standard input is empty: pipe a question in")
    if text.startswith("/"):
        raise UsageError(
            f"{text.split()[0]} is a command of chat's at a terminal; piped standard input is one "
            "question, and pictures are given with --image"
        )
    return text


def _checked(args: argparse.Namespace) -> list[Any]:
    """The pictures, with all told that can be told before a model is read."""
    if not args.image:
        return []
    from ..picture.check import checked

    return [checked(source, args.offline) for source in args.image]


def _conversation(args: argparse.Namespace, options: dict[str, Any]) -> "Conversation":
    from ..generation.conversation import Conversation
    from .flags import default_model, load_model, prefix_cache

    args.model = args.model or default_model()
    model, processor = load_model(args, args.model)
    return Conversation(
        model, processor, system=args.system, prefix_cache=prefix_cache(args), **options
    )


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prompter() -> Callable[[], str]:
    """Reads a question at the terminal: editing, history, several lines by Alt-Enter or a \\."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ModuleNotFoundError:
        raise UsageError(EXTRA) from None
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    names = [command.split()[0] for command in COMMANDS]
    session: Any = PromptSession(
        "> ", history=InMemoryHistory(), key_bindings=keys,
        completer=WordCompleter(names, sentence=True), complete_while_typing=False,
    )  # fmt: skip

    def ask() -> str:
        lines = [str(session.prompt())]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(str(session.prompt("  ")))
        return "\n".join(lines).strip()

    return ask


def _talk(session: "Session", ask: Callable[[], str]) -> int:
    """Questions and commands until the end of input; Ctrl-C stops an answer or clears the line."""
    while True:
        try:
            text = ask()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            continue
        if text in ("/exit", "/quit"):
            return 0
        try:
            if text.startswith("/"):
                session.command(text)
            elif text:
                session.ask(text)
        except UsageError as error:
            session.say(f"error: {error}")
        except KeyboardInterrupt:  # before an answer has begun
            session.say("stopped")


class Session:
    """A conversation with pictures that wait for the next question. say: prints a note."""

    def __init__(self, chat: "Conversation", images: list[Any], say: Say) -> None:
        self.chat, self.images, self.say = chat, images, say

    def ask(self, text: str, decorated: bool = True) -> None:
        """Stream the answer to standard output as it is; figures go to standard error."""
        before = len(self.chat.turns)
        with shown() as line:
            try:
                last = self._printed(text, line, decorated)
            except UsageError as error:
                raise UsageError(f"{error}{self._ways_out() if decorated else ''}") from None
            finally:
                if len(self.chat.turns) > before:  # pictures wait on where nothing was said
                    self.images = []
        print(flush=True)
        if last is None or not decorated:
            return
        if self.chat.dropped:
            self.say(f"the first {self.chat.dropped} turns no longer fit and were left out")
        drafts = f", {last.accepted_tokens} drafted" if last.drafted_tokens else ""
        self.say(
            f"[first token {last.ttft_e2e * 1000:.0f} ms, {last.reused_tokens} of "
            f"{last.prompt_tokens} prompt tokens known, {last.visual_tokens} visual; "
            f"{last.generation_tps:.1f} tokens/s{drafts}]"
        )

    def _printed(self, text: str, line: Shown, decorated: bool) -> "GenerationResult | None":
        """Print an answer's pieces, and give the last."""
        last = None
        pieces = self.chat.stream(text, self.images, progress=line.progress)
        try:
            for last in pieces:
                line.end()
                print(last.text, end="", flush=True)
        except KeyboardInterrupt:
            line.end()
            pieces.close()  # type: ignore[attr-defined]
            print(" [stopped]" if decorated else "", end="", flush=True)
        return last

    def _ways_out(self) -> str:
        """How a picture that fails every question is got rid of; nothing where there is none."""
        ways = ["/image - drops the pictures that wait"] if self.images else []
        if any(turn.images for turn in self.chat.turns):
            ways.append("/undo and /clear forget those of earlier questions")
        return f" ({'; '.join(ways)})" if ways else ""

    def command(self, line: str) -> None:
        """Run a line that begins with /. Raises UsageError for one that is not known."""
        name, _, rest = line.partition(" ")
        actions = {
            "/image": self._image, "/clear": self._clear, "/system": self._system,
            "/undo": self._undo, "/save": self._save, "/load": self._load, "/help": self._help,
        }  # fmt: skip
        if name not in actions:
            import difflib

            near = difflib.get_close_matches(name, actions, n=1)
            meant = f"did you mean {near[0]}?" if near else "/help lists them"
            raise UsageError(f"no command {name}; {meant}")
        actions[name](rest.strip())

    def _image(self, rest: str) -> None:
        from ..picture.image import open_image

        try:
            paths = shlex.split(rest)
        except ValueError as error:
            raise UsageError(f"/image: {error}; put quotes around a path with spaces") from None
        if not paths:
            raise UsageError("/image needs a path or an address")
        if paths == ["-"]:
            self.images = []
            self.say("no pictures wait")
            return
        for path in paths:
            open_image(path)
        self.images += paths
        self.say(f"{len(self.images)} for the next question")

    def _clear(self, rest: str) -> None:
        self.chat.clear()
        self.images = []
        self.say("cleared")

    def _system(self, rest: str) -> None:
        if rest:
            self.chat.system = None if rest == "-" else rest
        system = self.chat.system
        self.say(f"system prompt: {'the model’s own' if system is None else system or 'empty'}")

    def _undo(self, rest: str) -> None:
        self.say("forgot the last question" if self.chat.undo() else "there is nothing to undo")

    def _save(self, rest: str) -> None:
        self.chat.save(_one_path("/save", rest))
        self.say(f"saved {len(self.chat.turns)} turns")

    def _load(self, rest: str) -> None:
        self.chat.load(_one_path("/load", rest))
        self.say(f"loaded {len(self.chat.turns)} turns")

    def _help(self, rest: str) -> None:
        self.say("\n".join(f"  {command:16} {text}" for command, text in COMMANDS.items()))
        self.say("  a \\ at the end of a line, or Alt-Enter, goes on on the next one")


def _one_path(command: str, rest: str) -> str:
    """A path, quoted where it has spaces, or the whole line where that is no quoting."""
    try:
        paths = shlex.split(rest) if rest else []
    except ValueError:  # as of an apostrophe
        return rest
    if len(paths) != 1:
        raise UsageError(f"{command} needs one file")
    return paths[0]
