"""The testbed: its data are right and repeatable, and the shipped model is a plain Qwen2.5-VL."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent / "bench" / "testbed"
MODEL = ROOT / "model"


@pytest.fixture(autouse=True, scope="module")
def testbed_on_path() -> Iterator[None]:
    """Its scripts import each other as they do when run."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def read_dataset(out: Path, **options: object) -> list[dict]:
    from make_dataset import write_dataset

    path = write_dataset(out, **options)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    options = {"num_samples": 6, "images": (2, 5), "seed": 3}
    one = read_dataset(tmp_path / "one", **options)
    assert one == read_dataset(tmp_path / "two", **options)
    for line in one:
        for path in line["images"]:
            both = [(tmp_path / part / path).read_bytes() for part in ("one", "two")]
            assert both[0] == both[1]
    assert one != read_dataset(tmp_path / "three", **(options | {"seed": 4}))
    assert one[:4] == read_dataset(tmp_path / "four", **(options | {"num_samples": 4}))


def test_no_test_digit_is_a_training_digit() -> None:
    from collages import load_bank

    train, test = load_bank("train"), load_bank("test")
    assert not set(train.source) & set(test.source)
    assert len(train.source) + len(test.source) == 1797
    for bank in (train, test):
        for digit, rows in enumerate(bank.by_digit):
            assert (bank.label[rows] == digit).all()
    with pytest.raises(ValueError, match="train or test, got 'dev'"):
        load_bank("dev")


def right_answer(images: list[list[int]], grids: list[tuple[int, int]], question: str) -> str:
    """The answer, from the digits of every image, in the plainest code."""
    words = question.split()
    letters = "ABCDEFGHIJKL"
    if question.startswith("first digit of image"):
        return str(images[letters.index(words[4])][0])
    if question.startswith("most frequent digit of image"):
        digits = images[letters.index(words[5])]
        best = [d for d in range(10) if digits.count(d) == max(map(digits.count, range(10)))]
        assert len(best) == 1
        return str(best[0])
    if question.startswith("count of"):
        return str(images[letters.index(words[5])].count(int(words[2])))
    if question.startswith("which image has"):
        found = [k for k, digits in enumerate(images) if int(words[3]) in digits]
    elif question.startswith("which image repeats"):
        asked = letters.index(words[4])
        found = [
            k
            for k in range(len(images))
            if k != asked and (images[k], grids[k]) == (images[asked], grids[asked])
        ]
    else:
        assert question.startswith("same first digit in images")
        one, other = letters.index(words[5]), letters.index(words[7])
        assert one != other
        return "yes" if images[one][0] == images[other][0] else "no"
    assert len(found) == 1
    return letters[found[0]]


@pytest.mark.parametrize("images", [(2, 2), (3, 4), (12, 12)])
def test_answers_are_right(images: tuple[int, int]) -> None:
    from collages import TASKS
    from make_dataset import sample_prompts

    options = {"num_samples": 30, "images": images, "questions": 3, "seed": 1}
    asked = set()
    for bank, collages, turns in sample_prompts(**options):
        seen = [
            bank.label[collages.samples[0, k, : rows * columns]].tolist()
            for k, (rows, columns) in enumerate(collages.grids)
        ]
        for task, question, answer in turns:
            asked.add(task)
            assert answer == right_answer(seen, list(collages.grids), question)
    assert asked == set(TASKS)


def test_yes_and_no_and_the_counts_are_balanced() -> None:
    from make_dataset import sample_prompts

    for task, answers in (("same_first", 2), ("count", 5)):
        options = {"num_samples": 150, "images": (4, 12), "tasks": (task,)}
        said = [turns[0][2] for _, _, turns in sample_prompts(**options)]
        assert len(set(said)) == answers
        assert max(map(said.count, said)) < 1.5 * len(said) / answers


def test_dataset_lines_are_as_promised(tmp_path: Path) -> None:
    lines = read_dataset(tmp_path, num_samples=4, images=(3, 3), questions=8, tasks=("find",))
    for line in lines:
        assert set(line) == {"images", "messages", "task", "answer", "chance"}
        assert [x["role"] for x in line["messages"]] == ["user", "assistant"] * 8
        types = [part["type"] for part in line["messages"][0]["content"]]
        assert types == ["text", "image"] * 3 + ["text"]
        assert line["messages"][-1]["content"][0]["text"] == line["answer"]
        assert all((tmp_path / path).exists() for path in line["images"])
    with pytest.raises(ValueError, match=r"tasks must be of .* got 'sum'"):
        read_dataset(tmp_path, num_samples=1, images=(3, 3), tasks=("sum",))
    with pytest.raises(ValueError, match="range within 2 to 12, got 2-13"):
        read_dataset(tmp_path, num_samples=1, images=(2, 13))


@pytest.fixture(scope="module")
def shipped() -> tuple:
    from evaluate import load

    return load(MODEL)


def test_training_sees_the_pixels_of_the_processor() -> None:
    from collages import load_bank, make_collages, render
    from PIL import Image
    from vocabulary import build_processor

    bank = load_bank("test")
    grids = ((2, 2), (3, 2), (3, 4))
    collages = make_collages(np.random.default_rng(0), bank, batch=1, grids=grids)
    images = [Image.fromarray(render(bank, collages, 0, k)) for k in range(3)]
    found = build_processor().image_processor(images, return_tensors="np")
    assert found["image_grid_thw"].tolist() == [[1, 2 * r, 2 * c] for r, c in grids]
    cells = [collages.samples[0, k, : r * c] for k, (r, c) in enumerate(grids)]
    patches = bank.patches[np.concatenate(cells)].reshape(-1, 1, 16)  # one channel, one frame
    found = found["pixel_values"].reshape(-1, 6, 16)
    np.testing.assert_allclose(found, np.broadcast_to(patches, found.shape), atol=1e-6)


@pytest.mark.parametrize("isolated", [True, False])
def test_what_is_trained_is_the_plain_class(isolated: bool) -> None:
    from collages import TASKS, ask, load_bank, make_collages, render, words
    from make_dataset import to_messages
    from network import Trainee, bank_patches, build_batch, build_model
    from PIL import Image
    from vocabulary import build_processor

    bank, processor, model = load_bank("test"), build_processor(), build_model(1).eval()
    rng = np.random.default_rng(2)
    grids = ((3, 3), (2, 3), (3, 3))
    collages = make_collages(rng, bank, batch=2, grids=grids, num_pairs=1)
    questions = tuple(ask(rng, collages, task) for task in TASKS)
    batch = build_batch(bank_patches(bank), collages, questions, isolated=isolated)
    with torch.no_grad():
        logits, _ = Trainee(model)(batch)
    images = [Image.fromarray(render(bank, collages, 1, k)) for k in range(3)]
    turns = [(question.task, *words(question, 1)) for question in questions]
    for k in range(len(turns)):
        messages = to_messages(3, turns[k : k + 1] if isolated else turns[: k + 1])[:-1]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1]
        torch.testing.assert_close(logits[1, k], expected, atol=1e-4, rtol=1e-4)


def test_the_shipped_model_is_small_and_plain(shipped: tuple) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, _ = shipped
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert (MODEL / "model.safetensors").stat().st_size < 10_000_000
    assert sum(x.numel() for x in model.parameters()) < 4_900_000


def test_the_shipped_model_answers(shipped: tuple, tmp_path: Path) -> None:
    from evaluate import answer
    from PIL import Image

    lines = read_dataset(tmp_path, num_samples=36, images=(3, 6), seed=11)
    right = [
        answer(
            *shipped,
            [Image.open(tmp_path / path) for path in line["images"]],
            line["messages"][:-1],
        )
        == line["answer"]
        for line in lines
    ]
    assert np.mean(right) >= 0.9
