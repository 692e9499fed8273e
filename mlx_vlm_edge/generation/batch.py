"""Many pictures, the same questions: JSON lines that a stopped run goes on with.

A line is one answer, or what went wrong with one picture. It is written whole, at once and in any
order; which ones are there decides what is left to do, so nothing is done twice and nothing lost.
Pictures are read and cut up while the model answers earlier ones.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from ..errors import UsageError
from ..paths import expand
from ..text.prompt import Inputs, Processor
from ..timings import Steps, Timer
from ..whole_file import settle, settle_folder
from .answer import GenerationResult
from .engine import Engine
from .loop import Options

READERS = 2  # threads that read pictures ahead
Key = tuple[str, str]  # a picture's name and a question


@dataclass(frozen=True)
class Run:
    """What makes answers comparable: an output file has those of one run only.

    loading: how the model is loaded, and preprocessing: a dataclass of options.
    """

    model: str
    prompts: Sequence[str]
    system: str | None
    options: Options
    loading: Any = None

    @property
    def id(self) -> str:
        """16 hexadecimal digits of everything an answer depends on, but for the questions."""
        options = _changed(self.options)
        options.pop("draft", None)  # answers are the same without
        told = [self.model, self.system, options, _changed(self.loading)]
        text = json.dumps(told, default=str, sort_keys=True)
        return blake2b(text.encode(), digest_size=8).hexdigest()


def _changed(options: Any) -> dict[str, Any]:
    """What differs from its default, so that an option which a later version has changes no run."""
    values = {} if options is None else {item.name: item.default for item in fields(options)}
    return {
        name: getattr(options, name)
        for name, default in values.items()
        if getattr(options, name) != default
    }


class Output:
    """A file of JSON lines that is appended to; `done` has what is in it already.

    retry_errors: what went wrong in an earlier run counts as still to do. Raises UsageError for a
    file of another run or that is none of ours, and while another process writes to it. A last line
    that a kill left unfinished is cut off.
    """

    def __init__(self, path: Path, run: Run, retry_errors: bool = False) -> None:
        self.path, self._run, self._retry = path, run, retry_errors
        try:
            self._file: IO[bytes] = path.open("a+b")
            settle_folder(path.parent)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
        self._lock()
        self.failed: set[Key] = set()  # of `done`, what has an error in place of an answer
        self.done = self._read()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{self.path}: another batch writes to it; wait for it") from None

    def _read(self) -> set[Key]:
        self._file.seek(0)
        done: set[Key] = set()
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            entry = self._entry(line, number)
            key = entry["image"], entry["prompt"]
            if "error" not in entry:
                done.add(key)
                self.failed.discard(key)
            elif not self._retry:
                done.add(key)
                self.failed.add(key)
            whole += len(line)
        self._file.truncate(whole)
        return done

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(line)
            run, _ = entry["run"], (entry["image"], entry["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"{self.path}: line {number} was not written by batch; name another file"
            ) from None
        if run != self._run.id:
            raise UsageError(
                f"{self.path} has answers of {entry.get('model')} with other settings; "
                "name another file"
            )
        return entry

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line, on the disk when this returns."""
        line = {"run": self._run.id, "model": self._run.model, **entry}
        text = json.dumps(line, ensure_ascii=False)
        # A file's name may be no Unicode: JSON has a form for such halves of characters.
        self._file.write(text.encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        settle(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclass
class _Asked:
    """A picture and a question on their way."""

    key: Key
    reading: "Future[tuple[Inputs, Timer]]"
    text: str = ""


@dataclass
class Progress:
    """How far a batch is: `total` to do, of which `answered` and `failed` are done. error: what
    went wrong with the picture that was done last."""

    total: int
    answered: int = 0
    failed: int = 0
    error: str | None = None
    tokens: int = 0

    @property
    def done(self) -> int:
        return self.answered + self.failed


@dataclass
class Batch:
    """Answers all questions about all pictures that `output` has no line for yet.

    pictures: names (paths or URLs). engine: answers several at once; its processor reads pictures.
    """

    engine: Engine
    run: Run
    output: Output
    pictures: Sequence[str]
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self._left = [
            (picture, prompt)
            for picture in self.pictures
            for prompt in self.run.prompts
            if (picture, prompt) not in self.output.done
        ]
        self.progress = Progress(len(self._left))

    def __iter__(self) -> Iterator[Progress]:
        """One progress for every line written."""
        ahead = self.engine.rows_limit + READERS
        arrived: SimpleQueue[tuple[_Asked, GenerationResult | Exception]] = SimpleQueue()
        waiting, under_way = iter(self._left), 0
        readers = ThreadPoolExecutor(READERS)
        try:
            while True:
                while under_way < ahead and (key := next(waiting, None)) is not None:
                    self._start(key, readers, arrived)
                    under_way += 1
                if not under_way:
                    return
                if self._take(*arrived.get()):
                    under_way -= 1
                    yield self.progress
        finally:
            readers.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: Key, readers: ThreadPoolExecutor, arrived: "SimpleQueue[Any]") -> None:
        """Have a picture read, and its question put in the line when it has been."""

        def read() -> tuple[Inputs, Timer]:
            timer = Timer(measured=True)
            return timer.run(prepare(self.engine.processor, key, self.run.system)), timer

        asked = _Asked(key, readers.submit(read))

        def submit(reading: "Future[tuple[Inputs, Timer]]") -> None:
            try:
                inputs, timer = reading.result()
                self.engine.submit(
                    inputs, self.run.options, lambda piece: arrived.put((asked, piece)),
                    timer=timer,
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001  (raised where the batch waits for it)
                arrived.put((asked, error))

        asked.reading.add_done_callback(submit)

    def _take(self, asked: _Asked, piece: GenerationResult | Exception) -> bool:
        """Note a piece of an answer; whether it was the last one."""
        image, prompt = asked.key
        entry: dict[str, Any] = {"image": image, "prompt": prompt}
        if isinstance(piece, Exception):
            if not isinstance(piece, UsageError):
                raise piece
            self.progress.error = str(piece)
            self.output.write(entry | {"error": self.progress.error})
            self.progress.failed += 1
            return True
        asked.text += piece.text
        if piece.finish_reason is None:
            return False
        self.output.write(entry | _told(asked.text, piece))
        self.progress.error = None
        self.progress.answered += 1
        self.progress.tokens += piece.generation_tokens
        return True


def prepare(processor: Processor, key: Key, system: str | None) -> Steps[Inputs]:
    """A question about a picture, ready for the model."""
    image, prompt = key
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return processor.steps(messages, [image])


def _told(text: str, last: GenerationResult) -> dict[str, Any]:
    """An answer with its counts and times, in seconds."""
    return {
        "answer": text,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "visual_tokens": last.visual_tokens,
        "generation_tokens": last.generation_tokens,
        "seconds": {name: round(took, 6) for name, took in (last.stages or {}).items()},
    }


def share(
    pictures: Sequence[str], rank: int, size: int, content: Callable[[str], bytes]
) -> list[str]:
    """The pictures of one of `size` machines, by what is in them and not by their order, so that
    adding one moves no other, and equal ones meet the same prefix cache."""

    def place(picture: str) -> int:
        return int.from_bytes(blake2b(content(picture), digest_size=8).digest(), "big") % size

    return [picture for picture in pictures if place(picture) == rank]


def content_of(picture: str) -> bytes:
    """A file's bytes; of an address or what cannot be read, its name."""
    try:
        return expand(picture).read_bytes()
    except (OSError, ValueError):
        return picture.encode(errors="surrogateescape")
