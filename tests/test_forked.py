"""A child that is forked after MLX was used is refused; it would wait for ever."""

import subprocess
import sys

import pytest

PROGRAM = """if True:
    import os
    from mlx_vlm_edge import UsageError, generate, load
    model, processor = load({folder!r})
    pid = os.fork()
    if not pid:
        for use in (lambda: load({folder!r}), lambda: generate(model, processor, "Hi")):
            try:
                use()
            except UsageError as error:
                print(error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print(len(generate(model, processor, "Hi", max_tokens=2, full=True).text))
"""
LOADS_IN_THE_CHILD = """if True:
    import os
    from mlx_vlm_edge import generate, load
    pid = os.fork()
    if not pid:
        generate(*load({folder!r}), "Hi", max_tokens=2)
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing forks there")


def lines(program: str, folder: object) -> list[str]:
    code = program.format(folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_a_child_of_a_process_that_used_mlx_is_told(native_folder):
    *told, _ = lines(PROGRAM, native_folder)
    assert len(told) == 2
    assert all("forked from one that has used MLX" in line for line in told)


def test_a_child_may_use_it_first(native_folder):
    assert lines(LOADS_IN_THE_CHILD, native_folder) == ["7"]
