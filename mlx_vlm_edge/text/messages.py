"""A question or chat messages as users write them -> contents as lists of parts, and the pictures
in the order of their places.

A part is {"type": "text", "text": ...}, {"type": "image"} or {"type": "video"}. No picture is left
out, and no key that is not known.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..picture.image import Pixels
from ..picture.video import Video
from ..wording import quoted

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]

_SOURCE = "source"  # key of a part's own picture, until the pictures have been listed
_MESSAGE_KEYS = ("role", "content", "images", "image")
# The keys of each type of part; those but "text" name its picture, which others may do as well.
_PART_KEYS = {
    "text": ("text",),
    "image": ("image", "path", "url"),
    "image_url": ("image_url",),
    "video": ("video", "path"),
}


def check_question(text: str) -> None:
    """Raises UsageError for a question that says nothing."""
    if not text.strip():
        raise UsageError("the question is empty: ask something")


def normalize(
    prompt: str | Sequence[Message], images: Sequence[Any] = ()
) -> tuple[list[Message], list[Any]]:
    """Messages whose contents are lists of parts, and all their pictures, each at its part's place.

    Pictures may stand in parts ({"type": "image", "image": ...}, {"type": "image_url", ...}) and
    beside a message's text ("images"); `images` are for the parts that have none of their own, and
    go before the first user's words where there are no parts for pictures at all.
    Raises UsageError for what is not a chat, and where pictures and places differ in number.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise UsageError("the prompt must be a text or a list of messages, not empty")
    messages = [_message(message) for message in prompt]
    if messages[-1]["role"] != "user":
        raise UsageError("the last message must be the user's: there is nothing to answer")
    messages = _with_places(messages, images)
    _check_asked(messages[-1]["content"])
    places = [part for message in messages for part in _places(message["content"])]
    sources = _filled(places, images, "given", "the prompt has")
    return [_without_sources(message) for message in messages], sources


def kind_of(image: Any) -> str:
    """The type of a picture's part in a message: "image" or "video"."""
    return image.kind if isinstance(image, Video | Pixels) else "image"


def count(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _with_places(messages: list[Message], images: Sequence[Any]) -> list[Message]:
    """The messages with places for `images` before the first user's words, if they have none."""
    if any(_places(message["content"]) for message in messages):
        return messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    parts = [{"type": kind_of(image)} for image in images] + messages[first]["content"]
    return [*messages[:first], {**messages[first], "content": parts}, *messages[first + 1 :]]


def _check_asked(parts: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError for a last message of neither a picture nor a word."""
    if not _places(parts):
        check_question("".join(part["text"] for part in parts))


def _places(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for part in parts if part["type"] != "text"]


def _filled(
    places: Sequence[Mapping[str, Any]], images: Sequence[Any], verb: str, subject: str
) -> list[Any]:
    """The picture of every place: its own, or the next of `images`, which must all be used."""
    empty = [place for place in places if _SOURCE not in place]
    if len(empty) != len(images):
        own = " without a picture of its own" if len(empty) < len(places) else ""
        raise UsageError(
            f"{subject} {count(len(empty), 'place')} for an image{own}, but "
            f"{count(len(images), 'image')} {'was' if len(images) == 1 else 'were'} {verb}"
        )
    rest = iter(images)
    return [place[_SOURCE] if _SOURCE in place else next(rest) for place in places]


def _without_sources(message: Message) -> Message:
    parts = [{k: v for k, v in part.items() if k != _SOURCE} for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _message(message: Any) -> Message:
    """One message with its pictures in its parts, before its words unless parts wait for them."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise UsageError("a message must be an object with 'role' and 'content'")
    _refuse_unknown(message, _MESSAGE_KEYS, "a message")
    role = message["role"]
    if role not in ROLES:
        raise UsageError(f"role {quoted(role)} is not one of {', '.join(ROLES)}")
    beside = [*_listed(message.get("image")), *_listed(message.get("images"))]
    parts = _with_pictures(_parts(message["content"]), beside)
    if role != "user" and (places := _places(parts)):
        raise UsageError(f"{places[0]['type']}s belong to the user's messages, not the {role}'s")
    return {"role": role, "content": parts}


def _parts(content: Any) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UsageError("a message's content must be a text or a list of parts")
    return [_part(part) for part in content]


def _with_pictures(
    parts: list[Mapping[str, Any]], beside: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """The parts with the pictures beside them: in the parts that wait for one, else in front."""
    places = _places(parts)
    if not beside or all(_SOURCE in place for place in places):
        return [*({"type": kind_of(image), _SOURCE: image} for image in beside), *parts]
    sources = iter(_filled(places, beside, "beside its text", "a message has"))
    return [part if part["type"] == "text" else {**part, _SOURCE: next(sources)} for part in parts]


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _refuse_unknown(entry: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in entry:
        if key not in known:
            raise UsageError(
                f"{what} has the key {quoted(key)}, which is not known: use {', '.join(known)}"
            )


def _part(part: Any) -> Mapping[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise UsageError(f"content part of type {quoted(kind)} is not known: use 'text' or 'image'")
    keys = _PART_KEYS[kind]
    _refuse_unknown(part, ("type", *keys), f"a content part of type {kind!r}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise UsageError("a content part of type 'text' must have a 'text'")
        return part
    sources = [part[key] for key in keys if part.get(key) is not None]
    if len(sources) > 1:
        raise UsageError(f"a content part of type {kind!r} names more than one picture")
    if kind == "image_url":
        return {"type": "image", _SOURCE: _address(sources[0] if sources else None)}
    if kind == "video":
        sources = [Video(one) if isinstance(one, str | Path) else one for one in sources]
    return {"type": kind, **({_SOURCE: sources[0]} if sources else {})}


def _address(entry: Any) -> str:
    """The URL of an image_url, which stands alone or in an object."""
    if isinstance(entry, Mapping):
        _refuse_unknown(entry, ("url", "detail"), "an 'image_url'")
        if entry.get("detail", "auto") != "auto":
            raise UsageError(
                f"an 'image_url' of detail {quoted(entry['detail'])}: leave it out, the resolution "
                "is the model's"
            )
        entry = entry.get("url")
    if not isinstance(entry, str) or not entry.lower().startswith(("http://", "https://", "data:")):
        raise UsageError(
            "an 'image_url' must be an http(s) address or a data: URL; give a file as "
            "{'type': 'image', 'image': path}"
        )
    return entry
