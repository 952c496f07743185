"""Datasets from everywhere, processors, and what is said of broken ones."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from PIL import Image

from blindsight.calibrate import calibrate
from blindsight.cli.models import load_model
from blindsight.data.processors import digest_of_processor, load_processor, model_inputs
from blindsight.data.rows import Sample
from blindsight.data.samples import Samples, load_samples
from family_processors import HAS_TORCHVISION
from models import IMAGE_ID, tiny_model
from processors import tiny_processor
from questions import Watched


def picture(shade: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 255 - shade, 7))


def messages(text: str = "what?", num_images: int = 2, answer: str | None = None) -> list[Any]:
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    turns: list[Any] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def memory_rows(num_rows: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "images": [picture(10 * n), picture(10 * n + 5)],
            "messages": messages(f"question {n}", answer=f"answer {n}"),
            "task": "some",
        }
        for n in range(num_rows)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    lines = []
    for n in range(5):
        names = [f"img/{n}{side}.png" for side in "ab"]
        for name in names:
            picture(10 * n).save(tmp_path / name)
        row = {"images": names, "messages": messages(f"question {n}"), "answer": n, "task": "some"}
        lines.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def texts(samples: Samples) -> list[str]:
    return [sample.messages[0]["content"][-1]["text"] for sample in samples]


def test_a_file_and_its_folder_are_the_same(folder: Path) -> None:
    by_file, by_folder = load_samples(folder / "data.jsonl"), load_samples(str(folder))
    assert texts(by_file) == texts(by_folder) == [f"question {n}" for n in range(5)]
    sample = by_file[3]
    assert (sample.index, sample.task, sample.answer) == (3, "some", "3")
    assert [image.mode for image in sample.images] == ["RGB", "RGB"]
    assert sample.images[0].getpixel((0, 0)) == (30, 225, 7)
    assert by_file.digest() == by_folder.digest() != by_file[:4].digest()


def test_limit_and_seed_choose_the_same_samples_again(folder: Path) -> None:
    assert texts(load_samples(folder, limit=2)) == ["question 0", "question 1"]
    first, again = (load_samples(folder, limit=3, seed=7) for _ in range(2))
    assert texts(first) == texts(again)
    assert len(set(texts(first))) == 3
    orders = {tuple(texts(load_samples(folder, seed=seed))) for seed in range(20)}
    assert len(orders) > 5
    assert (
        texts(load_samples(load_samples(folder, seed=1), limit=2))
        == texts(load_samples(folder, seed=1))[:2]
    )


def test_the_digest_sees_another_image(folder: Path) -> None:
    before = load_samples(folder).digest()
    picture(3, width=40).save(folder / "img/0a.png")
    assert load_samples(folder).digest() != before


def test_rows_in_memory() -> None:
    samples = load_samples(memory_rows())
    assert len(samples) == 5
    assert [samples[n].answer for n in range(5)] == [f"answer {n}" for n in range(5)]
    assert len(samples[0].prompt) == 1 and len(samples[0].messages) == 2
    assert samples.digest() == load_samples(memory_rows()).digest()
    data = io.BytesIO()
    picture(3).save(data, "PNG")
    single = load_samples([{"image": data.getvalue(), "messages": messages(num_images=1)}])
    assert single[0].images[0].size == (16, 16)
    stream = (row for row in memory_rows())
    assert len(load_samples(stream, limit=2)) == 2
    with pytest.raises(
        ValueError, match=r"samples must have a length, .*load_samples\(stream, limit=\.\.\.\)"
    ):
        load_samples(row for row in memory_rows())


def test_datasets_of_datasets(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [
                {"role": datasets.Value("string"), "content": [{"type": datasets.Value("string"),
                 "text": datasets.Value("string")}]}
            ],
            "task": datasets.Value("string"),
        }
    )  # fmt: skip
    table = datasets.Dataset.from_list(memory_rows(), features=features)
    assert load_samples(table)[2].answer == "answer 2"
    table.save_to_disk(tmp_path / "one")
    saved = load_samples(tmp_path / "one")
    assert saved[2].messages == load_samples(memory_rows())[2].messages
    assert saved[1].images[0].getpixel((0, 0)) == (10, 245, 7)
    assert saved.digest() == load_samples(tmp_path / "one").digest()
    parts = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert len(load_samples(parts, split="test")) == 1
    parts.save_to_disk(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"one part of .* got all of them: train, test\. .*--split"
    ):
        load_samples(tmp_path / "two")
    broken = datasets.Dataset.from_list(
        [{"images": [{"bytes": b"no image", "path": None}] * 2, "messages": messages()}],
        features=datasets.Features({k: features[k] for k in ("images", "messages")}),
    )
    with pytest.raises(ValueError, match=r"sample 0 of .* must be readable"):
        load_samples(broken)[0]


def test_an_empty_dataset(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    for source in (tmp_path, []):
        with pytest.raises(ValueError, match="at least one sample, got none in"):
            load_samples(source)


def test_a_dataset_without_images_or_messages() -> None:
    with pytest.raises(ValueError, match="must have images or videos, got only messages, task"):
        load_samples([{"messages": messages(num_images=0), "task": "x"}])
    with pytest.raises(ValueError, match="must have a column 'messages', got images"):
        load_samples([{"images": []}])
    with pytest.raises(ValueError, match=r"one image for each .* got 1 images for 2"):
        load_samples([{"images": [picture(1)], "messages": messages()}])[0]
    with pytest.raises(ValueError, match=r"messages of sample 0 .* must be"):
        load_samples([{"images": [], "messages": [{"role": "user"}]}])[0]


def test_a_broken_image_file(folder: Path) -> None:
    (folder / "img/2b.png").write_bytes((folder / "img/2b.png").read_bytes()[:40])
    (folder / "img/3a.png").unlink()
    samples = load_samples(folder)
    assert samples[1].images
    for index, name in ((2, "image 2"), (3, "image 1")):
        with pytest.raises(ValueError, match=f"{name} of sample {index} of .* must be an image"):
            samples[index]


def test_all_rows_are_checked_before_long_work(folder: Path) -> None:
    samples = load_samples(folder)
    samples.check()
    (folder / "img/4b.png").write_bytes(b"no image")
    samples.take([0, 1, 2, 3]).check()
    with pytest.raises(ValueError, match=r"image 2 of sample 4 of .* must be an image"):
        samples.check()
    model = tiny_model("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"image 2 of sample 4 of .* must be an image"):
        calibrate(model, None, samples, progress=False)


def test_photographs_are_turned_as_they_say(tmp_path: Path) -> None:
    upright = Image.effect_noise((32, 16), 90).convert("RGB")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    encoded = base64.b64encode((tmp_path / "turned.png").read_bytes()).decode()
    for image in (
        tmp_path / "turned.png",
        (tmp_path / "turned.png").read_bytes(),
        Image.open(tmp_path / "turned.png"),
        f"data:image/png;base64,{encoded}",
    ):
        (sample,) = load_samples([{"images": [image], "messages": messages(num_images=1)}])
        assert sample.images[0].tobytes() == upright.tobytes()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/a.png", r"got https://example.com/a.png. Download it first"),
        ("data:image/png;base64,iVBO", "must be an image file"),
        ("A" * 5000, r"must be an image file, got .{10,320}\. Replace"),
    ],
)
def test_what_is_no_file(image: str, message: str) -> None:
    samples = load_samples([{"images": [image], "messages": messages(num_images=1)}])
    assert len(samples.digest()) == 64
    with pytest.raises(ValueError, match=message):
        samples[0]


def test_a_tokenizer_is_no_processor() -> None:
    tokenizer = tiny_processor("qwen2_5_vl").tokenizer
    with pytest.raises(ValueError, match="must take images, got a tokenizer, "):
        model_inputs(tokenizer, list(load_samples(memory_rows(1))))


def test_samples_may_be_given_again() -> None:
    samples = load_samples(memory_rows())
    listed = load_samples([samples[3], samples[1]])
    assert texts(listed) == ["question 3", "question 1"]
    assert listed[1].images[0].getpixel((0, 0)) == (10, 245, 7)
    assert (listed[0].answer, listed[0].task, listed[0].videos) == ("answer 3", "some", [])
    assert listed.digest() == load_samples([samples[3], samples[1]]).digest() != samples.digest()
    assert load_samples(samples) is samples
    assert texts(load_samples(memory_rows(2))) == texts(samples[:2])


def test_an_image_that_the_processor_does_not_take_has_a_number() -> None:
    rows = memory_rows(2)
    rows[1]["images"][0] = Image.new("RGB", (3000, 4))
    samples = load_samples(rows)
    with pytest.raises(ValueError, match=r"sample 1 must be what Qwen.*takes, got: .*aspect ratio"):
        model_inputs(tiny_processor("qwen2_5_vl"), [samples[1]])


def test_a_broken_line(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"images": [], "messages": []}\n{"images": [\n')
    with pytest.raises(ValueError, match=r"data.jsonl, line 2, must be JSON like"):
        load_samples(folder)


def test_no_such_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="a folder that datasets reads, got"):
        load_samples(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="split must be one of train for"):
        load_samples(tmp_path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_inputs_run(family: str) -> None:
    processor, model = tiny_processor(family), tiny_model(family)
    samples = load_samples(memory_rows())
    for side in ("left", "right"):
        rows = [samples[0], load_samples([{**memory_rows()[1], "messages": messages("x")}])[0]]
        inputs = model_inputs(processor, rows, padding_side=side)
        mask = inputs["attention_mask"]
        assert bool(mask[1, 0 if side == "right" else -1]) and not mask[1].all()
        counts = (inputs["input_ids"] == IMAGE_ID).sum(1).tolist()
        assert counts == [8, 8]
        with torch.no_grad():
            assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    alone = model_inputs(processor, [samples[0]])
    without_answer = load_samples([{**memory_rows()[0], "messages": messages("question 0")}])
    expected = model_inputs(processor, [without_answer[0]])
    assert torch.equal(alone["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="padding_side must be"):
        model_inputs(processor, rows, padding_side="both")
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        model_inputs(processor, rows)


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision resizes a bit differently")
def test_a_processor_is_told_from_another() -> None:
    processor = tiny_processor("qwen2_5_vl")
    digest = digest_of_processor(processor)
    assert digest == digest_of_processor(tiny_processor("qwen2_5_vl"))
    frames = SimpleNamespace(to_json_string=lambda: '{"max_frames": 8}')
    processor.video_processor = frames
    few = digest_of_processor(processor)
    frames.to_json_string = lambda: '{"max_frames": 9}'
    assert len({digest, few, digest_of_processor(processor)}) == 3
    processor = tiny_processor("qwen2_5_vl")
    processor.chat_template = processor.chat_template.replace("assistant", "model")
    assert digest_of_processor(processor) != digest


def test_processors_come_back_without_torchvision(tmp_path: Path) -> None:
    processor = tiny_processor()
    tiny_model("qwen2_5_vl", num_layers=1).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert type(loaded).__name__ == "Qwen2_5_VLProcessor"
    samples = load_samples(memory_rows())[:2]
    expected, found = model_inputs(processor, samples), model_inputs(loaded, samples)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_no_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must have a processor, got none in"):
        load_processor(tmp_path)


def test_a_dataset_that_needs_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_samples(folder)) == 5
    with pytest.raises(ImportError, match=r"install blindsight\[calibrate\]"):
        load_samples(folder / "img")


def test_importing_blindsight_does_not_import_datasets() -> None:
    code = (
        "import sys, blindsight.data.samples, blindsight.cli, blindsight.calibrate\n"
        "assert 'datasets' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    text = json.dumps({"images": [], "messages": messages("?")}) + "\n"
    (tmp_path / "data.jsonl").write_text(text)
    (tmp_path / "test.jsonl").write_text(text * 2)
    assert len(load_samples(tmp_path)) == 1
    assert len(load_samples(tmp_path, split="test")) == 2
    with pytest.raises(ValueError, match=r"split must be one of data, test for .* got train"):
        load_samples(tmp_path, split="train")
    for whole in (tmp_path / "data.jsonl", memory_rows()):
        with pytest.raises(ValueError, match=r"split must be left out, as .* has no parts"):
            load_samples(whole, split="test")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (memory_rows(1)[0], r"a list of rows, got one row, with messages, images\. Give \[row\]"),
        ({"train": memory_rows(1), "test": []}, r"got all of them: train, test\. Choose one: rows"),
        (
            [{"images": [], "question": "?"}],
            r"column 'messages', got images, question .*rows\.map",
        ),
    ],
)
def test_what_is_no_list_of_rows_is_told_what_to_be(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(given)


@pytest.mark.parametrize("name", ["/none", "./none", "~/none", "none.jsonl", "a/b/c", "a b.csv"])
def test_a_path_that_is_not_there_is_not_asked_for_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # or it would be an ImportError
    with pytest.raises(ValueError, match=f"dataset must be a path that exists, .* got '{name}'"):
        load_samples(name)
    for load in (load_processor, load_model):
        with pytest.raises(ValueError, match=f"model must be a path that exists, .* got '{name}'"):
            load(name)


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert len(load_samples("~")) == len(load_samples("~/data.jsonl")) == 5


def test_a_table_of_pandas_is_told_what_to_be() -> None:
    with pytest.raises(ValueError, match=r"got a table of pandas\. Give datasets\.Dataset\.from"):
        load_samples(pd.DataFrame(memory_rows(2)))


def test_shards_are_read_by_datasets(tmp_path: Path) -> None:
    for shard in (0, 1):
        text = json.dumps({"images": [], "messages": messages(f"{shard}?")}) + "\n"
        (tmp_path / f"train-0000{shard}-of-00002.jsonl").write_text(text)
    assert len(load_samples(tmp_path, split="train")) == 2


def test_loading_samples_opens_but_the_first() -> None:
    """To see that it has images: the others may be opened when they are read."""
    samples = Watched(load_samples(memory_rows(5)))
    load_samples(SamplesOfMine(samples))
    assert set(samples.opened) == {0}


class SamplesOfMine(Sequence[Sample]):
    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, at: Any) -> Any:
        return self._samples[at]
