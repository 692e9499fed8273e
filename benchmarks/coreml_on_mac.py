"""What Core ML makes of a bundle on this Mac: compile, load, plan, time, compare; one JSON file.

python benchmarks/coreml_on_mac.py BUNDLE [--json FILE] [--compute all cpu cpu-gpu cpu-ne]
    [--warmup 3] [--runs 20]

The plan is what Core ML says it would do before it runs: the device it prefers for each operation,
and that operation's share of the estimated cost. Outputs are compared with the interpreter's, on
random inputs. Every result is written as soon as it is there.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_vlm_edge_bench.bench import machine
from mlx_vlm_edge_bench.bench.figures import Figure
from mlx_vlm_edge_bench.bench.saved import Save, writable
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.emit.toolkit import tools
from mlx_vlm_edge_convert.coreml.names import IMAGE, MASK
from mlx_vlm_edge_convert.coreml.parity import distance
from mlx_vlm_edge_convert.coreml.run.runner import UNITS, CoreMLPackage, compiled, require_mac

from mlx_vlm_edge.errors import UsageError

DEVICES = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}
NONE = "not said"  # constants, mostly, have no device and no cost
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """One function of a package, with inputs and what the interpreter makes of them."""

    package: Path
    function: str
    inputs: Inputs
    expected: Mapping[str, np.ndarray]


def random_inputs(ports: Sequence[Mapping[str, Any]], seed: int = 0) -> Inputs:
    """For a function's inputs: pictures of 0..255, masks that hide nothing, small numbers else.

    Integers are positions: 0.
    """
    rng, inputs = np.random.default_rng(seed), {}
    for port in ports:
        shape = tuple(port["shape"])
        if port["kind"] == "image" or port["name"] == IMAGE:
            inputs[port["name"]] = rng.integers(0, 256, shape).astype(np.float32)
        elif port["dtype"] == "int32":
            inputs[port["name"]] = np.zeros(shape, np.int32)
        elif port["name"] == MASK:
            inputs[port["name"]] = np.zeros(shape, np.float32)
        else:
            inputs[port["name"]] = rng.standard_normal(shape).astype(np.float32) * 0.1
    return inputs


def work(folder: Path, content: Mapping[str, Any]) -> Iterator[Work]:
    """The functions of a bundle's packages."""
    for part in content["parts"].values():
        package = folder / part["package"]
        interpreter = Package(package)
        for function, entry in part["functions"].items():
            inputs = random_inputs(entry["inputs"])
            yield Work(package, function, inputs, interpreter.run(function, inputs))


def plan(path: Path, units: str, functions: Sequence[str]) -> dict[str, Any]:
    """By function: how many operations Core ML would run on each device, and their cost's share."""
    models = tools().ct.models.compute_plan
    chosen = getattr(tools().ct.ComputeUnit, UNITS[units])
    loaded = models.MLComputePlan.load_from_path(str(path), compute_units=chosen)
    program = loaded.model_structure.program
    if program is None:
        raise UsageError(f"{path.name}: is no ML program")
    known = program.functions
    return {name: placed(loaded, known[name].block) for name in functions if name in known}


def placed(loaded: Any, block: Any) -> dict[str, Any]:
    """Operations, their share of the cost and their kinds, by the device that Core ML prefers."""
    counts: dict[str, int] = {}
    costs: dict[str, float] = {}
    kinds: dict[str, dict[str, int]] = {}
    for operation in operations(block):
        usage = loaded.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = loaded.get_estimated_cost_for_mlprogram_operation(operation)
        device = NONE if usage is None else device_name(usage.preferred_compute_device)
        counts[device] = counts.get(device, 0) + 1
        costs[device] = costs.get(device, 0.0) + (0.0 if cost is None else cost.weight)
        if usage is not None:
            by_kind = kinds.setdefault(device, {})
            by_kind[operation.operator_name] = by_kind.get(operation.operator_name, 0) + 1
    return {"operations": counts, "cost": costs, "kinds": kinds}


def operations(block: Any) -> Iterator[Any]:
    """Those of a block and of the blocks in it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from operations(inner)


def device_name(device: Any) -> str:
    """As people call it; a class that is not known by its own name."""
    return DEVICES.get(type(device).__name__, type(device).__name__)


def timed(predict: Callable[[], Any], warmup: int, runs: int) -> Figure:
    """Seconds of a prediction; the first warm-up's apart."""
    seconds = [clocked(predict) for _ in range(warmup + runs)]
    return Figure(tuple(seconds[warmup:]), seconds[0] if warmup else None)


def clocked(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def error(outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest of the outputs' relative errors; infinite where one is missing or not finite."""
    return max(distance(outputs.get(name), array) for name, array in expected.items())


def measured(item: Work, path: Path, units: str, warmup: int, runs: int) -> dict[str, Any]:
    """One function on one choice of compute units."""
    device = CoreMLPackage(item.package, path, units)
    load = clocked(lambda: device.model(item.function))
    stateful = bool(device.interface[item.function]["states"])

    state = device.new_state(item.function) if stateful else None
    outputs = device.run(item.function, item.inputs, state)
    entered = device.entered(item.function, item.inputs)
    model = device.model(item.function)
    arguments = (entered,) if state is None else (entered, state)
    figure = timed(lambda: model.predict(*arguments), warmup, runs)
    return {
        "load_s": load,
        "predict_s": figure.record(),
        "relative_error": error(outputs, item.expected),
    }


def bench(folder: Path, units: Sequence[str], warmup: int, runs: int, save: Save) -> dict[str, Any]:
    """Measure a bundle; the record so far is saved after every step."""
    content = manifest.read(folder)
    record: dict[str, Any] = {
        "machine": machine.record(),
        "coremltools": tools().ct.__version__,
        "model": content["model"],
        "settings": {"warmup": warmup, "runs": runs},
        "packages": {},
    }
    with tempfile.TemporaryDirectory() as cache:
        for item in work(folder, content):
            entry = record["packages"].setdefault(item.package.name, {"functions": {}})
            started = time.perf_counter()
            path = compiled(item.package, Path(cache))
            entry.setdefault("compile_s", time.perf_counter() - started)
            results = entry["functions"].setdefault(item.function, {})
            for choice in units:
                results[choice] = attempt(item, path, choice, warmup, runs)
                print(line(item, choice, results[choice]), flush=True)
                save(record)
    return record


def attempt(item: Work, path: Path, units: str, warmup: int, runs: int) -> dict[str, Any]:
    """Plan and figures, or Core ML's own words where it refuses."""
    try:
        return {
            "plan": plan(path, units, [item.function]).get(item.function),
            **measured(item, path, units, warmup, runs),
        }
    except (UsageError, RuntimeError) as failure:
        return {"failed": str(failure)}


def line(item: Work, units: str, result: Mapping[str, Any]) -> str:
    """One result for people."""
    head = f"{item.package.stem} {item.function} {units}:"
    if "failed" in result:
        return f"{head} failed: {result['failed']}"
    seconds, placed = result["predict_s"], result["plan"] or {"operations": {}, "cost": {}}
    devices = ", ".join(
        f"{device} {count} ({placed['cost'][device]:.0%} of the cost)"
        for device, count in sorted(placed["operations"].items())
        if device != NONE
    )
    spread = "" if seconds["spread"] is None else f", spread {seconds['spread']:.0%}"
    return (
        f"{head} {seconds['median'] * 1000:.2f} ms (min {seconds['min'] * 1000:.2f}{spread}), "
        f"error {result['relative_error']:.1e}; operations planned: {devices or 'not said'}"
    )


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path, help="folder that `mlx-vlm-edge export` wrote")
    parser.add_argument("--json", metavar="FILE", default="coreml.json", help="result file")
    parser.add_argument("--compute", nargs="+", choices=UNITS, default=[*UNITS], metavar="UNITS")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args(arguments)
    if args.runs < 1 or args.warmup < 0:
        parser.error("--runs takes a number above zero, --warmup one from zero on")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    try:
        require_mac()
        with writable(args.json) as save:
            bench(args.bundle, args.compute, args.warmup, args.runs, save)
    except UsageError as mistake:
        print(f"coreml_on_mac: error: {mistake}", file=sys.stderr)
        return 2
    print(f"written to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
