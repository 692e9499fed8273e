"""What systems say of themselves, by doubles of their commands."""

import pytest
from mlx_vlm_edge_bench.bench import machine

from mlx_vlm_edge.loading import memory

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            500000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        200000.
Pages purgeable:                           1000.
"Translation faults":                 123456789.
"""
IOREG = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000538, registered>
    {
      "model" = "Apple M1 Max"
      "gpu-core-count" = 32
    }
"""
MAC = {
    ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M1 Max",
    ("sysctl", "-n", "hw.model"): "MacBookPro18,2",
    ("sysctl", "-n", "hw.memsize"): "34359738368",
    ("ioreg", "-rc", "AGXAccelerator"): IOREG,
    ("vm_stat",): VM_STAT,
}


def mac(command):
    return MAC.get(tuple(command), "")


def test_a_mac_tells_chip_cores_and_memory():
    found = machine.record(mac, "Darwin")
    assert (found["chip"], found["model"]) == ("Apple M1 Max", "MacBookPro18,2")
    assert (found["gpu_cores"], found["memory_bytes"]) == (32, 34359738368)
    assert found["os"].startswith("macOS")
    assert memory.free_memory(mac, "Darwin") == 34_000 * 16384


def test_a_system_that_tells_nothing_is_no_failure():
    found = machine.record(lambda command: "", "Darwin")
    assert (found["chip"], found["gpu_cores"], found["memory_bytes"]) == (None, None, None)
    assert memory.free_memory(lambda command: "", "Darwin") is None
    assert "unknown chip" in machine.summary(found)


def test_linux_tells_by_its_files():
    text = "MemTotal:  9 kB\nMemAvailable:   2048 kB\n"
    assert memory.parse_meminfo("MemAvailable", text) == 2 << 20
    assert memory.parse_meminfo("MemAvailable", "") is None
    cpuinfo = "processor : 0\nmodel name\t: AMD EPYC 9B14\nflags : x\nmodel name : other\n"
    assert machine._linux(cpuinfo) == {"chip": "AMD EPYC 9B14"}


def test_the_record_has_everything_a_figure_depends_on():
    found = machine.record(memory.ask)
    assert found["device"] in ("CPU", "GPU")
    assert {"mlx", "numpy", "tokenizers"} <= found["versions"].keys()
    for key in ("python", "os", "date", "blas", "threads", "commit", "mlx_vlm_edge", "cores"):
        assert key in found
    assert found["versions"]["mlx"] in machine.summary(found)


def test_a_command_that_is_not_there_gives_nothing():
    assert memory.ask(["no-such-command-here"]) == ""
    assert memory.ask(["false"]) == ""


@pytest.mark.parametrize(
    ("chip", "claimed", "same"),
    [
        ("Apple M1 Max", "M1 Max", True),
        ("Apple M1", "M1 Max", False),
        ("Apple M1 Max", "M1", False),
        ("AMD EPYC", "M1 Max", False),
        (None, "M1 Max", False),
        ("Apple M1 Max", None, False),
    ],
)
def test_milliseconds_are_compared_on_one_chip(chip, claimed, same):
    assert machine.same_chip(chip, claimed) is same


def test_a_busy_machine_is_said():
    assert machine.busy(1.0, 2) == machine.busy(None, 2) == machine.busy(9.0, None) == ""
    assert "load average is 1.5 on 2 cores" in machine.busy(1.5, 2)
