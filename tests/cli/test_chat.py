"""The chat verb: at a terminal of its own, and from a pipe."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace

import pytest

from mlx_vlm_edge import Conversation
from mlx_vlm_edge.cli import chat, main
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.conversation import Turn

from ..demo import IMAGES, known
from ..generation.test_prefix import fastvlm, models  # noqa: F401  (fixtures)

DESCRIBE = known("shapes.png", "Describe the image.")
READ = known("text.png", "What does it say?")
PROMPT = "\x1b[?2004h"  # what switches bracketed paste on
COMMAND = [sys.executable, "-m", "mlx_vlm_edge", "chat", "--model", "demo"]


class Terminal:
    """A chat at a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, text, seconds=60):
        """What was shown up to `text`, which must come."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text):
        """Type at the next prompt, once it is there."""
        self.until(PROMPT)
        self.press(text)

    def press(self, text):
        os.write(self.master, text.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal():
    terminals = []

    def start(*arguments):
        terminals.append(Terminal(*arguments))
        terminals[-1].until("/help lists the commands")
        return terminals[-1]

    yield start
    for opened in terminals:
        opened.close()


def test_a_session_at_a_terminal(terminal, tmp_path):
    session = terminal("--image", str(IMAGES / "shapes.png"))
    session.type(f"{DESCRIBE.question}\r")
    session.until(DESCRIBE.answer)
    session.until("prompt tokens known")
    session.type("/clear\r")
    session.until("cleared")
    session.type(f"/image {IMAGES / 'text.png'}\r")
    session.until("1 for the next question")
    session.type(f"{READ.question}\r")
    session.until(READ.answer)
    session.until("tokens/s]")
    session.type(f"/save {tmp_path / 'chat.json'}\r")
    session.until("saved 2 turns")
    session.type("/undo\r")
    session.until("forgot the last question")
    session.type(f"/load {tmp_path / 'chat.json'}\r")
    session.until("loaded 2 turns")
    session.type("/help\r")
    session.until("/system [TEXT]")
    session.type("/imgae x\r")
    session.until("did you mean /image?")
    session.type("\x04")
    assert session.process.wait(timeout=20) == 0


def test_several_lines_and_a_cleared_one(terminal):
    session = terminal("--image", str(IMAGES / "text.png"))
    session.type("half a question\x03")
    session.type("What does\\\r")
    session.type("it say?\r")
    session.until(READ.answer)
    session.until("tokens/s]")
    session.type("/exit\r")
    assert session.process.wait(timeout=20) == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal):
    session = terminal("--image", str(IMAGES / "shapes.png"), "--max-tokens", "1500",
                       "--schema", _endless())  # fmt: skip
    session.type("Go on and on\r")
    session.until('{"a": [')
    session.press("\x03")
    session.until("[stopped]")
    session.type("/undo\r")
    session.until("forgot the last question")
    session.type("\x04")
    assert session.process.wait(timeout=20) == 0


def _endless():
    """A schema whose answers are long, as the demo model's own are not."""
    import json
    import tempfile

    numbers = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 700}
    schema = {"type": "object", "properties": {"a": numbers}, "required": ["a"]}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(schema, file)
    return file.name


def piped(text, *arguments):
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True,
                          errors="surrogateescape", timeout=60, check=False)  # fmt: skip


def test_from_a_pipe_it_is_one_answer_without_decoration():
    done = piped(f"{DESCRIBE.question}\n", "--image", str(IMAGES / "shapes.png"))
    assert (done.returncode, done.stdout) == (0, DESCRIBE.answer + "\n")
    assert "tokens/s" not in done.stderr


@pytest.mark.parametrize(("text", "arguments", "said"), [
    ("", (), "empty"), ("  \n", (), "empty"), ("x", ("--image", "no-such.png"), "no such file"),
    ("caf\udce9?", (), "UTF-8"),
    ("x", ("--load", "no-such.json"), "cannot be read"),
    ("x", ("--temperature", "-1"), "temperature"),
    ("/image no-such.png\nWhat is it?", (), "is one question"),
])  # fmt: skip
def test_mistakes_are_one_line(text, arguments, said):
    done = piped(text, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


class Chat:
    """A conversation that says what it is told to."""

    dropped = 0
    save = load = None

    def __init__(self, *pieces):
        self.pieces, self.asked, self.turns = pieces, [], []

    def stream(self, text, images, progress=None):
        self.asked.append((text, images))
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            self.turns = [text, piece]
            yield type("Piece", (), {
                "text": piece, "ttft_e2e": 0.1, "reused_tokens": 1, "prompt_tokens": 2,
                "visual_tokens": 1, "generation_tps": 3.0, "drafted_tokens": 0,
            })  # fmt: skip


def test_text_is_printed_as_it_is(capfd):
    chat.Session(Chat("[red, blue]", "[/b] *x* \x1b"), [], print).ask("x")
    assert capfd.readouterr().out.startswith("[red, blue][/b] *x* ")


def test_pictures_stay_for_the_next_question_when_one_fails(capfd):
    session = chat.Session(Chat(UsageError("no")), ["a.png"], print)
    with pytest.raises(UsageError):
        session.ask("x")
    assert session.images == ["a.png"]


def test_a_picture_that_is_none_is_told_before_a_model_is_looked_for(capfd, monkeypatch):
    monkeypatch.setattr(chat, "_piped", lambda: "What is it?")
    assert main(["chat", "--model", "no/such/model", "--image", "no-such.png"]) == 2
    assert "no-such.png: no such file" in capfd.readouterr().err


def test_a_picture_of_an_address_is_fetched_once_and_saved_as_its_address(
    fastvlm,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    fetched, address = [], "https://name.example/shapes.png"

    def download(asked, name):
        fetched.append(asked)
        return (IMAGES / "shapes.png").read_bytes()

    monkeypatch.setattr("mlx_vlm_edge.picture.fetch.download", download)
    images = chat._checked(Namespace(image=[address], offline=False))
    conversation = Conversation(*fastvlm, max_tokens=2)
    conversation.ask("What is it?", images)
    conversation.save(tmp_path / "chat.json")
    assert fetched == [address]
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["turns"][0]["images"] == [address]


def test_a_picture_that_cannot_be_asked_about_can_be_dropped(capfd):
    """Every question would fail otherwise."""
    session, said = chat.Session(Chat(UsageError("no")), ["a.png"], print), []
    with pytest.raises(UsageError, match=r"^no \(/image - drops the pictures that wait\)$"):
        session.ask("x")
    with pytest.raises(UsageError, match=r"^no$"):  # a pipe has no commands
        session.ask("x", decorated=False)
    session.say = said.append
    session.command("/image -")
    assert (session.images, said) == ([], ["no pictures wait"])
    session.chat.turns = [Turn("user", "x", ("moved.png",)), Turn("assistant", "y")]
    with pytest.raises(UsageError, match=r"^no \(/undo and /clear forget"):
        session.ask("x")


def test_pictures_go_with_their_question(capfd):
    session = chat.Session(Chat("yes"), ["a.png"], print)
    session.ask("x")
    assert session.images == []


def lines(*typed):
    """What is typed at a terminal, and Ctrl-D at the end."""
    left = iter(typed)

    def ask():
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


class Unread(Chat):
    """A conversation that is broken off while it reads the pictures, the first time."""

    def stream(self, text, images, progress=None):
        if not self.asked:
            self.asked.append((text, images))
            raise KeyboardInterrupt
        return super().stream(text, images, progress)


@pytest.mark.parametrize("conversation", [Unread("yes"), Chat(KeyboardInterrupt())])
def test_ctrl_c_before_an_answer_has_begun_keeps_the_session_and_its_pictures(conversation, capfd):
    session = chat.Session(conversation, ["a.png"], print)
    assert chat._talk(session, lines("x", "")) == 0
    assert session.images == ["a.png"]
    assert "stopped" in capfd.readouterr().out


def test_ctrl_c_while_a_command_reads_a_picture_keeps_the_session(monkeypatch):
    from mlx_vlm_edge.picture import image

    def reading(path):
        if path == "b.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(image, "open_image", reading)
    said = []
    session = chat.Session(Chat("yes"), [], said.append)
    assert chat._talk(session, lines("/image a.png", "/image b.png", "/image a.png")) == 0
    assert session.images == ["a.png", "a.png"]
    assert "stopped" in said


@pytest.mark.parametrize("line", ["/save", "/load a b", '/image "x', "/image", "/nothing"])
def test_commands_that_cannot_be_followed(line):
    with pytest.raises(UsageError):
        chat.Session(Chat(), [], print).command(line)


@pytest.mark.parametrize("path", ["Bob's chat.json", '"my chat.json"', "chat.json"])
def test_a_path_with_an_apostrophe_is_one(path):
    """The conversation would be lost otherwise."""
    talk, named = Chat(), []
    talk.turns, talk.save, talk.load = [], named.append, named.append
    session = chat.Session(talk, [], lambda _: None)
    session.command(f"/save {path}")
    session.command(f"/load {path}")
    assert named == [path.strip('"')] * 2


def test_help_lists_the_flags(capfd):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert "--system-prompt" in capfd.readouterr().out
