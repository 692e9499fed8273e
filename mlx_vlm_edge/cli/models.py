"""`mlx-vlm-edge models list | pull | show | verify | rm`: the models here and how to get more."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hub.cache import cache_folder, cached_models, remove, snapshot_folder, usable_snapshot
from ..hub.models import ALIASES, DEMO, expanded, obtain, pull, repo_id
from ..wording import gigabytes
from . import streams

INTERRUPTED = 130  # exit code
SIZES = ("size", "download")  # facts that are bytes
HELP = "List, pull, show, verify and remove models."
PICTURES = ((640, 480), (1920, 1080), (1024, 1024))  # whose visual tokens are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="action", required=True, metavar="list | pull | show | verify | rm"
    )
    listing = verbs.add_parser(
        "list", aliases=["ls"], help="what is on this machine, with its size"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    one_of = listing.add_mutually_exclusive_group()
    one_of.add_argument(
        "--coreml", action="store_true", help="the packages that --vision-backend coreml exported"
    )
    one_of.add_argument(
        "--available", action="store_true",
        help="every model with a short name: size, memory here, licence",
    )  # fmt: skip
    pulling = verbs.add_parser("pull", help="download a model")
    showing = verbs.add_parser("show", help="what a model is: parts, sizes, licence")
    verifying = verbs.add_parser("verify", help="whether a model's files are whole and unchanged")
    for verb in (showing, verifying):
        verb.add_argument("--json", action="store_true", help="print JSON")
    showing.add_argument("--offline", action="store_true", help="never touch the network")
    for verb in (pulling, showing, verifying):
        verb.add_argument("name", help="alias or Hub id (show, verify: or a folder)")
        verb.add_argument("--revision", help="branch, tag or commit of a Hub model")
    removing = verbs.add_parser("rm", aliases=["remove"], help="remove a downloaded model")
    removing.add_argument("name", nargs="?", help="alias or Hub id; with --coreml a package")
    removing.add_argument(
        "--coreml", action="store_true",
        help="packages that --vision-backend coreml exported: NAME as listed, or all",
    )  # fmt: skip
    removing.add_argument("--yes", "-y", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    actions = {
        "list": _list, "ls": _list, "pull": _pull, "show": _show, "verify": _verify,
        "rm": _remove, "remove": _remove,
    }  # fmt: skip
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    if args.coreml:
        return _list_packages(args)
    if args.available:
        return _list_available(args)
    names = {repo: alias for alias, repo in ALIASES.items()}
    rows: list[dict[str, Any]] = [
        {
            "name": names.get(model.repo, model.repo),
            "repo": model.repo,
            "bytes": model.nbytes,
            "complete": model.complete,
        }
        for model in cached_models(names)
    ]
    here = {row["name"] for row in rows}
    bundled = sum(path.stat().st_size for path in obtain(DEMO).iterdir() if path.is_file())
    rows.append({"name": DEMO, "repo": None, "bytes": bundled, "complete": True})
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        note = "" if row["complete"] else "  incomplete: pull it again"
        note = note if row["repo"] else "  bundled"
        print(f"{row['name']:32} {gigabytes(row['bytes']):>9}{note}")
    if more := [alias for alias in ALIASES if alias not in here]:
        print(f"in {cache_folder()}; to pull: {', '.join(more)}", file=sys.stderr)
    return 0


def _list_available(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..loading.memory import usable
    from .available import heading, line, models

    if args.json:
        print(json.dumps([asdict(model) for model in models()]))
        return 0
    print(heading())
    limit = usable()
    for model in models():
        print(line(model, limit), flush=True)
    print(
        "weights in their published dtype, towers that stand elsewhere with them; memory for a "
        "short question about a picture on this machine; "
        "the licence is the publisher's word for it: read it before use",
        file=sys.stderr,
    )
    return 0


def _list_packages(args: argparse.Namespace) -> int:
    from mlx_vlm_edge_convert.coreml.run import cache

    packages = cache.entries()
    if args.json:
        rows = [{"name": p.name, "bytes": p.nbytes, **p.about} for p in packages]
        print(json.dumps(rows))
        return 0
    for package in packages:
        print(f"{package.name:26} {gigabytes(package.nbytes):>9}  {package.description}")
    print(f"{len(packages)} in {cache.folder()}", file=sys.stderr)
    return 0


def _remove_packages(args: argparse.Namespace) -> int:
    from mlx_vlm_edge_convert.coreml.run import cache

    packages = [p for p in cache.entries() if args.name in (None, p.name, p.about.get("model"))]
    if args.name and not packages:
        raise UsageError(f"{args.name} is no package of `mlx-vlm-edge models list --coreml`")
    size = gigabytes(sum(package.nbytes for package in packages))
    what = f"{len(packages)} Core ML package{'' if len(packages) == 1 else 's'} ({size})"
    if not args.yes and not confirmed(f"remove {what}? [y/N] "):
        print("kept", file=sys.stderr)
        return 1
    cache.clear(packages)
    print(f"removed {what}", file=sys.stderr)
    return 0


def _pull(args: argparse.Namespace) -> int:
    from ..text.saved_tokenizer import remember

    folder = fetched(args.name, args.revision)
    remember(folder)
    print(folder)
    for repo in _towers_elsewhere(folder):
        if usable_snapshot(repo) is None:
            gets = f"`mlx-vlm-edge models pull {repo}` gets it"
            print(f"note: it needs the vision tower {repo}: {gets}", file=sys.stderr)
    return 0


def _towers_elsewhere(folder: Path) -> list[str]:
    """Repositories of vision towers that the model of a folder needs beside it."""
    from ..checkpoint.config import read_config

    try:
        config = read_config(folder)
        return [] if "text_config" in config else _towers(config)
    except UsageError:  # a repository of another kind, such as a tower
        return []


def _towers(config: dict[str, Any]) -> list[str]:
    from mlx_vlm_edge_convert import tower_repositories

    return tower_repositories(config)


def fetched(name: str, revision: str | None = None) -> Path:
    """`pull`, which Ctrl-C ends at once."""
    try:
        return pull(name, revision=revision)
    except KeyboardInterrupt:  # already told what is here; the threads of the download go on
        sys.stdout.flush()
        os._exit(INTERRUPTED)


def _show(args: argparse.Namespace) -> int:
    path = expanded(args.name)
    if path.is_dir() or args.name == DEMO:
        facts = _local_facts(obtain(args.name, revision=args.revision))
    elif usable_snapshot(repo_id(args.name), args.revision):
        facts = _local_facts(obtain(args.name, revision=args.revision, offline=True))
    else:
        facts = _remote_facts(args)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        print(f"{key + ':':18} {_said(key, value)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..hub.verify import changed, damages, known_files

    path = expanded(args.name)
    if path.is_dir() or args.name == DEMO:
        folder = obtain(args.name, revision=args.revision)
    else:
        folder = snapshot_folder(repo_id(args.name), args.revision)
        if not folder.is_dir():
            raise UsageError(f"{repo_id(args.name)} is not on this machine: there is nothing here")
    files = known_files(folder)
    fetched_again = changed(folder, files)
    wrong = [*fetched_again, *damages(folder, as_published=bool(files))]
    if args.json:
        print(json.dumps({"folder": str(folder), "hashes": len(files), "problems": wrong}))
        return 1 if wrong else 0
    for line in wrong:
        print(line)
    if not wrong:
        held = f"{len(files)} files are the Hub's" if files else "whole; no hashes to hold it to"
        print(f"{folder}: {held}; its weights are finite")
    elif fetched_again:
        print(f"`mlx-vlm-edge models pull {args.name}` mends it", file=sys.stderr)
    return 1 if wrong else 0


def _said(key: str, value: Any) -> str:
    """A fact for people: 2873 -> "2,873", {"640x480": 256} -> "256 of 640x480 pixels"."""
    if key in SIZES:
        return gigabytes(value)
    if key == "memory":
        free = f"; {gigabytes(value['free'])} are free here" if value["free"] else ""
        return (
            f"{gigabytes(value['total'])} for a short question about a picture: weights "
            f"{gigabytes(value['weights'])} ({gigabytes(value['read'])} read for a token), "
            f"KV cache {gigabytes(value['cache'])} "
            f"({gigabytes(value['cache_position'])} a position), activations about "
            f"{gigabytes(value['activations'])}, the program {gigabytes(value['program'])}{free}"
        )
    if isinstance(value, dict):
        return ", ".join(f"{count:,} of {size} pixels" for size, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _remote_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a model that is not here: by its config, where that is shipped, and by the
    Hub, unless the user is offline. The Hub's part may be missing where there is a config."""
    from ..loading.cost import known_config

    repo = repo_id(args.name)
    facts: dict[str, Any] = {
        "model": repo,
        "on this machine": f"no; `mlx-vlm-edge models pull {args.name}` gets it",
    }
    config = known_config(args.name, args.revision)
    if config is not None:
        facts |= _config_facts(config) | _said_of_towers(_towers(config))
    try:
        if args.offline:
            raise UsageError(f"{repo} is not on this machine; without --offline the Hub is asked")
        from ..hub.download import describe

        remote = describe(repo, args.revision)
    except UsageError as error:
        if config is None:
            raise
        print(f"size and licence are not known: {error}", file=sys.stderr)
        return facts
    return {**facts, "download": remote.nbytes, "licence": remote.licence}


def _local_facts(folder: Path) -> dict[str, Any]:
    """What a model folder's config and files say."""
    from ..checkpoint.config import read_config
    from ..checkpoint.licence import licence
    from ..loading.cost import native

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "model": str(folder),
        **_config_facts(native(read_config(folder))),
        **_said_of_towers(_towers_elsewhere(folder)),
        "size": size,
        "licence": licence(folder),
    }


def _said_of_towers(repositories: list[str]) -> dict[str, str]:
    return {"vision towers of": ", ".join(repositories)} if repositories else {}


def _config_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What a native config says, asked of the model in its shapes and of its processor."""
    from ..loading.cost import blueprint
    from ..picture.pieces import cut_out
    from ..picture.token_budget import METHODS

    plan = blueprint(config, dtype=None, quantization=config.get("quantization"))
    text, tower = plan.config.text, config.get("vision_config") or {}
    heads = text.num_attention_heads
    facts: dict[str, Any] = {
        "family": config["model_type"],
        "language model": (
            f"{text.num_hidden_layers} layers, width {text.hidden_size}, {heads} heads "
            f"({getattr(text, 'num_key_value_heads', heads)} for keys and values), "
            f"vocabulary {text.vocab_size}"
        ),
    }
    if tower.get("embed_dims"):
        facts["vision tower"] = f"layers {tower['layers']}, widths {tower['embed_dims']}"
    views = {f"{width}x{height}": plan.pixels((width, height)) for width, height in PICTURES}
    sizes = {
        tuple(dict.fromkeys(piece.shape[:2] for piece in cut_out(pixels)))
        for pixels in views.values()
    }
    if len(sizes) == 1:
        several = sizes.pop()
        tiled = len(several) == 1 and any(pixels.data.ndim == 4 for pixels in views.values())
        shown = ", ".join(f"{width} x {height}" for height, width in several)
        facts["image size"] = f"{shown}{' a tile' if tiled else ''}"
    counts = {size: plan.processor.visual_tokens(pixels) for size, pixels in views.items()}
    same = len(set(counts.values())) == 1
    facts["tokens per image"] = next(iter(counts.values())) if same else counts
    methods = plan.processor.methods(plan.config)
    facts["fewer of them by"] = ", ".join(name for name in METHODS if name in methods)
    facts["quantisation"] = _quantisation(plan.model)
    facts["memory"] = _memory(config)
    return facts


def _memory(config: dict[str, Any]) -> dict[str, int | None]:
    """Bytes that a short question about a picture takes here, and what there is. "read": weights
    that one more token reads, which are not all where a token goes to some experts only."""
    from ..loading import memory

    cost = memory.needed(config)
    parts = memory.of_question(cost)
    return {
        "total": sum(parts.values()),
        "weights": parts["weights"],
        "read": cost.step.weights,
        "cache": parts["KV cache"],
        "cache_position": cost.cached,
        "activations": parts["activations (estimated)"],
        "program": parts["program"],
        "free": memory.usable(),
    }


def _quantisation(model: Any) -> str:
    """ "4 bits, groups of 64", of every kind that the layers have."""
    layers = [layer for layer in model.modules() if "scales" in layer]
    kinds = sorted({(layer.bits, layer.group_size) for layer in layers})
    return "; ".join(f"{bits} bits, groups of {size}" for bits, size in kinds) or "none"


def _remove(args: argparse.Namespace) -> int:
    if args.coreml:
        return _remove_packages(args)
    if not args.name:
        raise UsageError("name the model to remove (`mlx-vlm-edge models list`)")
    repo = repo_id(args.name)
    model = next((model for model in cached_models([repo]) if model.repo == repo), None)
    if model is None:
        raise UsageError(f"{repo} is not among the downloaded models (`mlx-vlm-edge models list`)")
    if not args.yes and not confirmed(f"remove {repo} ({gigabytes(model.nbytes)})? [y/N] "):
        print("kept", file=sys.stderr)
        return 1
    remove(model)
    print(f"removed {repo}, {gigabytes(model.nbytes)}", file=sys.stderr)
    return 0


def confirmed(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return not streams.input_closed() and sys.stdin.readline().strip().lower() in ("y", "yes")
