"""`mlx-vlm-edge models list | pull | show | verify | rm`: the models here and how to get more."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hub.cache import cache_folder, cached_models, local_snapshot, snapshot_folder
from ..hub.models import ALIASES, DEMO, expanded, locate, pull, repo_id
from ..wording import gigabytes

HELP = "List, pull, show, verify and remove models."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="action", required=True, metavar="list | pull | show | verify | rm"
    )
    listing = verbs.add_parser("list", help="what is on this machine, with its size")
    listing.add_argument("--json", action="store_true", help="print JSON")
    pulling = verbs.add_parser("pull", help="download a model")
    showing = verbs.add_parser("show", help="what a model is: parts, sizes, licence")
    verifying = verbs.add_parser("verify", help="whether a model's files are whole and unchanged")
    for verb in (showing, verifying):
        verb.add_argument("--json", action="store_true", help="print JSON")
    showing.add_argument("--offline", action="store_true", help="never touch the network")
    for verb in (pulling, showing, verifying):
        verb.add_argument("name", help="alias or Hub id (show, verify: or a folder)")
        verb.add_argument("--revision", help="branch, tag or commit of a Hub model")
    removing = verbs.add_parser("rm", help="remove a downloaded model")
    removing.add_argument("name", help="alias or Hub id")
    removing.add_argument("--yes", "-y", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    actions = {
        "list": _list, "pull": _pull, "show": _show, "verify": _verify, "rm": _remove,
    }  # fmt: skip
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:

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
    bundled = sum(path.stat().st_size for path in locate(DEMO).iterdir() if path.is_file())
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


def _pull(args: argparse.Namespace) -> int:
    print(pull(args.name, revision=args.revision))
    return 0


def _show(args: argparse.Namespace) -> int:
    path = expanded(args.name)
    folder = path if path.is_dir() or args.name == "demo" else None
    if folder is None:
        folder = local_snapshot(repo_id(args.name), args.revision)
    elif args.name == "demo" and not path.is_dir():
        folder = locate("demo")
    facts = _remote_facts(args) if folder is None else _local_facts(folder)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        print(f"{key + ':':18} {value}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..hub.verify import known_files, problems

    path = expanded(args.name)
    if path.is_dir() or args.name == DEMO:
        folder = locate(args.name, revision=args.revision)
    else:
        folder = snapshot_folder(repo_id(args.name), args.revision)
        if not folder.is_dir():
            raise UsageError(f"{repo_id(args.name)} is not on this machine: there is nothing here")
    files = known_files(folder)
    wrong = list(problems(folder, files))
    if args.json:
        print(json.dumps({"folder": str(folder), "hashes": len(files), "problems": wrong}))
        return 1 if wrong else 0
    for line in wrong:
        print(line)
    if not wrong:
        held = f"{len(files)} files are the Hub's" if files else "whole; no hashes to hold it to"
        print(f"{folder}: {held}; its weights are finite")
    elif files:
        print(f"`mlx-vlm-edge models pull {args.name}` mends it", file=sys.stderr)
    return 1 if wrong else 0


def _remote_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the Hub says of a model that is not here."""
    repo = repo_id(args.name)
    if args.offline:
        raise UsageError(f"{repo} is not on this machine; without --offline the Hub is asked")
    from ..hub.download import describe

    remote = describe(repo, args.revision)
    return {
        "model": repo,
        "on this machine": f"no; `mlx-vlm-edge models pull {args.name}` gets it",
        "download": gigabytes(remote.nbytes),
        "licence": remote.licence,
    }


def _local_facts(folder: Path) -> dict[str, Any]:
    """What a model folder's config and files say."""
    from ..checkpoint.config import read_config

    config = read_config(folder)
    text = {**(config.get("text_config") or {}), **config}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    facts = {
        "model": str(folder),
        "family": config.get("model_type", "unknown"),
        "language model": _language_model(text),
        **_vision(config),
        "quantisation": _quantisation(config.get("quantization")),
        "size": gigabytes(size),
        "licence": licence(folder),
    }
    return {key: value for key, value in facts.items() if value}


def _language_model(text: dict[str, Any]) -> str:
    heads = text.get("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    return (
        f"{text.get('num_hidden_layers')} layers, width {text.get('hidden_size')}, "
        f"{heads} heads ({kv_heads} for keys and values), vocabulary {text.get('vocab_size')}"
    )


def _vision(config: dict[str, Any]) -> dict[str, str]:
    """Image size, tower and tokens per image, as far as the config has them."""
    vision = config.get("vision_config") or {}
    tower = str(config.get("mm_vision_tower", "")).rsplit("_", 1)[-1]
    side = vision.get("image_size") or (int(tower) if tower.isdigit() else None)
    facts = {}
    if vision.get("embed_dims"):
        facts["vision tower"] = f"layers {vision['layers']}, widths {vision['embed_dims']}"
    tokens = config.get("image_seq_length")
    if side:
        facts["image size"] = f"{side} x {side}"
        patch = vision.get("patch_size", 64 if config.get("model_type") == "llava_qwen2" else None)
        tokens = tokens or (patch and (side // patch) ** 2)
    if tokens:
        facts["tokens per image"] = str(tokens)
    return facts


def _quantisation(block: dict[str, Any] | None) -> str:
    if not block:
        return "none"
    return f"{block.get('bits')} bits, groups of {block.get('group_size')}"


def licence(folder: Path) -> str:
    """The licence that README.md's front matter names, else the licence file's first line."""
    readme = folder / "README.md"
    if readme.is_file():
        front = readme.read_text(encoding="utf-8", errors="replace").split("---")
        for line in front[1].splitlines() if len(front) > 2 else []:
            key, _, value = line.partition(":")
            if key.strip() in ("license_name", "license") and value.strip():
                return value.strip()
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return f"{path.name}: {next((line.strip() for line in lines if line.strip()), '')}"
    return "not stated in its files"


def _remove(args: argparse.Namespace) -> int:
    import shutil

    repo = repo_id(args.name)
    model = next((model for model in cached_models([repo]) if model.repo == repo), None)
    if model is None:
        raise UsageError(f"{repo} is not among the downloaded models (`mlx-vlm-edge models list`)")
    if not args.yes and not _confirmed(f"remove {repo} ({gigabytes(model.nbytes)})? [y/N] "):
        print("kept", file=sys.stderr)
        return 1
    shutil.rmtree(model.folder)
    print(f"removed {repo}, {gigabytes(model.nbytes)}", file=sys.stderr)
    return 0


def _confirmed(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
