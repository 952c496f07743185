"""The four attention-head categories of BlindSight (arXiv 2507.09071)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class HeadCategory(IntEnum):
    """What a query inside one image may see of the other images, for one query head.

    The values are the codes of the profile file. Text queries, text keys and the first
    image of a sequence are never restricted; see :mod:`blindsight.attention.interval_masks`.
    """

    DENSE = 0  # everything
    SINK = 1  # the sink tokens of every image, and itself
    DOCUMENT = 2  # its own image
    DOCUMENT_SINK = 3  # its own image and the sink tokens of every image

    @classmethod
    def parse(cls, value: object) -> HeadCategory:
        """Return the category that ``value`` (a category, its code or its name) stands for.

        Raises:
            ValueError: ``value`` is no category; the message lists the names.
        """
        try:
            if isinstance(value, str):
                return cls[value.strip().upper()]
            number = float(value)  # type: ignore[arg-type]
            if type(value).__name__ in ("bool", "bool_") or number != int(number):
                raise ValueError
            return cls(int(number))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"category must be one of {', '.join(cls.names())} or a code "
                f"0..{len(cls) - 1}, got {value!r}."
            ) from None

    @classmethod
    def names(cls) -> list[str]:
        return [category.name for category in cls]


NUM_CATEGORIES = len(HeadCategory)


def summarize_categories(codes: Iterable[int]) -> str:
    """Return for example ``"4 DENSE, 12 SINK"`` for the category codes of some heads."""
    heads = [int(code) for code in codes]
    counts = {category: heads.count(category) for category in HeadCategory}
    return ", ".join(f"{count} {category.name}" for category, count in counts.items() if count)
