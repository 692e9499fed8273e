"""What can be asked about a scene, in the words that people type, and the right answers."""

from __future__ import annotations

from random import Random

from draw import NUMBERS, Scene

QUESTIONS = {
    "read": (
        "What does it say?", "What does the text say?", "What text is in the image?",
        "What is the text?", "Read the text.", "Read the text in the image.",
        "What is written here?", "What is written in the image?", "What word is this?",
        "What does this say?", "What letters are shown?", "Which characters are shown?",
        "Read this.", "What is printed in the picture?",
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
    ),
}  # fmt: skip
CATEGORIES = tuple(QUESTIONS)
NO_TEXT = "There is no text."
WHERE = {
    "left": "on the left of", "right": "on the right of", "top": "at the top of",
    "bottom": "at the bottom of", "center": "in the center of",
}  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def description(scene: Scene) -> str:
    """One sentence about the whole scene."""
    ground = f"{article(scene.background)} background."
    if scene.text:
        return f'The text "{scene.text}" in {scene.colour} on {ground}'
    if scene.count > 1:
        things = f"{scene.colour} {plural(scene.shape)}"
        return f"{NUMBERS[scene.count].capitalize()} {things} on {ground}"
    thing = article(f"{scene.colour} {scene.shape}").capitalize()
    return f"{thing} {WHERE.get(scene.place, 'on')} {ground}"


def answers(scene: Scene) -> dict[str, str]:
    """The right answer of every category that is fair to ask about the scene."""
    found = {
        "colour": scene.colour,
        "background": scene.background,
        "describe": description(scene),
        "read": scene.text or NO_TEXT,
    }
    if scene.shape:
        found |= {"shape": scene.shape, "count": str(scene.count)}
    if scene.place:
        found["position"] = scene.place
    return found


def phrase(category: str, scene: Scene, rng: Random, plain: bool = False) -> str:
    """One way to ask; unless `plain`, sometimes in lower or upper case or unpunctuated."""
    thing = scene.shape if scene.shape and rng.random() < 0.6 else "shape"
    thing = "text" if scene.text else thing
    while True:
        template = rng.choice(QUESTIONS[category])
        if scene.text and ("{things}" in template or template == "What are these?"):
            continue
        if scene.count == 1 and ("are the {things}" in template or "of the {things}" in template):
            continue
        break
    question = template.format(
        thing=thing, things=plural(thing), colour=scene.colour,
        color=rng.choice(("color", "colour")),
    )  # fmt: skip
    if plain:
        return question
    style = rng.random()
    if style < 0.03:
        return question.upper()
    if style < 0.3:
        question = question.lower()
    return question.rstrip("?.") if rng.random() < 0.2 else question


def pairs(scene: Scene, rng: Random, count: int) -> list[tuple[str, str]]:
    """`count` questions of different categories, the harder ones more often."""
    found = answers(scene)
    weight = {"read": 6.0 if scene.text else 1.0, "describe": 3.0, "count": 2.0}
    order = sorted(found, key=lambda c: rng.random() ** (1 / weight.get(c, 1.0)), reverse=True)
    return [(phrase(c, scene, rng), found[c]) for c in order[:count]]
