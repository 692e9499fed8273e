"""`mlx-vlm-edge serve`: an HTTP server that OpenAI's clients can use, and a page to try it on."""

import argparse
import ipaddress
import os
import re
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..checkpoint.adapter_choice import AdapterChoice
    from ..generation.engine import Engine
    from ..loading.load import LoadOptions

    Named = Mapping[str, AdapterChoice]

HELP = "Serve a model over HTTP (OpenAI API), with a page to try it on."
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXTRA = (
    "serving needs more packages: pip install 'starlette' 'uvicorn' 'pydantic' 'prometheus-client'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .flags import add_model_group, add_picture_arguments

    add_model_group(parser, named_adapters=True)
    add_picture_arguments(parser.add_argument_group("pictures"))
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on")
    network.add_argument("--port", type=int, default=8080, metavar="N", help="0 takes a free one")
    network.add_argument(
        "--api-key", metavar="KEY",
        help="what clients must send; needed for any host but this machine "
        "(or set MLX_VLM_EDGE_API_KEY)",
    )  # fmt: skip
    network.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another name under which this server is reached, without a port",
    )  # fmt: skip
    network.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL",
        help="a page that may use this server from a browser, such as https://example.org",
    )  # fmt: skip
    network.add_argument("--ssl-certfile", metavar="FILE", help="serve https with this certificate")
    network.add_argument("--ssl-keyfile", metavar="FILE", help="and this key")
    _add_limits(parser.add_argument_group("limits"))
    _add_cache(parser.add_argument_group("KV cache, prefill and drafts of each request"))


def _add_cache(group: argparse._ArgumentGroup) -> None:
    from .flags import CACHE, SAMPLING, add_draft_argument, add_options

    add_draft_argument(group)
    add_options(group, {name: SAMPLING[name] for name in CACHE})


def _add_limits(group: argparse._ArgumentGroup) -> None:
    from ..server.limits import Limits

    limits = Limits()
    for name, text in {
        "rows": "requests answered together",
        "waiting": "requests that may wait beside them",
        "tokens": "tokens of one answer",
        "images": "pictures of one request",
        "image_pixels": "pixels of one picture",
        "body_bytes": "bytes of one request",
        "connections": "connections open at once",
    }.items():
        flag = f"--max-{name.replace('_', '-')}"
        group.add_argument(flag, type=int, default=getattr(limits, name), metavar="N", help=text)
    group.add_argument(
        "--allow-url-images", action="store_true",
        help="fetch pictures from https addresses that clients name (public ones only)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.adapter_choice import split_named

    key = args.api_key or os.environ.get("MLX_VLM_EDGE_API_KEY")
    if args.host not in LOOPBACK and not key:
        raise UsageError(f"--host {args.host} is open to others: set --api-key")
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        raise UsageError("--ssl-certfile and --ssl-keyfile go together")
    args.allow_host = [_host_as_sent(name) for name in args.allow_host]
    _check_origins(args.cors_origin)
    for flag in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(args, flag)
        if path and not os.path.isfile(path):
            raise UsageError(f"{path}: no such file; --{flag.replace('_', '-')} names one")
    args.adapter, named = split_named(args.adapter)
    options = _options(args, named)
    listening = _listen(args.host, args.port)
    try:
        return _serve(args, key, listening, named, options)
    finally:
        listening.close()


def _options(args: argparse.Namespace, named: "Named") -> "LoadOptions":
    """What the flags ask of the model. Raises UsageError for all that can be told without it."""
    from ..checkpoint.adapter_choice import choices
    from ..loading.adapters import check_folders
    from .flags import load_options, memory_limit

    memory_limit(args)
    options = load_options(args)
    check_folders([*choices(options.adapter), *named.values()])
    return options


def _check_origins(origins: list[str]) -> None:
    """Raises UsageError for an origin that no browser would send, which nothing would match."""
    for origin in origins:
        if origin != _origin_as_sent(origin):
            raise UsageError(
                f"--cors-origin {origin}: write it as browsers send it, in lower case, without a "
                "path or the usual port, such as https://example.org"
            )


def _origin_as_sent(origin: str) -> str | None:
    """The origin of an address as a browser has it in its Origin header; None for no address."""
    try:
        parts = urlsplit(origin)
        host = _host_as_sent(parts.netloc.removesuffix(f":{parts.port}"))
    except (ValueError, UsageError):
        return None
    usual = {"http": 80, "https": 443}
    if parts.scheme not in usual:
        return None
    port = "" if parts.port in (None, usual[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _host_as_sent(name: str) -> str:
    """A name as clients have it in their Host header: "Server.org" -> "server.org", "::1" ->
    "[::1]". Raises UsageError for what none would send, which nothing would match."""
    if re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", name, re.ASCII):
        return name.lower()
    try:
        return f"[{ipaddress.IPv6Address(name.strip('[]').partition('%')[0])}]"
    except ValueError:
        raise UsageError(
            f"--allow-host {name}: give the name alone, as browsers send it, without http://, port "
            "or path, such as vlm.example.org or ::1"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything is loaded. Raises UsageError when it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port} ({reason}): choose another --host or --port"
        ) from None
    return listening


def _serve(
    args: argparse.Namespace,
    key: str | None,
    listening: socket.socket,
    named: "Named",
    options: "LoadOptions",
) -> int:
    try:
        import uvicorn

        from ..server.app import Served, application
        from ..server.connections import Protocol
    except ModuleNotFoundError as error:
        raise UsageError(f"{EXTRA} ({error.name} is missing)") from None
    from ..server.guards import LOCAL_NAMES, Access
    from ..server.limits import Limits
    from .flags import default_model

    name = args.model or default_model()
    limits = Limits(
        rows=args.max_rows, waiting=args.max_waiting, tokens=args.max_tokens,
        images=args.max_images, image_pixels=args.max_image_pixels,
        body_bytes=args.max_body_bytes, connections=args.max_connections,
        cache=_cache(args),
    )  # fmt: skip
    shown = f"[{args.host}]" if ":" in args.host else args.host
    hosts = {*LOCAL_NAMES, shown.lower(), *args.allow_host}
    served = Served(
        os.path.basename(name.rstrip("/")) if os.path.isdir(name) else name, limits,
        Access(frozenset(hosts), frozenset(args.cors_origin), key), args.allow_url_images,
        adapters=tuple(named),
    )  # fmt: skip
    scheme = "https" if args.ssl_certfile else "http"
    port = listening.getsockname()[1]
    print(f"{served.name} at {scheme}://{shown}:{port}", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        application(served, lambda: _engine(args, name, limits, named, options)),
        http=Protocol, ws="none",
        log_level="warning", access_log=False, server_header=False, lifespan="on",
        limit_concurrency=limits.connections, timeout_keep_alive=15,
        ssl_certfile=args.ssl_certfile, ssl_keyfile=args.ssl_keyfile, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)
    served.on_failure = partial(setattr, server, "should_exit", True)
    server.run(sockets=[listening])
    if served.failure is not None:
        raise served.failure
    return 0


def _cache(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of KV caches and drafts. Raises UsageError for a value out of range."""
    from ..generation.loop import Options
    from .flags import CACHE

    chosen = {name: getattr(args, name) for name in ("draft", *CACHE)}
    Options(**chosen)
    return chosen


def _engine(
    args: argparse.Namespace, name: str, limits: Any, named: "Named", options: "LoadOptions"
) -> "Engine":
    from ..generation.engine import Engine
    from ..loading.variants import Variants
    from .flags import fit_into_memory, load_whole, prefix_cache, within_budget

    options = within_budget(args, name, options)
    checked = None
    if named:
        fit_into_memory(args, name, options)  # before the model is fetched
        checked = Variants(name, options, named)
    rows = fit_into_memory(args, name, options, checked.nbytes() if checked else 0, limits.rows)
    model, processor = load_whole(name, options)
    adapters = checked.of(model) if checked else {}
    print("ready", file=sys.stderr, flush=True)
    return Engine(
        model, processor, rows=rows, waiting=limits.waiting,
        prefix_cache=prefix_cache(args), adapters=adapters,
    )  # fmt: skip
