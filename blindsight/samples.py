"""Datasets of prompts with images or videos: read from anywhere, turned into a model's inputs.

A row is a mapping:

    images    list of images: a path (relative to the file that the row is in), an opened image, or
              encoded bytes; ``image`` for a single one
    videos    list of videos: a list of frames, which are images; a path; or a mapping with
              ``frames`` and their ``fps``, or with ``path`` and the ``fps`` or the ``num_frames``
              to take from it; ``video`` for a single one
    messages  a conversation as chat templates take it; each ``{"type": "image"}`` stands for the
              next of the images, each ``{"type": "video"}`` for the next of the videos. It may end
              with the assistant's answer
    task      optional, the kind of question
    answer    optional, what is right; by default what the assistant says last

In a JSON-lines file each line is a row. Nothing is opened before it is asked for.

Shapes: B batch, T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from blindsight.media import (
    Video,
    identity_of,
    open_image,
    open_video,
    shortened,
    video_arguments,
)

if TYPE_CHECKING:
    from PIL import Image

_ROW = '{"images": ["a.png", ...], "messages": [...]}, or with "videos"'


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its images and videos.

    Attributes:
        images: In RGB, in the order of the prompt.
        messages: The conversation; the content of every message is a list of entries.
        task: The kind of question, or None.
        answer: What is right, or None.
        index: Which row of the source it is.
        videos: In the order of the prompt.
    """

    images: list[Image.Image]
    messages: list[dict[str, Any]]
    task: str | None
    answer: str | None
    index: int
    videos: list[Video] = field(default_factory=list)

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages without an assistant's answer at their end."""
        ends = bool(self.messages) and self.messages[-1].get("role") == "assistant"
        return self.messages[:-1] if ends else self.messages


class Samples(Sequence[Sample]):
    """Some rows of a source, opened one by one; a slice of it is another."""

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
            raise ValueError(f"{where} must be readable, got {error}. Remove or replace it.") from (
                error
            )
        return _sample_of_row(row, index, where, self._folder)

    def check(self) -> None:
        """Check all rows, images by their headers: what is wrong is heard before long work.

        Rows of a dataset of ``datasets`` are not: those decode their images to be looked at.

        Raises:
            ValueError: A row is malformed, or a file is missing or damaged.
        """
        if hasattr(self._rows, "_fingerprint"):
            return
        for index in self._indices:
            where = f"sample {index} of {self.name}"
            _sample_of_row(self._rows[index], index, where, self._folder, decode=False)

    def take(self, positions: Sequence[int]) -> Samples:
        """Return the samples at some positions, in that order."""
        chosen = [self._indices[at] for at in positions]
        return Samples(self._rows, chosen, self.name, self._folder)

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def digest(self) -> str:
        """Return a hex digest that tells these samples from others, without opening images.

        A file counts by its name and size.
        """
        known = getattr(self._rows, "_fingerprint", None)  # of a dataset, which hashed itself
        digest = hashlib.sha256(json.dumps([known, list(self._indices)]).encode())
        if known is None:
            for index in self._indices:
                digest.update(repr(_identity(self._rows[index], self._folder)).encode())
        return digest.hexdigest()


def load_samples(
    source: Any, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> Samples:
    """Return the samples of a dataset; local paths come before names on the hub.

    Args:
        source: A JSON-lines file, a folder with a ``data.jsonl`` (or a ``<split>.jsonl``), a
            folder that ``datasets`` saved, the id of a dataset on the hub, a dataset of
            ``datasets``, or any sequence of rows.
        split: Which part, where there are several.
        limit: At most so many samples.
        seed: Of the choice and order of samples; by default they are taken as they come.

    Raises:
        ValueError: There is no such dataset, it is empty, or its rows are not as above.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample, got {limit}.")
    rows, name, folder = _open(source, split)
    if isinstance(rows, Samples):
        chosen, rows, folder = rows._indices, rows._rows, rows._folder
    elif hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        chosen = range(len(rows))
    elif limit is None:
        raise ValueError(f"limit must be given for a stream of samples ({name}), got None.")
    else:
        rows = list(islice(rows, limit))
        chosen = range(len(rows))
    if not len(chosen):
        raise ValueError(f"dataset must have at least one sample, got none in {name}.")
    count = len(chosen) if limit is None else min(limit, len(chosen))
    if seed is not None:
        chosen = random.Random(seed).sample(chosen, count)
    samples = Samples(rows, chosen[:count], name, folder)
    _check_columns(rows, chosen[0], name)
    return samples


def model_inputs(
    processor: Any,
    samples: Sequence[Sample],
    *,
    prompt_only: bool = True,
    add_generation_prompt: bool = True,
    padding_side: str = "left",
) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward for a batch of samples.

    Args:
        processor: A processor of transformers, with a chat template, a tokenizer and an image
            processor; see :func:`load_processor`.
        samples: One for each row of the batch.
        prompt_only: Whether to leave out an assistant's answer at the end.
        add_generation_prompt: Whether a prompt ends where the assistant's turn begins.
        padding_side: ``"left"`` or ``"right"``.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[B, T]``, the pixels, and what else the family needs.

    Raises:
        ValueError: The processor cannot do it; the message says why.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    if not samples:
        raise ValueError("samples must be at least one, got none.")
    answered = [not prompt_only and len(sample.prompt) < len(sample.messages) for sample in samples]
    texts = [
        processor.apply_chat_template(
            sample.messages if answer else sample.prompt,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not answer,
        )
        for sample, answer in zip(samples, answered, strict=True)
    ]
    tokenizer = getattr(processor, "tokenizer", processor)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if len(samples) > 1:
        if getattr(tokenizer, "pad_token", None) is None:
            raise ValueError(
                "tokenizer must have a pad_token for batches of several prompts, got none. Set "
                "one, or use a batch size of 1."
            )
        options.update(padding=True, padding_side=padding_side)
    bos = getattr(tokenizer, "bos_token", None)
    if bos is not None and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template has written it already
    images = [sample.images for sample in samples]
    videos = [sample.videos for sample in samples]
    if any(videos):
        options.update(video_arguments(processor, videos))
    try:
        return dict(processor(text=texts, images=images if any(images) else None, **options))
    except (RuntimeError, ValueError) as error:
        what = shortened(" ".join(str(error).split()))
        if len(samples) == 1 or not any(videos):
            numbers = ", ".join(str(sample.index) for sample in samples)
            raise ValueError(
                f"sample {numbers} must be what {type(processor).__name__} takes, got: {what}"
            ) from error
        raise ValueError(
            f"processor must take {len(samples)} prompts with videos at once, and "
            f"{type(processor).__name__} did not: {what} Try a batch size of 1: some need the same "
            "number of frames in every video."
        ) from error


def inputs_on(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's forward on its device, and pixels in its dtype.

    Most families convert their pixels themselves; Aria, Llama 4 and Kimi do not.
    """
    parameter = next(model.parameters())
    dtype = getattr(model, "dtype", parameter.dtype)

    def on_model(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_pixels = name.startswith("pixel_values") and value.is_floating_point()
        return value.to(parameter.device, dtype if is_pixels else None)

    return {name: on_model(name, value) for name, value in inputs.items()}


def load_processor(path: str | os.PathLike[str]) -> Any:
    """Return the processor of a model.

    Where torchvision is not installed, a processor that also takes videos is built without that
    part: images go through Pillow.

    Args:
        path: A folder, or the id of a model on the hub.

    Raises:
        ValueError: There is no processor.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    auto: Any = AutoProcessor
    name = os.fspath(path)
    try:
        try:
            return auto.from_pretrained(name)
        except (ImportError, OSError) as error:
            # Videos need torchvision, or were left out when the processor was saved without it.
            if not {"torchvision", "video"} & set(str(error).lower().replace("`", " ").split()):
                raise
            config = AutoConfig.from_pretrained(name)
            try:
                return without_videos(PROCESSOR_MAPPING[type(config)]).from_pretrained(name)
            except (AttributeError, TypeError):
                raise error from None  # some cannot do without that part
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model must have a processor, got none in {name!r}: {' '.join(str(error).split())}"
        ) from error


def without_videos(processor_class: Any) -> Any:
    """Return a class of processors that takes no videos, and so does not need torchvision."""

    def get_attributes(cls: Any) -> list[str]:
        return [part for part in processor_class.get_attributes() if part != "video_processor"]

    # The same name: it is written to the files that the processor is saved in.
    return type(
        processor_class.__name__,
        (processor_class,),
        {"get_attributes": classmethod(get_attributes)},
    )


# Finding the rows.


def _open(source: Any, split: str | None) -> tuple[Any, str, Path | None]:
    """Return rows, what to call them, and the folder that their paths are relative to."""
    if not isinstance(source, (str, os.PathLike)):
        rows = _of_split(source, split, "the given dataset")
        return rows, getattr(rows, "name", type(rows).__name__), getattr(rows, "_folder", None)
    path, name = Path(source), os.fspath(source)
    if path.is_file():
        return _read_json_lines(path), name, path.parent
    if path.is_dir():
        for file in (f"{split}.jsonl", "data.jsonl"):
            if (path / file).is_file():
                return _read_json_lines(path / file), f"{name}/{file}", path
        if split is None and len(found := sorted(path.glob("*.jsonl"))) > 0:
            raise ValueError(
                f"split must be one of {', '.join(file.stem for file in found)} for {name}, got "
                "none."
            )
    return _of_split(_load_dataset(path, name), split, name), name, None


def _load_dataset(path: Path, name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"dataset must be a JSON-lines file, or a folder with data.jsonl, got {name!r}. For "
            "other datasets install blindsight[calibrate]."
        ) from None
    try:
        is_saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
        return datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
    except Exception as error:  # its errors have no common class
        what = "a folder that datasets reads" if path.exists() else "a path, or an id on the hub"
        raise ValueError(
            f"dataset must be {what}, got {name!r}: {' '.join(str(error).split())}"
        ) from error


def _of_split(rows: Any, split: str | None, name: str) -> Any:
    """Return one part of a mapping of parts; anything else is one already."""
    if not isinstance(rows, Mapping):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        raise ValueError(
            f"split must be one of {', '.join(map(str, rows))} for {name}, got {split}."
        )
    return rows[split]


def _read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                raise ValueError(
                    f"{path}, line {number}, must be JSON like {_ROW}, got {line[:60]!r}: {error}."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, must be {_ROW}, got {line[:60]!r}.")
            rows.append(row)
    return rows


# Reading one row.


def _check_columns(rows: Any, first: int, name: str) -> None:
    """Say at once that a dataset is of another kind, not when some image is opened."""
    columns = getattr(rows, "column_names", None)  # of a dataset, without decoding anything
    columns = list(rows[first]) if columns is None else list(columns)
    if "messages" not in columns:
        raise ValueError(
            f"dataset must have a column 'messages', got {', '.join(columns) or 'none'} in {name}. "
            f"A row is {_ROW}."
        )
    if not {"images", "image", "videos", "video"} & set(columns):
        raise ValueError(
            f"dataset must have images or videos, got only {', '.join(columns)} in {name}. A row "
            f"is {_ROW}."
        )


def _media_of(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the images of a row, or its videos."""
    several, single = row.get(f"{kind}s"), row.get(kind)
    if several is not None:
        return list(several) if isinstance(several, (list, tuple)) else [several]
    if single is None or (isinstance(single, (list, tuple)) and not single):
        return []
    # A list of images is no image, and a list of frames is a video.
    return list(single) if kind == "image" and isinstance(single, (list, tuple)) else [single]


def _sample_of_row(
    row: Mapping[str, Any], index: int, where: str, folder: Path | None, *, decode: bool = True
) -> Sample:
    messages = _messages_of(row, where)
    opened: dict[str, list[Any]] = {}
    open_kind: dict[str, Callable[..., Any]] = {
        "image": partial(open_image, decode=decode),
        "video": open_video,
    }
    for kind, open_one in open_kind.items():
        media = enumerate(_media_of(row, kind), start=1)
        opened[kind] = [open_one(x, f"{kind} {number} of {where}", folder) for number, x in media]
        wanted = sum(entry.get("type") == kind for m in messages for entry in m["content"])
        if wanted != len(opened[kind]):
            raise ValueError(
                f"{where} must have one {kind} for each {{'type': '{kind}'}} in its messages, got "
                f"{len(opened[kind])} {kind}s for {wanted}."
            )
    task, answer = row.get("task"), row.get("answer")
    if answer is None and messages and messages[-1].get("role") == "assistant":
        answer = "".join(entry.get("text", "") for entry in messages[-1]["content"])
    return Sample(
        opened["image"],
        messages,
        None if task is None else str(task),
        None if answer is None else str(answer),
        index,
        opened["video"],
    )


def _messages_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            f"messages of {where} must be a list of turns, got {shortened(repr(messages))}."
        )
    result = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or "role" not in message:
            raise ValueError(
                f"messages of {where} must be {{'role': ..., 'content': ...}}, got "
                f"{shortened(repr(message))}."
            )
        # Tables fill up what an entry lacks with None.
        entries = [{k: v for k, v in entry.items() if v is not None} for entry in content]
        result.append({**message, "content": entries})
    return result


def _identity(row: Mapping[str, Any], folder: Path | None) -> object:
    """Return what tells a row from others."""
    # Without videos as before there were any, so that what was measured then is found again.
    kinds = ("image", "video") if _media_of(row, "video") else ("image",)
    names = {name for kind in kinds for name in (kind, f"{kind}s")}
    rest = {name: row[name] for name in sorted(row) if name not in names}
    media = [identity_of(_media_of(row, kind), folder) for kind in kinds]
    return json.dumps(rest, sort_keys=True, default=str), *media
