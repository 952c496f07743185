"""What a mask is proven to be equals, element by element, the mask that the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from transformers import DynamicCache, Gemma3TextConfig, StaticCache
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from blindsight import Profile, TemplateRule, blindsight_backend, use_template
from blindsight.attention.base_mask import CAUSAL, evaluate_expression
from blindsight.attention.form_intervals import base_mask_of, facts_hold
from blindsight.configs import cache_argument
from blindsight.passes.find_attention import find_attention
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.lift_mask import Lifted, lift_mask

BATCH, LENGTH, WINDOW, CHUNK = 2, 11, 4, 3
DEVICE = torch.device("cpu")


def tiny_config(**changes: Any) -> Gemma3TextConfig:
    config = Gemma3TextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        **changes,
    )
    config._attn_implementation = "sdpa"
    config.attention_chunk_size = CHUNK
    return config


CONFIG = tiny_config()


@dataclass
class Run:
    """One attention call on one input: what was lifted, and the mask that the graph computed."""

    lifted: Lifted
    allowed: Tensor  # [B, Q, K]
    tensors: dict[fx.Node, Any]

    @property
    def shape(self) -> dict[str, Any]:
        batch, num_queries, num_keys = self.allowed.shape
        return {
            "batch": batch,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "device": DEVICE,
        }

    def with_tensors(self, structure: Any) -> Any:
        if isinstance(structure, tuple):
            return tuple(self.with_tensors(part) for part in structure)
        return self.tensors[structure] if isinstance(structure, fx.Node) else structure

    def facts_hold(self, groups: Tensor | None = None) -> bool:
        facts = self.with_tensors(self.lifted.facts)
        return bool(facts_hold(facts, **self.shape, groups=groups))

    def from_groups(self, groups: Tensor) -> Tensor:
        """What the intervals of groups [B, 3, K] of keys allow, [B, Q, K]."""
        assert self.lifted.form is not None
        form = self.with_tensors(self.lifted.form)
        lower, upper, valid = base_mask_of(form, **self.shape, groups=groups)
        column = torch.arange(self.allowed.shape[2])
        inside = (lower[..., None] <= column) & (column <= upper[..., None])
        return (inside & groups[:, :, None]).any(1) & valid[:, None]

    def from_form(self) -> Tensor:
        """What the intervals allow, [B, Q, K]."""
        assert self.lifted.form is not None
        lower, upper, valid = base_mask_of(self.with_tensors(self.lifted.form), **self.shape)
        batch, num_queries, num_keys = self.allowed.shape
        assert lower.dtype == upper.dtype == torch.int32
        assert lower.shape == upper.shape == (batch, num_queries)
        assert valid.dtype == torch.bool and valid.shape == (batch, num_keys)
        column = torch.arange(num_keys)
        inside = (lower[..., None] <= column) & (column <= upper[..., None])
        return inside & valid[:, None]

    def from_expression(self) -> Tensor:
        """What the expression allows, [B, Q, K]."""
        axes = [torch.arange(size) for size in self.allowed.shape]
        b, q, k = axes[0][:, None, None], axes[1][:, None], axes[2]
        value = evaluate_expression(self.with_tensors(self.lifted.expression), b, q, k)
        return torch.as_tensor(value).expand(self.allowed.shape)


def nodes_in(structure: Any) -> set[fx.Node]:
    if isinstance(structure, fx.Node):
        return {structure}
    return set().union(*map(nodes_in, structure)) if isinstance(structure, tuple) else set()


class Probe(fx.Interpreter):
    """Runs a graph, and reads what was lifted where the pass says that it may be read."""

    def __init__(self, gm: fx.GraphModule, calls: list[Any], lifted: list[Lifted]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.calls, self.lifted = calls, lifted
        self.tensors: list[dict[fx.Node, Any]] = [{} for _ in calls]
        self.runs: list[Run] = []

    def run_node(self, node: fx.Node) -> Any:
        for call, lifted, tensors in zip(self.calls, self.lifted, self.tensors, strict=True):
            if lifted.before is node:
                for used in nodes_in((lifted.form, lifted.facts, lifted.expression)):
                    value = self.env[used]
                    # later nodes may write into it
                    tensors[used] = value.clone() if isinstance(value, Tensor) else value
            if call.node is node:
                self.runs.append(Run(lifted, self._allowed(call), tensors))
        return super().run_node(node)

    def _allowed(self, call: Any) -> Tensor:
        query, key = self.env[call.node.args[0]], self.env[call.node.args[1]]
        shape = (query.shape[0], query.shape[2], key.shape[2])
        if call.attn_mask is None:
            ones = torch.ones(shape, dtype=torch.bool)
            return ones.tril() if call.is_causal else ones
        mask = self.env[call.attn_mask]
        if mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min
        num_heads = mask.shape[-3] if mask.dim() > 2 else 1
        mask = mask.expand(shape[0], num_heads, *shape[1:])
        if any(lifted.tier < 3 for lifted in self.lifted):
            assert (mask == mask[:, :1]).all()
        return mask[:, 0].clone()


@dataclass
class Compiled:
    """A function compiled so that each call of it appends to ``runs``."""

    function: Callable[..., Any]
    dynamic: bool = False
    runs: list[Run] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()
        self.compiled = torch.compile(self.function, backend=self._backend, dynamic=self.dynamic)

    def _backend(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        calls = find_attention(gm, layer_pattern=r"layers\.(\d+)")
        lifted = [lift_mask(gm, call) for call in calls]
        self.graphs.append(gm)

        def run(*args: Any) -> Any:
            probe = Probe(gm, calls, lifted)
            output = probe.run(*args)
            self.runs += probe.runs
            return output

        return run

    def __call__(self, *args: Any) -> list[Run]:
        """The attention calls of one call of the function."""
        self.runs.clear()
        with torch.no_grad():
            self.compiled(*args)
        assert self.runs
        return list(self.runs)


def check(run: Run, *, tier: int = 1, holds: bool | None = True) -> None:
    """What was lifted is exact, and as much as expected."""
    assert run.lifted.tier == tier, run.lifted.reason
    assert (run.lifted.reason == "") == (tier == 1)
    if tier <= 2:
        assert torch.equal(run.from_expression(), run.allowed)
    if tier == 1:
        if holds is not None:
            assert run.facts_hold() == holds
        if run.facts_hold():
            assert torch.equal(run.from_form(), run.allowed)
        # Any groups will do; what holds of all keys holds of each.
        num_keys = run.allowed.shape[2]
        generator = torch.Generator().manual_seed(num_keys)
        for _ in range(2):
            of = torch.randint(0, 3, (BATCH, num_keys), generator=generator)
            groups = torch.stack([of == group for group in range(3)], dim=1)
            assert run.facts_hold(groups) or not run.facts_hold()
            if run.facts_hold(groups):
                assert torch.equal(run.from_groups(groups), run.allowed)


def hidden(num_tokens: int = LENGTH) -> Tensor:
    return torch.zeros(BATCH, num_tokens, 8)


def attend(mask: Tensor | None, num_queries: int, num_keys: int, **kwargs: Any) -> Tensor:
    query = torch.zeros(BATCH, 2, num_queries, 4)
    key = torch.zeros(BATCH, 2, num_keys, 4)
    return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, **kwargs)


def paddings(length: int = LENGTH) -> list[Tensor]:
    """2-D padding masks [B, L] with unlike rows: none, left, right, holes."""
    masks = torch.ones(4, BATCH, length, dtype=torch.int64)
    masks[1, 0, :3] = 0
    masks[2, 1, -4:] = 0
    masks[3, 0, 2:5] = 0
    masks[3, 1, 0] = masks[3, 1, -1] = 0
    return list(masks)


IMAGES = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1]])
NO_IMAGES = torch.zeros_like(IMAGES)


# The masks of transformers.

CREATORS: dict[str, Callable[..., Any]] = {
    "causal": create_causal_mask,
    "sliding": create_sliding_window_causal_mask,
    "chunked": create_chunked_causal_mask,
    "bidirectional": create_bidirectional_mask,
    "bidirectional_window": create_bidirectional_sliding_window_mask,
}


def create(name: str, x: Tensor, padding: Tensor | None, cache: Any = None, **kwargs: Any) -> Any:
    # SDPA's own flag would do for some, and there would be no mask
    skip = "allow_is_bidirectional_skip" if "bidirectional" in name else "allow_is_causal_skip"
    kwargs[skip] = False
    return CREATORS[name](
        config=CONFIG,
        inputs_embeds=x,
        attention_mask=padding,
        **kwargs,
        **{cache_argument(CREATORS[name]): cache},
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("use_padding", [False, True])
@pytest.mark.parametrize("name", CREATORS)
def test_lifts_masks_of_a_prompt(name: str, use_padding: bool, dynamic: bool) -> None:
    def function(x: Tensor, padding: Tensor | None) -> Tensor:
        length = x.shape[1]
        return attend(create(name, x, padding), length, length)

    compiled = Compiled(function, dynamic)
    for padding in paddings() if use_padding else [None]:
        (run,) = compiled(hidden(), padding)
        check(run)
    if dynamic:
        (run,) = compiled(hidden(7), paddings(7)[1] if use_padding else None)
        check(run)


def vmapped(**kwargs: Any) -> Callable[..., Any]:
    def function(x: Tensor, padding: Tensor | None, ids: Tensor) -> Tensor:
        mask = create_causal_mask(
            config=CONFIG,
            inputs_embeds=x,
            attention_mask=padding,
            **{cache_argument(create_causal_mask): None},
            **{name: make(ids) for name, make in kwargs.items()},
        )
        return attend(mask, x.shape[1], x.shape[1])

    return function


@pytest.mark.parametrize("use_padding", [False, True])
def test_lifts_masks_that_are_built_by_vmap(use_padding: bool) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5]])
    spellings = {
        "window": vmapped(and_mask_function=lambda _: sliding_window_overlay(WINDOW)),
        "blocks": vmapped(or_mask_function=blockwise_overlay),
        "blocks in a window": vmapped(
            or_mask_function=blockwise_overlay,
            and_mask_function=lambda _: sliding_window_overlay(WINDOW),
        ),
        "everything": vmapped(or_mask_function=lambda _: lambda b, h, q, k: q >= 0),
        "constant": vmapped(or_mask_function=lambda _: lambda *args: torch.tensor(True)),
        "window to both sides": vmapped(
            or_mask_function=lambda _: lambda b, h, q, k: abs(q - k) < WINDOW,
        ),
        "one window in another": vmapped(
            and_mask_function=lambda _: or_masks(
                sliding_window_overlay(WINDOW), lambda b, h, q, k: abs(q - k) < 2
            ),
        ),
    }
    for function in spellings.values():
        compiled = Compiled(function)
        for padding in paddings() if use_padding else [None]:
            (run,) = compiled(hidden(), padding, ids)
            check(run)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("use_padding", [False, True])
def test_lifts_masks_of_a_vision_model(use_padding: bool, dynamic: bool) -> None:
    def function(x: Tensor, padding: Tensor | None, token_types: Tensor) -> list[Tensor]:
        masks = create_masks_for_vision_model(
            config=CONFIG,
            inputs_embeds=x,
            attention_mask=padding,
            **{cache_argument(create_masks_for_vision_model): None},
            position_ids=None,
            block_sequence_ids=get_block_sequence_ids_for_mask(token_types, x.device),
        )
        return [attend(mask, x.shape[1], x.shape[1]) for mask in masks.values()]

    compiled = Compiled(function, dynamic)
    for padding in paddings() if use_padding else [None]:
        for token_types in (IMAGES, NO_IMAGES, 1 - IMAGES):
            runs = compiled(hidden(), padding, token_types)
            assert len(runs) == 2
            for run in runs:
                check(run)
                assert {fact[0] for fact in run.lifted.facts} == {"contiguous", "connected"}


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked"])
def test_lifts_packed_sequences(name: str) -> None:
    def function(x: Tensor, position_ids: Tensor) -> Tensor:
        mask = create(name, x, None, position_ids=position_ids)
        return attend(mask, x.shape[1], x.shape[1])

    compiled = Compiled(function)
    for position_ids in (PACKED, PACKED.flip(0), PACKED + 5):
        (run,) = compiled(hidden(), position_ids)
        check(run)
    # Steps of more than one begin a new sequence, so these are sequences of one token, or two.
    for position_ids in (PACKED * 2, torch.zeros_like(PACKED), PACKED.flip(1)):
        (run,) = compiled(hidden(), position_ids)
        check(run)


def test_lifts_packed_images() -> None:
    def function(x: Tensor, position_ids: Tensor, token_types: Tensor) -> Tensor:
        ids = get_block_sequence_ids_for_mask(token_types, x.device)
        mask = create("causal", x, None, position_ids=position_ids, block_sequence_ids=ids)
        return attend(mask, x.shape[1], x.shape[1])

    compiled = Compiled(function)
    legal = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1]])
    (run,) = compiled(hidden(), PACKED, legal)
    check(run)


def filled_cache(kind: str, num_tokens: int, *, max_length: int = 16) -> Any:
    cache = (
        DynamicCache(config=CONFIG)
        if kind == "dynamic"
        else StaticCache(config=CONFIG, max_cache_len=max_length)
    )
    states = torch.zeros(BATCH, 1, num_tokens, 4)
    for layer in range(2):
        cache.update(states, states, layer)
    return cache


@pytest.mark.parametrize("past", [1, 3, 9])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("use_padding", [False, True])
def test_lifts_masks_of_a_later_turn(
    kind: str, num_queries: int, past: int, use_padding: bool
) -> None:
    """The cache is updated before the attention reads the mask, and with it its length."""
    total = past + num_queries

    def function(
        x: Tensor, padding: Tensor | None, token_types: Tensor, cache: Any
    ) -> list[Tensor]:
        ids = get_block_sequence_ids_for_mask(token_types, x.device)
        masks = create_masks_for_vision_model(
            config=CONFIG,
            inputs_embeds=x,
            attention_mask=padding,
            **{cache_argument(create_masks_for_vision_model): cache},
            position_ids=None,
            block_sequence_ids=ids,
        )
        plain = [create(name, x, padding, cache) for name in ("causal", "sliding")]
        query = torch.zeros(BATCH, 1, x.shape[1], 4)
        outputs = []
        for layer, name in enumerate(("sliding_attention", "full_attention")):
            key, value = cache.update(query, query, layer)
            for mask in (masks[name], plain[1 - layer]):
                outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        return outputs

    compiled = Compiled(function)
    for padding in paddings(total) if use_padding else [None]:
        token_types = IMAGES[:, :total] if total <= LENGTH else F.pad(IMAGES, (0, total - LENGTH))
        runs = compiled(hidden(num_queries), padding, token_types, filled_cache(kind, past))
        assert len(runs) == 4
        for run in runs:
            check(run)


@pytest.mark.parametrize("num_queries", [1, 6])
def test_lifts_flags(num_queries: int) -> None:
    def function(x: Tensor, is_causal: bool) -> Tensor:
        return attend(None, x.shape[1], 9, is_causal=is_causal)

    for is_causal in (False, True):
        (run,) = Compiled(function)(hidden(num_queries), is_causal)
        check(run)
        assert run.lifted.form == (("upper", ("index", "q")) if is_causal else ("nothing",))
        assert (run.lifted.form == CAUSAL) == is_causal


def test_tells_plain_causal_masks() -> None:
    def function(x: Tensor, padding: Tensor) -> list[Tensor]:
        masks = [
            create("causal", x, None),
            create("sliding", x, None),
            create("causal", x, padding),
        ]
        return [attend(mask, LENGTH, LENGTH) for mask in masks]

    runs = Compiled(function)(hidden(), paddings()[1])
    assert [run.lifted.form == CAUSAL for run in runs] == [True, False, False]


# Other spellings of the same masks.


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries [Q, 1] and keys [K]."""
    position = torch.arange(x.shape[1])
    return position[:, None], position


def where_min(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tril": lambda x, padding: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
    "not triu": lambda x, padding: (
        ~torch.triu(torch.ones((LENGTH, LENGTH), dtype=torch.bool), diagonal=1)
    ),
    "triu of -inf": lambda x, padding: torch.triu(
        torch.full((LENGTH, LENGTH), float("-inf")), diagonal=1
    ),
    "not greater": lambda x, padding: torch.logical_not(torch.gt(grid(x)[1], grid(x)[0])),
    "difference": lambda x, padding: grid(x)[1] - grid(x)[0] - 2 < -1,
    "band": lambda x, padding: (
        (grid(x)[1] - grid(x)[0]).abs().le(2) & padding[:, None, None].bool()
    ),
    "where": lambda x, padding: where_min(grid(x)[1] <= grid(x)[0]),
    "where of padding": lambda x, padding: where_min(
        (grid(x)[1] <= grid(x)[0]) & (padding[:, None, None, :] != 0)
    ),
    "masked_fill": lambda x, padding: torch.zeros(LENGTH, LENGTH).masked_fill(
        grid(x)[1] > grid(x)[0], float("-inf")
    ),
    "one minus": lambda x, padding: (
        (1.0 - (grid(x)[1] <= grid(x)[0]).to(torch.float32)) * torch.finfo(torch.float32).min
    ),
    "sum of biases": lambda x, padding: (
        where_min(grid(x)[1] <= grid(x)[0]) + where_min(padding[:, None, None].bool())
    ),
    "half": lambda x, padding: where_min(grid(x)[1] <= grid(x)[0]).to(torch.float32),
    "product of integers": lambda x, padding: (
        (grid(x)[1] <= grid(x)[0]).int() * (grid(x)[1] > grid(x)[0] - 3).int()
    ).bool(),
    "product of booleans": lambda x, padding: (
        (grid(x)[1] <= grid(x)[0]) * (grid(x)[1] > grid(x)[0] - 3)
    ),
    "rows and columns": lambda x, padding: (
        padding.bool()[:, None, None, :] & padding.bool()[:, None, :, None]
    ),
    "transposed twice": lambda x, padding: (grid(x)[0] <= grid(x)[1]).transpose(0, 1),
    "per head": lambda x, padding: (grid(x)[1] <= grid(x)[0]).expand(BATCH, 2, LENGTH, LENGTH),
    "sliced": lambda x, padding: sdpa_mask(BATCH, LENGTH, 20, allow_is_causal_skip=False)[
        :, :, :, :LENGTH
    ],
    "indexed rows": lambda x, padding: (torch.arange(20)[None, :] <= torch.arange(20)[:, None])[
        torch.arange(LENGTH) + 2
    ][:, :LENGTH],
    "static minimum": lambda x, padding: (
        grid(x)[1] <= torch.minimum(grid(x)[0], 3 + 0 * grid(x)[0])
    ),
    "eager": lambda x, padding: eager_mask(
        BATCH, LENGTH, LENGTH, attention_mask=padding.bool(), mask_function=causal_mask_function
    ),
    "bound of each query": lambda x, padding: grid(x)[1] <= padding.cumsum(-1)[:, None, :, None],
    "one query sees all": lambda x, padding: (grid(x)[1] <= grid(x)[0]) | (grid(x)[0] == 3),
    "chunks": lambda x, padding: grid(x)[0] // 4 == grid(x)[1] // 4,
    "chunks by a shift": lambda x, padding: grid(x)[0] >> 2 == grid(x)[1] >> 2,
    "half of the past, by a shift": lambda x, padding: (
        grid(x)[1] <= torch.bitwise_right_shift(grid(x)[0], 1)
    ),
    "truncated chunks": lambda x, padding: (
        torch.div(grid(x)[0], 4, rounding_mode="trunc")
        == torch.div(grid(x)[1], 4, rounding_mode="trunc")
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_lifts_other_spellings(name: str) -> None:
    def function(x: Tensor, padding: Tensor) -> Tensor:
        return attend(SPELLINGS[name](x, padding), LENGTH, LENGTH)

    compiled = Compiled(function)
    for padding in paddings():
        (run,) = compiled(hidden(), padding)
        check(run)


# Look-alikes.


def overwritten(x: Tensor, data: Tensor) -> Tensor:
    mask = grid(x)[1] <= grid(x)[0]
    mask[3, 5] = True
    return mask


def overwritten_by_index_put(x: Tensor, data: Tensor) -> Tensor:
    mask = grid(x)[1] <= grid(x)[0]
    mask.index_put_((torch.tensor([3]), torch.tensor([5])), torch.tensor(True))
    return mask


def overwritten_through_a_view(x: Tensor, data: Tensor) -> Tensor:
    mask = (grid(x)[1] <= grid(x)[0])[None, None]
    mask[0, 0, 3].fill_(True)
    return mask


def overwritten_positions(x: Tensor, data: Tensor) -> Tensor:
    position = torch.arange(LENGTH)
    rows = position[:, None].clone()
    rows[3] = 7
    return position <= rows


def overwritten_padding(x: Tensor, data: Tensor) -> Tensor:
    padding = (data > 1).clone()
    allowed = (grid(x)[1] <= grid(x)[0]) & padding[:, None, None]
    padding.zero_()
    return allowed


def overwritten_by_another_name(x: Tensor, data: Tensor) -> Tensor:
    buffer = torch.empty(data.shape, dtype=torch.bool)
    padding = torch.gt(data, 1, out=buffer)
    allowed = (grid(x)[1] <= grid(x)[0]) & padding[:, None, None]
    buffer.zero_()
    return allowed & (grid(x)[1] > grid(x)[0] - 3)


def images(data: Tensor) -> Tensor:
    """The number of each token's image, or -1, as Gemma 4 counts them."""
    is_image = data > 1
    is_previous = torch.roll(is_image, 1, -1)
    is_previous[..., 0] = False
    begins = is_image & ~is_previous
    return torch.where(is_image, begins.int().cumsum(1) - 1, -1)


def written_before_it_is_read(x: Tensor, data: Tensor) -> Tensor:
    numbers = images(data)
    row, column = numbers[:, None, :, None], numbers[:, None, None]
    return (grid(x)[1] <= grid(x)[0]) | ((row == column) & (row >= 0))


def written_after_it_is_read(x: Tensor, data: Tensor) -> Tensor:
    numbers = images(data)
    numbers.fill_(3)
    row, column = numbers[:, None, :, None], numbers[:, None, None]
    return (grid(x)[1] <= grid(x)[0]) | ((row == column) & (row >= 0))


LOOK_ALIKES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "overwritten": (3, overwritten),
    "overwritten by index_put_": (3, overwritten_by_index_put),
    "overwritten through a view": (3, overwritten_through_a_view),
    "overwritten positions": (3, overwritten_positions),
    "overwritten padding": (1, overwritten_padding),
    "overwritten by another name": (3, overwritten_by_another_name),
    "written before it is read": (1, written_before_it_is_read),
    "written after it is read": (3, written_after_it_is_read),
    "index_put": (
        3,
        lambda x, data: (grid(x)[1] <= grid(x)[0]).index_put(
            (torch.tensor([3]), torch.tensor([5])), torch.tensor(True)
        ),
    ),
    "one more element": (
        2,
        lambda x, data: (grid(x)[1] <= grid(x)[0]) | ((grid(x)[0] == 3) & (grid(x)[1] == 5)),
    ),
    "global sinks": (
        2,
        lambda x, data: (
            (grid(x)[1] <= grid(x)[0]) & ((grid(x)[1] > grid(x)[0] - 3) | (grid(x)[1] < 2))
        ),
    ),
    "hole": (2, lambda x, data: (grid(x)[1] <= grid(x)[0]) & (grid(x)[1] != grid(x)[0] - 2)),
    "outside of a band": (2, lambda x, data: (grid(x)[1] - grid(x)[0]).abs() > 2),
    "transposed": (1, lambda x, data: (grid(x)[1] <= grid(x)[0]).transpose(-2, -1)),
    "window of data": (
        1,
        lambda x, data: (
            (grid(x)[1] <= grid(x)[0]) & (grid(x)[1] > grid(x)[0] - data[:, None, None, :1])
        ),
    ),
    "scaled by data": (2, lambda x, data: grid(x)[1] * data.sum() <= grid(x)[0]),
    "window per key": (
        2,
        lambda x, data: (
            (grid(x)[1] <= grid(x)[0]) & (grid(x)[1] + data[:, None, None, :] > grid(x)[0])
        ),
    ),
    "other term per head": (
        3,
        lambda x, data: (
            (grid(x)[1] <= grid(x)[0]) & (grid(x)[1] > grid(x)[0] - torch.arange(2)[:, None, None])
        ),
    ),
    "penalty": (3, lambda x, data: torch.where(grid(x)[1] <= grid(x)[0], 0.0, -1e4)),
    "distance": (3, lambda x, data: -(grid(x)[0] - grid(x)[1]).abs().to(torch.float32)),
    "reward": (3, lambda x, data: torch.where(grid(x)[1] <= grid(x)[0], 1.0, float("-inf"))),
    "not a number": (
        3,
        lambda x, data: (1.0 - (grid(x)[1] <= grid(x)[0]).float()) * float("-inf"),
    ),
    "bias of data": (
        3,
        lambda x, data: (
            torch.where(grid(x)[1] <= grid(x)[0], 0.0, float("-inf")) + data[:, None, None].float()
        ),
    ),
    "positions of data": (1, lambda x, data: grid(x)[1] <= data[:, None, :, None]),
    "both positions of data": (1, lambda x, data: data[:, None, None] <= data[:, None, :, None]),
    "keys of data": (2, lambda x, data: data[:, None, None] <= grid(x)[0]),
    "float positions": (
        2,
        lambda x, data: torch.arange(LENGTH)[:, None] + 0.5 >= torch.arange(LENGTH).float(),
    ),
    "rolled": (3, lambda x, data: (grid(x)[1] <= grid(x)[0]).roll(1, 0)),
    "flipped": (3, lambda x, data: (grid(x)[1] <= grid(x)[0]).flip(-1)),
    "wrapping indices": (
        1,
        lambda x, data: torch.arange(LENGTH)[torch.arange(LENGTH) - 3][:, None] >= grid(x)[1],
    ),
    "reshaped": (
        3,
        lambda x, data: (torch.arange(LENGTH * 2)[:, None] >= grid(x)[1]).reshape(
            2, LENGTH, LENGTH
        )[:1],
    ),
    "input": (3, lambda x, data: (data[:, None, :, None] + data[:, None, None]).cumsum(-1) > 9),
    "every second": (2, lambda x, data: grid(x)[1] * 2 <= grid(x)[0] % 4),
    "narrow integers": (
        2,
        lambda x, data: (grid(x)[1] * 40).to(torch.uint8) <= (grid(x)[0] * 40).to(torch.uint8),
    ),
    "order of ids": (1, lambda x, data: data[:, None, None] < data[:, None, :, None] + grid(x)[0]),
    "maximum over an axis": (
        1,
        lambda x, data: (grid(x)[1] <= grid(x)[0]) | (grid(x)[1] + grid(x)[0]).amax(1, True).gt(15),
    ),
    "where as a method": (
        2,
        lambda x, data: (grid(x)[1] > 3).where(grid(x)[1] <= grid(x)[0], grid(x)[1] < 2),
    ),
    "compared with the lowest number": (
        1,
        lambda x, data: (
            torch.where(grid(x)[1] <= grid(x)[0], 0.0, torch.finfo(torch.float32).min)
            > torch.finfo(torch.float32).min
        ),
    ),
    "compared with a number that is rounded": (
        3,
        lambda x, data: (
            torch.where(grid(x)[1] <= grid(x)[0], 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
            > torch.finfo(torch.bfloat16).min * 1.001
        ),
    ),
    "exclusive or": (
        1,
        lambda x, data: (grid(x)[1] <= grid(x)[0]) ^ (grid(x)[1] == 0),
    ),
    "chunks up to a number of data": (
        2,
        lambda x, data: (grid(x)[1] - grid(x)[0]) % 4 <= data[0, 0],
    ),
    "chunks up to a number": (2, lambda x, data: (grid(x)[1] + grid(x)[0]) // 4 <= data.amax()),
    "a group of keys or another": (
        1,
        lambda x, data: (grid(x)[1] <= grid(x)[0]) | ((data > 2) & (data < 9))[:, None, None],
    ),
    "a group of all rows": (
        1,
        lambda x, data: (
            torch.where(data > 2, 1, -1)[:, None, :, None]
            == torch.where(data > 2, 1, -1)[:, None, None]
        ),
    ),
    "truncated towards zero": (
        1,
        lambda x, data: (
            torch.div(grid(x)[0] - 5, 4, rounding_mode="trunc")
            == torch.div(grid(x)[1] - 5, 4, rounding_mode="trunc")
        ),
    ),
    "a shift of what is negative": (2, lambda x, data: (grid(x)[1] - grid(x)[0]) >> 1 <= -2),
    "logical operators on integers": (
        3,
        lambda x, data: torch.logical_and(grid(x)[1], grid(x)[0]),
    ),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_never_taken_for_what_they_are_not(name: str) -> None:
    tier, make = LOOK_ALIKES[name]

    def function(x: Tensor, data: Tensor) -> Tensor:
        return attend(make(x, data), LENGTH, LENGTH)

    compiled = Compiled(function)
    generator = torch.Generator().manual_seed(0)
    increasing = torch.arange(LENGTH).expand(BATCH, -1).clone()
    for data in (
        increasing,
        increasing.flip(1).clone(),
        torch.randint(0, 4, (BATCH, LENGTH), generator=generator),
        torch.randint(-3, LENGTH + 3, (BATCH, LENGTH), generator=generator),
    ):
        (run,) = compiled(hidden(), data)
        check(run, tier=tier, holds=None)


class WritesInPlace(torch.nn.Module):
    """One decoder layer whose mask rests on numbers that the graph writes in place."""

    def __init__(self, into_input: bool) -> None:
        super().__init__()
        self.language_model = torch.nn.Module()
        self.language_model.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.language_model.layers[0].self_attn = _Attends(into_input)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        result: Tensor = self.language_model.layers[0].self_attn(x, data)
        return result


class _Attends(torch.nn.Module):
    def __init__(self, into_input: bool) -> None:
        super().__init__()
        self._into_input = into_input

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        if self._into_input:
            numbers = data.add_(1) * 2
        else:
            own = data * 1
            own[..., 5] = 1  # tears a group in two
            numbers = own + 1
        row, column = numbers[:, None, :, None], numbers[:, None, None]
        position = torch.arange(x.shape[2])
        mask = (position <= position[:, None]) | ((row == column) & (row >= 0))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.filterwarnings("ignore:a mask is evaluated element by element")
@pytest.mark.parametrize("into_input", [False, True])
def test_what_a_mask_rests_on_is_judged_as_the_graph_leaves_it(into_input: bool) -> None:
    """Through the backend: what it looks at before the graph runs is written in place, too."""
    num_tokens = 64
    span_id = torch.zeros(1, num_tokens, dtype=torch.int32)
    span_id[:, 2:10], span_id[:, 20:30] = 1, 2
    is_sink = (span_id > 0) & (span_id != span_id.roll(1, 1))
    fingerprint = {"architecture": "x", "num_layers": "1", "num_heads": "2", "num_kv_heads": "2"}
    profile = Profile(
        torch.tensor([[0, 2]], dtype=torch.uint8),
        rule=TemplateRule(image_token_ids=(1,)),
        fingerprint={**fingerprint, "head_dim": "16", "layer_types": "full_attention"},
    )
    model = WritesInPlace(into_input).eval()
    x, data = torch.randn(1, 2, num_tokens, 16), torch.arange(num_tokens)[None] // 8
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    ours, theirs = data.clone(), data.clone()
    with torch.no_grad():
        expected = model(x, theirs)
        with use_template(span_id, is_sink):
            found = torch.compile(model, backend=backend)(x, ours)
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=0)  # the dense head
    assert (found[:, 1] - expected[:, 1]).abs().max() > 1e-3
    assert torch.equal(ours, theirs)
    (how,) = {how for row in backend.report().rows for how in row.runs}
    assert how == ("sparse, ordered, fused" if into_input else "sparse, expressed, fused")


def test_mask_from_outside_is_opaque() -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        return attend(mask, LENGTH, LENGTH)

    (run,) = Compiled(function)(hidden(), torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool))
    check(run, tier=3)
    assert "input of the graph" in run.lifted.reason


def test_input_is_read_before_it_is_overwritten() -> None:
    def function(x: Tensor, length: Tensor, late: bool) -> Tensor:
        if not late:
            length.add_(1)
        mask = grid(x)[1] <= grid(x)[0] + length
        if late:
            length.add_(1)
        return attend(mask, LENGTH, LENGTH)

    (run,) = Compiled(function)(hidden(), torch.tensor(2), True)
    check(run)
    (run,) = Compiled(function)(hidden(), torch.tensor(2), False)
    check(run, tier=3)
    assert "add_" in run.lifted.reason


def overwritten_part(x: Tensor, data: Tensor) -> Tensor:
    rows, other = torch.arange(2 * LENGTH).split(LENGTH)
    mask = grid(x)[1] <= rows[:, None]
    torch._foreach_add_([mask.view(torch.uint8)], 1)
    return mask & (other[:, None] > 0)


def test_parts_and_lists_of_tensors_are_followed() -> None:
    def function(x: Tensor, data: Tensor) -> Tensor:
        return attend(overwritten_part(x, data), LENGTH, LENGTH)

    (run,) = Compiled(function)(hidden(), torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    check(run, tier=3)


def test_lifts_masks_of_an_exported_program() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            mask = create("sliding", x, padding)[:, :, :, : x.shape[1]]
            return attend(mask, LENGTH, LENGTH)

    inputs = (hidden(), paddings()[1])
    gm = torch.export.export(Module(), inputs).module()
    calls = find_attention(gm, layer_pattern=r"layers\.(\d+)")
    probe = Probe(gm, calls, [lift_mask(gm, call) for call in calls])
    probe.run(*inputs)
    (run,) = probe.runs
    check(run)


@pytest.mark.parametrize("dynamic", [False, True])
def test_form_may_be_an_argument_of_a_node(dynamic: bool) -> None:
    """As a pass uses it: put where the lifted mask says, then traced by AOTAutograd."""
    found: list[tuple[Any, ...]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        gm = copy_graph_module(gm)
        call = find_attention(gm, layer_pattern=r"layers\.(\d+)")[-1]
        lifted = lift_mask(gm, call)
        with gm.graph.inserting_before(lifted.before):
            ids = gm.graph.find_nodes(op="placeholder")[-1]
            sizes = [gm.graph.call_method("size", (ids, dim)) for dim in (0, 1)]
            shape = dict(zip(("batch", "num_queries", "num_keys"), (*sizes, sizes[1]), strict=True))
            mask = gm.graph.call_function(base_mask_of, (lifted.form,), shape)
            hold = gm.graph.call_function(facts_hold, (lifted.facts,), shape)
        output = gm.graph.output_node()
        output.args = ((*output.args[0], *(mask, hold)),)
        gm.recompile()

        def run(*args: Any) -> Any:
            *outputs, mask, hold = gm(*args)
            found.append((*mask, hold))
            return tuple(outputs)

        return run

    def function(x: Tensor, padding: Tensor, token_types: Tensor) -> list[Tensor]:
        masks = create_masks_for_vision_model(
            config=CONFIG,
            inputs_embeds=x,
            attention_mask=padding,
            **{cache_argument(create_masks_for_vision_model): None},
            position_ids=None,
            block_sequence_ids=get_block_sequence_ids_for_mask(token_types, x.device),
        )
        length = x.shape[1]
        outputs = [attend(mask, length, length) for mask in masks.values()]
        return [*outputs, masks["sliding_attention"]]

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    *_, allowed = compiled(hidden(), paddings()[1], IMAGES)
    lower, upper, valid, hold = found[-1]
    column = torch.arange(LENGTH)
    inside = (lower[..., None] <= column) & (column <= upper[..., None]) & valid[:, None]
    assert hold and torch.equal(inside, allowed[:, 0])


@pytest.mark.parametrize(
    "opaque",
    [
        lambda b, h, q, k: torch.stack([q, k]).amax() < 5,
        lambda b, h, q, k: torch.stack([q, k]).chunk(2)[1][0] <= q,
        lambda b, h, q, k: torch.stack([k, k]).sum() < 5,
    ],
)
def test_what_is_not_understood_inside_a_vmap_is_opaque(opaque: Callable[..., Tensor]) -> None:
    function = vmapped(and_mask_function=lambda _: opaque)
    (run,) = Compiled(function)(hidden(), paddings()[1], IMAGES)
    check(run, tier=3)


# Facts.


def test_groups_that_are_torn_apart_are_noticed() -> None:
    def function(x: Tensor, ids: Tensor) -> Tensor:
        mask = create("causal", x, None, block_sequence_ids=ids)
        return attend(mask, LENGTH, LENGTH)

    compiled = Compiled(function)
    legal = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    (run,) = compiled(hidden(), legal)
    check(run)
    torn = legal.clone()
    torn[0, 9] = 0
    (run,) = compiled(hidden(), torn)
    check(run, holds=False)
    assert not torch.equal(run.from_form(), run.allowed)


def test_images_that_see_each_other_are_intervals_of_groups() -> None:
    """Molmo 2: all images are one group of bidirectional tokens."""

    def function(x: Tensor, token_types: Tensor) -> Tensor:
        ids = torch.where(token_types == 1, 0, -1)
        return attend(create("causal", x, None, block_sequence_ids=ids), LENGTH, LENGTH)

    def groups_of(is_image: Tensor) -> Tensor:
        begins = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
        return torch.stack([~is_image, begins, is_image & ~begins], dim=1)

    compiled = Compiled(function)
    (run,) = compiled(hidden(), IMAGES)
    check(run, holds=False)
    groups = groups_of(IMAGES.bool())
    assert run.facts_hold(groups) and torch.equal(run.from_groups(groups), run.allowed)
    torn = IMAGES.clone()
    torn[0, -1] = 1  # of an image to the model, and text to us
    (run,) = compiled(hidden(), torn)
    check(run, holds=False)
    assert not run.facts_hold(groups)
    assert run.facts_hold(groups_of(torn.bool()))
    (run,) = compiled(hidden(), NO_IMAGES)
    check(run)


def test_sequences_that_are_shuffled_are_noticed() -> None:
    import transformers.masking_utils as home

    if not hasattr(home, "packed_sequence_compatibility_function"):
        pytest.skip("these transformers have no packed_sequence_compatibility_function")
    packed_sequence_compatibility_function = home.packed_sequence_compatibility_function

    def function(x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        mask_function = packed_sequence_compatibility_function(causal_mask_function, positions, ids)
        mask = sdpa_mask(
            BATCH, LENGTH, LENGTH, mask_function=mask_function, allow_is_causal_skip=False
        )
        return attend(mask, LENGTH, LENGTH)

    compiled = Compiled(function)
    ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [3] * LENGTH])
    (run,) = compiled(hidden(), ids, PACKED)
    check(run)
    shuffle = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    backwards = torch.tensor([[0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 1], list(range(LENGTH))])
    for wrong_ids, wrong_positions in (
        (ids[:, shuffle], PACKED[:, shuffle]),
        (ids[:, shuffle], PACKED),
        (ids, PACKED[:, shuffle]),
        (ids, backwards),
    ):
        (run,) = compiled(hidden(), wrong_ids, wrong_positions)
        check(run, holds=False)


def test_groups_apart_from_the_past_are_noticed() -> None:
    """A group that a query sees but is not next to may not be joined with what it sees."""

    def function(x: Tensor, ids: Tensor, mine: Tensor) -> Tensor:
        row, column = grid(x)
        same = (mine[:, None, :, None] == ids[:, None, None]) & (mine >= 0)[:, None, :, None]
        return attend((column <= row) | same, LENGTH, LENGTH)

    compiled = Compiled(function)
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4]).expand(BATCH, -1).clone()
    (run,) = compiled(hidden(), ids, ids)
    check(run)
    (run,) = compiled(hidden(), ids, ids - 1)
    check(run)
    (run,) = compiled(hidden(), ids, (ids + 3) % 5)
    check(run, holds=False)


def test_base_mask_is_traceable() -> None:
    """Both functions run under a compiler, with lengths that change."""
    position, column = ("index", "q"), ("index", "k")

    def function(ids: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        batch, length = ids.shape
        row, key = (
            ("load", ids, (("index", "b"), position)),
            ("load", ids, (("index", "b"), column)),
        )
        same = ("and", ("row", ("ge", row, 0)), ("same", (row,), (key,), False))
        valid = ("valid", ("load", padding, (("index", "b"), column)))
        union = (("upper", position), same)
        shape = {"batch": batch, "num_queries": length, "num_keys": length, "device": ids.device}
        facts = (
            ("contiguous", ("ge", row, 0), (row,), (key,)),
            ("connected", True, union),
            ("consecutive", ids, None),
        )
        lower, upper, mask = base_mask_of(("and", valid, ("or", *union)), **shape)
        return lower, upper, mask, facts_hold(facts, **shape)

    torch._dynamo.reset()
    try:  # our own graphs call them as one node, which Dynamo does not look into
        torch.compile(lambda x: x + len({id((1, 2))}), fullgraph=True, backend="eager")(
            torch.ones(1)
        )
    except torch._dynamo.exc.Unsupported:
        pytest.skip("Dynamo of this torch cannot trace id() of a tuple")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (6, 9):
        ids = torch.arange(length).repeat(2, 1) // 2
        padding = torch.ones(2, length, dtype=torch.bool)
        for got, expected in zip(compiled(ids, padding), function(ids, padding), strict=True):
            assert torch.equal(got, expected)


# Anything that can be said with these atoms.


def random_masks() -> st.SearchStrategy[Callable[..., Callable[..., Tensor]]]:
    """Functions of (padding, ids) that give mask functions of (b, h, q, k)."""
    small = st.integers(-3, 6)
    atoms = st.one_of(
        st.just(lambda p, i: causal_mask_function),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: k <= q + n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: q - n < k),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: (q - k).abs() <= n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: k >= n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: q.ne(n)),
        st.integers(1, 5).map(lambda n: lambda p, i: lambda b, h, q, k: q // n == k // n),
        st.just(lambda p, i: lambda b, h, q, k: p[b, k]),
        st.just(lambda p, i: lambda b, h, q, k: p[b, q]),
        st.just(lambda p, i: lambda b, h, q, k: i[b, q] == i[b, k]),
        st.just(lambda p, i: lambda b, h, q, k: i[b, k] <= i[b, q]),
        st.just(lambda p, i: lambda b, h, q, k: k <= i[b, q]),
        st.just(lambda p, i: lambda b, h, q, k: k <= i[b, k] + q),
        st.just(lambda p, i: blockwise_overlay(i - 1)),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: k == q + n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: 2 * k <= q + n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: (k - q) // 2 <= n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: i[b, k] > i[b, q] - n),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: i[b, q] - n <= k),
        small.map(lambda n: lambda p, i: lambda b, h, q, k: torch.where(q > n, k <= q, k > n)),
        st.just(lambda p, i: lambda b, h, q, k: k <= torch.maximum(q, i[b, q])),
        st.just(lambda p, i: lambda b, h, q, k: (k <= q) ^ p[b, k]),
        st.just(lambda p, i: lambda b, h, q, k: (k <= q).long() * (q < 3).int() > 0),
    )

    def join(children: Any) -> Any:
        def combine(function: Any) -> Any:
            return lambda parts: lambda p, i: function(*(part(p, i) for part in parts))

        def negate(part: Any) -> Any:
            return lambda p, i: lambda *args: ~part(p, i)(*args)

        pairs = st.lists(children, min_size=2, max_size=3)
        return st.one_of(
            pairs.map(combine(and_masks)),
            pairs.map(combine(and_masks)),
            pairs.map(combine(or_masks)),
            children.map(negate),
        )

    return st.recursive(atoms, join, max_leaves=5)


@given(data=st.data(), make=random_masks(), use_vmap=st.booleans())
def test_whatever_is_lifted_is_exact(data: st.DataObject, make: Any, use_vmap: bool) -> None:
    num_queries = data.draw(st.integers(1, 6))
    past = data.draw(st.integers(0, 3))
    kv_offset = data.draw(st.integers(0, 2))
    num_keys = past + num_queries
    as_bias = data.draw(st.booleans())

    def function(padding: Tensor, ids: Tensor) -> Tensor:
        build = eager_mask if as_bias else sdpa_mask
        mask = build(
            BATCH,
            num_queries,
            num_keys,
            q_offset=past + kv_offset,
            kv_offset=kv_offset,
            mask_function=make(padding, ids),
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
        )
        return attend(mask, num_queries, num_keys)

    compiled = Compiled(function)
    total = past + kv_offset + num_queries
    rows = st.lists(st.integers(0, 3), min_size=total, max_size=total)
    for _ in range(3):
        ids = torch.tensor([data.draw(rows), sorted(data.draw(rows))])
        padding = torch.tensor([data.draw(rows), data.draw(rows)]) > 0
        (run,) = compiled(padding, ids)
        check(run, tier=run.lifted.tier, holds=None)
        assert run.lifted.tier < 3
