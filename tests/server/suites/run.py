"""Others' test suites and clients against our server: python -m tests.server.suites.run [NAME...]

Each suite gets an environment of its own under .venv/suites, and what it needs from the package
index. What fails or is skipped must be one of exceptions.toml's, with its reason, and each of those
must still fail. --record writes the counts down, from which docs/server.md has its table.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PLACE = ROOT / ".venv" / "suites"
DOCUMENT = ROOT / "docs" / "server.md"
BEGIN, END = "<!-- suites: begin -->", "<!-- suites: end -->"
LLAMA = "llama-cpp-python==0.3.36"
LLAMA_KEY = "sk-this-is-the-secret-key"  # the one that test_security.py sends
LLAMA_TESTS = "vendor/llama.cpp/tools/server/tests"
FILES = ("chat_completion", "compat_anthropic", "compat_oai_responses", "completion", "stream")
FORMATS = ("open-responses", "openai-chat", "anthropic")
STATUSES = '[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", 400, 404, 429]\n'

Outcomes = dict[str, str]  # test -> "passed", or anything else


@dataclass(frozen=True)
class Suite:
    """title: for people. packages: what its environment has. run: its outcomes."""

    title: str
    packages: Sequence[str]
    run: Callable[[Path], Outcomes]


@contextmanager
def served(*arguments: str) -> Iterator[int]:
    """The port of a server of the demo model in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.server.suites.served", str(port), *arguments]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield port
        finally:
            process.terminate()


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def environment(name: str, packages: Sequence[str]) -> Path:
    """The folder of an environment that has the packages; made once for each list of them."""
    folder = PLACE / name
    listed = folder / "packages.txt"
    if not listed.exists() or listed.read_text() != "\n".join(packages):
        print(f"setting up {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip(folder, "install", *packages)
        listed.write_text("\n".join(packages))
    return folder


def pip(folder: Path, *arguments: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "-qq", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def call(command: Sequence[str], cwd: Path = PLACE, **more: str) -> str:
    """What a command prints; failing is for its report to tell."""
    local = {"no_proxy": "127.0.0.1,localhost"}
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | local | more, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def pytest(folder: Path, arguments: Sequence[str], cwd: Path = PLACE, **more: str) -> Outcomes:
    """file::test -> outcome."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    python = str(folder / "bin" / "python")
    printed = call(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
         *arguments], cwd, **more,
    )  # fmt: skip
    if not report.exists():
        raise SystemExit(printed)
    return dict(outcomes(ElementTree.parse(report).getroot()))


def outcomes(report: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """The tests of a JUnit report; of one that fails, and fails again when torn down, the worse."""
    for case in report.iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        group = case.get("classname", "").rpartition(".")[2]
        name = case.get("name", "")
        yield f"{group}::{name}" if group else name, bad[0] if bad else "passed"


def llama(folder: Path) -> Outcomes:
    """llama.cpp's: with the files that need no key, then those about security with one."""
    tests = folder / "llama.cpp"
    if not tests.exists():
        fetch_llama(folder, tests)
    flags = ["--tb=no", "--timeout=60", "-m", "not slow", "-k", "not vision"]
    aimed = {"DEBUG_EXTERNAL": "1"}
    with served("llama") as port:
        files = [f"unit/test_{name}.py" for name in FILES]
        told = pytest(folder, [*flags, *files], tests, PORT=str(port), **aimed)
        media = ["unit/test_security.py", "-k", "media"]
        told |= pytest(folder, [*flags, *media], tests, PORT=str(port), **aimed)
    with served("llama", LLAMA_KEY) as port:
        keyed = ["unit/test_security.py", "-k", "not media"]
        return told | pytest(folder, [*flags, *keyed], tests, PORT=str(port), **aimed)


def fetch_llama(folder: Path, tests: Path) -> None:
    """The tests' folder out of the source distribution."""
    pip(
        folder, "download", "--no-binary", "llama-cpp-python", "--no-deps", "-d", str(folder), LLAMA
    )
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as files:
        chosen = [member for member in files if f"/{LLAMA_TESTS}/" in member.name]
        files.extractall(folder, chosen, filter="data")
    (folder / archive.name.removesuffix(".tar.gz") / LLAMA_TESTS).rename(tests)
    archive.unlink()


def llm_comply(folder: Path) -> Outcomes:
    told: Outcomes = {}
    with served() as port:
        for form in FORMATS:
            printed = call([
                str(folder / "bin" / "llm-comply"), "-u", f"http://127.0.0.1:{port}/v1",
                "-k", "none", "-m", "demo", "--format", form, "--json",
            ])  # fmt: skip
            for row in json.loads(printed)["results"]:
                told[f"{form}::{row['id']}"] = row["status"]
    return told


def schemathesis(folder: Path) -> Outcomes:
    """Operations, and how their fuzzing ended."""
    (folder / "statuses.toml").write_text(STATUSES)
    report = folder / "report.xml"
    with served() as port:
        printed = call([
            str(folder / "bin" / "st"), "--config-file", str(folder / "statuses.toml"), "run",
            f"http://127.0.0.1:{port}/openapi.json", "--phases", "examples,coverage,fuzzing",
            "-n", "25", "--seed", "1", "--no-shrink", "--continue-on-failure", "--warnings", "off",
            "--report", "junit", "--report-junit-path", str(report),
        ])  # fmt: skip
    told = dict(outcomes(ElementTree.parse(report).getroot()))
    if any(outcome != "passed" for outcome in told.values()):
        print(printed)
    return told


def of_file(name: str, *flags: str) -> Callable[[Path], Outcomes]:
    """A suite that is a file of this folder."""

    def run(folder: Path) -> Outcomes:
        with served() as port:
            arguments = ["--noconftest", f"--rootdir={HERE}", *flags, str(HERE / f"{name}.py")]
            return pytest(folder, arguments, SERVED=f"http://127.0.0.1:{port}")

    return run


LOOP = ("asyncio_mode=auto", "asyncio_default_fixture_loop_scope=session",
        "asyncio_default_test_loop_scope=session")  # fmt: skip
SUITES = {
    "llama": Suite(
        "llama.cpp's server tests (from llama-cpp-python 0.3.36)",
        ["pytest~=8.3.3", "pytest-timeout", "filelock~=3.16", "numpy~=2.2.6", "openai~=2.14.0",
         "requests~=2.32.3", "wget~=3.2", "prometheus-client~=0.20.0"],
        llama,
    ),
    "comply": Suite("llm-comply 0.5.0", ["llm-comply==0.5.0", "jsonschema"], llm_comply),
    "schemathesis": Suite("schemathesis 4.32.5", ["schemathesis==4.32.5"], schemathesis),
    "langchain": Suite(
        "langchain-tests 1.1.9 on langchain-openai 1.7.4",
        ["langchain-tests==1.1.9", "langchain-openai==1.7.4", "pytest"],
        of_file("langchain_chat", *(flag for option in LOOP for flag in ("-o", option))),
    ),
    "litellm": Suite(
        "litellm 1.110.2 and llm 0.36", ["litellm==1.110.2", "llm==0.36", "pytest"],
        of_file("litellm_and_llm"),
    ),
    "pydantic-ai": Suite(
        "pydantic-ai 2.68.0", ["pydantic-ai-slim[openai]==2.68.0", "pytest"],
        of_file("pydantic_ai_agent"),
    ),
    "instructor": Suite(
        "instructor 1.17.0", ["instructor==1.17.0", "pytest"], of_file("instructor_json")
    ),
}  # fmt: skip


def exceptions() -> dict[str, list[dict[str, object]]]:
    """suite -> [{reason, tests}]; a test without brackets is all of its cases."""
    return tomllib.loads((HERE / "exceptions.toml").read_text())


def covers(named: str, test: str) -> bool:
    return test == named or test.startswith(f"{named}[")


def judge(told: Mapping[str, str], excepted: Sequence[str]) -> list[str]:
    """What is wrong with the outcomes: a test that does not pass and is not excepted, and an
    exception of which no test fails any more."""
    bad = [test for test, outcome in told.items() if outcome != "passed"]
    wrong = [f"{test}: {told[test]}" for test in bad
             if not any(covers(named, test) for named in excepted)]  # fmt: skip
    stale = [named for named in excepted if not any(covers(named, test) for test in bad)]
    return wrong + [f"{named}: passes, or is not there; it needs no exception" for named in stale]


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Counts and reasons, as docs/server.md has them."""
    lines = ["| suite | pass | do not |", "|---|---|---|"]
    lines += [
        f"| {SUITES[name].title} | {of['passed']} | {of['excepted'] or '-'} |"
        for name, of in counts.items()
    ]
    for name, rows in exceptions().items():
        lines += ["", f"{SUITES[name].title}:", ""]
        for row in rows:
            tests = ", ".join(f"`{test}`" for test in row["tests"])  # type: ignore[attr-defined]
            lines.append(f"- {row['reason']}{': ' if tests else ''}{tests}")
    return "\n".join(lines)


def put(document: str, new: str) -> str:
    """The document with a new table between its marks."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SUITES, []], metavar="NAME")
    parser.add_argument("--record", action="store_true", help="write the counts and the table")
    args = parser.parse_args()
    counts_at = HERE / "counts.json"
    counts = json.loads(counts_at.read_text()) if counts_at.exists() else {}
    wrong = 0
    for name in args.names or SUITES:
        suite, started = SUITES[name], time.monotonic()
        told = suite.run(environment(name, suite.packages))
        named = [test for row in exceptions().get(name, ()) for test in row["tests"]]  # type: ignore[attr-defined]
        faults = judge(told, named)
        passed = sum(outcome == "passed" for outcome in told.values())
        counts[name] = {"passed": passed, "excepted": len(told) - passed}
        print(f"{suite.title}: {counts[name]}, {time.monotonic() - started:.0f} s", flush=True)
        print("".join(f"  {line}\n" for line in faults), end="", flush=True)
        wrong += len(faults)
    if args.record:
        counts = {name: counts[name] for name in SUITES if name in counts}
        counts_at.write_text(json.dumps(counts, indent=1) + "\n")
        DOCUMENT.write_text(put(DOCUMENT.read_text(), table(counts)))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
