"""Where the images of a prompt are: token ids to spans and sinks.

Shapes: B batch, T tokens of the whole sequence (past and present).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blindsight.families import DEFAULT_LAYER_PATTERN, rule_of_family
from blindsight.videos import FRAME, VIDEO, mark_by_grid

# What a token can be, as bits: one id may be both delimiters (a separator between images).
# Videos have two more, see blindsight.videos.
TEXT, IMAGE, START, END, LEADING, TRAILING = 0, 1, 2, 4, 8, 16

# Left out of a rule's JSON where they are empty: it is then what it was before there were any.
_OPTIONAL = ("leading_tile_ids", "trailing_tile_ids", "video_token_ids")

_FEW = 16  # ids of a token that is decoded, of every row: looked up one by one
_text_alone: dict[torch.Size, Tensor] = {}  # by shape, see TemplateRule.shared_kinds


@dataclass(frozen=True)
class Template:
    """The images of one batch of prompts.

    Attributes:
        span_id: ``[B, T]`` int32, the number (1..n, in prompt order) of the image span that
            a token belongs to, 0 for text and padding.
        is_sink: ``[B, T]`` bool, tokens kept visible across spans.
    """

    span_id: Tensor
    is_sink: Tensor

    @property
    def num_tokens(self) -> int:
        return self.span_id.shape[1]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.span_id, self.is_sink

    def restricts_queries_from(self, past: int) -> bool:
        """Whether any query at or after token ``past`` lies in a span other than the first.

        Where none does, every category is dense.
        """
        return bool((self.span_id[:, past:] > 1).any())


@dataclass(frozen=True)
class TemplateRule:
    """How to find the images of a prompt in its token ids.

    A span is a maximal run of image tokens, the start delimiter right before it and the end
    delimiter right after it, where there are any. A delimiter without image tokens is text.

    Some families cut an image into tiles, each a run of its own between marks and text. Those
    runs are one span: leading tiles with the run after them, trailing tiles with the run before.
    What is written between them, delimiters aside, stays text.

    Some write all frames of a video as one run. Where the model's ``video_grid_thw`` is known,
    each frame is a span; the delimiters go with the first and the last.

    Args:
        image_token_ids: Ids of the tokens of an image (or video): of its placeholders, and of
            the separators between its rows and tiles, where a family has them; at least one.
        start_token_ids: Ids of the delimiter before an image.
        end_token_ids: Ids of the delimiter after an image.
        leading_tile_ids: Ids of the marks of tiles that come before the rest of their image: a
            run of image tokens is such a tile if a mark is between it and the run before it, and
            no start delimiter after the mark (which may be one itself).
        trailing_tile_ids: The same of tiles that come after the rest of their image.
        video_token_ids: Those of ``image_token_ids`` whose runs are whole videos.
        sink_offsets: Positions relative to a span's first token that are its sinks, clipped
            to the span; one that falls on text inside the span is none. ``(0,)`` is the start
            delimiter, or the first image token where a family has no delimiters.
        layer_pattern: Regular expression with one group, the layer's number, that is searched
            in a module's dotted path to tell decoder attention from everything else.

    Raises:
        ValueError: An argument is malformed; the message says which.
    """

    image_token_ids: tuple[int, ...]
    start_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    sink_offsets: tuple[int, ...] = (0,)
    layer_pattern: str = DEFAULT_LAYER_PATTERN
    leading_tile_ids: tuple[int, ...] = ()
    trailing_tile_ids: tuple[int, ...] = ()
    video_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "layer_pattern":
                ids = _int_tuple(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, ids)
        if not self.image_token_ids:
            raise ValueError("image_token_ids must name at least one token id, got none.")
        if unknown := set(self.video_token_ids).difference(self.image_token_ids):
            raise ValueError(
                f"video_token_ids must be among image_token_ids, got {sorted(unknown)} beside."
            )
        try:
            groups = re.compile(self.layer_pattern).groups
        except (re.error, TypeError) as error:
            raise ValueError(
                f"layer_pattern must be a regular expression, got {self.layer_pattern!r}: {error}."
            ) from None
        if groups != 1:
            raise ValueError(
                "layer_pattern must have exactly one group, the layer's number, got "
                f"{groups} groups in {self.layer_pattern!r}."
            )

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any = None) -> TemplateRule:
        """Derive the rule from a transformers config (or a model that has one).

        Args:
            config: Of the model.
            tokenizer: Of the model, or its processor; needed where a family's config does not tell
                all ids. The error says so.

        Raises:
            ValueError: The family is not known, or its tokenizer is needed.
        """
        return cls(**rule_of_family(config, tokenizer))

    def to_json(self) -> str:
        data = {
            name: value for name, value in asdict(self).items() if value or name not in _OPTIONAL
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TemplateRule:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: The text is not the JSON of a rule.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"rule must be JSON, got {text[:80]!r}: {error}.") from None
        needed = {field.name for field in fields(cls)}.difference(_OPTIONAL)
        if not isinstance(data, dict) or set(data).difference(_OPTIONAL) != needed:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"rule must be an object with the keys {sorted(needed)}, got {found}.")
        return cls(**data)

    def classify(self, input_ids: Tensor) -> Tensor:
        """Return what each token is, as bits (``IMAGE``, ...): ``[B, T]`` uint8."""
        if input_ids.numel() > _FEW:
            return self._kinds(input_ids.detach().cpu())
        rows = input_ids.tolist()
        if self._are_text(rows):
            return torch.zeros(input_ids.shape, dtype=torch.uint8, device="cpu")
        kinds = [[self._bits.get(each, TEXT) for each in row] for row in rows]
        return torch.tensor(kinds, dtype=torch.uint8, device="cpu")

    def shared_kinds(self, input_ids: Tensor) -> Tensor:
        """As :meth:`classify`, but short texts share one cached tensor: do not write to it.

        Making one took 20 microseconds for each token that is decoded.
        """
        if input_ids.numel() > _FEW or not self._are_text(input_ids.tolist()):
            return self.classify(input_ids)
        shape = input_ids.shape
        if shape not in _text_alone:
            made = torch.zeros(shape, dtype=torch.uint8, device="cpu")
            if type(made) is not Tensor:
                return made  # of a mode that pretends, such as FakeTensorMode
            _text_alone[shape] = made
        return _text_alone[shape]

    def _are_text(self, rows: list[list[int]]) -> bool:
        return all(map(self._bits.keys().isdisjoint, rows))

    def _kinds(self, ids: Tensor) -> Tensor:
        kinds = torch.zeros_like(ids, dtype=torch.uint8)
        for token_id, bits in self._bits.items():
            kinds = kinds | ((ids == token_id).to(torch.uint8) * bits)
        return kinds

    @cached_property
    def _bits(self) -> dict[int, int]:
        """What the tokens are that are no text, by their ids."""
        bits: dict[int, int] = {}
        for bit, token_ids in (
            (IMAGE, self.image_token_ids),
            (START, self.start_token_ids),
            (END, self.end_token_ids),
            (LEADING, self.leading_tile_ids),
            (TRAILING, self.trailing_tile_ids),
            (VIDEO, self.video_token_ids),
        ):
            for token_id in token_ids:
                bits[token_id] = bits.get(token_id, 0) | bit
        return bits

    def template(self, input_ids: Tensor, video_grid_thw: Tensor | None = None) -> Template:
        """Return the template of a prompt.

        Args:
            input_ids: ``[B, T]``.
            video_grid_thw: ``[V, 3]``, frames, height and width of each video in patches, as the
                model takes them. Without it, or where it does not fit the tokens, a run of them is
                a span.
        """
        kinds = self.classify(input_ids)
        if video_grid_thw is not None:
            marked = mark_by_grid(kinds, video_grid_thw)
            kinds = kinds if marked is None else marked
        return self.template_of_kinds(kinds)

    def template_of_inputs(self, inputs: Mapping[str, Any]) -> Template:
        """Return the template of a prompt, from the arguments of a model's forward."""
        return self.template(inputs["input_ids"], inputs.get("video_grid_thw"))

    def template_of_kinds(self, kinds: Tensor) -> Template:
        """Return the template of classified tokens ``[B, T]`` (see :meth:`classify`)."""
        image = (kinds & IMAGE).bool()
        before_image, after_image = _shift(image, -1), _shift(image, 1)
        opens = (kinds & START).bool() & before_image & ~image
        closes = (kinds & END).bool() & after_image & ~image & ~opens
        inside = image | opens | closes
        begins = opens | (image & ~after_image & ~_shift(opens, 1))
        if self.leading_tile_ids or self.trailing_tile_ids:
            begins &= ~_goes_on(kinds, begins)
        begins |= (kinds & FRAME).bool() & after_image
        span_id = begins.cumsum(1, dtype=torch.int32) * inside
        return Template(span_id, find_sinks(span_id, self.sink_offsets))


def is_all_text(kinds: Tensor) -> bool:
    """Whether none of the classified tokens can belong to an image: ``[B, T]``, on the CPU."""
    return kinds is _text_alone.get(kinds.shape) or not bool(kinds.any())


def _goes_on(kinds: Tensor, begins: Tensor) -> Tensor:
    """Whether a run of image tokens goes on with the image of the run before it.

    Args:
        kinds: ``[B, T]``, see :meth:`TemplateRule.classify`.
        begins: ``[B, T]`` bool, the first tokens of the runs, delimiters included.

    Returns:
        ``[B, T]`` bool, of such first tokens.
    """
    # a mark counts up to where the next image is said to start, be it the same token
    end_of_run = _latest((kinds & IMAGE).bool(), before=True)
    since = torch.maximum(end_of_run + 1, _latest((kinds & START).bool()))
    is_leading = begins & (_latest((kinds & LEADING).bool()) >= since)
    is_trailing = begins & (_latest((kinds & TRAILING).bool()) >= since)
    run_before = _latest(begins, before=True)
    follows_leading = _latest(is_leading, before=True) == run_before
    return begins & (run_before >= 0) & (follows_leading | is_trailing)


def _latest(flags: Tensor, *, before: bool = False) -> Tensor:
    """Return where the last flag was, up to each token or ``before`` it: ``[B, T]``, or -1."""
    position = torch.arange(flags.shape[1], device=flags.device)
    latest = torch.where(flags, position, -1).cummax(dim=1).values
    return torch.nn.functional.pad(latest, (1, 0), value=-1)[:, :-1] if before else latest


def template_of_ids(input_ids: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Return span_id and is_sink of ``input_ids [B, T]``, on their device; for use in a graph.

    Args:
        input_ids: Of the whole sequence.
        rule: The JSON of a :class:`TemplateRule`.
    """
    known = TemplateRule.from_json(rule)
    return known.template_of_kinds(known._kinds(input_ids)).tensors()


def find_sinks(span_id: Tensor, sink_offsets: Iterable[int]) -> Tensor:
    """Return ``is_sink [B, T]``: the tokens at ``sink_offsets`` of each span, clipped to it."""
    first, last = span_edges(span_id)
    position = torch.arange(span_id.shape[1], device=span_id.device)
    is_sink = torch.zeros_like(span_id, dtype=torch.bool)
    for offset in sink_offsets:
        is_sink |= position == torch.minimum((first + offset).clamp(min=first), last)
    return is_sink & (span_id > 0)


def span_edges(span_id: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last position of each token's span: ``[B, T]`` int64.

    The values at tokens of text are undefined.
    """
    # Not by running maxima: on a GPU, one block of threads walks through a whole row for each.
    num_tokens = span_id.shape[1]
    position = torch.arange(num_tokens, device=span_id.device).expand(span_id.shape)
    spans = span_id.long().clamp(0, num_tokens)
    # Only the edges of runs write to their span: a place that all tokens write to makes them wait.
    changes = spans[:, 1:] != spans[:, :-1]
    beside = num_tokens + 1 + position

    def edge(is_edge: Tensor, start: int, reduce: str) -> Tensor:
        of_spans = position.new_full((span_id.shape[0], 2 * num_tokens + 1), start)
        place = torch.where(is_edge, spans, beside)
        return of_spans.scatter_reduce(1, place, position, reduce).gather(1, spans)

    begins, ends = (torch.nn.functional.pad(changes, side, value=True) for side in ((1, 0), (0, 1)))
    return edge(begins, num_tokens, "amin"), edge(ends, 0, "amax")


def find_order_problem(span_id: Tensor) -> str | None:
    """Say what keeps ``span_id [B, T]`` from numbering spans 1..n in prompt order, if anything."""
    so_far = span_id.cummax(dim=1).values
    before = torch.cat([torch.zeros_like(so_far[:, :1]), so_far[:, :-1]], dim=1)
    wrong = (span_id != 0) & (span_id != before) & (span_id != before + 1)
    if not bool(wrong.any()):
        return None
    row, column = (int(index) for index in wrong.nonzero()[0])
    return (
        f"got {int(span_id[row, column])} at row {row}, token {column}, after "
        f"{int(before[row, column])} spans"
    )


def _shift(flags: Tensor, steps: int) -> Tensor:
    """Return ``flags`` moved along the sequence; what comes in from the side is False."""
    moved = torch.zeros_like(flags)
    if steps > 0:
        moved[:, steps:] = flags[:, :-steps]
    else:
        moved[:, :steps] = flags[:, -steps:]
    return moved


def _int_tuple(name: str, values: Any) -> tuple[int, ...]:
    items = values if isinstance(values, (list, tuple, set, frozenset)) else (values,)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ValueError(f"{name} must be a tuple of ints, got {values!r}.")
    return tuple(items)
