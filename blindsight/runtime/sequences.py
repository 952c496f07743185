"""What is known of the sequence that a graph runs on: before a call, and what is left for later.

Shapes: B batch, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from blindsight.configs import forgets
from blindsight.runtime.cache_notes import CacheNote, Witness
from blindsight.runtime.context import is_disabled
from blindsight.runtime.history import History, Pending
from blindsight.runtime.plan import DENSE_HEADS, Plan, Sizes
from blindsight.runtime.state import BackendState

_NO_IMAGE_QUERY = "no query in a second image"
_OTHER_TOKENS = "some of its attention is of other tokens than the prompt's"
_SEVERAL_PROMPTS = "a layer runs twice in one graph, maybe for several prompts"
_ADVICE = {
    _OTHER_TOKENS: "Every layer must see the keys of all tokens for its profile to mean anything.",
    _SEVERAL_PROMPTS: "Compile the model that is called twice, not what calls it; or, if both "
    "prompts have their images at the same places, give their template: {template}.",
}


class Past(NamedTuple):
    """What is known of the tokens in a cache before a call: None of them, if no history is."""

    history: History | None
    is_known: bool
    decodes: bool = False  # one token of text follows


_EMPTY, _UNKNOWN = Past(None, True), Past(None, False)


class _Call(NamedTuple):
    """A call of the graph, before it runs.

    Attributes:
        args: The inputs of the graph.
        layers: The layer of each attention call.
        sizes: Of its attention.
        pending: The tokens of the forward under way, if they were seen.
    """

    args: Sequence[Any]
    layers: tuple[int, ...]
    sizes: Sizes
    pending: Pending | None

    @property
    def is_alone(self) -> bool:
        """Whether there are no keys but the call's own."""
        return self.sizes.num_keys == self.sizes.num_queries

    @property
    def decodes(self) -> bool:
        return self.sizes.num_queries == 1 and self.pending is not None and self.pending.is_text


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
        explicit, pending = self._forwards.explicit_history(), self._forwards.pending
        if explicit is None and pending is None:
            self._state.models.look_for_prompt()
            pending = self._forwards.pending
        call = _Call(args, layers, self._plan.sizes(args), pending)
        past = None
        if explicit is not None and (past := self._past_beyond(explicit, call)) is not None:
            explicit = None  # it was of the prompt alone, which this token comes after
        if past is None:
            past = self._past(call, explicit)
        if explicit is None:
            history, unknown = self._whole(call, past)
        else:
            self._check(explicit, call, past)
            history, unknown = explicit, ""
        if not call.sizes.see_all:
            history, unknown = None, _OTHER_TOKENS
        elif self._plan.repeats_layers and explicit is None:
            history, unknown = None, _SEVERAL_PROMPTS
        is_text = explicit is None and pending is not None and pending.is_text
        return Known(history, self._dense_because(call, history, unknown, is_text=is_text), past)

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

    def _past(self, call: _Call, explicit: History | None) -> Past:
        """Return what is known of the tokens in the cache before the call."""
        cache = self._plan.cache
        note = None if cache.before is None else self._forwards.caches.get(call.args[cache.before])
        # Reading a counter on a device waits for it: not for a decoded token.
        matters = explicit is not None or not call.decodes
        length = None
        if cache.length is not None and (matters or note is None):
            length = int(call.args[cache.length])
        # A cache of which no key is read, without a counter, is overwritten from its beginning.
        is_new = length is None and call.is_alone and (cache.before is None or not cache.is_read)
        if length == 0 or is_new:
            return _EMPTY
        if cache.before is None:
            return _UNKNOWN
        keys: Tensor = call.args[cache.before]
        if note is not None and cache.has_new:
            # An earlier layer, whose keys this one shares, may have left it in this very forward.
            if note.history is explicit:
                return _UNKNOWN
            joined = {} if call.pending is None else call.pending.joined
            for past, whole in joined.values():
                if note.history is whole:
                    return Past(past, True, call.decodes)
        if note is None and not call.decodes:
            note = self._note_of_a_copy(keys, call.layers[cache.call])
        if note is not None and length in (None, note.history.num_tokens):
            witness = note.witness if matters else None
            if witness is None or witness.holds(keys):
                return Past(note.history, True, call.decodes)
        is_empty = (cache.has_new and call.is_alone) or keys.numel() == 0
        return _EMPTY if is_empty else _UNKNOWN

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

    def _past_beyond(self, explicit: History, call: _Call) -> Past | None:
        """Return what is in the cache, if a text token follows the prompt of the template."""
        if call.sizes.num_queries != 1 or call.pending is None or call.pending.has_images:
            return None
        past = self._past(call, None)
        expected = self._num_tokens(call, past)
        return past if expected is not None and expected > explicit.num_tokens else None

    def _check(self, explicit: History, call: _Call, past: Past) -> None:
        """Check that a template given by hand is of the whole sequence."""
        batch, num_queries = call.sizes.batch, call.sizes.num_queries
        expected = self._num_tokens(call, past)
        if expected is not None and (batch, expected) != (explicit.batch, explicit.num_tokens):
            raise ValueError(
                f"template must be [B, T] = [{batch}, {expected}] for {expected - num_queries} "
                f"past and {num_queries} new tokens, got [{explicit.batch}, "
                f"{explicit.num_tokens}]. Give use_template the whole sequence"
                + (", or leave the context before decoding." if num_queries == 1 else ".")
            )

    def _whole(self, call: _Call, past: Past) -> tuple[History | None, str]:
        """Return the whole sequence as the model's inputs tell it, or what is not known of it."""
        pending = call.pending
        if pending is None:
            return None, "input_ids were not seen and no template was given"
        if self._plan.embeds_other_tokens:
            return (
                None,
                "the tokens that are embedded are others than the model's input_ids, or are moved",
            )
        batch, num_queries, *_ = call.sizes
        if tuple(pending.kinds.shape) != (batch, num_queries):
            raise ValueError(
                f"input_ids must have the shape of the decoder's queries, {batch} x "
                f"{num_queries} tokens, got {' x '.join(map(str, pending.kinds.shape))}. Give "
                "the template of the whole sequence: blindsight.use_template(span_id, is_sink)."
            )
        history = self._forwards.history(pending, past.history) if past.is_known else None
        return history, "the tokens already in the cache are not known"

    def _dense_because(
        self, call: _Call, history: History | None, unknown: str, *, is_text: bool
    ) -> str | None:
        """Return why a call runs dense; None: it does not."""
        if is_disabled():
            return "disabled"
        if is_text:
            return _NO_IMAGE_QUERY
        if history is None:
            advice = _ADVICE.get(unknown, "Give the template of the whole sequence: {template}.")
            what = "prefill" if call.sizes.num_queries > 1 else "a single token"
            self._forwards.warn_once(
                f"{what} ran dense: {unknown}. "
                + advice.format(template="blindsight.use_template(span_id, is_sink)")
            )
            return unknown
        if not history.restricts_queries_from(history.num_tokens - call.sizes.num_queries):
            return _NO_IMAGE_QUERY
        self._forwards.expect_all_layers()
        if not any(self._plan.profile.categories[layer].any() for layer in call.layers):
            return DENSE_HEADS
        return None

    def _num_tokens(self, call: _Call, past: Past) -> int | None:
        """Return T, or None where only the user knows how much is in the cache."""
        if past.is_known:
            return call.sizes.num_queries + (0 if past.history is None else past.history.num_tokens)
        cache = self._plan.cache
        if cache.length is not None:
            return call.sizes.num_queries + int(call.args[cache.length])
        all_types = self._plan.profile.layer_types
        types = [all_types[layer] for layer in self._plan.profile.layers]
        grows = cache.before is not None and call.sizes.num_keys > call.args[cache.before].shape[2]
        slides = any(map(forgets, types)) and len(self._plan.calls) < len(types)
        return call.sizes.num_keys if grows and not slides else None
