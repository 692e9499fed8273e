"""A model folder's tokenizer files -> a `tokenizers` backend, and tokens and templates they name.

Whatever is wrong with one of them is a UsageError that names the file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..checkpoint import files
from ..errors import Refusing, UsageError
from ..wording import quoted
from . import mapped_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

# Classes whose vocab.json and merges.txt are enough: Qwen2's composes letters and splits texts as
# tiktoken's do, CodeGen's (Phi-2) is GPT-2's.
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
GPT2_CLASSES = ("CodeGenTokenizer", "CodeGenTokenizerFast")
# Keys that name one token each: its text, or an object with "content".
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHAT_TOKEN = re.compile(r"<\|[^<>|\s]+\|>")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read(folder: Path) -> "tuple[Backend, dict[str, Any]]":
    """The tokenizer, and tokenizer_config.json with what other files add to it.

    Raises UsageError when there is none, or one of the files is damaged.
    """
    config = files.read_json(folder / files.TOKENIZER_CONFIG)
    older = files.read_json(folder / files.SPECIAL_TOKENS_MAP)
    config = {name: older[name] for name in NAMED if name in older} | config
    backend = _backend(folder, config)
    added, source = _added_tokens(folder, config, older)
    with Refusing(source, "cannot be used", "copy the original model's"):
        if missing(backend, added):
            backend = mapped_tokenizer.whole(backend)
        add_tokens(backend, added, source)
    return backend, config | {"chat_template": files.read_chat_template(folder)}


def write_json(folder: Path, target: Path) -> bool:
    """Write tokenizer.json of a folder that has tokenizer.model or a tiktoken file alone; whether
    that was the case.

    The ids are the same, and it is read several times as fast. Where LLaMA's tokenizer puts BOS
    itself, others who read the file are told so. Raises UsageError as `read` does.
    """
    source = files.tokenizer_files(folder)
    if source not in (files.TOKENIZER_MODEL, *files.TIKTOKEN):
        return False
    from tokenizers.processors import TemplateProcessing

    backend, config = read(folder)
    bos = named_tokens(config).get("bos_token", "")
    adds = source == files.TOKENIZER_MODEL and config.get("add_bos_token") is not False
    if adds and (id := backend.token_to_id(bos)) is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, id)]
        )
    backend.save(str(target / files.TOKENIZER_JSON[0]))
    return True


def _backend(folder: Path, config: Mapping[str, Any]) -> "Backend":
    pieces = folder / files.TOKENIZER_MODEL[0]
    match files.tokenizer_files(folder):
        case files.TOKENIZER_JSON:
            backend = _from_file(folder / files.TOKENIZER_JSON[0])
            doubtful = begins_once(backend) and config.get("legacy") is not False
            return _from_pieces(pieces, backend) if doubtful and pieces.is_file() else backend
        case files.VOCAB_AND_MERGES:
            return _byte_level(folder, config)
        case files.TOKENIZER_MODEL:
            return _pieces_backend(pieces)
        case (name,):
            return _ranks_backend(folder / name)
    raise UsageError(
        f"{folder}: no tokenizer.json, tokenizer.model, or vocab.json with merges.txt: "
        "copy the tokenizer's files from the original model"
    )


def _pieces_backend(pieces: Path) -> "Backend":
    from . import sentencepiece  # which most tokenizers do without

    return sentencepiece.backend(pieces)


def _from_pieces(pieces: Path, saved: "Backend") -> "Backend":
    """tokenizer.model's tokenizer with the tokens that were added in tokenizer.json.

    transformers 5 saves every LLaMA tokenizer that does not say "legacy" as one that begins once,
    whatever the model was trained with, and without the scores of what is merged first. A file that
    cannot be read here, or has other ids, leaves tokenizer.json as it is.
    """
    added = {
        id: {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
        for id, token in saved.get_added_tokens_decoder().items()
    }
    try:
        backend = _pieces_backend(pieces)
        add_tokens(backend, added, pieces)
    except UsageError:
        return saved
    return backend


def begins_once(backend: "Backend") -> bool:
    """Whether a text has the word mark at its beginning only, and not after special tokens too."""
    return getattr(backend.pre_tokenizer, "prepend_scheme", None) == "first"


def _from_file(path: Path) -> "Backend":
    from tokenizers import Tokenizer as Backend

    def parse() -> Backend:
        with Refusing(path, "is damaged", "fetch it again"):
            return Backend.from_file(str(path))

    return cast("Backend", mapped_tokenizer.known(path, parse)) or parse()


def remember(folder: Path) -> bool:
    """Have the user's cache know a folder's tokenizer.json, so that it need not be parsed again;
    whether it does. Small ones are as well parsed."""
    listed = files.tokenizer_files(folder) == files.TOKENIZER_JSON
    return listed and mapped_tokenizer.remember(folder / files.TOKENIZER_JSON[0])


def _ranks_backend(path: Path) -> "Backend":
    from . import tiktoken

    return tiktoken.backend(path)


def _byte_level(folder: Path, config: Mapping[str, Any]) -> "Backend":
    """The tokenizer that transformers' class of that name builds from the same two files."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind = config.get("tokenizer_class")
    if kind not in QWEN2_CLASSES + GPT2_CLASSES:
        raise UsageError(
            f"{folder}: vocab.json and merges.txt of a {kind or 'nameless tokenizer'} without a "
            "tokenizer.json: save it once with transformers' save_pretrained"
        )
    with Refusing(folder, "vocab.json or merges.txt is damaged", "fetch them again"):
        model = models.BPE.from_file(*(str(folder / name) for name in files.VOCAB_AND_MERGES))
    backend = Backend(model)
    if kind in QWEN2_CLASSES:
        from .tiktoken import PATTERN

        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _added_tokens(
    folder: Path, config: Mapping[str, Any], older: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], Path]:
    """Tokens by id, as added_tokens_decoder has them, and the file that lists them.

    Without that key, and without tokenizer.json, they are in added_tokens.json, as {text: id}, and
    special where they are named as such elsewhere, or written as chat tokens are.
    """
    listed, source = config.get("added_tokens_decoder"), folder / files.TOKENIZER_CONFIG
    if listed is not None:
        with Refusing(source, "its added_tokens_decoder is damaged", "fetch it again"):
            return {int(id): _entry(entry) for id, entry in listed.items()}, source
    if files.tokenizer_files(folder) == files.TOKENIZER_JSON:
        return {}, source
    source = folder / files.ADDED_TOKENS
    with Refusing(source, "is damaged", "fetch it again"):
        special = _listed_as_special(config) | _listed_as_special(older)
        ids = files.read_json(source)
        return {int(id): _from_text(text, text in special) for text, id in ids.items()}, source


def _from_text(text: str, special: bool) -> dict[str, Any]:
    special = special or bool(CHAT_TOKEN.fullmatch(text))
    return {"content": text, "special": special, "normalized": not special}


def _entry(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        raise ValueError("a token is an object with a text as its 'content'")
    return {key: entry[key] for key in ("content", *_FLAGS) if key in entry}


def _listed_as_special(config: Mapping[str, Any]) -> set[str]:
    more = config.get("additional_special_tokens") or []
    tokens = [*named_tokens(config).values(), *map(content, more)]
    return {token for token in tokens if token}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token, eos_token, ... where they are set. Raises UsageError for others."""
    tokens = {name: content(config[name]) for name in NAMED if config.get(name) is not None}
    for name, token in tokens.items():
        if token is None:
            wrong = quoted(config[name])
            raise UsageError(
                f"{files.TOKENIZER_CONFIG}: {name} must be a token's text, not {wrong}"
            )
    return {name: token for name, token in tokens.items() if token}


def content(token: Any) -> str | None:
    """The text of a token that is written as a string or as an object with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def missing(
    backend: "Backend", wanted: Mapping[int, Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """Those of the added tokens, by id, that a tokenizer has not."""
    known = backend.get_added_tokens_decoder()
    return {
        id: wanted[id]
        for id in sorted(wanted)
        if id not in known or known[id].content != wanted[id]["content"]
    }


def add_tokens(backend: "Backend", wanted: Mapping[int, Mapping[str, Any]], source: Path) -> None:
    """Add those that are not there yet, all in one go, each of which must get its own id."""
    from tokenizers import AddedToken

    absent = missing(backend, wanted)
    if not absent:
        return

    def token(entry: Mapping[str, Any]) -> "AddedToken":
        chosen = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
        return AddedToken(entry["content"], **chosen)

    backend.add_tokens([token(entry) for entry in absent.values()])
    for id, entry in absent.items():
        if (got := backend.token_to_id(entry["content"])) != id:
            raise UsageError(
                f"{source}: token {quoted(entry['content'])} should have id {id}, but has {got}"
            )
