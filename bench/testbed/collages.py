"""Prompts of the testbed: collages of handwritten digits, and questions about them.

Everything is made for a whole batch at once with numpy. A batch has one layout: every prompt in it
has the same number of images, image k of every prompt has the same grid of digits, and question k
of every prompt is of the same task. So nothing is ever padded.

Shapes: B prompts, N images a prompt, M cells of the largest grid, Q questions a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from vocabulary import CELL, DIGITS, IMAGE_MEAN, IMAGE_STD, LABELS, MERGE_SIZE, PATCH_SIZE

Array = np.ndarray

TASKS = ("first_digit", "most_frequent", "count", "find", "same_first", "repeat")
ONE_IMAGE, ALL_IMAGES, COMPARES = TASKS[:3], TASKS[3:4], TASKS[4:]

# {0}, {1}: the arguments: the label of an image or a digit
TEMPLATES = {
    "first_digit": "first digit of image {0} ?",
    "most_frequent": "most frequent digit of image {0} ?",
    "count": "count of {0} in image {1} ?",
    "find": "which image has {0} ?",
    "same_first": "same first digit in images {0} and {1} ?",
    "repeat": "which image repeats image {0} ?",
}
MAX_COUNT = 4
NUM_TEST = 297  # of 1,797 digits

# How often the digits of a collage occur, most frequent first; the first is always alone.
_COUNTS = {
    4: ((2, 1, 1), (3, 1)),
    6: ((2, 1, 1, 1, 1), (3, 2, 1), (3, 1, 1, 1), (4, 1, 1)),
    9: (
        *(
            (4, 3, 1, 1),
            (4, 3, 2),
            (4, 2, 1, 1, 1),
            (4, 2, 2, 1),
            (3, 2, 2, 1, 1),
            (3, 2, 1, 1, 1, 1),
        ),
        *((3, 2, 2, 2), (4, 1, 1, 1, 1, 1)),
    ),
    12: ((4, 3, 2, 2, 1), (4, 3, 3, 1, 1), (4, 3, 2, 1, 1, 1), (4, 2, 2, 2, 1, 1)),
    16: ((4, 3, 3, 3, 2, 1), (4, 3, 3, 2, 2, 2), (4, 3, 3, 3, 3), (4, 3, 2, 2, 2, 2, 1)),
}
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3), (3, 4), (4, 3), (4, 4))


@dataclass(frozen=True)
class Bank:
    """Handwritten digits, as the image processor would give them.

    Attributes:
        pixels: ``[D, 8, 8]`` uint8, gray.
        label: ``[D]``, which digit it is.
        by_digit: ``[10, S]``, for each digit the rows that show it, repeated to equal length.
        source: ``[D]``, the digit of the data set it was made from.
    """

    pixels: Array
    label: Array
    by_digit: Array
    source: Array

    @property
    def patches(self) -> Array:
        """``[D, 4, 16]`` float32, the four patches of each digit in the processor's order."""
        scaled = (self.pixels.astype(np.float32) / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
        m, p = MERGE_SIZE, PATCH_SIZE
        return scaled.reshape(-1, m, p, m, p).swapaxes(2, 3).reshape(-1, m * m, p * p)


@cache
def load_bank(split: str, num_variants: int = 0) -> Bank:
    """The digits of one split of scikit-learn's (UCI's optical recognition set, 8 x 8 pixels).

    Args:
        split: ``train`` or ``test``; no digit is in both.
        num_variants: This many slightly turned, scaled, shifted copies of each digit are added.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}. Name one of the two.")
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    rows = np.sort(order[:NUM_TEST] if split == "test" else order[NUM_TEST:])
    images, label, source = found.images[rows] / 16, found.target[rows], rows
    if num_variants:
        copies = [images, *(_vary(images, seed) for seed in range(num_variants))]
        images = np.concatenate(copies)
        label, source = (np.tile(x, num_variants + 1) for x in (label, source))
    pixels = np.round(images.clip(0, 1) * 255).astype(np.uint8)
    groups = [np.flatnonzero(label == digit) for digit in range(10)]
    longest = max(len(group) for group in groups)
    by_digit = np.stack([np.resize(group, longest) for group in groups])
    return Bank(pixels, label, by_digit, source)


def _vary(images: Array, seed: int) -> Array:
    """Each image turned by up to 12 degrees, scaled by up to 12 %, shifted by half a pixel."""
    from scipy.ndimage import affine_transform

    rng = np.random.default_rng((1, seed))
    varied = np.empty_like(images)
    centre = np.full(2, (CELL - 1) / 2)
    for row, image in enumerate(images):
        turn, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12, 2)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * scale
        offset = centre - matrix @ centre + rng.uniform(-0.5, 0.5, 2)
        varied[row] = affine_transform(image, matrix, offset, order=1) * rng.uniform(0.85, 1.1)
    return varied


@dataclass(frozen=True)
class Collages:
    """The images of a batch.

    Attributes:
        grids: rows and columns of image k, for every k.
        digits: ``[B, N, M]``, row by row; -1 where the grid has no cell.
        samples: ``[B, N, M]``, the row of the bank in each cell.
        counts: ``[B, N, 10]``, how often each digit occurs.
    """

    grids: tuple[tuple[int, int], ...]
    digits: Array
    samples: Array
    counts: Array


@cache
def _ranks(cells: int) -> tuple[Array, Array]:
    """For each way to fill: the rank of the digit in each cell, and the number of digits."""
    ways = _COUNTS[cells]
    return (
        np.array([np.repeat(np.arange(len(way)), way) for way in ways]),
        np.array([len(way) for way in ways]),
    )


def make_collages(
    rng: np.random.Generator,
    bank: Bank,
    *,
    batch: int,
    grids: tuple[tuple[int, int], ...],
    num_rare: int = 1,
    num_pairs: int = 0,
) -> Collages:
    """Random images such that all tasks can be asked.

    Args:
        rng: Decides everything.
        bank: Which handwriting.
        batch: B.
        grids: of each image.
        num_rare: This many digits of each prompt are in one image only, each in another.
        num_pairs: This many images of each prompt are repeated by another, in other handwriting
            (fewer where the two grids differ).
    """
    n = len(grids)
    if num_rare + 2 * num_pairs > n:
        raise ValueError(
            f"num_rare + 2 * num_pairs must be at most the number of images, {n}, got "
            f"{num_rare} + 2 * {num_pairs}. Ask for fewer."
        )
    cells = np.array([rows * columns for rows, columns in grids])
    digits = np.full((batch, n, cells.max()), -1)
    places = rng.random((batch, n)).argsort(1)  # first the images with a rare digit, then pairs
    rare = rng.random((batch, 10)).argsort(1)[:, :num_rare]
    is_rare = np.zeros((batch, 10), bool)
    np.put_along_axis(is_rare, rare, True, 1)
    own = np.full((batch, n), -1)  # the rare digit of each image
    np.put_along_axis(own, places[:, :num_rare], rare, 1)

    order = np.where(is_rare[:, None], 2, rng.random((batch, n, 10))).argsort(-1)
    for size in np.unique(cells):
        which = np.flatnonzero(cells == size)
        ranks, lengths = _ranks(int(size))
        way = rng.integers(len(lengths), size=(batch, len(which)))
        chosen = order[:, which].copy()
        slot = (rng.random(way.shape) * lengths[way]).astype(int)[..., None]
        mine = own[:, which, None]
        kept = np.take_along_axis(chosen, slot, -1)
        np.put_along_axis(chosen, slot, np.where(mine >= 0, mine, kept), -1)
        filled = np.take_along_axis(chosen, ranks[way], -1)
        filled = np.take_along_axis(filled, rng.random(filled.shape).argsort(-1), -1)
        digits[:, which, :size] = filled

    rows = np.arange(batch)
    for _ in range(max(1, n // 3)):  # make some first digits equal, by exchanging two digits
        one, other = rng.random((batch, n)).argsort(1)[:, :2].T
        a, b = digits[rows, one, 0], digits[rows, other, 0]
        swap = ~is_rare[rows, a] & ~is_rare[rows, b]
        image = digits[rows, other]
        swapped = np.where(image == b[:, None], a[:, None], image)
        swapped = np.where(image == a[:, None], b[:, None], swapped)
        digits[rows, other] = np.where(swap[:, None], swapped, image)
    for pair in range(num_pairs):
        one, other = places[:, num_rare + 2 * pair], places[:, num_rare + 2 * pair + 1]
        same = np.array(grids)[one] == np.array(grids)[other]
        digits[rows, other] = np.where(same.all(1)[:, None], digits[rows, one], digits[rows, other])

    pick = (rng.random(digits.shape) * bank.by_digit.shape[1]).astype(int)
    samples = np.where(digits < 0, 0, bank.by_digit[digits, pick])
    counts = (digits[..., None] == np.arange(10)).sum(2)
    return Collages(grids, digits, samples, counts)


def render(bank: Bank, collages: Collages, prompt: int, image: int) -> Array:
    """One image, ``[8 * rows, 8 * columns, 3]`` uint8."""
    rows, columns = collages.grids[image]
    cells = bank.pixels[collages.samples[prompt, image, : rows * columns]]
    gray = cells.reshape(rows, columns, CELL, CELL).swapaxes(1, 2)
    gray = gray.reshape(rows * CELL, columns * CELL)
    return np.repeat(gray[..., None], 3, -1)


@dataclass(frozen=True)
class Question:
    """Question k of every prompt of a batch.

    Attributes:
        task: Its name.
        arguments: ``[B, A]``, in the order of the template: images and digits by number.
        answer: ``[B]``: a digit, a count, an image, or 1 for yes and 0 for no.
        valid: ``[B]``, whether it can be asked of this prompt with exactly one right answer.
    """

    task: str
    arguments: Array
    answer: Array
    valid: Array


def ask(rng: np.random.Generator, collages: Collages, task: str) -> Question:
    """A question of this task for each prompt, the answers balanced where the images allow."""
    digits, counts = collages.digits, collages.counts
    batch, n, _ = digits.shape
    rows = np.arange(batch)
    image = rng.integers(n, size=batch)
    everywhere = np.ones(batch, bool)
    if task == "first_digit":
        return Question(task, image[:, None], digits[rows, image, 0], everywhere)
    if task == "most_frequent":
        return Question(task, image[:, None], counts[rows, image].argmax(-1), everywhere)
    if task == "count":
        wanted = counts[..., None] == np.arange(MAX_COUNT + 1)  # [B, N, 10, 5]
        number, _ = _choose(rng, wanted.any((1, 2)))
        where, valid = _choose(rng, wanted[rows, :, :, number].reshape(batch, -1))
        return Question(task, np.stack([where % 10, where // 10], 1), number, valid)
    if task == "find":
        digit, valid = _choose(rng, (counts > 0).sum(1) == 1)
        return Question(task, digit[:, None], (counts[rows, :, digit] > 0).argmax(1), valid)
    if task == "same_first":
        first = digits[:, :, 0]
        same = first[:, :, None] == first[:, None]
        yes = rng.integers(2, size=batch)
        asked = np.where(yes[:, None, None] == 1, same, ~same) & ~np.eye(n, dtype=bool)
        where, valid = _choose(rng, asked.reshape(batch, -1))
        return Question(task, np.stack([where // n, where % n], 1), yes, valid)
    if task == "repeat":
        grids = np.array(collages.grids)
        same = (digits[:, :, None] == digits[:, None]).all(-1)
        same &= (grids[:, None] == grids[None]).all(-1) & ~np.eye(n, dtype=bool)
        image, valid = _choose(rng, same.sum(-1) == 1)
        return Question(task, image[:, None], same[rows, image].argmax(-1), valid & (n > 2))
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}. Name one of these.")


def _choose(rng: np.random.Generator, allowed: Array) -> tuple[Array, Array]:
    """For each row ``[B, X]`` one of the allowed, evenly; and whether any was."""
    scores = np.where(allowed, rng.random(allowed.shape), -1)
    return scores.argmax(1), allowed.any(1)


def words(question: Question, prompt: int) -> tuple[str, str]:
    """A question and its answer as text."""
    task, answer = question.task, int(question.answer[prompt])
    names = [
        DIGITS[x] if is_digit_argument(task, k) else LABELS[x]
        for k, x in enumerate(question.arguments[prompt])
    ]
    if task in ("find", "repeat"):
        said = LABELS[answer]
    else:
        said = ("no", "yes")[answer] if task == "same_first" else DIGITS[answer]
    return TEMPLATES[task].format(*names), said


def is_digit_argument(task: str, argument: int) -> bool:
    """Whether this argument of the task's template is a digit, not an image."""
    return task in ("count", "find") and argument == 0
