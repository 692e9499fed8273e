"""Completion, asked of the shells themselves."""

import shutil
import subprocess

import pytest

from mlx_vlm_edge import cli


def script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(capsys, *words):
    """What bash offers for the last word."""
    ask = f"COMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}"
    text = f'{script("bash", capsys)}\n{ask}\n_mlx_vlm_edge\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ge"], ["generate"]),
        (["generate", "--pro"], ["--prompt"]),
        (["generate", "--dtype", "b"], ["bfloat16"]),
        (["generate", "--model", "fastvlm-0"], ["fastvlm-0.5b"]),
        (["models", "pu"], ["pull"]),
        (["models", "pull", "eve-7b-hd"], ["eve-7b-hd", "eve-7b-hd-v2"]),
        (["generate", "--image", "pho"], []),
    ],
)
def test_bash(words, offered, capsys):
    assert completed(capsys, "mlx-vlm-edge", *words) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(shell, capsys, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script(shell, capsys))
    done = subprocess.run(
        [shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
