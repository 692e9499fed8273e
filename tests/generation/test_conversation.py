"""Several turns with pictures: nothing is computed twice; answers are those of a cold run."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from mlx_vlm_edge import Conversation, Options, generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.conversation import Turn
from mlx_vlm_edge.picture.image import open_image
from mlx_vlm_edge.timings import Timer

from .test_prefix import FAMILIES, family, fastvlm, models, picture  # noqa: F401  (fixtures)

TOKENS = 6


@contextmanager
def context_of(model, positions):
    """The model with a shorter context; its own afterwards."""
    before = model.config.context
    object.__setattr__(model.config, "context", positions)
    try:
        yield
    finally:
        object.__setattr__(model.config, "context", before)


def messages(chat):
    return [turn.message() for turn in chat.turns]


def cold(model, processor, chat, question, images=()):
    """The same question with everything computed anew."""
    asked = {"role": "user", "content": [*({"type": "image"} for _ in images),
                                         {"type": "text", "text": question}]}  # fmt: skip
    sources = [image for turn in chat.turns for image in turn.images] + list(images)
    return generate(model, processor, [*messages(chat), asked], sources, max_tokens=TOKENS)


def test_each_answer_is_that_of_a_cold_run_and_no_picture_is_encoded_twice(family, monkeypatch):  # noqa: F811
    name, model, processor = family
    if name == "fuyu":
        pytest.skip("Fuyu takes one question; see the test of that")
    chat = Conversation(model, processor, max_tokens=TOKENS)
    encoded, encode = [], type(model).stages
    turns = [("What is this?", [picture(1)]), ("And its colour?", []), ("And this?", [picture(2)])]
    if name == "cambrian":  # which was trained for one picture
        turns[2] = ("And this?", [])
    for question, images in turns:
        want = cold(model, processor, chat, question, images)
        with monkeypatch.context() as patch:
            patch.setattr(
                type(model), "stages",
                lambda this, *rest, **more: (encoded.append(1), encode(this, *rest, **more))[1],
            )  # fmt: skip
            assert chat.ask(question, images) == want
    # LLaVA-OneVision cuts up a lone picture only, so its first one is another beside a second.
    assert len(encoded) == {"llava_onevision": 3, "cambrian": 1}.get(name, 2)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 3


def test_a_model_of_single_questions_says_so_and_nothing_is_lost(models):  # noqa: F811
    chat = Conversation(*models("fuyu"), max_tokens=TOKENS)
    chat.ask("What is this?", picture(1))
    with pytest.raises(UsageError, match="one question and no conversation"):
        chat.ask("And its colour?")
    assert len(chat.turns) == 2


def test_going_back_and_branching(fastvlm):  # noqa: F811
    chat = Conversation(*fastvlm, max_tokens=TOKENS)
    first = chat.ask("What is this?", picture(1))
    other = chat.branch()
    chat.ask("And its colour?")
    assert len(chat.turns) == 4
    assert len(other.turns) == 2
    assert chat.undo()
    assert messages(chat) == messages(other)
    assert chat.ask("And its size?") == other.ask("And its size?")
    assert chat.rewind(0)
    assert not chat.undo()
    assert chat.ask("What is this?", picture(1)) == first
    chat.clear()
    assert chat.turns == []
    assert chat.prefix_cache.nbytes == 0


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(fastvlm):  # noqa: F811
    chat = Conversation(*fastvlm, max_tokens=TOKENS)
    stream = chat.stream("What is this?")
    said = next(piece.text for piece in stream if piece.text)
    stream.close()
    assert chat.turns[-1].text == said
    unheard = chat.stream("And this?")
    unheard.close()
    assert len(chat.turns) == 2


def test_the_oldest_turns_leave_when_the_context_is_full(fastvlm, monkeypatch):  # noqa: F811
    model, processor = fastvlm
    with context_of(model, 300):
        chat = Conversation(model, processor, max_tokens=TOKENS, system="Be brief.")
        dropped = []
        for index in range(12):
            chat.ask(
                f"Question {index}: what is this thing here?", picture(1) if not index else None
            )
            dropped.append(chat.dropped)
        assert dropped[0] == 0
        assert dropped == sorted(dropped)
        changes = len(set(dropped))
        assert 1 < changes < 6  # several leave at once, so that the rest is not prefilled each time
        assert len(chat.turns) == 24
        with pytest.raises(UsageError, match="more than the context"):
            chat.ask("word " * 300)
        assert len(chat.turns) == 24


@pytest.mark.parametrize(("length", "left_out"), [(225, 0), (226, 2)])
def test_a_quarter_of_the_context_is_left_for_an_answer(fastvlm, length, left_out):  # noqa: F811
    """And no more, however long an answer may be."""
    model, processor = fastvlm
    chat = Conversation(model, processor)
    turns = [Turn("user", ""), Turn("assistant", "A"), Turn("user", "What?")]
    with context_of(model, 300):
        for count in range(300):
            turns[0] = Turn("user", "?!" * (count // 2) + "?" * (count % 2))
            asked = processor([turn.message() for turn in turns], [])
            if asked.input_ids.shape[1] == length:
                break
        else:
            pytest.fail("no text of that length")
        assert chat._fitting(turns, Options(max_tokens=1000), Timer())[2] == left_out


def test_turns_that_were_left_out_are_back_where_there_is_room_again(fastvlm):  # noqa: F811
    model, processor = fastvlm
    with context_of(model, 300):
        chat = Conversation(model, processor, max_tokens=TOKENS)
        for index in range(12):
            chat.ask(f"Question {index}: what is this thing here?")
        assert chat.dropped
        dropped = chat.dropped
        assert not chat.rewind(24)
        assert chat.dropped == dropped
        assert chat.rewind(dropped)
        other = Conversation(model, processor, max_tokens=TOKENS)
        other.turns = list(chat.turns)
        assert chat.ask("And this?") == other.ask("And this?")
        assert chat.dropped == other.dropped < dropped


def test_turns_that_were_left_out_keep_no_pixels_and_are_forgotten_when_told(fastvlm):  # noqa: F811
    model, processor = fastvlm
    with context_of(model, 400):
        chat = Conversation(model, processor, max_tokens=TOKENS)
        for index in range(12):
            chat.ask(f"Question {index}: what is this thing here?", picture(index))
        dropped = chat.dropped
        assert dropped >= 4
        assert [bool(turn.pixels) for turn in chat.turns[::2]] == [
            index >= dropped // 2 for index in range(12)
        ]
        assert all(turn.images for turn in chat.turns[::2])
        other = chat.branch()
        other.forget(3)
        assert (len(other.turns), other.dropped) == (22, dropped - 2)
        other.forget()
        assert (messages(other), other.dropped) == (messages(chat)[dropped:], 0)
        assert chat.ask("And this?", picture(1)) == other.ask("And this?", picture(1))
        assert len(other.turns) == len(chat.turns) - dropped
        other.forget(99)
        assert (other.turns, other.dropped) == ([], 0)


@pytest.mark.parametrize("kept", [1, 3, 6, 9])
def test_pictures_are_read_again_as_far_as_there_is_room(kept, fastvlm, tmp_path):  # noqa: F811
    """Of a conversation that went back, or was loaded: as if all had been read."""
    model, processor = fastvlm
    with context_of(model, 400):
        chat = Conversation(model, processor, max_tokens=TOKENS)
        for index in range(12):
            chat.ask(f"Question {index}: what is this thing here?", picture(index))
        chat.rewind(2 * kept)
        chat.save(tmp_path / "chat.json")
        loaded = Conversation(model, processor, max_tokens=TOKENS)
        loaded.load(tmp_path / "chat.json")
        anew = Conversation(model, processor, max_tokens=TOKENS)
        preprocess = processor.preprocessor(1)
        for turn in chat.turns:  # all are read, and the oldest leave first
            pixels = tuple(preprocess(open_image(image)) for image in turn.images)
            anew.turns.append(replace(turn, pixels=pixels, preprocess=preprocess))
        answers = [one.ask("And this?", picture(1)) for one in (chat, loaded, anew)]
        assert len({*answers}) == 1
        assert chat.dropped == loaded.dropped == anew.dropped
        for one in (chat, loaded):
            assert [bool(turn.pixels) for turn in one.turns[::2]] == [
                index >= one.dropped // 2 for index in range(kept + 1)
            ]


def test_turns_whose_pictures_are_gone_stay_left_out(models, tmp_path):  # noqa: F811
    from PIL import Image

    model, processor = models("llava_onevision")  # which reads a lone picture anew beside another
    for index in range(2):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.png")
    context = model.config.context
    try:
        chat = Conversation(model, processor, max_tokens=TOKENS)
        chat.ask("What is this?", tmp_path / "0.png")
        size = processor([chat.turns[0].message()], [picture(0)]).input_ids.shape[1]
        object.__setattr__(model.config, "context", size + 100)
        while not chat.dropped:
            chat.ask("And what is its colour here?")
        chat.ask("And this?", tmp_path / "1.png")
        (tmp_path / "0.png").unlink()
        chat.ask("And its colour?")
        assert chat.undo()
        assert chat.ask("And its size?")
        assert chat.dropped
        assert chat.undo()
        with pytest.raises(UsageError, match=r"2\.png: no such file"):
            chat.ask("And this?", tmp_path / "2.png")
        (tmp_path / "1.png").unlink()
        assert chat.rewind(2)
        assert chat.ask("And now?")
        assert chat.rewind(0)
        with pytest.raises(UsageError, match=r"0\.png: no such file"):
            chat.ask("What is this?", tmp_path / "0.png")
    finally:
        object.__setattr__(model.config, "context", context)


def test_a_video_is_asked_about_as_without_a_conversation_and_saved_by_its_name(tmp_path):
    from PIL import Image

    from mlx_vlm_edge import load
    from mlx_vlm_edge.picture.video import Video

    from ..reference import idefics3 as theirs

    case = theirs.CASES["smolvlm"]
    model, processor = load(str(theirs.save(theirs.build(case), case, tmp_path / "model")))
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(3):
        Image.new("RGB", (40, 30), (index * 50, 9, 9)).save(frames / f"{index}.png")
    video = Video(frames, fps=2)
    chat = Conversation(model, processor, max_tokens=TOKENS)
    want = processor("What happens?", [video]).input_ids.tolist()
    chat.ask("What happens?", video)
    asked = processor([chat.turns[0].message()], [video]).input_ids.tolist()
    assert asked == want
    chat.save(tmp_path / "chat.json")
    other = Conversation(model, processor, max_tokens=TOKENS)
    other.load(tmp_path / "chat.json")
    assert other.turns[0].images == (Video(str(frames), fps=2),)
    assert other.ask("And then?") == chat.ask("And then?")


def test_a_conversation_is_saved_and_gone_on_with(fastvlm, tmp_path):  # noqa: F811
    chat = Conversation(*fastvlm, max_tokens=TOKENS, system="Be brief.")
    chat.ask("What is this?", picture(1))
    chat.save(tmp_path / "chat.json")
    other = Conversation(*fastvlm, max_tokens=TOKENS)
    other.load(tmp_path / "chat.json")
    assert other.system == "Be brief."
    assert other.ask("And its colour?") == chat.ask("And its colour?")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    assert (tmp_path / "chat.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": 9}', '{"format": 1, "system": 3, "turns": []}', "[" * 9999,
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x"}]}',
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": 1, "images": []}]}',
    '{"format": 1, "system": null, "turns": "x"}', "\udc80",
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x", "images": [3]}]}',
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x", "images": [{"video": 1, '
    '"fps": 1}]}]}',
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x", "images": [{"video": '
    '"x", "fps": true}]}]}',
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x", "images": [{"video": '
    '"x", "fps": 1' + "0" * 400 + "}]}]}",
    '{"format": 1, "system": null, "turns": [{"role": "user", "text": "x", "images": [{"video": '
    '"x", "fps": -1}]}]}',
])  # fmt: skip
def test_a_damaged_file_is_one_line_and_changes_nothing(fastvlm, tmp_path, content):  # noqa: F811
    chat = Conversation(*fastvlm, max_tokens=TOKENS)
    chat.ask("What is this?")
    (tmp_path / "chat.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"chat\.json: not a saved conversation") as error:
        chat.load(tmp_path / "chat.json")
    assert "\n" not in str(error.value)
    assert len(chat.turns) == 2


def test_files_that_cannot_be_read_or_written_are_named(fastvlm, tmp_path):  # noqa: F811
    chat = Conversation(*fastvlm, max_tokens=TOKENS)
    with pytest.raises(UsageError, match=r"none\.json: cannot be read"):
        chat.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be written"):
        chat.save(tmp_path / "no folder" / "chat.json")


def test_a_picture_s_name_that_is_no_unicode_is_saved(fastvlm, tmp_path):  # noqa: F811
    chat, other = Conversation(*fastvlm), Conversation(*fastvlm)
    chat.turns = [Turn("user", "é", ("\udcff.png",)), Turn("assistant", "x")]
    chat.save(tmp_path / "chat.json")
    other.load(tmp_path / "chat.json")
    assert [(turn.text, turn.images) for turn in other.turns] == [("é", ("\udcff.png",)), ("x", ())]


def test_pictures_that_are_bytes_are_saved_whole(fastvlm, tmp_path):  # noqa: F811
    import io

    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(picture(1)).save(written, "PNG")
    chat = Conversation(*fastvlm, max_tokens=TOKENS)
    chat.ask("What is this?", written.getvalue())
    chat.save(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())["turns"][0]["images"]
    assert saved[0].startswith("data:;base64,")
