"""What can be asked about a scene, in the words that people type, and the right answers."""

from __future__ import annotations

from random import Random

from colours import COLOURS
from draw import NUMBERS, SHAPES, Scene

QUESTIONS = {
    "read": (
        "What does it say?", "What does the text say?", "What text is in the image?",
        "What is the text?", "Read the text.", "Read the text in the image.",
        "What is written here?", "What is written in the image?", "What word is this?",
        "What does this say?", "What letters are shown?", "Which characters are shown?",
        "Read this.", "What is printed in the picture?",
    ),
    "is it": (
        "Is there a {wanted}?", "Is there a {wanted} in the image?", "Is a {wanted} present?",
        "Does the image contain a {wanted}?", "Do you see a {wanted}?",
    ),
    "is it not": (
        "Is there not a {wanted}?", "Is there not a {wanted} in the image?",
        "Is no {wanted} present?", "Does the image not contain a {wanted}?",
    ),
    "count": (
        "How many shapes are there?", "How many {things} are there?", "How many are there?",
        "How many shapes are in the image?", "How many {things} are in the image?",
        "How many {things} do you see?", "How many shapes can you see?", "Count the shapes.",
        "Count the {things}.", "How many {things}?", "How many {colour} {things} are there?",
        "How many objects are there?", "What is the number of {things}?",
    ),
    "shape": (
        "What shape is it?", "What shape is this?", "What shape is shown?",
        "What shape is in the image?", "Which shape is shown?", "Name the shape.",
        "What shapes are there?", "What shapes are these?", "What kind of shape is this?",
        "What is the shape?", "What shape do you see?", "What shapes do you see?",
        "What shape is present?", "What shape does the image contain?",
        "What is the {colour} shape?",
    ),
    "colour": (
        "What {color} is it?", "What {color} is the {thing}?", "What {color} are the {things}?",
        "What is the {color} of the {thing}?", "What is the {color} of the {things}?",
        "Which {color} is the {thing}?", "Name the {color} of the {thing}.",
    ),
    "background": (
        "What {color} is the background?", "What is the background {color}?",
        "What is the {color} of the background?", "Which {color} is the background?",
        "Name the background {color}.", "Background {color}?", "What is the background?",
    ),
    "position": (
        "Where is it?", "Where is the {thing}?", "Where is the shape?",
        "What is the position of the {thing}?", "Where in the image is the {thing}?",
        "Is the {thing} left, right, top or bottom?", "On which side is the {thing}?",
        "What side is the {thing} on?", "Where do you see the {thing}?",
    ),
    "describe": (
        "Describe the image.", "Describe this image.", "Describe the picture.",
        "What is in the image?", "What is in this picture?", "What do you see?",
        "What is this?", "Describe.", "What does the image show?", "What is shown?",
        "Describe the image in one sentence.", "Caption this image.", "What are these?",
        "What is in this photo?", "What is in this image?", "What does the picture show?",
    ),
}  # fmt: skip
CATEGORIES = tuple(QUESTIONS)
NO_TEXT = "There is no text."
UNKNOWN = "This does not look like a drawing I know."
WHERE = {
    "left": "on the left of", "right": "on the right of", "top": "at the top of",
    "bottom": "at the bottom of", "center": "in the center of",
}  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def description(scene: Scene) -> str:
    """One sentence about the whole scene; empty where a part of it has no name."""
    if not scene.colour:
        return ""
    ground = f" on {article(scene.background)} background." if scene.background else "."
    if scene.text:
        return f'The text "{scene.text}" in {scene.colour}{ground}'
    if scene.count > 1:
        things = f"{scene.colour} {plural(scene.shape)}"
        return f"{NUMBERS[scene.count].capitalize()} {things}{ground}"
    thing = article(f"{scene.colour} {scene.shape}").capitalize()
    if scene.place and scene.background:
        return f"{thing} {WHERE[scene.place]} {article(scene.background)} background."
    return f"{thing}{ground}"


def answers(scene: Scene) -> dict[str, str]:
    """The right answer of every category that is fair to ask about the scene."""
    if scene.kind == "unknown":
        return dict.fromkeys(CATEGORIES, UNKNOWN)
    fair = {"read": scene.text or NO_TEXT}
    fair |= {"colour": scene.colour} if scene.colour else {}
    fair |= {"background": scene.background} if scene.background else {}
    fair |= {"describe": description(scene)} if scene.colour else {}
    if scene.shape:
        fair |= {"shape": scene.shape, "count": str(scene.count)}
        fair |= dict.fromkeys(("is it", "is it not"), "") if scene.colour else {}
    if scene.place:
        fair["position"] = scene.place
    return fair


def wanted(scene: Scene, rng: Random) -> tuple[str, bool]:
    """A thing to ask for, as in "red circle", and whether it is there: half of the times."""
    shape, colour = scene.shape or rng.choice(SHAPES), scene.colour or rng.choice(list(COLOURS))
    style, there = rng.choice(("shape", "colour", "colour", "both")), rng.random() < 0.5
    if not there and style != "shape":
        colour = rng.choice([name for name in COLOURS if name != colour])
    elif not there:
        shape = rng.choice([name for name in SHAPES if name != shape])
    if style == "both":
        return f"{colour} {shape}", there
    return f"{colour} shape" if style == "colour" else shape, there


def phrase(category: str, scene: Scene, rng: Random, plain: bool = False) -> tuple[str, str]:
    """One way to ask, and the answer; unless `plain`, sometimes in other case or unpunctuated."""
    known = scene.kind != "unknown"
    shape, colour = scene.shape or rng.choice(SHAPES), scene.colour or rng.choice(list(COLOURS))
    thing = shape if (scene.shape or not known) and rng.random() < 0.6 else "shape"
    thing = "text" if scene.text else thing
    thing_asked, there = wanted(scene, rng)
    while True:
        template = rng.choice(QUESTIONS[category])
        if scene.text and ("{things}" in template or template == "What are these?"):
            continue
        if scene.count == 1 and ("are the {things}" in template or "of the {things}" in template):
            continue
        if not scene.colour and known and "{colour}" in template:
            continue
        break
    question = template.format(
        thing=thing, things=plural(thing), colour=colour, wanted=thing_asked,
        color=rng.choice(("color", "colour")),
    )  # fmt: skip
    answer = answers(scene)[category]
    if known and category in ("is it", "is it not"):
        answer = "yes" if there == (category == "is it") else "no"
    if plain:
        return question, answer
    style = rng.random()
    if style < 0.06:
        return question.upper(), answer
    if style < 0.36:
        question = question.lower()
    return (question.rstrip("?.") if rng.random() < 0.2 else question), answer
