"""The tokens of a sequence, as far as they are known.

- ``Pending``: the tokens of the forward under way, until all of its layers have run.
- ``History``: those of a whole sequence, the ones in a cache and after them a forward's own.

Shapes: B batch, T tokens of the whole sequence, Q tokens of a forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.runtime.calls import has_returned
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
    """The tokens of one sequence so far.

    Attributes:
        batch, num_tokens: B, T.
    """

    def __init__(self, rule: TemplateRule, batch: int, num_tokens: int) -> None:
        self._rule = rule
        self.batch = batch
        self.num_tokens = num_tokens
        self._found: dict[object, Any] = {}  # what others found out of this sequence

    @cached_property
    def template(self) -> Template:
        """Where the images are, computed on first use: decoding never needs it."""
        raise NotImplementedError

    def extended(self, new: Pending) -> History | None:
        """Return the history with new tokens after it, or None where that is ambiguous."""
        raise NotImplementedError

    def lacks_frames(self, new: Pending) -> bool:
        """Whether new tokens go on with a video, and nothing tells if they begin a frame."""
        return False

    def cuts_delimiter(self, new: Pending) -> bool:
        """Whether new tokens begin with an image after the first whose delimiter came before."""
        if new.is_text or new.kinds.shape[0] != self.batch:
            return False
        last = self._last_kinds()
        if last is None:
            return False
        opens = ((last & START) > 0) & ((new.kinds[:, 0] & IMAGE) > 0)
        return bool(opens.any()) and bool((opens & (self.template.span_id > 0).any(1)).any())

    def _last_kinds(self) -> Tensor | None:
        """The kind of the last token ``[B]``, if it is known."""
        raise NotImplementedError

    def once(self, key: object, find: Callable[[], _T]) -> _T:
        """Return what ``find`` finds out of this sequence; it is called once per key."""
        if key not in self._found:
            self._found[key] = find()
        found: _T = self._found[key]
        return found

    def restricts_queries_from(self, past: int) -> bool:
        """As the template's, computed once: every layer asks."""
        return self.once(("restricts", past), lambda: self.template.restricts_queries_from(past))

    def on(self, device: torch.device) -> Template:
        """Return the template as tensors on a device, copied once."""
        tensors = self.template.tensors()
        return self.once(("on", device), lambda: Template(*(x.to(device) for x in tensors)))

    def is_like(self, other: History) -> bool:
        """Whether the images of two sequences are at the same places."""
        pairs = zip(self.template.tensors(), other.template.tensors(), strict=True)
        return self is other or all(torch.equal(mine, its) for mine, its in pairs)


class SeenHistory(History):
    """A sequence of which every token was seen.

    Args:
        rule: How images are found.
        kinds: ``[B, T]``, of its tokens.
        text_after: How many more there are, all of text.
        corner: ``[2, B]``, height and width of the last token, if it is of a video.
    """

    def __init__(
        self,
        rule: TemplateRule,
        kinds: Tensor,
        *,
        text_after: int = 0,
        corner: Tensor | None = None,
    ) -> None:
        super().__init__(rule, kinds.shape[0], kinds.shape[1] + text_after)
        # Text after the other tokens is joined to them when needed: not in decoding. One
        # attribute, as threads may share a history.
        self._tokens = kinds, text_after
        self._corner = corner

    @cached_property
    def template(self) -> Template:
        return self._rule.template_of_kinds(self._kinds)

    def extended(self, new: Pending) -> History | None:
        kinds = new.kinds
        if kinds.shape[0] != self.batch:
            return None
        if new.is_text:
            first_kinds, text = self._tokens
            return SeenHistory(self._rule, first_kinds, text_after=text + kinds.shape[1])
        goes_on, _ = self._border(new)
        first = torch.where(goes_on, kinds[:, 0] & _NO_FRAME, kinds[:, 0])
        whole = torch.cat([self._kinds, first[:, None], kinds[:, 1:]], dim=1)
        return SeenHistory(self._rule, whole, corner=new.last_corner)

    def lacks_frames(self, new: Pending) -> bool:
        if new.is_text or new.kinds.shape[0] != self.batch:
            return False
        return bool(self._border(new)[1].any())

    def _last_kinds(self) -> Tensor:
        return self._kinds[:, -1]

    @property
    def _kinds(self) -> Tensor:
        """The kinds of all tokens, ``[B, T]``."""
        kinds, text = self._tokens
        if text:
            kinds = pad(kinds, (0, text))  # 0: text
            self._tokens = kinds, 0
        return kinds

    def _border(self, new: Pending) -> tuple[Tensor, Tensor]:
        """Whether the first new token goes on with a frame, and whether that is not known.

        Returns:
            Two flags ``[B]``; what is not known goes on.
        """
        is_cut = (self._kinds[:, -1] & new.kinds[:, 0] & VIDEO) > 0
        if new.by_grid:  # whose frames are whole
            return torch.zeros_like(is_cut), torch.zeros_like(is_cut)
        if self._corner is None or new.corners is None:
            return is_cut, is_cut
        corner = new.corners[..., 0]
        unknown = is_cut & is_of_text(self._corner, corner)
        return is_cut & (unknown | ~begins_frame(self._corner, corner)), unknown


class ExplicitHistory(History):
    """A sequence whose template was given by hand, and the tokens that were seen after it.

    Args:
        rule: How images are found.
        given: The template.
        kinds_after: ``[B, A]``, of the tokens after it, if there are any.
    """

    def __init__(
        self, rule: TemplateRule, given: Template, kinds_after: Tensor | None = None
    ) -> None:
        after = 0 if kinds_after is None else kinds_after.shape[1]
        super().__init__(rule, given.span_id.shape[0], given.num_tokens + after)
        self._given = given
        self._kinds_after = kinds_after

    @cached_property
    def template(self) -> Template:
        if self._kinds_after is None:
            return self._given
        return _joined(self._given, self._rule.template_of_kinds(self._kinds_after))

    def extended(self, new: Pending) -> History | None:
        kinds, after = new.kinds, self._kinds_after
        if kinds.shape[0] != self.batch:
            return None
        if after is not None and bool((after[:, -1] & kinds[:, 0] & VIDEO).any()):
            return None  # whether a frame goes on is told by more than is kept here
        after = kinds if after is None else torch.cat([after, kinds], dim=1)
        # A template given by hand says nothing of the tokens that would join its last span, nor of
        # marks, which tell what tiles are part of.
        joins = (self._given.span_id[:, -1] > 0) & (after[:, 0] > 0)
        if self._rule.leading_tile_ids or self._rule.trailing_tile_ids:
            joins |= (after & IMAGE).bool().any(1)
        return None if bool(joins.any()) else ExplicitHistory(self._rule, self._given, after)

    def _last_kinds(self) -> Tensor | None:
        return None if self._kinds_after is None else self._kinds_after[:, -1]


def _joined(first: Template, second: Template) -> Template:
    """Return the template of two pieces of a sequence, no span of which goes on in the other."""
    before = first.span_id.amax(dim=1, keepdim=True)
    span_id = torch.where(second.span_id > 0, second.span_id + before, 0)
    return Template(
        torch.cat([first.span_id, span_id], dim=1),
        torch.cat([first.is_sink, second.is_sink], dim=1),
    )


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
    is_told: bool = False  # whether a template was given by hand, under which layers are checked
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
