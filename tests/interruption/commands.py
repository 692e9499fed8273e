"""What is interrupted: each command's folder before it, the command, and what its folder then has.

A state is one word: "none", "old", "new", or "unfinished" for what the program itself knows to be
so. Whatever else a function says ("half ...") is half-written work that would be taken for whole.
"""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mlx_vlm_edge import blas  # noqa: F401  before MLX
from mlx_vlm_edge.errors import UsageError

from .hub_double import COMMIT, REPO, Hub, hub_double

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mlx_vlm_edge" / "demo"
PICTURES = ROOT / "examples" / "images"


@dataclass(frozen=True)
class Command:
    """prepare: makes what is there before, and may leave a source in `root.parent / "source"`.

    states: allowed after a kill. loads: what is imported before children are forked. durable: a
    loss of power takes nothing of what the command said was done.
    """

    run: Callable[[Path], int]
    state: Callable[[Path], str]
    states: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda _: None
    loads: tuple[str, ...] = ()
    durable: bool = True
    double: Callable[[Path], None] = field(default=lambda _: None)


def main(*arguments: object) -> int:
    from mlx_vlm_edge.cli import main as run

    return run([str(part) for part in arguments])


# convert


def _source(root: Path, mark: str) -> Path:
    """The demo's folder with a mark in a file that is copied as it is."""
    source = root.parent / f"source-{mark}"
    if not source.exists():
        shutil.copytree(DEMO, source)
        settings = json.loads((source / "generation_config.json").read_text())
        (source / "generation_config.json").write_text(json.dumps(settings | {"mark": mark}))
    return source


def _whole_model(folder: Path) -> str:
    """Of which source a converted folder is, by all of its files."""
    if not folder.exists() or not any(folder.iterdir()):
        return "none"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name != "generation_config.json":
            digest.update(path.name.encode() + path.read_bytes())
    try:
        mark = json.loads((folder / "generation_config.json").read_text())["mark"]
    except (OSError, ValueError, KeyError):
        return f"half {sorted(os.listdir(folder))}"
    reference = folder.parents[1] / "digest"
    if not reference.exists():
        reference.write_text(digest.hexdigest())
    return mark if digest.hexdigest() == reference.read_text() else f"half {mark}"


def _convert(root: Path, mark: str, *more: str) -> int:
    return main("convert", _source(root, mark), "-o", root / "out", *more)


def _prepare_convert(root: Path) -> None:
    _source(root, "new")
    _convert(root, "old")
    _whole_model(root / "out")


def _prepare_new_convert(root: Path) -> None:
    _prepare_convert(root)
    shutil.rmtree(root / "out")


def _without_swap(_: Path) -> None:
    """A file system, or a system, that cannot swap names."""
    from mlx_vlm_edge_convert import new_folder

    new_folder._swap = lambda *_: False


# export


def _export(root: Path, mark: str, *more: str) -> int:
    return main(
        "export", _source(root, mark), "-o", root / "out", "--part", "connector",
        "--separate-connector", "--no-verify", *more,
    )  # fmt: skip


def _whole_bundle(root: Path) -> str:
    from mlx_vlm_edge_convert.coreml import manifest

    folder = root / "out"
    if not folder.exists():
        return "none"
    try:
        content = manifest.read(folder)
    except UsageError as error:
        return f"half {error}"
    return content["model"]["name"].removeprefix("source-")


# the Hub


def _pulled(root: Path) -> str:
    from mlx_vlm_edge.hub.cache import (
        cached_models,
        local_snapshot,
        repository_folder,
        whole_snapshot,
    )

    if not repository_folder(REPO).exists():
        return "none"
    named = local_snapshot(REPO)
    snapshot = named or whole_snapshot(REPO)  # whole, and the branch that names it is lost
    listed = [model.complete for model in cached_models([REPO])]
    if listed != [snapshot is not None]:
        return f"half, listed as {listed}"
    if snapshot is None:
        return "unfinished"
    right = all(
        (snapshot / name).is_file() and (snapshot / name).read_bytes() == content
        for name, content in Hub.files.items()
    )
    if not right:
        return f"half {sorted(os.listdir(snapshot))}"
    return "new" if named else "unfinished"


def _pull(root: Path) -> int:
    return main("models", "pull", REPO)


def _remove(root: Path) -> int:
    """`models rm`; that there is nothing is what an earlier one wanted."""
    if _pulled(root) == "none":
        return 0
    return main("models", "rm", REPO, "--yes")


def _state_of_removal(root: Path) -> str:
    return {"new": "old", "none": "new"}.get(state := _pulled(root), state)


def _prepare_pull(root: Path) -> None:
    hub_double(root)
    _pull(root)


_FIRST = ("mlx-vlm-edge", "snapshots", COMMIT, "generation_config.json")


def _worst_order(root: Path) -> None:
    """A file system that lists first what makes a model known as incomplete once it is gone."""
    hub_double(root)
    listing = os.scandir

    class Listing(list):
        def __enter__(self) -> "Listing":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def listed(path: object = ".") -> Listing:
        with listing(path) as entries:  # type: ignore[call-overload]
            return Listing(
                sorted(entries, key=lambda entry: (*_FIRST, entry.name).index(entry.name))
            )

    os.scandir = listed  # type: ignore[assignment]


# Core ML's cache


def _prepare_packages(root: Path) -> None:
    entry = root / "coreml" / "abc"
    for name in ("vision.mlpackage/Data/weights/weight.bin", "vision.mlpackage/Manifest.json"):
        (entry / name).parent.mkdir(parents=True, exist_ok=True)
        (entry / name).write_bytes(b"x" * 100)
    from mlx_vlm_edge_convert.coreml.run import cache

    cache.describe(entry, model="demo", size=(64, 64), precision="fp16", compute="cpu-ne")


def _packages(root: Path) -> None:
    os.environ["MLX_VLM_EDGE_CACHE"] = str(root / "coreml")


def _remove_packages(root: Path) -> int:
    if not any((root / "coreml").iterdir()):
        return 0
    return main("models", "rm", "--coreml", "--yes")


def _state_of_packages(root: Path) -> str:
    entry = root / "coreml" / "abc"
    if not entry.is_dir():
        return "new"
    files = [path for path in entry.rglob("*") if path.is_file()]
    return "old" if len(files) == 3 else f"half {sorted(path.name for path in files)}"


# one file each


def _conversation(text: str):
    from mlx_vlm_edge.generation.conversation import Conversation, Turn

    chat = Conversation(None, None, prefix_cache=SimpleNamespace())
    chat.turns = [Turn("user", text), Turn("assistant", "an answer " * 2000)]
    return chat


def _save_chat(root: Path, mark: str = "new") -> int:
    from mlx_vlm_edge.cli.chat import Session

    Session(_conversation(mark), [], print).command(f"/save {root / 'chat.json'}")
    return 0


def _saved_chat(root: Path) -> str:
    chat, path = _conversation(""), root / "chat.json"
    if not path.exists():
        return "none"
    try:
        chat.load(path)
    except UsageError as error:
        return f"half {error}"
    return chat.turns[0].text


def _report_double(_: Path) -> None:
    from mlx_vlm_edge.cli import doctor
    from mlx_vlm_edge.doctor import published

    published.report = lambda *_: {"mark": "new", "problems": [], "filler": "x" * 9000}
    doctor._machine = lambda: {}
    doctor._summarise = lambda _: None


def _doctor(root: Path) -> int:
    return main("doctor", "--model", "demo", "--report", root / "report.json")


def _bench_double(_: Path) -> None:
    from mlx_vlm_edge_bench.bench import cases, last, machine, table

    cases.check = lambda *_: None
    cases.run = lambda *_: iter([{"mark": "new"}])
    last.remember = lambda *_: None  # the user's own file, of figures that are none here
    machine.record, machine.summary = lambda: {"cores": 1, "filler": "x" * 9000}, lambda _: ""
    table.case = table.notes = lambda *_: ""


def _bench(root: Path) -> int:
    return main("bench", "--model", "demo", "--json", root / "report.json")


def _old_report(root: Path) -> None:
    (root / "report.json").write_text('{"mark": "old"}')


def _json_file(root: Path) -> str:
    path = root / "report.json"
    if not path.exists():
        return "none"
    try:
        content = json.loads(path.read_text())
        return content["cases"][0]["mark"] if "cases" in content else content["mark"]
    except (ValueError, KeyError) as error:
        return f"half {error}"


# what computes


def _ask(root: Path) -> int:
    return main(
        "generate", "--model", "demo", "--image", PICTURES / "shapes.png", "--prompt", "What?",
        "--max-tokens", 2, "--cache-dir", root / "cache",
    )  # fmt: skip


def _cached(root: Path) -> str:
    """Entries that say themselves that they are whole; a damaged one is refused, but lost work."""
    folder = root / "cache"
    paths = [] if not folder.exists() else sorted(folder.glob("[!.]*"))
    for path in paths:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        if digest != path.stem.rpartition("-")[2]:
            return f"half {path.name}"
    return ("none", "unfinished", "new")[len(paths)]


def _batch(root: Path) -> int:
    return main(
        "batch", PICTURES / "shapes.png", PICTURES / "text.png", "-p", "What?", "-p", "Where?",
        "--max-tokens", 2, "--model", "demo", "--rows", 1, "-o", root / "out.jsonl",
    )  # fmt: skip


def _batch_double(_: Path) -> None:
    """What was said to be written is noted where no injector looks."""
    from mlx_vlm_edge.generation.batch import Output

    write = Output.write

    def noted(self: Output, entry: dict[str, object]) -> None:
        write(self, entry)
        descriptor = os.open(
            self.path.parent.parent / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT
        )
        os.write(descriptor, b"x")
        os.close(descriptor)

    Output.write = noted  # type: ignore[method-assign]


def _lines(root: Path) -> str:
    path, said = root / "out.jsonl", root.parent / "said"
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        asked = {(line["image"], line["prompt"]) for line in map(json.loads, whole)}
    except ValueError:
        return "half line"
    promised = said.stat().st_size if said.exists() else 0
    said.write_bytes(b"")
    if len(asked) != len(whole) or len(whole) < promised:
        return f"half: {len(whole)} lines of {promised}"
    said.write_bytes(b"")
    return {0: "none", 4: "new" if content.endswith(b"\n") else "unfinished"}.get(
        len(whole), "unfinished"
    )


_CONVERT = ("mlx.core", "mlx.nn", "tokenizers", "mlx_vlm_edge_convert", "mlx_vlm_edge.models")
_ANSWER = (
    "mlx.core", "mlx.nn", "tokenizers", "PIL.Image", "mlx_vlm_edge", "mlx_vlm_edge.generation.disk",
    "mlx_vlm_edge.generation.batch", "mlx_vlm_edge.loading.load", "mlx_vlm_edge.models.llava",
)  # fmt: skip

COMMANDS = {
    "convert": Command(
        lambda root: _convert(root, "new"), lambda root: _whole_model(root / "out"),
        ("none", "new"), _prepare_new_convert, _CONVERT,
    ),
    "convert-overwrite": Command(
        lambda root: _convert(root, "new", "--overwrite"), lambda root: _whole_model(root / "out"),
        ("old", "new"), _prepare_convert, _CONVERT,
    ),
    "convert-without-swap": Command(  # for a moment nothing is at its place, until the next run
        lambda root: _convert(root, "new", "--overwrite"), lambda root: _whole_model(root / "out"),
        ("old", "none", "new"), _prepare_convert, _CONVERT, double=_without_swap,
    ),
    "export": Command(
        lambda root: _export(root, "new"), _whole_bundle, ("none", "new"),
        lambda root: (_source(root, "old"), _source(root, "new"))[0],
        (*_CONVERT, "coremltools", "mlx_vlm_edge_convert.coreml.export"),
    ),
    "export-overwrite": Command(
        lambda root: _export(root, "new", "--overwrite"), _whole_bundle, ("old", "new"),
        lambda root: (_source(root, "new"), _export(root, "old"))[0],
        (*_CONVERT, "coremltools", "mlx_vlm_edge_convert.coreml.export"),
    ),
    "pull": Command(
        _pull, _pulled, ("none", "unfinished", "new"), loads=("mlx_vlm_edge.hub.download",),
        double=hub_double,
    ),
    "rm": Command(
        _remove, _state_of_removal, ("old", "unfinished", "new"), _prepare_pull,
        ("mlx_vlm_edge.hub.download",), durable=False, double=hub_double,
    ),
    "rm-in-the-worst-order": Command(
        _remove, _state_of_removal, ("old", "unfinished", "new"), _prepare_pull,
        ("mlx_vlm_edge.hub.download",), durable=False, double=_worst_order,
    ),
    "rm-coreml": Command(
        _remove_packages, _state_of_packages, ("old", "new"), _prepare_packages,
        ("mlx_vlm_edge_convert.coreml.run.cache",), durable=False, double=_packages,
    ),
    "chat-save": Command(
        _save_chat, _saved_chat, ("old", "new"), lambda root: _save_chat(root, "old"),
        ("mlx_vlm_edge.cli.chat", "mlx_vlm_edge.generation.conversation"),
    ),
    "doctor": Command(
        _doctor, _json_file, ("old", "new"), _old_report, ("mlx_vlm_edge.doctor.published",),
        double=_report_double,
    ),
    "bench": Command(
        _bench, _json_file, ("old", "new"), _old_report,
        ("mlx_vlm_edge_bench.bench.cases", "mlx_vlm_edge_bench.bench.table"), double=_bench_double,
    ),
    "prefix-cache": Command(_ask, _cached, ("none", "unfinished", "new"), loads=_ANSWER),
    "batch": Command(
        _batch, _lines, ("none", "unfinished", "new"), loads=_ANSWER, double=_batch_double
    ),
}  # fmt: skip

sys.stdin = io.StringIO()
