"""The companion app's logic, compiled in Swift 6 mode and run; its views are not."""

import hashlib
import json
import platform
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from .swift_build import HERE, STRICT, package

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("apt-get"),
    reason="Debian's Swift is unpacked where apt-get is, on Linux and x86_64",
)
LOGIC = HERE.parents[1] / "examples" / "app" / "Logic" / "Sources" / "AppLogic"


@pytest.fixture(scope="module")
def program():
    tools = package()
    tools.module("AppLogic", sorted(LOGIC.glob("*.swift")), "-Onone", *STRICT)
    return tools, tools.program("app-checks", [HERE / "app_checks" / "main.swift"])


@pytest.fixture
def told(program, tmp_path):
    """What the program tells of a situation."""
    tools, path = program

    def run(*arguments):
        home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [path, *arguments], env=tools.environment(**home), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


def test_a_chat_goes_from_state_to_state(told):
    result = told("chat")
    assert result["states"] == [
        "noModel", "idle", "thinking", "idle", "idle", "noModel",
    ]  # fmt: skip
    assert result["messages"] == [
        ["user", "what?", "2", "", "[]"],
        ["model", "2 pictures of what?", "0", "", "[1, 2, 7]"],
        ["user", "fail", "0", "", "[]"],
        ["model", "0 pictures of fail", "0", "it broke; mend it", "[]"],
        ["user", "for ever", "0", "", "[]"],
        ["model", "0 pictures of for ever", "0", "", "[]"],
    ]
    assert (result["cleared"], result["resets"], result["unloads"]) == (True, 1, 1)
    # The text that was typed goes only where it was asked.
    assert result["asked"] == [False, False, True, False]
    assert result["answered"] == 1  # neither what failed nor what was stopped
    assert result["shares"] == [75, 25]
    expected = "First word after 400 milliseconds: looking 300 milliseconds, thinking 100"
    assert result["spoken"].startswith(expected)


def test_one_model_is_loaded_at_a_time_and_the_last_that_was_chosen_stays(told):
    """A load that is broken off is not told as a mistake, and one that fails is."""
    result = told("loading")
    begun = ("one", "three", "damaged", "four", "five")  # the second was never begun
    assert result["told"] == [f"{name} {what}" for name in begun for what in ("begins", "ends")]
    assert result["states"] == ["idle", "noModel", "noModel", "idle"]
    assert result["quiet"] == 0
    assert result["messages"] == [
        "what? true", "0 pictures of what? true", "it is damaged; export it again true",
    ]  # fmt: skip


def test_a_chosen_bundle_that_has_gone_is_no_obstacle(told, tmp_path):
    """And with a bundle goes what was compiled of it; tests of the package see to the rest."""
    folder = tmp_path / "bundles"
    for name in ("a", "b", "half.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    assert told("library", str(folder)) == {"chosen": ["a", "b", "a"], "left": ["b"]}


def test_a_chat_is_shown_again_and_a_shortcut_asks(told, tmp_path):
    result = told("restored", str(tmp_path))
    assert (result["none"], result["damaged"], result["left"]) == (0, 0, 0)
    note = "The conversation had become too long: the model no longer knows its 2 oldest questions"
    assert result["shown"] == ["0 and now? true ", f"1 0 pictures of and now? true {note}"]
    assert result["ids"] == [0, 1, 2, 3]
    assert result["mistakes"] == [
        "no model is loaded; open the app, and choose one in its settings",
        "another question is being answered; ask again when it is done",
        "it broke; mend it",
        "the question is empty; ask something",
        "the answer was stopped; ask again",
    ]
    assert result["answer"] == "1 pictures of what?"
    busy = "another question is being answered; ask again when it is done"
    assert busy in result["together"]
    assert len({"1 pictures of one?", "1 pictures of other?"} & set(result["together"])) == 1


def test_captions_are_of_the_newest_frame(told):
    """Frames 2 and 3 are dropped, 5 comes too early, 13 fails and 7 meets a pause."""
    result = told("captions")
    assert result["told"] == ["frame 1 0.0 2", "frame 4 2.0 2", f"frame 6 {2 / 21} 3"]
    assert result["mistake"] == "no luck; another frame"


def test_heat_and_memory_warnings(told):
    result = told("pressure")
    slow = [line.count("captions") for line in result["heat"]]
    assert slow[0] == slow[4] == 0  # nothing has changed
    assert "captions(every: nil)" in result["heat"][3]
    assert "captions(every: Optional(0.0))" in result["heat"][5]
    assert (result["first"], result["busy"], result["second"], result["calm"]) == (
        True,
        True,
        True,
        1,
    )


def test_settings_are_kept_and_held_within_bounds(told):
    assert told("settings") == {
        "plain": True, "same": True, "broken": True, "options": ["0.0", "1.0", "1"],
        "instructions": ["none", "Be brief."], "presets": ["what?", "where?"],
        "lines": "what?\n\n where? \nwhat?",
    }  # fmt: skip


class Server(BaseHTTPRequestHandler):
    """Files of `files`; the first answer of the largest ends in its middle."""

    files: ClassVar[dict[str, bytes]] = {}
    broken: ClassVar[set[str]] = set()
    ranges: ClassVar[list[str]] = []

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted:
            self.ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.path in self.broken:
            self.broken.remove(self.path)
            self.wfile.write(content[start : len(content) // 2])
            return
        self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    contents = {"a.txt": b"small", "parts/large.bin": bytes(range(256)) * 2000}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    Server.files = {f"/model/{name}": data for name, data in contents.items()}
    sizes = {"files": sum(map(len, contents.values()))}
    Server.files["/model/manifest.json"] = json.dumps({"files": hashes, "memory": sizes}).encode()
    Server.broken, Server.ranges = set(), []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_a_download_goes_on_where_it_broke(told, server, tmp_path):
    Server.broken = {"/model/parts/large.bin"}
    result = told("download", f"{server}/model", str(tmp_path / "bundles"), "model")
    assert result["mistakes"] == ["broken off"]
    assert Server.ranges == ["bytes=256000-"]
    whole = sum(map(len, Server.files.values()))
    assert result["entries"] == [f"model {whole}"]
    assert result["last"] == "2/2"
    shares = [*map(float, result["shares"])]
    assert shares == sorted(shares)
    assert (shares[0] < 0.1, shares[-1]) == (True, 1)
    folder = tmp_path / "bundles" / "model"
    assert (folder / "parts" / "large.bin").read_bytes() == Server.files["/model/parts/large.bin"]
    assert not list(Path(folder).rglob("*.part"))


def test_a_file_that_comes_damaged_is_no_bundle(told, server, tmp_path):
    Server.files["/model/a.txt"] = b"other"
    result = told("download", f"{server}/model", str(tmp_path / "bundles"), "model")
    assert result["mistakes"] == ["a.txt: came damaged; download it again"] * 4
    assert result["entries"] == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"/model/manifest.json": b"no"}, "is no bundle; give the address of a bundle's folder"),
        ({}, "manifest.json: the server answers 404; check the address"),
        (
            {"/model/manifest.json": b'{"files": {"../x": "00"}}'},
            "../x is no file of a bundle; download another bundle",
        ),
    ],
)
def test_what_is_no_bundle_is_refused(told, server, tmp_path, files, message):
    Server.files = files
    result = told("download", f"{server}/model", str(tmp_path / "bundles"), "model")
    assert result["mistakes"][0].endswith(message)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "more"),
    [
        ({"memory": {"files": 10**18}}, 10**12),
        (
            {"memory": {"files": 5}, "parts": {"vision": {"memory": {"package": 10**18}}, "x": {}}},
            10**12,
        ),
    ],
)
def test_a_bundle_that_the_storage_has_no_room_for_is_not_begun(
    told, server, tmp_path, content, more
):
    manifest = json.dumps({"files": {"a.txt": "00"}, **content})
    Server.files = {"/model/manifest.json": manifest.encode()}
    result = told("download", f"{server}/model", str(tmp_path / "bundles"), "model")
    start = f"the bundle, and what is compiled of it, take {more} MB more, "
    assert result["mistakes"][0].startswith(start)
    assert result["mistakes"][0].endswith(" MB are free; free some storage")
    assert result["shares"] == []


@pytest.mark.parametrize("name", ["", "/", "..", "a/b"])
def test_a_bundle_needs_a_folder_s_name(told, server, tmp_path, name):
    folder = tmp_path / "bundles"
    result = told("download", server, str(folder), name)
    message = f"{server}: has no folder's name; give the address of a bundle's folder"
    assert result["mistakes"] == [message] * 4
    assert [*folder.iterdir()] == []
