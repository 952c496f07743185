"""The layouts of datasets that are usual in the field give the same samples."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from blindsight.data.samples import Samples, load_samples

SHADES = 10, 200
TYPED = {"type": "image"}


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 8), (shade, 255 - shade, 7))


def encoded(shade: int) -> bytes:
    data = io.BytesIO()
    picture(shade).save(data, "PNG")
    return data.getvalue()


def in_base64(shade: int) -> str:
    return base64.b64encode(encoded(shade)).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shade in SHADES:
        picture(shade).save(tmp_path / f"{shade}.png")
    return tmp_path


def row(*entries: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """A question about two images, with text before, between and after them."""
    one, two = entries
    texts = ({"type": "text", "text": text} for text in ("one ", " and two ", " differ?"))
    content = [next(texts), one, next(texts), two, next(texts)]
    answer = [{"type": "text", "text": "yes"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


def as_text(**columns: Any) -> dict[str, Any]:
    text = "one <image> and two <image> differ?"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns, **columns}


def of_llava(**columns: Any) -> dict[str, Any]:
    text = "one <image> and two <image> differ?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turns, **columns}


def of_openai(*urls: str) -> dict[str, Any]:
    return row(*({"type": "image_url", "image_url": {"url": url}} for url in urls))


def files() -> list[str]:
    return [f"{shade}.png" for shade in SHADES]


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "beside": lambda _: row(TYPED, TYPED, images=files()),
    "in text": lambda _: as_text(images=files()),
    "LLaVA": lambda _: of_llava(image=files()),
    "inside": lambda _: row(*({**TYPED, "image": file} for file in files())),
    "paths": lambda _: row(*({**TYPED, "path": file} for file in files())),
    "urls of files": lambda at: row(*({**TYPED, "url": f"file://{at / x}"} for x in files())),
    "base64": lambda _: row(*({**TYPED, "base64": in_base64(shade)} for shade in SHADES)),
    "OpenAI": lambda _: of_openai(*(f"data:image/png;base64,{in_base64(x)}" for x in SHADES)),
    "inside, as numpy": lambda _: row(
        *({**TYPED, "image": np.asarray(picture(shade))} for shade in SHADES)
    ),
    "both": lambda _: row(*({**TYPED, "image": "gone.png"} for _ in SHADES), images=files()),
    "first inside": lambda _: row({**TYPED, "image": files()[0]}, TYPED, image=files()[1]),
    "counted": lambda _: row(
        {**TYPED, "index": 1, "text": None},
        {**TYPED, "index": 0},
        images=[*reversed(files()), "gone.png"],
    ),
    "second inside": lambda _: row(TYPED, {**TYPED, "image": files()[1]}, image=files()[0]),
}


def content_of(samples: Samples) -> Any:
    (sample,) = samples
    shades = [image.getpixel((0, 0)) for image in sample.images]
    return shades, sample.messages, sample.prompt, sample.answer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_sample(layout: str, folder: Path) -> None:
    rows: Any = [LAYOUTS[layout](folder)]
    if "numpy" not in layout:
        (folder / "data.jsonl").write_text(json.dumps(rows[0]))
        rows = folder
    shades, messages, prompt, answer = content_of(load_samples(rows))
    assert shades == [(shade, 255 - shade, 7) for shade in SHADES]
    assert messages == row(TYPED, TYPED)["messages"]
    assert (len(prompt), answer) == (1, "yes")


def test_pixels_of_numpy_are_an_image() -> None:
    images = [np.asarray(picture(shade)) for shade in SHADES]
    assert content_of(load_samples([as_text(images=images)]))[0] == [(10, 245, 7), (200, 55, 7)]
    with pytest.raises(ValueError, match="image 1 of sample 0 of list must be an image file, got"):
        load_samples([as_text(images=[np.zeros((2, 3, 4, 5))] * 2)])[0]


def test_opened_images_inside_messages() -> None:
    def rows(*shades: int) -> list[dict[str, Any]]:
        return [row(*({**TYPED, "image": picture(shade)} for shade in shades))]

    assert content_of(load_samples(rows(*SHADES)))[0] == [(10, 245, 7), (200, 55, 7)]
    digests = [load_samples(rows(*shades)).digest() for shades in (SHADES, SHADES, (10, 201))]
    assert digests[0] == digests[1] != digests[2]
    given = rows(*SHADES)
    load_samples(given)[0]
    assert "image" in given[0]["messages"][0]["content"][1]  # the caller's row is left alone


def test_the_digest_sees_files_inside_messages(folder: Path) -> None:
    (folder / "data.jsonl").write_text(json.dumps(LAYOUTS["inside"](folder)))
    before = load_samples(folder).digest()
    Image.new("RGB", (640, 80)).save(folder / files()[0])
    assert load_samples(folder).digest() != before


def test_videos_inside_messages(folder: Path) -> None:
    frames = [picture(shade) for shade in SHADES]
    (folder / "a.mp4").write_bytes(b"a video")
    one = {"type": "video", "video": frames, "fps": 2}
    two = {"type": "video_url", "video_url": {"url": str(folder / "a.mp4")}, "num_frames": 3}
    (sample,) = load_samples([row(one, two)])
    (of_frames, of_a_file) = sample.videos
    assert (len(of_frames.frames), of_frames.fps) == (2, 2)
    assert (of_a_file.path, of_a_file.num_frames) == (str(folder / "a.mp4"), 3)
    assert [x["type"] for x in sample.messages[0]["content"]][1::2] == ["video", "video"]
    assert all(set(x) == {"type"} for x in sample.messages[0]["content"][1::2])
    three = {"type": "video", "base64": base64.b64encode(b"a video").decode(), "fps": 4}
    four = {"type": "video", "fps": 1}
    (sample,) = load_samples([row(three, four, video=str(folder / "a.mp4"))])
    assert [(video.data, video.fps) for video in sample.videos] == [(b"a video", 4), (None, 1)]
    with pytest.raises(ValueError, match=r"video 1 of sample 0 .* must be in base64, got data:"):
        load_samples([row({**three, "base64": "!"}, four, video=str(folder / "a.mp4"))])[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (as_text(), "must have images or videos, got only messages"),
        (as_text(images=[]), r"one image for each {'type': 'image'} .*, got 0 images for 2"),
        (of_llava(image=picture(1)), r"one image for each .*, got 1 images for 2"),
        (row({**TYPED, "image": 3}, TYPED, image=picture(1)), "image 1 of sample 0 .*, got int"),
        (row({**TYPED, "index": 1}, TYPED, image=picture(1)), r"from 0 to 0 .*, got \[1, None\]"),
        (of_openai("https://a/b.png", "c"), r"image 1 .* file, got https://a/b.png. Download it"),
        ({"messages": [{"role": "user", "content": ["what?"]}], "images": []}, "a string or a lis"),
        ({"conversations": [{"from": "human"}], "images": []}, "conversations of sample 0 of"),
        ({"conversations": None, "images": []}, "messages of sample 0 .* list of turns, got None"),
    ],
)
def test_what_is_no_row(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples([given])[0]


def test_rows_of_text_may_come_first() -> None:
    inside = LAYOUTS["base64"](Path())
    of_text = {"messages": [{"role": "user", "content": "what?"}]}
    assert [len(sample.images) for sample in load_samples([of_text, inside])] == [0, 2]
    beside = {**as_text(), "images": [picture(1), picture(2)]}
    assert [len(sample.images) for sample in load_samples([of_text, beside])] == [0, 2]


def test_files_of_other_kinds(folder: Path) -> None:
    """A list in a .json file, as LLaVA's are; lines in one; a .parquet file."""
    rows = [LAYOUTS[name](folder) for name in ("in text", "beside")]
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    found = [content_of(load_samples(folder / f"{name}.json")[1:]) for name in ("list", "lines")]
    assert found[0] == found[1] == content_of(load_samples(folder / "list.json")[:1])
    (folder / "broken.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"broken.json, line 1, must be {\"images\""):
        load_samples(folder / "broken.json")
    images = datasets.Features({"images": datasets.List(datasets.Image())})
    table = datasets.Dataset.from_list(
        [{"images": [{"bytes": encoded(shade)} for shade in SHADES]}], features=images
    ).add_column("messages", [as_text()["messages"]])
    table.to_parquet(folder / "rows.parquet")
    assert content_of(load_samples(folder / "rows.parquet")) == found[0]


@pytest.mark.parametrize("several", [False, True])
def test_videos_of_datasets_are_not_decoded_by_them(several: bool, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a video")
    feature = datasets.List(datasets.Video()) if several else datasets.Video()
    path = str(tmp_path / "a.mp4")
    name = "videos" if several else "video"
    table = datasets.Dataset.from_dict(
        {name: [[path]] if several else [path]}, features=datasets.Features({name: feature})
    ).add_column("messages", [[{"role": "user", "content": "<video>what?"}]])
    (sample,) = load_samples(table)
    assert [video.path for video in sample.videos] == [path]


@pytest.mark.parametrize("index", ["1", 1.0, True, -1, 2])
def test_an_index_that_is_none_is_an_error(index: object, folder: Path) -> None:
    given = row({**TYPED, "index": index}, {**TYPED, "index": 0}, images=files())
    samples = load_samples([given])
    with pytest.raises(ValueError, match=r"must have an index from 0 to 1 for each .* got \["):
        samples.check()


def test_an_index_of_numpy_is_one() -> None:
    images = [picture(shade) for shade in reversed(SHADES)]
    given = row(*({**TYPED, "index": np.int64(at)} for at in (1, 0)), images=images)
    assert content_of(load_samples([given]))[0] == [(10, 245, 7), (200, 55, 7)]


@pytest.mark.parametrize(("answer", "expected"), [(4, "4"), (0.5, "0.5"), (float("nan"), "yes")])
def test_answers_may_be_numbers(answer: object, expected: str) -> None:
    given = as_text(images=[picture(shade) for shade in SHADES], answer=answer)
    assert load_samples([given])[0].answer == expected


@pytest.mark.parametrize("answer", [["cat", "cats"], {"text": "cat"}, np.float32("nan")])
def test_what_no_answer_can_be_equal_to_is_none(answer: object) -> None:
    question = [{"role": "user", "content": "<image>?"}]
    given = {"messages": question, "images": [picture(3)], "answer": answer}
    assert load_samples([given])[0].answer is None
    is_number = isinstance(answer, np.float32)
    message = "must have an answer, got none" if is_number else "one string or number, got"
    with pytest.raises(ValueError, match=f"sample 0 .*{message}"):
        load_samples([given]).check(answers=True)
    given["messages"] = [*question, {"role": "assistant", "content": "cat"}]
    load_samples([given]).check(answers=True)


def test_what_an_assistant_shows_is_an_error() -> None:
    images = [picture(shade) for shade in SHADES]
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "<image>!"}]
    for messages, found in ((turns, "one with images or videos"), (turns[1:], "assistant's alone")):
        with pytest.raises(ValueError, match=f"sample 0 of list must .* got .*{found}"):
            load_samples([{"messages": messages, "images": images}])[0]


@pytest.mark.parametrize("broken", [None, "x", 5])
def test_a_row_that_is_none_is_an_error(broken: object) -> None:
    good = as_text(images=[picture(shade) for shade in SHADES])
    for at, rows in ((1, [good, broken]), (0, [broken, good])):
        for read in (Samples.check, Samples.digest):
            with pytest.raises(ValueError, match=f"sample {at} of list must be"):
                read(load_samples(rows))


def test_grey_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    for image in (tmp_path / "grey.png", values, Image.fromarray(values.astype(np.int32))):
        opened = load_samples([as_text(images=[image, image])])[0].images[0]
        assert np.abs(np.asarray(opened)[..., 0] - values / 257).max() <= 1
    low = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))
    opened = load_samples([as_text(images=[low, low])])[0].images[0]
    assert np.asarray(opened)[..., 2].max() == 63
    bright = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ValueError, match="grey values must be integers, got floats"):
        load_samples([as_text(images=[bright, bright])])[0]
