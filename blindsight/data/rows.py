"""Rows of datasets, in the layouts that are common in the field, and the samples made of them.

A row is a mapping:

    images    list of images: a path (relative to the file that holds the row), an opened image, or
              encoded bytes; ``image`` for a single one
    videos    list of videos: a list of frames, which are images; a path; encoded bytes; or a
              mapping with ``frames`` and their ``fps``, or with ``path`` or ``bytes`` and the
              ``fps`` or ``num_frames`` to take from it; ``video`` for a single one
    messages  a conversation as chat templates take it; it may end with the assistant's answer.
              Each ``{"type": "image"}`` stands for the next of the images, each
              ``{"type": "video"}`` for the next of the videos; so do ``<image>`` and ``<video>``
              in a content that is a string. An entry may instead hold its image:
              ``{"type": "image", "image": ...}``, or under ``url``, ``path`` or ``base64``, or as
              OpenAI has it, ``{"type": "image_url", "image_url": {"url": ...}}``. Or it may say
              which of the images it is, counted from zero: ``{"type": "image", "index": 1}``
    conversations
              instead of messages, as LLaVA has them: ``{"from": "human", "value": "<image> ..."}``
              and ``{"from": "gpt", "value": ...}``
    task      optional, the kind of question
    answer    optional, the expected answer, a string or a number; by default the assistant's at
              the end of the messages
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from blindsight.data.media import Video, as_mapping, identity_of, open_image, open_video
from blindsight.error_text import shortened

if TYPE_CHECKING:
    from PIL import Image

ROW = '{"images": ["a.png", ...], "messages": [...]}, or with "videos"'

_KINDS = ("image", "video")
_MEDIA = {*_KINDS, *(f"{kind}s" for kind in _KINDS)}
_TURNS = ("messages", "conversations")
# What to do with rows that have a question and no messages.
_TO_MESSAGES = (
    'Make messages of it, such as rows.map(lambda row: {"messages": [{"role": "user", "content": '
    '"<image>" * len(row["images"]) + row["question"]}]}).'
)
_IN_TEXT = re.compile("(<image>|<video>)")
_OF_A_VIDEO = ("fps", "num_frames")
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its images and videos.

    Attributes:
        images: In RGB, in the order of the prompt.
        messages: The conversation; the content of every message is a list of entries.
        task: The kind of question, or None.
        answer: The expected answer, or None.
        index: The number of its row in the source.
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
        """The messages, without an assistant's answer at the end."""
        ends = bool(self.messages) and self.messages[-1].get("role") == "assistant"
        return self.messages[:-1] if ends else self.messages


def sample_of_row(
    row: Mapping[str, Any], index: int, where: str, folder: Path | None, *, decode: bool = True
) -> Sample:
    """Return the sample of a row.

    Args:
        row: See the top of this module.
        index: The number of the row.
        where: What error messages call the row.
        folder: The folder that paths are relative to.
        decode: If false, only the headers of images are read.

    Raises:
        ValueError: The row is malformed, or a file is missing or damaged.
    """
    check_row(row, where)
    messages = _messages_of(row, where)
    _check_turns(messages, where)
    open_kind: dict[str, Callable[..., Any]] = {
        "image": partial(open_image, decode=decode),
        "video": open_video,
    }
    opened = {
        kind: [
            open_one(media, f"{kind} {number} of {where}", folder)
            for number, media in enumerate(_take_media(row, messages, kind, where), start=1)
        ]
        for kind, open_one in open_kind.items()
    }
    task, answer = row.get("task"), _answer_of(row)
    if answer is None and messages[-1].get("role") == "assistant":
        answer = "".join(entry.get("text", "") for entry in messages[-1]["content"])
    return Sample(
        opened["image"],
        messages,
        None if task is None else str(task),
        answer,
        index,
        opened["video"],
    )


def check_answer(sample: Sample, *, answered: bool = True) -> Sample:
    """Return a sample that has an answer; or one that has none, if the others have none either.

    Raises:
        ValueError: It is not so.
    """
    if answered and sample.answer is None:
        raise ValueError(
            f"sample {sample.index} must have an answer, got none. Add an 'answer' to the row, a "
            "string or a number, or end its messages with the assistant's."
        )
    if not answered and sample.answer is not None:
        raise ValueError(
            f"samples must all have an answer, or none of them, got one in sample {sample.index} "
            "and none in the first. Add the answers that are missing, or remove all."
        )
    return sample


def has_answer(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row has an answer, beside its messages or at their end.

    Raises:
        ValueError: It has something in place of one.
    """
    turns: Any = next((row[name] for name in _TURNS if row.get(name)), [])
    last = turns[-1] if isinstance(turns, (list, tuple)) else None
    role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    if _answer_of(row) is not None or _ROLES.get(str(role), role) == "assistant":
        return True
    for name in ("answer", "answers"):
        if isinstance(answer := row.get(name), (list, tuple, Mapping)):
            what = "a list" if isinstance(answer, (list, tuple)) else type(answer).__name__
            raise ValueError(
                f"answer of {where} must be one string or number, got {what} as {name!r}: "
                f"{shortened(repr(answer))}. Give one 'answer', or remove the column to evaluate "
                "without answers."
            )
    return False


def row_of_sample(sample: Sample) -> dict[str, Any]:
    """Return a row that makes the given sample."""
    row = {name: getattr(sample, name) for name in ("messages", "task", "answer")}
    media = {"images": sample.images, "videos": sample.videos}
    return {**row, **{name: held for name, held in media.items() if held}}


def check_row(row: object, where: str) -> None:
    """Check that a row is a mapping.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be {ROW}, got {shortened(repr(row))}.")


def identity_of_row(row: Mapping[str, Any], folder: Path | None) -> object:
    """Return what tells a row from others, without opening files."""

    def plain(value: Any) -> Any:
        is_media = isinstance(value, bytes) or hasattr(value, "tobytes")
        return identity_of(value, folder) if is_media else str(value)

    # Kinds that a row lacks are left out, so that digests of earlier versions stay valid.
    kinds = ("image", "video") if _column(row, "video") else ("image",)
    names = {name for kind in kinds for name in (kind, f"{kind}s")}
    rest = {name: row[name] for name in sorted(row) if name not in names}
    media = [identity_of(_column(row, kind), folder) for kind in kinds]
    inside = [identity_of(held, folder) for held in _media_inside(row)]
    return json.dumps(rest, sort_keys=True, default=plain), *media, *([inside] if inside else [])


def check_columns(rows: Any, indices: Any, name: str) -> None:
    """Check that a dataset has conversations and images, before any image is opened.

    Raises:
        ValueError: It has no conversations, or no images.
    """

    def row_at(at: int) -> Mapping[str, Any]:  # one by one: rows may be opened when they are read
        row: Mapping[str, Any] = rows[at]
        check_row(row, f"sample {at} of {name}")
        return row

    columns = getattr(rows, "column_names", None)  # of a dataset, without decoding anything
    columns = list(row_at(indices[0])) if columns is None else list(columns)
    if not set(_TURNS) & set(columns):
        advice = _TO_MESSAGES if "question" in columns else f"A row is {ROW}."
        raise ValueError(
            f"dataset must have a column 'messages', got {', '.join(columns) or 'none'} in {name}. "
            f"{advice}"
        )
    has_media = bool(_MEDIA & set(columns)) or any(
        (_MEDIA & set(row)) or any(True for _ in _media_inside(row)) for row in map(row_at, indices)
    )
    if not has_media:
        raise ValueError(
            f"dataset must have images or videos, got only {', '.join(columns)} in {name}. A row "
            f"is {ROW}."
        )


def columns_of_rows(given: Mapping[Any, Any]) -> list[str]:
    """Return the keys of a mapping that only a row has, not parts of a dataset by name."""
    return [name for name in (*_TURNS, *sorted(_MEDIA), "question") if name in given]


# Images and videos.


def _column(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the images, or the videos, that a row has outside of its messages."""
    several, single = row.get(f"{kind}s"), row.get(kind)
    if several is not None:
        return list(several) if isinstance(several, (list, tuple)) else [several]
    if single is None or (isinstance(single, (list, tuple)) and not single):
        return []
    # A list under "image" is several images; a list under "video" is the frames of one.
    return list(single) if kind == "image" and isinstance(single, (list, tuple)) else [single]


def _take_media(
    row: Mapping[str, Any], messages: list[dict[str, Any]], kind: str, where: str
) -> list[Any]:
    """Return the images, or the videos, of a row in the order of its messages.

    What the entries of the messages hold is removed from them.
    """
    entries = [x for message in messages for x in message["content"] if x.get("type") == kind]
    held = [_held(entry, kind) for entry in entries]
    beside = _in_order(_column(row, kind), entries, kind, where)
    if len(beside) == len(held):
        held = [None] * len(held)  # the row has all of them; entries may repeat them
    missing = sum(media is None for media in held)
    if missing != len(beside):
        raise ValueError(
            f"{where} must have one {kind} for each {{'type': '{kind}'}} in its messages, got "
            f"{len(beside)} {kind}s for {missing}."
        )
    others = iter(beside)
    media = [next(others) if each is None else each for each in held]
    if kind == "video":
        media = [_as_asked(each, entry) for each, entry in zip(media, entries, strict=True)]
    for entry in entries:
        for name in (*_holders(kind), *_OF_A_VIDEO, "index"):
            entry.pop(name, None)
    return media


def _in_order(media: list[Any], entries: list[dict[str, Any]], kind: str, where: str) -> list[Any]:
    """Return media in the order of the indices that the entries give, if they give any."""
    indices = [entry.get("index") for entry in entries]
    if all(index is None for index in indices):
        return media
    if not all(_is_int(index) and 0 <= index < len(media) for index in indices):
        raise ValueError(
            f"{where} must have an index from 0 to {len(media) - 1} for each {{'type': '{kind}'}}, "
            f"or for none, got {indices}."
        )
    return [media[index] for index in indices if index is not None]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _holders(kind: str) -> tuple[str, ...]:
    return kind, f"{kind}_url", "url", "path", "base64"


def _held(entry: Mapping[str, Any], kind: str) -> Any:
    """Return the image or the video that an entry holds, or None."""
    found = [(name, entry[name]) for name in _holders(kind) if entry.get(name) is not None]
    if not found:
        return None
    name, media = found[0]
    if name == f"{kind}_url" and isinstance(media, Mapping):
        media = media.get("url")
    return f"data:;base64,{media}" if name == "base64" else media


def _as_asked(video: Any, entry: Mapping[str, Any]) -> Any:
    """Return a video with the ``fps`` or ``num_frames`` that its entry asks for."""
    asked = {name: entry[name] for name in _OF_A_VIDEO if entry.get(name) is not None}
    if not asked or isinstance(video, Video):
        return video
    return {**as_mapping(video), **asked}


def _media_inside(row: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the images and videos in the messages of a row, which may be malformed."""
    messages = row.get("messages")
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for entry in content if isinstance(content, (list, tuple)) else ():
            kind = _kind_of(entry) if isinstance(entry, Mapping) else None
            if kind in _KINDS and (media := _held(entry, kind)) is not None:
                yield media


def _kind_of(entry: Mapping[str, Any]) -> str:
    """Return the type of an entry; OpenAI's types by the names of transformers."""
    return str(entry.get("type")).removesuffix("_url")


# Messages.


def _messages_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return copies of the turns of a row, with each content as a list of entries."""
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = row.get(name)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(
            f"messages of {where} must be a list of turns, got {shortened(repr(turns))}."
        )
    return [_message_of(turn, f"{name} of {where}") for turn in turns]


def _check_turns(messages: list[dict[str, Any]], where: str) -> None:
    *prompt, last = messages
    if last.get("role") != "assistant":
        return
    if not prompt:
        raise ValueError(f"{where} must have a turn of the user's, got an assistant's alone.")
    if any(entry.get("type") in _KINDS for entry in last["content"]):
        raise ValueError(
            f"{where} must end with an assistant's answer in text, got one with images or videos. "
            "Put them into the turns before it."
        )


def _answer_of(row: Mapping[str, Any]) -> str | None:
    """Return the answer beside the messages, if there is one that an answer can be equal to."""
    answer = row.get("answer")
    is_one = isinstance(answer, (str, Number, np.bool_))
    return str(answer) if is_one and answer == answer else None  # tables have nan for none


def _message_of(turn: Any, what: str) -> dict[str, Any]:
    message = dict(turn) if isinstance(turn, Mapping) else {}
    if "from" in message and "value" in message:
        speaker, said = message.pop("from"), message.pop("value")
        message.update(role=_ROLES.get(speaker, speaker), content=said)
    content = message.get("content")
    if isinstance(content, str):
        content = _entries_of_text(content)
    entries: Any = content if isinstance(content, (list, tuple)) else [None]
    if "role" not in message or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(
            f"{what} must be {{'role': ..., 'content': ...}}, a content a string or a list of "
            f"{{'type': ..., ...}}, got {shortened(repr(turn))}."
        )
    return {**message, "content": [_entry_of(entry) for entry in entries]}


def _entry_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    # Tables have None where an entry lacks a column.
    result = {name: value for name, value in entry.items() if value is not None}
    return {**result, "type": _kind_of(entry)} if _kind_of(entry) in _KINDS else result


def _entries_of_text(text: str) -> list[dict[str, Any]]:
    """Return the entries of a text: it is split at ``<image>`` and ``<video>``."""
    parts = [part for part in _IN_TEXT.split(text) if part] or [""]
    return [
        {"type": part[1:-1]} if _IN_TEXT.fullmatch(part) else {"type": "text", "text": part}
        for part in parts
    ]
