"""What a backend knows while a model runs: whose tokens are in the prompt and in each cache.

Dynamo often cuts a vision-language model into many graphs, and the decoder's see no
``input_ids``. So whichever graph does see them says so here, and the graphs with attention ask.
What is known of a call's tokens is dropped once every layer was served: a later call with
``inputs_embeds`` of the same length must not pick it up. What is known of a cache's tokens
belongs to the very tensor that holds the cache's keys; cropping, reordering, resetting or
copying a cache makes another tensor (or another version of it), of which nothing is known.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.modules import plain_name
from blindsight.profile import Profile
from blindsight.runtime import left_dense
from blindsight.runtime.cache_notes import CacheNote
from blindsight.runtime.calls import has_returned, module_calls
from blindsight.runtime.context import (
    BlindsightWarning,
    ForwardUnder,
    explicit_template,
    is_disabled,
)
from blindsight.runtime.history import ExplicitHistory, History, Pending, SeenHistory
from blindsight.runtime.tensor_notes import TensorNotes, version_of


@dataclass
class _Watched:
    """A forward of which hooks tell the beginning and the end."""

    is_compiled: Callable[[], bool]
    call: FrameType | None
    outer: _Watched | None = None  # that it is within
    is_served: bool = False  # in all layers


class _Thread(threading.local):
    pending: Pending | None = None
    watched: _Watched | None = None
    decoder_ran: bool = False  # in the backend's graphs, since it last ended


class Forwards:
    """The state of one backend; each thread has its own forward under way."""

    def __init__(self, profile: Profile, *, strict: bool) -> None:
        self.rule = profile.rule
        self.layers = frozenset(profile.layers)
        self._sparse_layers = {at for at in self.layers if not profile.layer_is_dense(at)}
        self._strict = strict
        self.met: set[int] = set()
        self.caches: TensorNotes[CacheNote] = TensorNotes()  # by the tensor of a cache's keys
        self.masks: TensorNotes[Any] = TensorNotes()  # what blindsight.runtime.given_mask found out
        self._thread = _Thread()
        self._models: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._warned: set[str] = set()

    @property
    def pending(self) -> Pending | None:
        pending = self._thread.pending
        if pending is not None and pending.is_over:
            self._thread.pending = pending = None
        return pending

    @property
    def _watched(self) -> _Watched | None:
        watched = self._thread.watched
        while watched is not None and has_returned(watched.call):  # interrupted
            self._thread.watched = watched = watched.outer
        return watched

    @property
    def is_watched(self) -> bool:
        """Whether a hook announced the forward under way, and will announce its end."""
        return self._watched is not None

    def _is_model(self, module: nn.Module) -> bool:
        """Whether a module has the decoder's attention in it."""
        if module not in self._models:
            names = (plain_name(name) for name, _ in module.named_modules())
            pattern = self.rule.layer_pattern
            self._models[module] = any(re.search(pattern, name) for name in names)
        return self._models[module]

    def _call_of_model(self) -> FrameType | None:
        """Return the outermost call of a model that is running in this thread, if any is."""
        return next((call for call, module in module_calls() if self._is_model(module)), None)

    def begin(
        self, call: FrameType | None, input_ids: Tensor | None, *, is_compiled: Callable[[], bool]
    ) -> None:
        """Take note of the tokens of a forward that begins, of which the end will be told.

        Args:
            call: The call of the model, if it is known.
            input_ids: ``[B, Q]``, where it is given any.
            is_compiled: Whether the whole forward is compiled with this backend, if that is asked.
        """
        outer, pending = self._watched, self._thread.pending
        if outer is None:
            self._thread.decoder_ran = False
        elif input_ids is None:
            return  # within a call that is watched
        self._thread.watched = _Watched(is_compiled, call, outer)
        if outer is None and pending is not None and pending.call is not None:
            # A call that hooks told of has ended: this one began before there were any.
            self._check_ended(pending, input_ids)
        if input_ids is None:
            self._thread.pending = None
        elif outer is None or pending is None or not self._are_those_of(pending, input_ids):
            self._thread.pending = self._pending_of(input_ids, call)

    def _pending_of(self, input_ids: Tensor, call: FrameType | None) -> Pending:
        pending = Pending.of(input_ids, self.rule, call)
        pending.is_told = explicit_template() is not None
        return pending

    def _check_ended(self, pending: Pending, input_ids: Tensor | None) -> None:
        """Complain of what a forward left out of which the end was not told, as another begins."""
        same = input_ids is not None and self._are_those_of(pending, input_ids)
        is_repeated = same and not pending.served  # a call that failed
        if not (is_repeated or pending.is_gone or pending.is_told):
            self._check_served(pending, certain=False)

    def _are_those_of(self, pending: Pending, input_ids: Tensor) -> bool:
        """Whether tokens are what a tensor holds now."""
        version = version_of(input_ids)
        if pending.source() is not input_ids or pending.version != version:
            return False
        # Nothing counts what is written to a tensor made in inference mode: look again.
        return version is not None or torch.equal(pending.tokens, self.rule.classify(input_ids))

    def observe(self, input_ids: Tensor, *, is_first: bool = False) -> None:
        """Take note of the tokens that a graph of a forward shows.

        Args:
            input_ids: ``[B, Q]``.
            is_first: Whether they are those of the first call of a model that is known: what a
                graph outside of it showed before was no forward of its.
        """
        pending, watched = self._thread.pending, self._watched is not None
        if pending is not None:
            is_over = pending.is_over  # and so what its call held may be gone
            same = self._are_those_of(pending, input_ids)
            if same and not is_over and (pending.call is not None or not pending.served):
                return
            goes_on = pending.call is not None and not is_over  # what it gives the model is new
            was_outside = is_first and pending.call is None and not pending.served
            if not (watched or goes_on or was_outside):
                self._check_ended(pending, input_ids)
        self._thread.pending = self._pending_of(input_ids, self._call_of_model())

    def expect_same_images(self, given: Tensor, inner: Tensor) -> None:
        """Warn if a model is given no images by a module that is given some.

        Args:
            given: ``input_ids`` of the module.
            inner: Those that it gives the model.
        """
        if given.shape != inner.shape or explicit_template() is not None or is_disabled():
            return
        has_images = [Pending.of(ids, self.rule).has_images for ids in (given, inner)]
        if has_images == [True, False]:
            self.warn_once(
                "the model is given tokens without images by a module that is given some, so it "
                "runs dense. If they are only written over, say where the images are: "
                "blindsight.use_template(profile.rule.template(input_ids))."
            )

    def expect_images(self) -> None:
        """Warn if the forward under way is given pixels, and no token is known to be an image's."""
        pending = self.pending
        if pending is None or explicit_template() is not None or is_disabled():
            return
        if not pending.has_images:
            self.warn_once(
                "the model is given pixels, but by the profile's rule (image_token_ids="
                f"{self.rule.image_token_ids}) the prompt has no image tokens, so it runs dense. "
                "Make the profile with the model's rule: TemplateRule.from_config(model.config, "
                "processor)."
            )

    def _pending_videos(self) -> Pending | None:
        """Return the tokens of the forward under way, if frames of videos can still be told."""
        pending = self._thread.pending
        if pending is None or not pending.has_videos or pending.served:
            return None
        return self.pending

    def observe_videos(self, video_grid_thw: Tensor) -> None:
        """Take note of the frames of the videos in the forward under way: ``[V, 3]``."""
        pending = self._pending_videos()
        if pending is not None:
            pending.take_grid(video_grid_thw.cpu())

    def observe_positions(self, position_ids: Tensor) -> None:
        """Take note of positions in (text,) time, height and width: ``[3 or 4, B or 1, Q]``."""
        if (pending := self._pending_videos()) is None:
            return
        batch, num_queries = pending.tokens.shape
        if position_ids.shape[1] in (1, batch) and position_ids.shape[2] == num_queries:
            height, width = position_ids[-2:].expand(-1, batch, -1).cpu()
            pending.take_positions(height, width)

    def end(
        self, call: FrameType | None, *, failed: bool, may_be_compiled: Callable[[], bool]
    ) -> None:
        """Take note that a forward is over of which the beginning was told.

        Args:
            call: As when it began.
            failed: Whether it ended with an error.
            may_be_compiled: Whether any part of the decoder is, with this backend.
        """
        pending, watched = self._thread.pending, self._thread.watched
        if watched is not None and watched.call is not call:
            return
        self._thread.pending = None
        self._thread.watched = None if watched is None else watched.outer
        if watched is not None and watched.outer is not None:
            watched.outer.is_served = True  # its tokens were those of the call within
        if failed or watched is None or watched.is_served or is_disabled():
            return
        explicit = self.explicit_history()
        if explicit is None and (pending is None or pending.is_text):
            return  # nothing was to be sparse: not to look through the model for each token
        served = () if pending is None else pending.served
        # A model of which nothing is compiled runs its hooks, too, and dense is what it shall run.
        if not served and not watched.is_compiled() and not may_be_compiled():
            return
        if explicit is not None:
            num_queries = explicit.num_tokens if pending is None else pending.kinds.shape[1]
            if explicit.restricts_queries_from(explicit.num_tokens - num_queries):
                self.expect_all_layers()
        elif pending is not None:
            self._check_served(pending, certain=True)

    def history(self, pending: Pending, past: History | None) -> History | None:
        """Return the whole sequence: a cache's tokens (if any) and the forward's own."""
        if id(past) not in pending.joined:
            untold = pending.has_videos and not pending.knows_frames
            untold = untold or (past is not None and past.lacks_frames(pending))
            if untold and not is_disabled():
                self.warn_once(
                    "the frames of a video are not told apart, and count as one image: its "
                    "video_grid_thw was not seen, or does not fit its tokens. Say where they are: "
                    "blindsight.use_template(rule.template(input_ids, video_grid_thw))."
                )
            if past is not None and past.cuts_delimiter(pending) and not is_disabled():
                self.warn_once(
                    "a chunk ended in the start delimiter of an image, which counted as text "
                    "there, so it saw all earlier images; in a prompt that is prefilled whole it "
                    "would not. Cut prompts elsewhere to get the same numbers."
                )
            if past is None:
                joined: History | None = SeenHistory(
                    self.rule, pending.kinds, corner=pending.last_corner
                )
            else:
                joined = past.extended(pending)
            pending.joined[id(past)] = (past, joined)
        return pending.joined[id(past)][1]

    def explicit_history(self) -> History | None:
        """Return the history of the template given by hand, one for all graphs; None: none is."""
        explicit = explicit_template()
        if explicit is None:
            return None
        if self not in explicit.forwards:
            explicit.forwards[self] = ForwardUnder(ExplicitHistory(self.rule, explicit.template))
        return explicit.forwards[self].history

    def expect_all_layers(self) -> None:
        """Take note that the forward under a template given by hand is to be sparse."""
        if (explicit := explicit_template()) is not None and self in explicit.forwards:
            explicit.forwards[self].is_sparse = True

    def check_explicit(self, forward: ForwardUnder) -> None:
        """Complain of sparse layers that did not run here under a template given by hand."""
        missing = self._sparse_layers - forward.served
        if missing and forward.is_sparse:
            message = left_dense.layers_under_template(missing, forward.served)
            self._complain(message, is_error=True)

    def serve(self, layers: Sequence[int]) -> None:
        """Take note that these layers of the forward under way have run."""
        pending, explicit = self._thread.pending, explicit_template()
        self._thread.decoder_ran = True
        if explicit is not None and self in explicit.forwards:
            explicit.forwards[self].served.update(layers)
        if pending is not None:
            pending.served.update(layers)
            if not (pending.is_text or pending.is_told or is_disabled()):
                # Earlier layers have run by now; of text nothing is sparse, token by token.
                self._check_served(pending, certain=True, before=min(layers))
            if pending.served >= self.layers:
                self._thread.pending = None
                if (watched := self._thread.watched) is not None:
                    watched.is_served = True

    def warn_once(self, message: str) -> None:
        if message in self._warned:
            return
        # Python shows a text once for all backends, unless a registry is given.
        warnings.warn_explicit(message, BlindsightWarning, __file__, 0, __name__, registry={})
        self._warned.add(message)  # not where warnings are errors: each call is one then

    def _complain(self, message: str, *, is_error: bool) -> None:
        """Raise, if that is an error to a strict backend; warn if not."""
        if is_error and self._strict:
            raise ValueError(message)
        self.warn_once(message)

    def finish(self) -> None:
        """Take note that the decoder has run: what it did not serve here, ran elsewhere."""
        if self._watched is not None:
            return  # the end will be told
        pending, ran = self.pending, self._thread.decoder_ran
        self._thread.pending, self._thread.decoder_ran = None, False
        if is_disabled():
            return
        if pending is not None:
            self._check_served(pending, certain=True)
        elif not ran and left_dense.recompile_limit_was_hit():
            self.warn_once(left_dense.DECODER_NOT_SEEN)

    def _check_served(self, pending: Pending, *, certain: bool, before: int | None = None) -> None:
        """Complain of layers that a forward ran outside of the backend's graphs.

        Args:
            pending: What is known of the forward.
            certain: Whether the decoder has run; a forward may also have ended with an error.
            before: The layer that it has come to; None: all have run.
        """
        missing = self.layers - pending.served
        if before is not None:
            missing = frozenset(layer for layer in missing if layer < before)
        if not missing or not self._restricts(pending):
            return
        self._thread.pending = None
        never = missing - self.met
        gave_up = bool(pending.served) and left_dense.recompile_limit_was_hit()
        message = left_dense.layers_of_forward(missing, never, certain=certain)
        self._complain(message, is_error=certain or bool(never) or gave_up)

    def _restricts(self, pending: Pending) -> bool:
        """Whether any query of a forward is one that a category restricts."""
        num_queries = pending.kinds.shape[1]
        known = [joined for _, joined in pending.joined.values() if joined is not None]
        alone = SeenHistory(self.rule, pending.kinds)
        return any(
            history.restricts_queries_from(history.num_tokens - num_queries)
            for history in (alone, *known)
        )
