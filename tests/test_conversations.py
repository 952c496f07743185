"""Conversations at random: whatever was done to caches in between, no call takes wrong images.

A call is right if it gives what its profile says of the whole sequence; where what is in the cache
cannot be known, it may give what the dense model does instead, and so may each layer where layers
are compiled one by one. Each is compared from the very cache that the call found.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

import blindsight
from blindsight import Profile, blindsight_backend, use_template
from decoders import template_of
from models import END_ID, FIRST_TEXT_ID, IMAGE_ID, PAD_ID, START_ID, VOCAB_SIZE, tiny_model
from oracles import run_reference

CATEGORIES = [[3, 1, 2, 0], [2, 3, 1, 0]]
MOST_TOKENS = 120  # of a conversation
CLOSE, APART = 1e-3, 2e-2
MODES = st.sampled_from([torch.no_grad, torch.inference_mode])
CHANGES = ("fail", "fork", "begin_anew", "crop", "choose_rows", "write_over")
CALLS = (*["prefill"] * 4, "decode", "disabled", "eager", "embeds", "template", "other template")


class Fault(Exception):
    """What a graph is made to fail with."""


@dataclass
class Conversation:
    """What was said so far, by whom ever: the cache may not hold what it seems to."""

    cache: Any
    ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    is_known: bool = True  # whether a backend has to know it
    given: tuple[Tensor, Tensor] | None = None  # the template by hand of its first tokens

    def template(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Spans and sinks of all tokens, new ones included."""
        if self.given is None:
            return template_of(ids)
        span_id, is_sink = self.given
        after = template_of(ids[:, span_id.shape[1] :])
        number = torch.where(after[0] > 0, after[0] + span_id.amax(1, keepdim=True), 0)
        return torch.cat([span_id, number], 1), torch.cat([is_sink, after[1]], 1)

    def chosen(self, which: Any) -> Conversation:
        """Some rows, or the first tokens, of it."""
        given = None if self.given is None else (self.given[0][which], self.given[1][which])
        return Conversation(self.cache, self.ids[which], self.valid[which], False, given)


def eagerly() -> Any:
    return torch.compiler.set_stance("force_eager")


@dataclass
class Setup:
    """A model that is compiled once for all conversations, and the same one as it is."""

    run: Any
    eager: Any
    family: str
    static: bool
    by_layers: bool
    fails: list[str] = field(default_factory=list)  # at the next call of a graph
    num_sparse: int = 0
    num_dense: int = 0

    def inputs(self, before: Conversation, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """What a call of the model is given for new tokens."""
        batch, past = before.ids.shape
        positions = torch.arange(past, past + ids.shape[1]).expand(batch, -1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.cat([before.valid, valid], 1).long(),
            "position_ids": positions,
        }
        if self.family == "gemma3":
            is_image = torch.cat([before.ids, ids], 1) == IMAGE_ID
            return {**inputs, "token_type_ids": is_image.long()}
        return {**inputs, "position_ids": positions.expand(3, -1, -1)}

    def new_cache(self) -> Any:
        config = self.eager.config
        if self.static:
            return StaticCache(config=config, max_cache_len=MOST_TOKENS)
        return DynamicCache(config=config)

    def mode_for(self, cache: Any, mode: Any, *, writes: bool) -> Any:
        """The mode, unless it may not write to a cache: what inference mode made needs that."""
        layer = cache.layers[0]
        is_bound = writes and layer.is_initialized and layer.keys.is_inference()
        return torch.inference_mode if is_bound else mode

    def inner(self, gm: Any, example_inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            when = self.fails.pop() if self.fails else ""
            if when == "before":
                raise Fault
            outputs = gm(*args)
            if when == "after":
                raise Fault
            return outputs

        return call


@st.composite
def pieces(draw: st.DrawFn) -> list[int]:
    """Ids of a few tokens: images whole or cut, delimiters alone, text."""
    some = st.lists(
        st.one_of(
            st.integers(1, 4).map(lambda n: [FIRST_TEXT_ID + 7 * n] * n),
            st.integers(1, 9).map(lambda n: [START_ID, *[IMAGE_ID] * n, END_ID]),
            st.integers(1, 9).map(lambda n: [START_ID, *[IMAGE_ID] * n]),
            st.integers(1, 4).map(lambda n: [IMAGE_ID] * n),
            st.sampled_from([[START_ID], [END_ID]]),
        ),
        min_size=1,
        max_size=5,
    )
    return [token for piece in draw(some) for token in piece][:25]


@st.composite
def chunks(draw: st.DrawFn, batch: int) -> tuple[Tensor, Tensor]:
    """Ids ``[B, Q]`` and which of them are no padding."""
    rows = [draw(pieces()) for _ in range(batch)]
    length = max(map(len, rows))
    is_left = draw(st.booleans())
    ids, valid = [], []
    for row in rows:
        missing = length - len(row)
        sides = (missing, 0) if is_left else (0, missing)
        ids.append(pad(torch.tensor(row), sides, value=PAD_ID))
        valid.append(pad(torch.ones(len(row), dtype=torch.bool), sides, value=False))
    return torch.stack(ids), torch.stack(valid)


class Conversations(RuleBasedStateMachine):
    """Each step is a call: of a new conversation, or of one whose cache may have been changed."""

    setup: Setup

    conversations = Bundle("conversations")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    @initialize(target=conversations, data=st.data(), batch=st.integers(1, 2), mode=MODES)
    def one(self, data: Any, batch: int, mode: Any) -> Conversation:
        nothing = torch.zeros(batch, 0, dtype=torch.long)
        new = Conversation(self.setup.new_cache(), nothing, nothing.bool())
        return self._call(new, *data.draw(chunks(batch)), mode, must_be="sparse")

    @initialize(target=conversations, data=st.data(), batch=st.integers(1, 2), mode=MODES)
    def other(self, data: Any, batch: int, mode: Any) -> Conversation:
        return self.one(data, batch, mode)

    @rule(
        target=conversations,
        conversation=consumes(conversations),
        data=st.data(),
        changes=st.lists(st.sampled_from(CHANGES), max_size=2),
        how=st.sampled_from(CALLS),
        mode=MODES,
    )
    def go_on(
        self, conversation: Conversation, data: Any, changes: list[str], how: str, mode: Any
    ) -> Any:
        for change in changes:
            if conversation.ids.shape[1]:  # it was not begun anew
                conversation = getattr(self, f"_{change}")(conversation, data)
        batch, length = conversation.ids.shape
        if how == "decode":
            token = data.draw(st.sampled_from([FIRST_TEXT_ID, VOCAB_SIZE - 1, IMAGE_ID, START_ID]))
            ids = torch.full((batch, 1), token)
            valid = torch.ones_like(ids, dtype=torch.bool)
        else:
            ids, valid = data.draw(chunks(batch))
        if length + ids.shape[1] > MOST_TOKENS:
            return multiple()
        if how in ("prefill", "decode"):
            must_be = "sparse" if conversation.is_known else ""
            return self._call(conversation, ids, valid, mode, must_be=must_be)
        if how == "disabled":
            after = self._call(
                conversation, ids, valid, context=blindsight.disabled, must_be="dense"
            )
        elif how == "eager":
            after = self._call(conversation, ids, valid, context=eagerly, must_be="dense")
        elif how == "embeds":
            after = self._call(conversation, ids, valid, must_be="dense", embeds=True)
        else:  # by a template, the right one or another
            given = conversation.template(torch.cat([conversation.ids, ids], 1))
            if how == "other template":
                turned = data.draw(st.integers(0, length))
                given = template_of(torch.cat([conversation.ids, ids], 1).roll(turned, 1))
            conversation = replace(conversation, given=given)
            after = self._call(
                conversation, ids, valid, context=lambda: use_template(*given), must_be="sparse"
            )
        return replace(after, is_known=False)

    def _call(
        self,
        before: Conversation,
        ids: Tensor,
        valid: Tensor,
        mode: Any = torch.no_grad,
        context: Any = contextlib.nullcontext,
        *,
        must_be: str = "",
        embeds: bool = False,
    ) -> Conversation:
        """Run new tokens on a conversation's cache.

        Args:
            before: What is in the cache, which the call changes.
            ids, valid: The new tokens.
            mode, context: What the call runs in.
            must_be: "sparse" or "dense"; by default either will do.
            embeds: Whether the model is not given their ids.
        """
        inputs = self.setup.inputs(before, ids, valid)
        whole = torch.cat([before.ids, ids], 1)
        eager = self.setup.eager
        template = before.template(whole)

        def reference(categories: Any) -> Tensor:
            cache = copy.deepcopy(before.cache)
            found = run_reference(eager, categories, *template, inputs, past_key_values=cache)
            return found.logits

        with torch.no_grad():
            dense = eager(**inputs, past_key_values=copy.deepcopy(before.cache)).logits
        expected = {"sparse": reference(CATEGORIES), "dense": dense}
        if self.setup.by_layers and not must_be:  # each layer may know its own cache, or not
            for layer in range(2):
                one = [row if at == layer else [0] * 4 for at, row in enumerate(CATEGORIES)]
                expected[f"layer {layer} alone is sparse"] = reference(one)
        mode = self.setup.mode_for(before.cache, mode, writes=self.setup.static)
        with mode(), context():
            if embeds:
                inputs["inputs_embeds"] = eager.get_input_embeddings()(inputs.pop("input_ids"))
            found = self.setup.run(**inputs, past_key_values=before.cache).logits
        errors = {name: float((found - x)[valid].abs().max()) for name, x in expected.items()}
        if float((expected["sparse"] - dense)[valid].abs().max()) > APART:
            self.setup.num_sparse += errors["sparse"] < CLOSE
            self.setup.num_dense += errors["dense"] < CLOSE
        allowed = (must_be,) if must_be else tuple(errors)
        assert min(errors[name] for name in allowed) < CLOSE, (errors, allowed)
        return replace(before, ids=whole, valid=torch.cat([before.valid, valid], 1))

    # What may be done to a cache.

    def _fail(self, conversation: Conversation, data: Any) -> Conversation:
        """A call that fails; the conversation goes on from a copy, if the cache was changed."""
        kept = copy.deepcopy(conversation.cache)
        ids, valid = data.draw(chunks(len(conversation.ids)))
        if conversation.ids.shape[1] + ids.shape[1] > MOST_TOKENS:
            return conversation
        self.setup.fails.append(data.draw(st.sampled_from(["before", "after"])))
        inputs = self.setup.inputs(conversation, ids, valid)
        mode = self.setup.mode_for(conversation.cache, torch.no_grad, writes=self.setup.static)
        with pytest.raises(Fault), mode():
            self.setup.run(**inputs, past_key_values=conversation.cache)
        if conversation.cache.get_seq_length() == conversation.ids.shape[1]:
            return replace(conversation, is_known=False)
        return replace(conversation, cache=kept, is_known=False)

    def _fork(self, conversation: Conversation, data: Any) -> Conversation:
        """A copy goes on; the original may be kept, which tells what is in the copy."""
        if data.draw(st.booleans()):
            self.kept.append(conversation.cache)
        cache = copy.deepcopy(conversation.cache)
        return replace(conversation, cache=cache, is_known=False)

    def _begin_anew(self, conversation: Conversation, data: Any) -> Conversation:
        cache = conversation.cache if self.setup.static else self.setup.new_cache()
        with self.setup.mode_for(cache, torch.no_grad, writes=True)():
            cache.reset()
        ids, valid = conversation.ids[:, :0], conversation.valid[:, :0]
        return Conversation(cache, ids, valid)

    def _crop(self, conversation: Conversation, data: Any) -> Conversation:
        if self.setup.static or conversation.ids.shape[1] < 2:
            return conversation
        length = data.draw(st.integers(1, conversation.ids.shape[1] - 1))
        try:
            conversation.cache.crop(length - conversation.ids.shape[1])
        except RuntimeError:
            assert self.setup.family == "gemma3"  # it slid
            return conversation
        return conversation.chosen((slice(None), slice(0, length)))

    def _choose_rows(self, conversation: Conversation, data: Any) -> Conversation:
        """As beam search does."""
        batch = len(conversation.ids)
        same = {"min_size": batch, "max_size": batch} if self.setup.static else {"max_size": 3}
        rows = data.draw(st.lists(st.integers(0, batch - 1), **{"min_size": 1, **same}))
        chosen = torch.tensor(rows)
        if self.setup.static:
            conversation.cache.reorder_cache(chosen)
        else:
            conversation.cache.batch_select_indices(chosen)
        return conversation.chosen(chosen)

    def _write_over(self, conversation: Conversation, data: Any) -> Conversation:
        """The keys of another prompt of this length, or of its rows in another order."""
        ids, valid = conversation.ids, conversation.valid
        if data.draw(st.booleans()):
            ids, valid = ids.flip(0), valid.flip(0)
        else:
            ids = ids.roll(data.draw(st.integers(1, ids.shape[1])), 1)
            valid = torch.ones_like(valid)
        cache = self.setup.new_cache()
        nothing = Conversation(cache, ids[:, :0], valid[:, :0])
        with torch.no_grad():
            self.setup.eager(**self.setup.inputs(nothing, ids, valid), past_key_values=cache)
        ours = [t for layer in conversation.cache.layers for t in (layer.keys, layer.values)]
        its = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        with self.setup.mode_for(conversation.cache, data.draw(MODES), writes=True)():
            for to, written in zip(ours, its, strict=True):
                to.copy_(written)
        return replace(conversation, ids=ids, valid=valid, is_known=False, given=None)


@contextlib.contextmanager
def setup_of(family: str, *, static: bool, by_layers: bool) -> Iterator[Setup]:
    model = tiny_model(family)
    setup = Setup(None, copy.deepcopy(model), family, static, by_layers)
    profile = Profile.for_model(model, CATEGORIES)
    backend = blindsight_backend(profile, inner=setup.inner, lowering="fused")
    if by_layers:
        for layer in model.model.language_model.layers:
            layer.compile(backend=backend, dynamic=True)
        setup.run = model
    else:
        setup.run = torch.compile(model, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=2048):
        yield setup


@pytest.mark.parametrize(
    ("family", "static", "by_layers"),
    [
        ("qwen2_5_vl", False, False),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("qwen2_5_vl", True, False),
                ("qwen2_5_vl", False, True),
                ("gemma3", False, False),
                ("gemma3", True, True),
            ]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::blindsight.BlindsightWarning")
def test_whatever_is_done_to_caches(family: str, static: bool, by_layers: bool) -> None:
    with setup_of(family, static=static, by_layers=by_layers) as setup:
        machine = type("Machine", (Conversations,), {"setup": setup})
        most = max(6, settings().max_examples // 12)  # the first few compile all there is
        run_state_machine_as_test(
            machine, settings=settings(stateful_step_count=12, max_examples=most)
        )
    assert setup.num_sparse > 5
    assert setup.num_dense > 5


@pytest.mark.filterwarnings("ignore::blindsight.BlindsightWarning")
def test_keys_that_are_written_over_in_a_cache_that_slid() -> None:
    """In inference mode nobody counts writes, and the first rows of such a cache are gone."""
    image = [START_ID, *[IMAGE_ID] * 6, END_ID]
    rows = torch.tensor([[15] * 17, [29, 29, 29, *image, 36, 36, 36, 36, 22, 22]])
    question = torch.tensor([image, image])
    with setup_of("gemma3", static=True, by_layers=True) as setup, torch.inference_mode():
        machine = type("Machine", (Conversations,), {"setup": setup})()
        new = Conversation(setup.new_cache(), rows[:, :0], rows[:, :0].bool())
        begun = machine._call(new, rows, rows > 0, torch.inference_mode, must_be="sparse")
        for layer in begun.cache.layers:
            for kept in (layer.keys, layer.values):
                kept.copy_(kept.flip(0))
        turned = begun.chosen(torch.tensor([1, 0]))
        machine._call(turned, question, question > 0, torch.inference_mode)
