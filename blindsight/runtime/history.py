"""The tokens of a sequence, and where they are kept.

- ``Pending``: the tokens of the forward under way, until all of its layers have run.
- ``History``: those of a whole sequence, the ones in a cache and after them a forward's own.
- ``CacheNote``: a history, kept with the tensor of the cache's keys that a forward left.
- ``Witness``: what shows at a later call that the tensor still holds these keys.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from blindsight.runtime.tensor_notes import version_of
from blindsight.template import IMAGE, START, Template, TemplateRule, is_all_text
from blindsight.videos import (
    FRAME,
    VIDEO,
    begins_frame,
    is_of_text,
    mark_by_grid,
    mark_by_positions,
)

_NO_FRAME = 0xFF ^ FRAME

_T = TypeVar("_T")


class History:
    """The tokens of one sequence so far: their kinds, or a template given by hand."""

    def __init__(
        self,
        rule: TemplateRule,
        *,
        kinds: Tensor | None = None,
        text_after: int = 0,
        corner: Tensor | None = None,
        template: Template | None = None,
        kinds_after: Tensor | None = None,
    ) -> None:
        self._rule = rule
        # Tokens of text after the others are joined to them when needed: not in decoding. One
        # attribute, as threads may share a history.
        self._tokens = None if kinds is None else (kinds, text_after)
        self._corner = corner  # [2, B], height and width of the last token, if it is of a video
        self._template = template if kinds_after is None else None
        self._given = template, kinds_after  # by hand, and what came after it
        self._on_device: dict[torch.device, Template] = {}
        self._restricts: dict[int, bool] = {}
        self._found: dict[object, Any] = {}  # what others found out of this sequence
        known = kinds if template is None else template.span_id
        assert known is not None
        self.batch: int = known.shape[0]
        self.num_tokens: int = known.shape[1] + text_after
        if kinds_after is not None:
            self.num_tokens += kinds_after.shape[1]

    @property
    def template(self) -> Template:
        """The template, computed on first use: decoding never needs it."""
        if self._template is None:
            given, after = self._given
            if given is None:
                kinds = self._kinds
                assert kinds is not None
                self._template = self._rule.template_of_kinds(kinds)
            else:
                assert after is not None
                self._template = _joined(given, self._rule.template_of_kinds(after))
        return self._template

    def once(self, key: object, find: Callable[[], _T]) -> _T:
        """Return what ``find`` finds out of this sequence; it is called once per key."""
        if key not in self._found:
            self._found[key] = find()
        found: _T = self._found[key]
        return found

    def restricts_queries_from(self, past: int) -> bool:
        """As the template's, computed once: every layer asks."""
        if past not in self._restricts:
            self._restricts[past] = self.template.restricts_queries_from(past)
        return self._restricts[past]

    def on(self, device: torch.device) -> Template:
        """Return the template as tensors on a device, copied once."""
        if device not in self._on_device:
            self._on_device[device] = Template(*(x.to(device) for x in self.template.tensors()))
        return self._on_device[device]

    def extended(self, new: Pending) -> History | None:
        """Return the history with new tokens after it, or None where that is ambiguous."""
        kinds = new.kinds
        if kinds.shape[0] != self.batch:
            return None
        if self._tokens is not None and new.is_text:
            first_kinds, text = self._tokens
            return History(self._rule, kinds=first_kinds, text_after=text + kinds.shape[1])
        if (before := self._kinds) is not None:
            goes_on, _ = self._border(before, new)
            first = torch.where(goes_on, kinds[:, 0] & _NO_FRAME, kinds[:, 0])
            whole = torch.cat([before, first[:, None], kinds[:, 1:]], dim=1)
            return History(self._rule, kinds=whole, corner=new.last_corner)
        given, after = self._given
        assert given is not None
        if after is not None and bool((after[:, -1] & kinds[:, 0] & VIDEO).any()):
            return None  # whether a frame goes on is told by more than is kept here
        after = kinds if after is None else torch.cat([after, kinds], dim=1)
        # A template given by hand says nothing of the tokens that would join its last span, nor of
        # marks, which tell what tiles are part of.
        joins = (given.span_id[:, -1] > 0) & (after[:, 0] > 0)
        if self._rule.leading_tile_ids or self._rule.trailing_tile_ids:
            joins |= (after & IMAGE).bool().any(1)
        if bool(joins.any()):
            return None
        return History(self._rule, template=given, kinds_after=after)

    def lacks_frames(self, new: Pending) -> bool:
        """Whether new tokens go on with a video, and nothing tells if they begin a frame."""
        if new.is_text or new.kinds.shape[0] != self.batch:
            return False
        before = self._kinds
        return before is not None and bool(self._border(before, new)[1].any())

    def is_like(self, other: History) -> bool:
        """Whether the images of two sequences are at the same places."""
        pairs = zip(self.template.tensors(), other.template.tensors(), strict=True)
        return self is other or all(torch.equal(mine, its) for mine, its in pairs)

    def cuts_delimiter(self, new: Pending) -> bool:
        """Whether new tokens begin with an image after the first whose delimiter came before."""
        if new.is_text or new.kinds.shape[0] != self.batch:
            return False
        last = self._given[1] if self._tokens is None else self._kinds
        if last is None:
            return False
        opens = ((last[:, -1] & START) > 0) & ((new.kinds[:, 0] & IMAGE) > 0)
        return bool(opens.any()) and bool((opens & (self.template.span_id > 0).any(1)).any())

    @property
    def _kinds(self) -> Tensor | None:
        """The kinds of all tokens, ``[B, T]``; None where a template was given instead."""
        if self._tokens is None:
            return None
        kinds, text = self._tokens
        if text:
            kinds = pad(kinds, (0, text))  # 0: text
            self._tokens = kinds, 0
        return kinds

    def _border(self, before: Tensor, new: Pending) -> tuple[Tensor, Tensor]:
        """Whether the first new token goes on with a frame, and whether that is not known.

        Args:
            before: The kinds of this history's tokens.
            new: What comes after them.

        Returns:
            Two flags ``[B]``; what is not known goes on.
        """
        is_cut = (before[:, -1] & new.kinds[:, 0] & VIDEO) > 0
        if new.by_grid:  # whose frames are whole
            return torch.zeros_like(is_cut), torch.zeros_like(is_cut)
        if self._corner is None or new.corners is None:
            return is_cut, is_cut
        corner = new.corners[..., 0]
        unknown = is_cut & is_of_text(self._corner, corner)
        return is_cut & (unknown | ~begins_frame(self._corner, corner)), unknown


def _joined(first: Template, second: Template) -> Template:
    """Return the template of two pieces of a sequence, no span of which goes on in the other."""
    before = first.span_id.amax(dim=1, keepdim=True)
    span_id = torch.where(second.span_id > 0, second.span_id + before, 0)
    return Template(
        torch.cat([first.span_id, span_id], dim=1),
        torch.cat([first.is_sink, second.is_sink], dim=1),
    )


class Witness(NamedTuple):
    """What tells later whether a cache still holds the keys that it held.

    Tensors made in inference mode keep no count of what is written to them.
    """

    num_rows: int
    totals: Tensor  # of the bits of those rows, as ints: whatever order they are added in

    @classmethod
    def of(cls, keys: Tensor, history: History, before: Witness | None) -> Witness | None:
        """Return the witness of a cache; None where there is no need, or no way.

        Args:
            keys: ``[B, G, K, D]``.
            history: Of the tokens in it.
            before: Of some of its rows, which will do.
        """
        num_rows = history.num_tokens
        if not keys.is_inference() or keys.dim() != 4 or keys.itemsize not in _INTS:
            return None
        if num_rows > keys.shape[2]:  # it slid: its first rows are gone, the others elsewhere
            return None
        return before or cls(num_rows, _totals(keys, num_rows))

    def holds(self, keys: Tensor) -> bool:
        return torch.equal(self.totals, _totals(keys, self.num_rows))


_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _totals(keys: Tensor, num_rows: int) -> Tensor:
    """Return one number for each sequence and head, ``[B, G]``: tokens may have changed places."""
    of_tokens = keys[:, :, :num_rows].view(_INTS[keys.itemsize]).sum(-1, dtype=torch.int64)
    weights = torch.arange(1, 2 * num_rows, 2, device=keys.device)  # odd: none loses a bit
    return (of_tokens * weights).sum(-1)


class CacheNote(NamedTuple):
    """What is known of the tensors that hold a cache's keys, of one layer each."""

    history: History
    witness: Witness | None = None


@dataclass
class Pending:
    """The tokens of the forward under way in one thread."""

    source: weakref.ref[Tensor]
    version: int | None
    tokens: Tensor  # what they are, [B, Q]
    call: FrameType | None  # of the model, if it is known
    kinds: Tensor = field(init=False)  # the same, frames of videos marked
    corners: Tensor | None = None  # [2, B, Q], height and width of each token, where they told it
    by_grid: bool = False  # whether the model's grids told it
    served: set[int] = field(default_factory=set)
    joined: dict[int, tuple[History | None, History | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = self.tokens

    @classmethod
    def of(cls, input_ids: Tensor, rule: TemplateRule, call: FrameType | None = None) -> Pending:
        kinds = rule.shared_kinds(input_ids)
        return cls(weakref.ref(input_ids), version_of(input_ids), kinds, call)

    @property
    def is_gone(self) -> bool:
        """Whether the tensor of these tokens is."""
        return self.source() is None

    @property
    def is_over(self) -> bool:
        """Whether the forward that these tokens belong to is."""
        return self.is_gone or has_returned(self.call)

    @cached_property
    def is_text(self) -> bool:
        """Whether no token can belong to an image."""
        return is_all_text(self.tokens)

    @property
    def has_images(self) -> bool:
        """Whether any token is an image's, or a video's."""
        return not self.is_text and bool((self.tokens & IMAGE).any())

    def take_grid(self, video_grid_thw: Tensor) -> None:
        """Take what the model is told of its videos; the last that is told counts."""
        marked = mark_by_grid(self.tokens, video_grid_thw)
        if marked is None and self.corners is not None:
            return
        self.kinds = self.tokens if marked is None else marked
        self.by_grid = marked is not None
        self.joined.clear()

    def take_positions(self, height: Tensor, width: Tensor) -> None:
        """Take the positions of the decoder's queries, if they are not those of text."""
        marked = mark_by_positions(self.tokens, height, width)
        if marked is None:
            return
        # A grid that says something else is of another call, which failed.
        self.by_grid &= bool(torch.equal(marked[:, 1:], self.kinds[:, 1:]))
        self.kinds = marked
        self.corners = torch.stack([height, width])
        self.joined.clear()

    @property
    def knows_frames(self) -> bool:
        """Whether anything told the frames of its videos apart."""
        return self.by_grid or self.corners is not None

    @cached_property
    def has_videos(self) -> bool:
        """Whether there are videos that are one run each."""
        return not self.is_text and bool((self.tokens & VIDEO).any())

    @property
    def last_corner(self) -> Tensor | None:
        return None if self.corners is None else self.corners[..., -1].clone()


def module_calls() -> list[tuple[FrameType, nn.Module]]:
    """Return the calls of modules that are running in this thread, the outermost first."""
    return list(inner_calls())[::-1]


def inner_calls() -> Iterator[tuple[FrameType, nn.Module]]:
    """Yield the calls of modules that are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            yield frame, frame.f_locals["self"]
        frame = frame.f_back


def has_returned(call: FrameType | None) -> bool:
    """Whether a call is over, if it is known; lets go of what it held."""
    if call is None:
        return False
    try:
        call.clear()
    except RuntimeError:  # it is running
        return False
    return True
