"""What is known of the sequence that a graph runs on: before a call, and what is left for later.

Shapes: B batch, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from blindsight.families import forgets
from blindsight.runtime.context import is_disabled
from blindsight.runtime.history import CacheNote, History, Pending, Witness
from blindsight.runtime.plan import DENSE_HEADS, Plan
from blindsight.runtime.state import BackendState

_NO_IMAGE_QUERY = "no query in a second image"


class Past(NamedTuple):
    """What is known of the tokens in a cache before a call: None of them, if no history is."""

    history: History | None
    is_known: bool
    decodes: bool = False  # one token of text follows


_EMPTY, _UNKNOWN = Past(None, True), Past(None, False)


class Known(NamedTuple):
    """What is known before a call.

    Attributes:
        history: The whole sequence, the call's own tokens included; None if it is not known.
        dense_because: Why the call runs dense, or None.
        past: What is in the cache.
    """

    history: History | None
    dense_because: str | None
    past: Past


class Sequences:
    """The sequences of one graph's calls.

    Args:
        state: The backend's.
        plan: Of the graph, which has attention.
    """

    def __init__(self, state: BackendState, plan: Plan) -> None:
        self._state = state
        self._forwards = state.forwards
        self._plan = plan

    def find(self, args: Sequence[Any], layers: tuple[int, ...]) -> Known:
        """Return what is known before a call.

        Args:
            args: The inputs of the graph.
            layers: The layer of each attention call.

        Raises:
            ValueError: What is known does not fit the call.
        """
        sizes = self._plan.sizes(args)
        explicit, pending = self._forwards.explicit_history(), self._forwards.pending
        if explicit is None and pending is None:
            self._state.models.look_for_prompt()
            pending = self._forwards.pending
        past = None
        if explicit is not None:
            past = self._past_beyond(explicit, args, layers, sizes, pending)
        if past is not None:
            explicit = None
        else:
            past = self._past(args, layers, sizes, explicit, pending)
        if explicit is None:
            history, unknown = self._whole(sizes, pending, past)
        else:
            self._check(explicit, args, sizes, past)
            history, unknown = explicit, ""
        is_text = explicit is None and pending is not None and pending.is_text
        dense_because = self._dense_because(
            history, unknown, layers, num_queries=sizes[1], is_text=is_text
        )
        return Known(history, dense_because, past)

    def remember(
        self,
        args: Sequence[Any],
        outputs: Any,
        layers: tuple[int, ...],
        known: Known,
    ) -> None:
        """Attach what is known of the sequence to the tensors that hold its keys after a call.

        Of every layer: other graphs may run some of them in the next call.
        """
        history, _, past = known
        notes, caches = self._forwards.caches, self._plan.kept_keys
        tensors = [*[outputs[at] for at in caches.left], *[args[at] for at in caches.written]]
        labels = [layers[call] for call in caches.calls]
        left: Sequence[CacheNote] = []
        if history is not None and not any(map(Tensor.is_inference, tensors)):
            left = [CacheNote(history)] * len(tensors)
        elif history is not None:
            befores = [
                notes.get(args[at]) if past.decodes and at is not None else None
                for at in caches.befores
            ]
            left = [
                CacheNote(history, Witness.of(keys, history, before=note and note.witness))
                for keys, note in zip(tensors, befores, strict=True)
            ]
        # What was known of these is of an earlier call; what that left there nobody saw.
        unknown = [args[at] for at in caches.found]
        for keys in unknown if history is not None else [*unknown, *tensors]:
            note = notes.get(keys)
            if note is None or note.history is not history:  # not of this forward
                notes.drop(keys)
        if left:
            notes.put(tensors, left, labels)

    def _past(
        self,
        args: Sequence[Any],
        layers: tuple[int, ...],
        sizes: tuple[int, int, int],
        explicit: History | None,
        pending: Pending | None,
    ) -> Past:
        """Return what is known of the tokens in the cache before the call."""
        _, num_queries, num_keys = sizes
        cache, notes = self._plan.cache, self._forwards.caches
        is_alone = num_keys == num_queries  # no keys but the call's own
        # Reading a counter on a device waits for it: not for a decoded token.
        decodes = pending is not None and pending.is_text and num_queries == 1
        matters = explicit is not None or not decodes
        note = None if cache.before is None else notes.get(args[cache.before])
        length = None
        if cache.length is not None and (matters or note is None):
            length = int(args[cache.length])
        if length == 0:
            return _EMPTY
        if cache.before is None:
            return _EMPTY if length is None and is_alone else _UNKNOWN
        keys: Tensor = args[cache.before]
        if not cache.is_read and length is None and is_alone:
            return _EMPTY  # what it holds is overwritten
        if note is not None and cache.has_new:
            # An earlier layer, whose keys this one shares, may have left it in this very forward.
            if note.history is explicit:
                return _UNKNOWN
            for past, whole in () if pending is None else pending.joined.values():
                if note.history is whole:
                    return Past(past, True, decodes)
        if note is None and not decodes:
            note = self._note_of_a_copy(keys, layers[cache.call])
        if note is not None and length in (None, note.history.num_tokens):
            witness = note.witness if matters else None
            if witness is None or witness.holds(keys):
                return Past(note.history, True, decodes)
        return _EMPTY if (cache.has_new and is_alone) or keys.numel() == 0 else _UNKNOWN

    def _note_of_a_copy(self, keys: Tensor, layer: int) -> CacheNote | None:
        """Return what is known of a cache that holds the very same keys, if there is one.

        First-layer keys do not depend on masks: two caches of one prompt hold the same ones even
        where their templates differ.
        """
        found = self._forwards.caches.find_equal(keys, layer)
        if not found or found[0].history.num_tokens > keys.shape[2]:
            return None  # it slid: other sequences may end alike
        first = found[0].history
        return found[0] if all(first.is_like(note.history) for note in found) else None

    def _past_beyond(
        self,
        explicit: History,
        args: Sequence[Any],
        layers: tuple[int, ...],
        sizes: tuple[int, int, int],
        pending: Pending | None,
    ) -> Past | None:
        """Return what is in the cache, if a text token follows the prompt of the template."""
        _, num_queries, num_keys = sizes
        if num_queries != 1 or pending is None or pending.has_images:
            return None
        past = self._past(args, layers, sizes, None, pending)
        expected = self._num_tokens(args, past, num_queries, num_keys)
        return past if expected is not None and expected > explicit.num_tokens else None

    def _check(
        self, explicit: History, args: Sequence[Any], sizes: tuple[int, int, int], past: Past
    ) -> None:
        """Check that a template given by hand is of the whole sequence."""
        batch, num_queries, num_keys = sizes
        expected = self._num_tokens(args, past, num_queries, num_keys)
        if expected is not None and (batch, expected) != (explicit.batch, explicit.num_tokens):
            raise ValueError(
                f"template must be [B, T] = [{batch}, {expected}] for {expected - num_queries} "
                f"past and {num_queries} new tokens, got [{explicit.batch}, "
                f"{explicit.num_tokens}]. Give use_template the whole sequence"
                + (", or leave it before decoding." if num_queries == 1 else ".")
            )

    def _whole(
        self, sizes: tuple[int, int, int], pending: Pending | None, past: Past
    ) -> tuple[History | None, str]:
        """Return the whole sequence as the model's inputs tell it, or what is not known of it."""
        batch, num_queries, _ = sizes
        if pending is None:
            return None, "input_ids were not seen and no template was given"
        if tuple(pending.kinds.shape) != (batch, num_queries):
            raise ValueError(
                f"input_ids must have the shape of the decoder's queries, {batch} x "
                f"{num_queries} tokens, got {' x '.join(map(str, pending.kinds.shape))}. Give "
                "the template of the whole sequence: blindsight.use_template(span_id, is_sink)."
            )
        history = self._forwards.history(pending, past.history) if past.is_known else None
        return history, "the tokens already in the cache are not known"

    def _dense_because(
        self,
        history: History | None,
        unknown: str,
        layers: tuple[int, ...],
        *,
        num_queries: int,
        is_text: bool,
    ) -> str | None:
        """Return why a call runs dense; None: it does not."""
        if is_disabled():
            return "disabled"
        if is_text:
            return _NO_IMAGE_QUERY
        if history is None:
            self._forwards.warn_once(
                f"prefill ran dense: {unknown}. Give the template of the whole sequence: "
                "blindsight.use_template(span_id, is_sink)."
            )
            return unknown
        if not history.restricts_queries_from(history.num_tokens - num_queries):
            return _NO_IMAGE_QUERY
        self._forwards.expect_all_layers()
        if not any(self._plan.profile.categories[layer].any() for layer in layers):
            return DENSE_HEADS
        return None

    def _num_tokens(
        self,
        args: Sequence[Any],
        past: Past,
        num_queries: int,
        num_keys: int,
    ) -> int | None:
        """Return T, or None where only the user knows how much is in the cache."""
        if past.is_known:
            return num_queries + (0 if past.history is None else past.history.num_tokens)
        cache = self._plan.cache
        if cache.length is not None:
            return num_queries + int(args[cache.length])
        all_types = self._plan.profile.layer_types
        types = [all_types[layer] for layer in self._plan.profile.layers]
        grows = cache.before is not None and num_keys > args[cache.before].shape[2]
        slides = any(map(forgets, types)) and len(self._plan.calls) < len(types)
        return num_keys if grows and not slides else None
