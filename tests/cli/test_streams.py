"""Streams that are closed or full, and Ctrl-C, in processes of their own."""

import io
import os
import signal
import subprocess
import sys

import pytest

from mlx_vlm_edge.cli import main

PROGRAM = [sys.executable, "-m", "mlx_vlm_edge"]
ASK = [*PROGRAM, "generate", "--model", "demo", "--prompt", "Hi", "--max-tokens", "2"]


def run(command, redirection):
    """The command under a shell's redirection of its streams; (exit code, stdout)."""
    script = f'exec "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command], stdout=subprocess.PIPE, timeout=120, check=False
    )
    return done.returncode, done.stdout.decode()


@pytest.fixture(scope="module")
def answered():
    return run(ASK, "</dev/null 2>/dev/null")


def test_a_closed_standard_input_is_no_file_of_ours(answered):
    """The first file to be opened would have the number 0, which MLX takes for none."""
    assert answered[0] == 0
    assert run(ASK, "0<&-") == answered


@pytest.mark.parametrize("closed", [True, False])
def test_a_program_may_have_closed_or_read_its_standard_input(closed, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"one\ntwo\n"), encoding="utf-8")
    stdin.readline()
    if closed:
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out
    if closed:
        for ask in (["generate", "-"], ["generate", "Hi", "--image", "-"], ["chat"],
                    ["batch", "-", "-p", "Hi", "-o", "out.jsonl"]):  # fmt: skip
            assert main(ask) == 2
            assert "standard input is closed" in capsys.readouterr().err


def test_notes_are_lost_where_standard_error_is_closed_or_full(answered):
    from_default = [*PROGRAM, "models", "show", "no-such-model"]
    assert run(from_default, "2>&-") == (2, "")
    note = "import sys; from mlx_vlm_edge.cli import streams\n"
    note += "with streams.safe(): print('a note', file=sys.stderr); print('answer')"
    for redirection in ("2>&-", "2>/dev/full"):
        assert run([sys.executable, "-c", note], redirection) == (0, "answer\n")


def test_a_closed_standard_output_is_told():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, "--version"],
        stderr=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"standard output is closed" in done.stderr


DEAF = """if True:
    import ctypes
    from mlx_vlm_edge.cli import streams
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    with streams.safe():
        while True:
            try:
                print("ready", flush=True)
                libc.pthread_mutex_lock(mutex)  # for ever, whatever signals come
            except KeyboardInterrupt:
                pass  # one that came before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux mutex that is all zeros")
def test_a_second_interrupt_ends_what_python_cannot_interrupt():
    """As during one long evaluation of MLX's."""
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if line == "ready\n" or "Ctrl-C again" in line:
                process.send_signal(signal.SIGINT)
            if "Ctrl-C again" in line:
                break
        assert process.wait(timeout=60) == 130


PATIENT = """if True:
    import sys, time
    from mlx_vlm_edge.cli import streams
    with streams.safe():
        for _ in range(3):
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                print("stopped", flush=True)
"""


def test_interrupts_that_are_answered_do_not_add_up():
    """As in a chat, where each stops an answer."""
    with subprocess.Popen(
        [sys.executable, "-c", PATIENT], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(3):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "stopped\n"
        assert process.wait(timeout=60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only there a library is loaded at import")
def test_an_interrupt_during_the_imports_ends_without_a_traceback(tmp_path):
    """The import waits here for a library that is a pipe."""
    library = tmp_path / "library.so"
    os.mkfifo(library)
    environment = os.environ | {"MLX_VLM_EDGE_BLAS": str(library)}
    with subprocess.Popen(
        [*PROGRAM, "--version"], env=environment, stderr=subprocess.PIPE
    ) as process:
        with library.open("wb"):  # as soon as it is being read
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == -signal.SIGINT
        assert process.stderr.read() == b""


HOSTILE = "no\x1b]0;owned\x07such\x1b[2J.png"


def test_a_name_never_reaches_the_terminal_raw():
    command = [*PROGRAM, "generate", "--model", "demo", "--prompt", "Hi", "--image", HOSTILE]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"]0;owned" in done.stderr
    assert not {0x1B, 0x07} & set(done.stderr)


SAY = """if True:
    import sys
    from mlx_vlm_edge.cli import streams
    with streams.safe():
        print("an\\x1b[2J answer", flush=True)
        print("\\r1/2\\x1b[K note\\x07", file=sys.stderr)
        print(sys.stdout.encoding, sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.buffer)
"""


def test_an_answer_does_not_command_a_terminal_and_is_whole_in_a_pipe():
    piped = subprocess.run([sys.executable, "-c", SAY], capture_output=True, check=True)
    assert piped.stdout.startswith(b"an\x1b[2J answer\n")
    assert piped.stderr == b"\r1/2\x1b[K note\\x07\n"
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", SAY], stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 4096).replace(b"\r\n", b"\n")
    os.close(ours)
    assert b"an\\x1b[2J answer\n\r1/2\x1b[K note\\x07\nutf-8 1 True <_io." in shown
