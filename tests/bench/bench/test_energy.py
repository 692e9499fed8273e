"""powermetrics' output, made here as it prints it: plists with NUL bytes between."""

import os
import plistlib
import time

import pytest
from mlx_vlm_edge_bench.bench import energy


def sample(seconds, **processor):
    return plistlib.dumps({"elapsed_ns": int(seconds * 1e9), "processor": processor})


def test_energy_is_power_times_time():
    output = b"\0".join([sample(0.1, combined_power=20_000.0), sample(0.3, combined_power=10_000)])
    found = energy.parse(output)
    assert found.joules == pytest.approx(5)
    assert found.seconds == pytest.approx(0.4)
    record = found.record(2)
    assert record == {"joules_per_answer": 2.5, "watts": pytest.approx(12.5), "answers": 2}


def test_without_a_sum_the_parts_are_added():
    output = sample(0.1, cpu_energy=500, gpu_energy=1500, ane_energy=0)
    assert energy.parse(output).joules == 2


def test_a_sample_that_is_cut_off_is_left_out():
    whole = sample(0.1, combined_power=1000)
    found = energy.parse(whole + b"\0" + whole[: len(whole) // 2] + b"\0")
    assert found.seconds == pytest.approx(0.1)
    assert energy.parse(b"") == energy.Energy(0, 0)
    assert energy.parse(b"").record(1)["watts"] == 0


def test_why_energy_cannot_be_measured_is_one_line():
    assert energy.unavailable("Linux") == energy.ONLY_MACOS
    assert energy.unavailable("Darwin", lambda: False) == energy.ONLY_ROOT
    assert energy.unavailable("Darwin", lambda: True) == ""
    assert "\n" not in energy.ONLY_MACOS + energy.ONLY_ROOT


def test_all_of_a_long_output_is_read(tmp_path, monkeypatch):
    """More than a pipe holds, from a double of sudo that writes until it is told to end."""
    samples = tmp_path / "samples"
    samples.write_bytes((sample(0.1, combined_power=1000.0, padding="x" * 5000) + b"\0") * 100)
    sudo = tmp_path / "sudo"
    sudo.write_text(f"#!/bin/sh\ncat {samples}\ntouch {tmp_path}/done\nexec sleep 60\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answer():
        while not (tmp_path / "done").exists():
            time.sleep(0.01)

    assert energy.measure(answer, 2).seconds == pytest.approx(10)
