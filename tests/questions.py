"""Questions with random images and answers, for the models of tests/models.py."""

import random
from typing import Any, overload

from PIL import Image

from blindsight.data.rows import Sample
from blindsight.data.samples import Samples, load_samples


def rows(number: int, *, seed: int = 0, max_images: int = 4) -> list[dict[str, Any]]:
    """Rows of unlike lengths, of the tasks a and b, each answered by a letter."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        images = [
            Image.frombytes(
                "RGB",
                size := (draw.choice([16, 24]), draw.choice([16, 24])),
                draw.randbytes(3 * size[0] * size[1]),
            )
            for _ in range(draw.randint(1, max_images))
        ]
        content = [{"type": "text", "text": "Look " * draw.randint(0, 2)}]
        content += [{"type": "image"} for _ in images]
        content += [{"type": "text", "text": "Which one?"}]
        found.append(
            {
                "images": images,
                "messages": [{"role": "user", "content": content}],
                "task": draw.choice("ab"),
                "answer": draw.choice("xyz"),
            }
        )
    return found


def samples(number: int, **options: Any) -> Samples:
    return load_samples(rows(number, **options))


class Watched(Samples):
    """Samples that remember which were opened, and end the run at one of them."""

    def __init__(self, of: Samples, *, stop_at: int | None = None) -> None:
        super().__init__(of._rows, of._indices, of.name, of._folder)
        self.stop_at = stop_at
        self.opened: list[int] = []

    @overload
    def __getitem__(self, at: int) -> Sample: ...

    @overload
    def __getitem__(self, at: slice) -> Samples: ...

    def __getitem__(self, at: int | slice) -> Sample | Samples:
        assert isinstance(at, int)
        if at == self.stop_at:
            raise KeyboardInterrupt
        self.opened.append(at)
        return super().__getitem__(at)
