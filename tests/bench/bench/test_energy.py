"""powermetrics' output, made here as it prints it: plists with NUL bytes between."""

import os
import plistlib
import signal
import subprocess
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


# A double of sudo, as root's: writes samples until sudo, and nobody else, ends it.
SUDO = """#!/bin/sh
[ "$2" = kill ] && {kill}
cat {folder}/samples
touch {folder}/done
exec sleep 60
"""


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Puts the double in sudo's place: what its `kill` does -> an answer that waits for samples."""

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    started = []
    real = subprocess.Popen.__init__

    def watched(process, command, **options):
        real(process, command, **options)
        started.append((process, command))

    for way in ("send_signal", "terminate", "kill"):
        monkeypatch.setattr(subprocess.Popen, way, refused)
    monkeypatch.setattr(subprocess.Popen, "__init__", watched)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(energy, "PATIENCE", 5)
    samples = (sample(0.1, combined_power=1000.0, padding="x" * 5000) + b"\0") * 100
    (tmp_path / "samples").write_bytes(samples)  # more than a pipe holds

    def double(kill):
        sudo = tmp_path / "sudo"
        sudo.write_text(SUDO.format(kill=kill, folder=tmp_path))
        sudo.chmod(0o755)

        def answer():
            while not (tmp_path / "done").exists():
                time.sleep(0.01)

        return answer

    yield double, started
    for process, command in started:
        if command[2] != "kill" and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def test_all_of_a_long_output_is_read_and_the_sampler_ended_as_root(roots):
    double, started = roots
    assert energy.measure(double('exec kill "$3"'), 2).seconds == pytest.approx(10)
    (sampler, command), _ = started
    assert sampler.returncode is not None
    assert command[-2:] == ["-n", str(energy.LONGEST * 10)], "it ends by itself as well"


@pytest.mark.parametrize("kill", ["exit 1", "exit 0"])
def test_a_sampler_that_cannot_be_ended_is_one_line(roots, kill, monkeypatch):
    """sudo asks for a password by then, or its signal is not passed on."""
    monkeypatch.setattr(energy, "PATIENCE", 0.5)
    double, _ = roots
    with pytest.raises(
        energy.NotMeasuredError, match="could not be ended; it ends by itself"
    ) as told:
        energy.measure(double(kill), 1)
    assert "\n" not in str(told.value)


def test_samples_that_end_before_the_answers_are_no_measurement(roots):
    _, started = roots
    roots[0]("exit 0")

    def answer():
        process = started[0][0]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    with pytest.raises(energy.NotMeasuredError, match="ended before the answers did"):
        energy.measure(answer, 1)


def test_what_an_answer_raises_comes_through(roots):
    double, started = roots

    def interrupted():
        raise KeyboardInterrupt

    double('exec kill "$3"')
    with pytest.raises(KeyboardInterrupt):
        energy.measure(interrupted, 1)
    assert started[0][0].returncode is not None
