"""Datasets of prompts with images or videos, from files, folders, ``datasets`` or memory.

:mod:`blindsight.data.rows` describes their rows. Nothing is opened before it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

from blindsight.data.rows import (
    ROW,
    Sample,
    check_answer,
    check_columns,
    check_row,
    columns_of_rows,
    has_answer,
    identity_of_row,
    row_of_sample,
    sample_of_row,
)
from blindsight.error_text import local_path, on_one_line

_TO_CHOOSE = (
    "Choose one: rows['test'] of rows in memory, load_samples(path, split='test') of "
    "blindsight.data.samples, or --split test."
)


class Samples(Sequence[Sample]):
    """Some rows of a source, opened one at a time; a slice is a :class:`Samples` too."""

    def __init__(self, rows: Any, indices: Sequence[int], name: str, folder: Path | None) -> None:
        self._rows = rows
        self._indices = indices
        self._folder = folder
        self.name = name

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> Sample: ...

    @overload
    def __getitem__(self, at: slice) -> Samples: ...

    def __getitem__(self, at: int | slice) -> Sample | Samples:
        if isinstance(at, slice):
            return Samples(self._rows, self._indices[at], self.name, self._folder)
        index = self._indices[at]
        where = f"sample {index} of {self.name}"
        try:
            row = self._rows[index]
        except Exception as error:  # datasets decode images right here
            message = f"{where} must be readable, got {error}. Remove or replace it."
            raise ValueError(message) from error
        return sample_of_row(row, index, where, self._folder)

    def has_answers(self) -> bool:
        """Whether the samples have answers, as the first one tells.

        Raises:
            ValueError: It has something in place of one, such as a list of several.
        """
        index = self._indices[0]
        where = f"sample {index} of {self.name}"
        check_row(row := self._rows[index], where)
        return has_answer(row, where)

    def check(self, *, answers: bool | None = None) -> None:
        """Check all rows, and images by their headers, so that errors are found before long work.

        Datasets of ``datasets`` are not checked: looking at their images would decode them.

        Args:
            answers: Whether every row has to have one, or none of them; None does not look.

        Raises:
            ValueError: A row is malformed, or a file is missing or damaged.
        """
        if hasattr(self._rows, "_fingerprint"):
            return
        for index in self._indices:
            where = f"sample {index} of {self.name}"
            sample = sample_of_row(self._rows[index], index, where, self._folder, decode=False)
            if answers is not None:
                has_answer(self._rows[index], where)
                check_answer(sample, answered=answers)

    def take(self, positions: Sequence[int]) -> Samples:
        """Return the samples at some positions, in the given order."""
        chosen = [self._indices[at] for at in positions]
        return Samples(self._rows, chosen, self.name, self._folder)

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def digest(self) -> str:
        """Return a hex digest that tells these samples from others, without opening images.

        Files are told apart by name and size.
        """
        known = getattr(self._rows, "_fingerprint", None)  # datasets hash what they hold
        digest = hashlib.sha256(json.dumps([known, list(self._indices)]).encode())
        if known is None:
            for index in self._indices:
                row = self._rows[index]
                check_row(row, f"sample {index} of {self.name}")
                digest.update(repr(identity_of_row(row, self._folder)).encode())
        return digest.hexdigest()


def load_samples(
    source: Any, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> Samples:
    """Return the samples of a dataset.

    Args:
        source: A JSON-lines file, a ``.json`` file with a list of rows, a ``.parquet`` file, a
            folder with a ``data.jsonl`` (or a ``<split>.jsonl``), a folder that ``datasets``
            reads, the id of a dataset on the hub, a dataset of ``datasets``, any sequence of rows,
            a list of samples, or what this function returned. A path that exists is preferred
            to an id on the hub.
        split: Which part of the dataset, if it has several.
        limit: How many samples to return at most.
        seed: Seed that draws the samples in random order; by default they keep their order.

    Raises:
        ValueError: There is no such dataset, it is empty, or its rows are not as
            :mod:`blindsight.data.rows` describes.
        ImportError: The dataset needs the package ``datasets``, which is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample, got {limit}.")
    is_listed = isinstance(source, Sequence) and not isinstance(source, (str, Samples))
    if is_listed and len(source) and isinstance(source[0], Sample):
        source = _RowsOfSamples(source)
    rows, name, folder = _open(source, split)
    if isinstance(rows, Samples):
        chosen, rows, folder = rows._indices, rows._rows, rows._folder
    elif hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        chosen = range(len(rows))
    elif limit is None:
        raise ValueError(
            f"samples must have a length, got a stream that has none ({name}). Give a list, or "
            "load_samples(stream, limit=...) of blindsight.data.samples with how many to take."
        )
    else:
        rows = list(islice(rows, limit))
        chosen = range(len(rows))
    if not len(chosen):
        raise ValueError(f"dataset must have at least one sample, got none in {name}.")
    if isinstance(source, Samples) and limit is None and seed is None:
        return source
    count = len(chosen) if limit is None else min(limit, len(chosen))
    if seed is not None:
        chosen = random.Random(seed).sample(chosen, count)
    samples = Samples(rows, chosen[:count], name, folder)
    check_columns(rows, samples._indices, name)
    return samples


class _RowsOfSamples(Sequence[Mapping[str, Any]]):
    """The rows of somebody's samples, which may be opened when they are asked for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.name = getattr(samples, "name", type(samples).__name__)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, at: Any) -> Any:
        return row_of_sample(self._samples[at])


# Finding the rows.


def _open(source: Any, split: str | None) -> tuple[Any, str, Path | None]:
    """Return rows, their name, and the folder that their paths are relative to."""
    if hasattr(source, "iloc"):
        raise ValueError(
            "dataset must be rows, got a table of pandas. Give datasets.Dataset.from_pandas(table)."
        )
    if isinstance(source, Mapping) and (columns := columns_of_rows(source)):
        raise ValueError(
            f"samples must be a list of rows, got one row, with {', '.join(columns)}. Give [row]."
        )
    if not isinstance(source, (str, os.PathLike)):
        rows = _with_videos_as_files(_of_split(source, split, "the given dataset"))
        return rows, getattr(rows, "name", type(rows).__name__), getattr(rows, "_folder", None)
    name = local_path(os.fspath(source), "dataset")
    path = Path(name)
    if path.is_file() and path.suffix != ".parquet":
        return _of_split(_read_json(path), split, name), name, path.parent
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    if found and [file.name for file in found] != ["metadata.jsonl"]:  # that is of datasets
        file = path / f"{split or 'data'}.jsonl"
        if file in found:
            return _read_json(file), f"{name}/{file.name}", path
        if not any(each.name.startswith(f"{split}-") for each in found):  # shards: of datasets
            raise ValueError(
                f"split must be one of {', '.join(each.stem for each in found)} for {name}, got "
                f"{split or 'none'}. {_TO_CHOOSE}"
            )
    rows = _of_split(_load_dataset(path, name), split, name)
    return _with_videos_as_files(rows), name, path.parent if path.is_file() else None


def _load_dataset(path: Path, name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"dataset must be a JSON-lines file, or a folder with data.jsonl, got {name!r}. For "
            "other datasets install blindsight[calibrate]."
        ) from None
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=name)
        is_saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
        return datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
    except Exception as error:  # the errors of datasets have no common class
        what = "a folder that datasets reads" if path.exists() else "a path, or an id on the hub"
        raise ValueError(f"dataset must be {what}, got {name!r}: {on_one_line(error)}") from error


def _of_split(rows: Any, split: str | None, name: str) -> Any:
    """Return one part of a mapping of parts; anything else has no parts."""
    if not isinstance(rows, Mapping):
        if split is not None:
            raise ValueError(f"split must be left out, as {name} has no parts, got {split!r}.")
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        parts = ", ".join(map(str, rows))
        if split is None:
            raise ValueError(
                f"dataset must be one part of {name}, got all of them: {parts}. {_TO_CHOOSE}"
            )
        raise ValueError(f"split must be one of {parts} for {name}, got {split}. {_TO_CHOOSE}")
    return rows[split]


def _with_videos_as_files(rows: Any) -> Any:
    """Return a dataset that does not decode videos: it cannot know which frames are needed."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping):
        return rows
    from datasets import Video  # the rows are of it

    def encoded(feature: Any) -> Any:
        if isinstance(feature, Video):
            return Video(decode=False)
        if isinstance(feature, Mapping):
            return {name: encoded(part) for name, part in feature.items()}
        if hasattr(feature, "feature"):  # a list of them
            return replace(feature, feature=encoded(feature.feature))
        return feature

    for name, feature in features.items():
        if (as_file := encoded(feature)) != feature:
            rows = rows.cast_column(name, as_file)
    return rows


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a file that has one on each line, or one list of all."""
    rows: list[Mapping[str, Any]] = []
    if path.suffix == ".json":
        try:
            listed = json.loads(path.read_bytes())
        except ValueError:  # lines, or broken: the line says it
            listed = None
        if isinstance(listed, list) and all(isinstance(row, dict) for row in listed):
            return listed
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                raise ValueError(
                    f"{path}, line {number}, must be JSON like {ROW}, got {line[:60]!r}: {error}."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, must be {ROW}, got {line[:60]!r}.")
            rows.append(row)
    return rows
