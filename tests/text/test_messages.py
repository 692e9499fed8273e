"""Pictures inside messages: each at its place, none dropped, and no key that is not known."""

import pytest
from PIL import Image

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.video import Video
from mlx_vlm_edge.text.messages import normalize

PICTURE = Image.new("RGB", (2, 2))
URL = "https://example.org/a.png"
TEXT = {"type": "text", "text": "?"}
PLACE = {"type": "image"}


def user(content, **beside):
    return {"role": "user", "content": content, **beside}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": b"bytes"}, b"bytes"),
        ({"type": "image", "image": PICTURE}, PICTURE),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": URL}, URL),
        ({"type": "image_url", "image_url": URL}, URL),
        ({"type": "image_url", "image_url": {"url": URL}}, URL),
        ({"type": "image_url", "image_url": {"url": "data:,x", "detail": "auto"}}, "data:,x"),
        ({"type": "video", "video": "a.gif"}, Video("a.gif")),
        ({"type": "video", "video": Video("a.gif", 2)}, Video("a.gif", 2)),
    ],
)
def test_a_picture_in_a_part(part, source):
    messages, images = normalize([user([TEXT, part, TEXT])])
    assert images == [source]
    kind = "video" if part["type"] == "video" else "image"
    assert messages == [user([TEXT, {"type": kind}, TEXT])]


@pytest.mark.parametrize("beside", [{"images": ["a", "b"]}, {"image": "a", "images": ("b",)}])
def test_pictures_beside_a_text_go_before_it(beside):
    messages, images = normalize([user("?", **beside)])
    assert images == ["a", "b"]
    assert messages == [user([PLACE, PLACE, TEXT])]


def test_pictures_beside_a_text_go_to_its_empty_places():
    own = {"type": "image", "image": "own"}
    messages, images = normalize([user([PLACE, TEXT, own, PLACE], images=["a", "b"])])
    assert images == ["a", "own", "b"]
    assert messages == [user([PLACE, TEXT, PLACE, PLACE])]
    messages, images = normalize([user([TEXT, own], images=["a"])])
    assert images == ["a", "own"]


def test_images_fill_the_parts_without_a_picture_in_order():
    chat = [
        user([PLACE, TEXT, {"type": "image", "image": "own"}]),
        {"role": "assistant", "content": "A"},
        user([PLACE, TEXT]),
    ]
    messages, images = normalize(chat, ["x", "y"])
    assert images == ["x", "own", "y"]
    assert [len(message["content"]) for message in messages] == [3, 1, 2]
    assert chat[0]["content"][2]["image"] == "own"  # what was handed in is not changed


def test_images_without_places_go_before_the_first_users_words():
    system = {"role": "system", "content": "S"}
    messages, images = normalize([system, user("?")], [Video("v"), "x"])
    assert images == [Video("v"), "x"]
    assert messages[1] == user([{"type": "video"}, PLACE, TEXT])


@pytest.mark.parametrize(
    ("message", "images", "match"),
    [
        (user("?", pictures=["a"]), [], "key 'pictures'"),
        (user("?", name="Bob"), [], "key 'name'"),
        (user([{"type": "text", "text": "?", "image": "a"}]), [], "key 'image'"),
        (user([{"type": "image", "file": "a"}]), [], "key 'file'"),
        (user([{"type": "image", "image": "a", "path": "b"}]), [], "more than one picture"),
        (user([{"type": "image_url", "image_url": "/etc/passwd"}]), [], "http"),
        (user([{"type": "image_url", "image_url": {"url": "file:///a"}}]), [], "http"),
        (user([{"type": "image_url"}]), [], "http"),
        (user([{"type": "image_url", "image_url": {"url": URL, "size": 5}}]), [], "key 'size'"),
        (user([{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]), [], "'low'"),
        (user([{"type": ["image"]}]), [], "not known"),
        (user([{"type": "image", "image": "a"}]), ["b"], "own, but 1 image was given"),
        (user("?", images=["a"]), ["b", "c"], "0 places .* 2 images were given"),
        (user([PLACE, PLACE], images=["a"]), [], "2 places .* 1 image was beside its text"),
        (user([PLACE]), [], "1 place for an image, but 0 images were given"),
        ({"role": "system", "content": "S", "images": ["a"]}, [], "system's"),
    ],
)  # fmt: skip
def test_what_is_refused(message, images, match):
    with pytest.raises(UsageError, match=match) as caught:
        normalize([message, user("?")], images)
    assert "\n" not in str(caught.value)
