"""What a backend knows while a model runs: whose tokens are in the prompt and in each cache.

Dynamo often cuts a vision-language model into many graphs, and the decoder's see no
``input_ids``. So whichever graph does see them says so here, and the graphs with attention ask.
What is known of a call's tokens is dropped once every layer was served: a later call with
``inputs_embeds`` of the same length must not pick it up. What is known of a cache's tokens
belongs to the very tensor that holds the cache's keys; cropping, reordering, resetting or
copying a cache makes another tensor (or another version of it), of which nothing is known.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from blindsight.template import IMAGE, Template, TemplateRule, find_order_problem
from blindsight.videos import (
    FRAME,
    VIDEO,
    begins_frame,
    is_of_text,
    mark_by_grid,
    mark_by_positions,
)

T = TypeVar("T")

_NO_FRAME = 0xFF ^ FRAME

_given: ContextVar[_Given | None] = ContextVar("blindsight_template", default=None)
_disabled: ContextVar[bool] = ContextVar("blindsight_disabled", default=False)


class BlindsightWarning(UserWarning):
    """Something ran dense, or was left alone, that the profile would have made sparse."""


@contextmanager
def use_template(span_id: Tensor, is_sink: Tensor) -> Iterator[None]:
    """Say where the images are, for models that never show ``input_ids`` to a compiled graph.

    Args:
        span_id: ``[B, T]`` ints over past and present tokens: 1..n for the tokens of each image
            in prompt order, 0 for text and padding.
        is_sink: ``[B, T]`` bool, the tokens kept visible across images.

    Raises:
        ValueError: The tensors do not describe spans; the message says where. Or, at the end, a
            strict backend has run some layers of its profile under this template, and not all.
    """
    given = _Given(_checked_template(span_id, is_sink))
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)
    for runtime, forward in given.forwards.items():
        runtime.check_explicit(forward)


@contextmanager
def disabled() -> Iterator[None]:
    """Run the model's own graphs inside this context, for comparison."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def _checked_template(span_id: Tensor, is_sink: Tensor) -> Template:
    for name, tensor in (("span_id", span_id), ("is_sink", is_sink)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor [B, T], got {found}.")
    if span_id.shape != is_sink.shape:
        raise ValueError(
            "span_id and is_sink must have the same shape, got "
            f"{tuple(span_id.shape)} and {tuple(is_sink.shape)}."
        )
    if span_id.dtype.is_floating_point or span_id.dtype == torch.bool:
        raise ValueError(f"span_id must hold ints, got {span_id.dtype}.")
    if is_sink.dtype != torch.bool:
        raise ValueError(f"is_sink must be bool, got {is_sink.dtype}.")
    span_id = span_id.detach().to("cpu", torch.int32).contiguous()
    problem = find_order_problem(span_id)
    if problem:
        raise ValueError(f"span_id must number spans 1..n in prompt order, {problem}.")
    return Template(span_id, is_sink.detach().cpu().contiguous())


class History:
    """The tokens of one sequence so far: their kinds, or a template given by hand."""

    def __init__(
        self,
        rule: TemplateRule,
        *,
        kinds: Tensor | None = None,
        corner: Tensor | None = None,
        template: Template | None = None,
    ) -> None:
        self._rule = rule
        self._kinds = kinds
        self._corner = corner  # [2, B], height and width of the last token, if it is of a video
        self._template = template
        self._on_device: dict[torch.device, Template] = {}
        self._restricts: dict[int, bool] = {}
        self.memo: dict[object, Any] = {}  # what others found out of this sequence
        known = kinds if template is None else template.span_id
        assert known is not None
        self.batch, self.num_tokens = known.shape

    @property
    def template(self) -> Template:
        """The template, computed on first use: decoding never needs it."""
        if self._template is None:
            assert self._kinds is not None
            self._template = self._rule.template_of_kinds(self._kinds)
        return self._template

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

    def extended(self, new: _Pending) -> History | None:
        """Return the history with new tokens after it, or None where that is ambiguous."""
        kinds = new.kinds
        if len(kinds) != self.batch:
            return None
        if self._kinds is not None:
            goes_on, _ = self._border(new)
            first = torch.where(goes_on, kinds[:, 0] & _NO_FRAME, kinds[:, 0])
            whole = torch.cat([self._kinds, first[:, None], kinds[:, 1:]], dim=1)
            return History(self._rule, kinds=whole, corner=new.last_corner)
        # A template given by hand says nothing of the tokens that would join its last span, nor of
        # marks, which tell what tiles are part of.
        after, old = self._rule.template_of_kinds(kinds), self.template
        joins = (old.span_id[:, -1] > 0) & (kinds[:, 0] > 0)
        if self._rule.leading_tile_ids or self._rule.trailing_tile_ids:
            joins |= (kinds & IMAGE).bool().any(1)
        if bool(joins.any()):
            return None
        before = old.span_id.amax(dim=1, keepdim=True)
        span_id = torch.where(after.span_id > 0, after.span_id + before, 0)
        return History(
            self._rule,
            template=Template(
                torch.cat([old.span_id, span_id], dim=1),
                torch.cat([old.is_sink, after.is_sink], dim=1),
            ),
        )

    def lacks_frames(self, new: _Pending) -> bool:
        """Whether new tokens go on with a video, and nothing tells if they begin a frame."""
        if self._kinds is None or len(new.kinds) != self.batch:
            return False
        return bool(self._border(new)[1].any())

    def _border(self, new: _Pending) -> tuple[Tensor, Tensor]:
        """Whether the first new token goes on with a frame, and whether that is not known.

        Returns:
            Two flags ``[B]``; what is not known goes on.
        """
        assert self._kinds is not None
        is_cut = (self._kinds[:, -1] & new.kinds[:, 0] & VIDEO) > 0
        if new.by_grid:  # whose frames are whole
            return torch.zeros_like(is_cut), torch.zeros_like(is_cut)
        if self._corner is None or new.corners is None:
            return is_cut, is_cut
        corner = new.corners[..., 0]
        unknown = is_cut & is_of_text(self._corner, corner)
        return is_cut & (unknown | ~begins_frame(self._corner, corner)), unknown


@dataclass
class _Forward:
    """What a backend did under a template given by hand."""

    history: History
    served: set[int] = field(default_factory=set)
    is_sparse: bool = False  # whether any graph was to restrict a query


@dataclass
class _Given:
    """A template given by hand."""

    template: Template
    forwards: dict[Runtime, _Forward] = field(default_factory=dict)


@dataclass
class _Pending:
    """The tokens of the forward under way in one thread."""

    source: weakref.ref[Tensor]
    version: int | None
    tokens: Tensor  # what they are, [B, Q]
    from_graph: bool
    kinds: Tensor = field(init=False)  # the same, frames of videos marked
    corners: Tensor | None = None  # [2, B, Q], height and width of each token, where they told it
    by_grid: bool = False  # whether the model's grids told it
    served: set[int] = field(default_factory=set)
    joined: dict[int, tuple[History | None, History | None]] = field(default_factory=dict)
    limit_hits: int = 0  # of Dynamo's, when the forward began

    def __post_init__(self) -> None:
        self.kinds = self.tokens

    @cached_property
    def is_text(self) -> bool:
        """Whether no token can belong to an image."""
        return not bool(self.kinds.any())

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

    @property
    def has_videos(self) -> bool:
        """Whether there are videos that are one run each."""
        return bool((self.tokens & VIDEO).any())

    @property
    def last_corner(self) -> Tensor | None:
        return None if self.corners is None else self.corners[..., -1].clone()


class _Thread(threading.local):
    pending: _Pending | None = None
    decoder_ran: bool = False  # in the backend's graphs, since it last ended


class TensorNotes(Generic[T]):
    """What is known of tensors; a note dies with its tensor, and with any change of it."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int | None, T]] = {}
        self._lock = threading.Lock()

    def get(self, tensor: Tensor) -> T | None:
        entry = self._entries.get(id(tensor))
        if entry is None:
            return None
        reference, version, note = entry
        return note if reference() is tensor and version == version_of(tensor) else None

    def put(self, tensor: Tensor, note: T) -> None:
        number, entries, lock = id(tensor), self._entries, self._lock

        def forget(dead: weakref.ref[Tensor]) -> None:
            with lock:
                if number in entries and entries[number][0] is dead:
                    del entries[number]

        with lock:
            entries[number] = (weakref.ref(tensor, forget), version_of(tensor), note)

    def drop(self, tensor: Tensor) -> None:
        """Forget what a tensor holds: something unknown was written to it."""
        with self._lock:
            self._entries.pop(id(tensor), None)


class Runtime:
    """The state of one backend; each thread has its own forward under way."""

    def __init__(
        self,
        rule: TemplateRule,
        layers: Sequence[int],
        *,
        sparse_layers: Sequence[int],
        strict: bool,
    ) -> None:
        self.rule = rule
        self.layers = frozenset(layers)
        self.sparse_layers = frozenset(sparse_layers)
        self.strict = strict
        self.met: set[int] = set()
        self.caches: TensorNotes[History] = TensorNotes()  # by the tensor of a cache's keys
        self.masks: TensorNotes[Any] = TensorNotes()  # what blindsight.given_mask found out
        self._thread = _Thread()
        self._warned: set[str] = set()

    @property
    def pending(self) -> _Pending | None:
        pending = self._thread.pending
        if pending is not None and pending.source() is None:
            # The call that these tokens belong to is over.
            self._thread.pending = pending = None
        return pending

    def observe(self, input_ids: Tensor, *, from_graph: bool = True) -> None:
        """Take note of the tokens of the forward that begins, or is under way."""
        version = version_of(input_ids)
        pending = self.pending
        if pending is not None:
            same = pending.source() is input_ids and pending.version == version
            if same and version is None:
                # Nothing counts what is written to a tensor made in inference mode: look again.
                same = torch.equal(pending.tokens, self.rule.classify(input_ids))
            if same and not pending.served:
                return
            if pending.from_graph:
                self._check_served(pending, certain=False)
        self._thread.pending = _Pending(
            weakref.ref(input_ids),
            version,
            self.rule.classify(input_ids),
            from_graph,
            limit_hits=_limit_hits(),
        )

    def observe_videos(self, video_grid_thw: Tensor) -> None:
        """Take note of the frames of the videos in the forward under way: ``[V, 3]``."""
        pending = self.pending
        if pending is not None and not pending.served and pending.has_videos:
            pending.take_grid(video_grid_thw.cpu())

    def observe_positions(self, position_ids: Tensor) -> None:
        """Take note of positions in (text,) time, height and width: ``[3 or 4, B or 1, Q]``."""
        pending = self.pending
        if pending is None or pending.served or not pending.has_videos:
            return
        batch, num_queries = pending.tokens.shape
        if position_ids.shape[1] in (1, batch) and position_ids.shape[2] == num_queries:
            height, width = position_ids[-2:].expand(-1, batch, -1).cpu()
            pending.take_positions(height, width)

    def end(self) -> None:
        """Take note that a forward is over of which a hook told the beginning."""
        pending = self.pending
        self._thread.pending = None
        if pending is None or pending.from_graph or is_disabled():
            return
        # A model that is not compiled at all runs its hooks, too, and dense is what it shall run.
        if _limit_hits() > pending.limit_hits:
            self._check_served(pending, certain=True)

    def history(self, pending: _Pending, past: History | None) -> History | None:
        """Return the whole sequence: a cache's tokens (if any) and the forward's own."""
        if id(past) not in pending.joined:
            untold = pending.has_videos and not pending.knows_frames
            untold = untold or (past is not None and past.lacks_frames(pending))
            if untold and not is_disabled():
                self.warn_once(
                    "the frames of a video are not told apart, and count as one image: its "
                    "video_grid_thw was not seen, or does not fit its tokens. Say where they are: "
                    "blindsight.use_template(*rule.template(input_ids, video_grid_thw).tensors())."
                )
            if past is None:
                joined: History | None = History(
                    self.rule, kinds=pending.kinds, corner=pending.last_corner
                )
            else:
                joined = past.extended(pending)
            pending.joined[id(past)] = (past, joined)
        return pending.joined[id(past)][1]

    def explicit_history(self) -> History | None:
        """Return the history of the template given by hand, one for all graphs; None: none is."""
        given = _given.get()
        if given is None:
            return None
        if self not in given.forwards:
            given.forwards[self] = _Forward(History(self.rule, template=given.template))
        return given.forwards[self].history

    def expect_all_layers(self) -> None:
        """Take note that the forward under a template given by hand is to be sparse."""
        if (given := _given.get()) is not None and self in given.forwards:
            given.forwards[self].is_sparse = True

    def check_explicit(self, forward: _Forward) -> None:
        """Complain of sparse layers that did not run here under a template given by hand."""
        missing = sorted(self.sparse_layers - forward.served)
        if not missing or not forward.is_sparse:
            return
        message = (
            f"the attention of layers {compact(missing)} of the profile did not run through this "
            f"backend under the template, layers {compact(sorted(forward.served))} did. If this is "
            "a stage of a pipeline, give its backend the stage's profile: profile.stage(first, "
            "stop, keeps_numbers=...). If torch._dynamo warned of its recompile limit, raise "
            "torch._dynamo.config.recompile_limit."
        )
        if self.strict:
            raise ValueError(message[0].upper() + message[1:])
        self.warn_once(message)

    def serve(self, layers: Sequence[int]) -> None:
        """Take note that these layers of the forward under way have run."""
        pending, given = self._thread.pending, _given.get()
        self._thread.decoder_ran = True
        if given is not None and self in given.forwards:
            given.forwards[self].served.update(layers)
        if pending is not None:
            pending.served.update(layers)
            if pending.served >= self.layers:
                self._thread.pending = None

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, BlindsightWarning, stacklevel=2)

    def finish(self) -> None:
        """Take note that the decoder has run: what it did not serve here, ran elsewhere."""
        pending, ran = self.pending, self._thread.decoder_ran
        self._thread.pending, self._thread.decoder_ran = None, False
        if is_disabled():
            return
        if pending is not None:
            if pending.from_graph:
                self._check_served(pending, certain=True)
        elif not ran and _limit_hits():
            self.warn_once(
                "a forward ran its decoder outside of this backend's graphs, so dense, as Dynamo "
                "gave up compiling it. Raise torch._dynamo.config.recompile_limit, or compile the "
                "decoder alone: model.model.language_model.compile(backend=backend) with a backend "
                "that was given the model."
            )

    def _check_served(self, pending: _Pending, *, certain: bool) -> None:
        """Complain of layers that a forward ran outside of the backend's graphs.

        Args:
            pending: What is known of the forward.
            certain: Whether the decoder has run; a forward may also have ended with an error.
        """
        missing = sorted(self.layers - pending.served)
        if not missing or not self._restricts(pending):
            return
        self._thread.pending = None
        never = sorted(self.layers - self.met)
        message = (
            f"the attention of layers {compact(missing)} of the profile did not run through this "
            "backend, so it was dense"
        )
        if never:
            message += f" (layers {compact(never)} were never met)"
        message += (
            ". Load the model with attn_implementation='sdpa'. If torch._dynamo warned of its "
            "recompile limit, raise torch._dynamo.config.recompile_limit."
        )
        if not certain:
            message += " If the last forward ended with an error of its own, call again."
        if self.strict and (certain or never or pending.served):
            raise ValueError(message[0].upper() + message[1:])
        self.warn_once(message)

    def _restricts(self, pending: _Pending) -> bool:
        """Whether any query of a forward is one that a category restricts."""
        num_queries = pending.kinds.shape[1]
        known = [joined for _, joined in pending.joined.values() if joined is not None]
        alone = History(self.rule, kinds=pending.kinds)
        return any(
            history.restricts_queries_from(history.num_tokens - num_queries)
            for history in (alone, *known)
        )


def _limit_hits() -> int:
    """Return how often Dynamo has reached its recompile limit; it then runs a frame as it is."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return sum(reasons[text] for text in reasons if "recompile limit exceeded" in text)


def version_of(tensor: Tensor) -> int | None:
    """Return the count of in-place changes; None for inference tensors, which keep none."""
    return None if tensor.is_inference() else tensor._version


def is_disabled() -> bool:
    return _disabled.get()


def compact(numbers: Sequence[int]) -> str:
    """Return for example ``"0-3, 7"`` for sorted ints."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
