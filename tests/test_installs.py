"""tests/tools/installs.py: which Python it takes."""

from .tools import installs


def test_a_python_without_pip_s_bundle_is_passed_over(tmp_path, monkeypatch):
    programs = {"bare": '! echo "$2" | grep -q ensurepip', "whole": "true"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    both = [str(tmp_path / name) for name in programs]
    monkeypatch.setattr(installs, "interpreters", lambda _: both)
    assert installs.python_of("3.12") == both[1]
