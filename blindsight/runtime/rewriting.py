"""How a prompt runs in a rewritten graph, and that graph.

Shapes: B batch, H query heads, Q and K lengths in tokens, N calls that are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from blindsight.attention.base_mask import Tier
from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.lowering import Layout, causal_layout
from blindsight.attention.mask_forms import MaskForm
from blindsight.passes.find_attention import find_attention
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.lift_mask import lift_masks
from blindsight.passes.replace_attention import Capacity, replace_attention_pass
from blindsight.profile import Profile
from blindsight.runtime.any_length import capacity_of, is_symbol, takes_any_number
from blindsight.runtime.choose import (
    Choice,
    ChoosableCall,
    Device,
    Fastest,
    best_mask_form,
    choose_layouts,
)
from blindsight.runtime.cost_model import CallSize
from blindsight.runtime.data_check import DataCheck
from blindsight.runtime.given_mask import GivenMasks, add_given_inputs, lifted_of_given
from blindsight.runtime.history import History
from blindsight.runtime.plan import Plan, PlannedCall
from blindsight.runtime.state import BackendState


@dataclass(frozen=True)
class Rewriting:
    """How to run a prompt in a rewritten graph.

    Attributes:
        calls: Which attention calls are replaced.
        layouts: Of each of them.
        mask_form: Of the masks that are known as intervals.
        given: Intervals of the masks that are inputs of the graph, by their names.
        capacities: Of the calls that are replaced, if other lengths than those at hand shall do.
        longer: Capacities of longer prompts, whose compiled graph is taken if it is there.
        is_dense: Whether all heads run dense, on ``is_causal``, which is estimated to be faster.
    """

    calls: tuple[int, ...]
    layouts: tuple[Layout, ...]
    mask_form: MaskForm
    given: Mapping[str, BaseMask]
    capacities: tuple[Capacity, ...] | None
    longer: tuple[Capacity, ...] | None = None
    is_dense: bool = False


class Rewriter:
    """Chooses how the prompts of one graph run, and rewrites it.

    Args:
        state: The backend's.
        plan: Of the graph, which has attention.
    """

    def __init__(self, state: BackendState, plan: Plan) -> None:
        self._state = state
        self._plan = plan
        self._calls = plan.calls
        self._data = DataCheck(plan)
        self._given = GivenMasks(plan, state.forwards.masks)

    def choose(
        self, args: Sequence[Any], layers: Sequence[int], history: History
    ) -> Rewriting | None:
        """Return how to run a prompt; None: in the model's own graph, estimated to be faster.

        Args:
            args: The inputs of the graph.
            layers: The layer of each attention call.
            history: The whole sequence.
        """
        given = self._read_given(args, layers, history)
        own, whole = self._plan.profile, self._state.profile
        replaced = self._replaced(own, layers, given)
        any_length = self._fits_any_length(history.num_tokens, given, replaced)
        of_whole = self._replaced(whole, layers, given)
        categories = whole.categories[[layers[at] for at in of_whole]]
        form = self._mask_form(args, history, categories, given, any_length)
        capacities = longer = None
        if replaced and any_length and form.is_sorted:
            capacities = tuple(self._capacity(at, args) for at in replaced)
            longer = tuple(map(self._longer, replaced, capacities))
        # Only dense heads can do with less than FlexAttention, where what proofs rest on holds.
        is_causal = [False] * len(self._calls)
        holds = form not in (MaskForm.GROUPED, MaskForm.EXPRESSED)
        if holds and bool((categories == 0).any()):
            is_causal = self._data.plain_causal(args, given)
        # Work is that of the kernel that will run, which may be one for longer prompts.
        rows = {} if longer is None else dict(zip(replaced, longer, strict=True))

        def choice_for(profile: Profile, replaced: Sequence[int]) -> Choice:
            calls = [
                ChoosableCall(
                    categories=tuple(profile.categories[layers[at]].tolist()),
                    form=form.for_tier(tier_of(self._calls[at], given)),
                    is_causal=is_causal[at],
                    size=self._call_size(profile, at, args, rows.get(at, (None, None))),
                )
                for at in replaced
            ]
            return choose_layouts(
                calls, history, lowering=self._state.lowering, device=self._device()
            )

        choice = choice_for(own, replaced)
        # The ranks of a tensor-parallel model decide alike, as one process with all heads would:
        # dense on one and sparse on another would be neither.
        decided = choice if own is whole else choice_for(whole, of_whole)
        for at, reason in zip(of_whole, decided.reasons, strict=True):
            self._calls[at].verdict.estimate = reason
        if decided.fastest is Fastest.OWN_GRAPH:
            return None
        is_dense = decided.fastest is Fastest.CAUSAL
        return Rewriting(
            calls=replaced,
            layouts=(causal_layout(own.num_heads),) * len(replaced) if is_dense else choice.layouts,
            mask_form=form,
            given=given,
            capacities=capacities,
            longer=longer,
            is_dense=is_dense,
        )

    def _device(self) -> Device:
        # Looked up each time: threads may be set, and costs measured, between two prompts.
        return Device.of(self._plan.device, self._plan.dtype)

    def rewrite(
        self,
        rewriting: Rewriting,
        size_of: Callable[[int | torch.SymInt], int],
        numbers: Mapping[str, float],
        *,
        takes_regions: bool,
    ) -> fx.GraphModule:
        """Return the rewritten graph; the masks that were given are inputs at its end.

        Args:
            rewriting: What :meth:`choose` returned.
            size_of: The value of a symbolic size.
            numbers: Values of nodes that become constants, by name.
            takes_regions: Whether the compiler behind compiles regions that are called.
        """
        gm = copy_graph_module(self._plan.gm)
        for node in list(gm.graph.nodes):
            if node.name in numbers:
                node.replace_all_uses_with(numbers[node.name])
                gm.graph.erase_node(node)
        pattern = self._plan.profile.rule.layer_pattern
        by_name = {call.node.name: call for call in find_attention(gm, layer_pattern=pattern)}
        inputs = {name: add_given_inputs(gm, name) for name in rewriting.given}
        attention = [by_name[self._calls[at].attention.node.name] for at in rewriting.calls]
        lifted = lift_masks(gm, attention)
        for at, (call, proof) in enumerate(zip(attention, lifted, strict=True)):
            name = "" if proof.given is None else proof.given.name
            if name in inputs:
                by_group = rewriting.given[name].is_by_group
                lifted[at] = lifted_of_given(inputs[name], call.node, by_group=by_group)
        sizes = [size for call in attention for size in call.lengths]
        # A region would need the symbols of keys of a composed size among its inputs.
        is_composed = rewriting.capacities is not None and any(
            not isinstance(size, int) and not is_symbol(size) for size in sizes
        )
        return replace_attention_pass(
            gm,
            attention=attention,
            lifted=lifted,
            form=rewriting.mask_form,
            groups=[layout.groups for layout in rewriting.layouts],
            size_of=size_of,
            capacities=rewriting.capacities,
            in_region=takes_regions and len(attention) > 1 and not is_composed,
            by_operator=takes_regions and self._plan.device.type == "cpu",
            num_threads=self._device().num_threads,
        )

    def sizes_of_given(self, name: str) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """Return Q and K of the given mask of this name, as the graph knows them."""
        return self._given.sizes_of(name)

    def _read_given(
        self, args: Sequence[Any], layers: Sequence[int], history: History
    ) -> dict[str, BaseMask]:
        """Return the masks among the inputs that are intervals, by name.

        Intervals of groups are of use only if the graph's other masks are such as well.
        """
        given = self._given.read(args, layers, history)
        if not any(mask.is_by_group for mask in given.values()):
            return given
        if self._data.facts_hold(args, by_groups_of=history):
            return given
        return {name: mask for name, mask in given.items() if not mask.is_by_group}

    def _replaced(
        self, profile: Profile, layers: Sequence[int], given: Mapping[str, BaseMask]
    ) -> tuple[int, ...]:
        """Return the calls to replace: of dense layers, too, where their mask is known.

        It need not be built then.
        """
        return tuple(
            at
            for at, call in enumerate(self._calls)
            if call.layer is None
            or tier_of(call, given) is Tier.INTERVALS
            or not profile.layer_is_dense(layers[at])
        )

    def _fits_any_length(
        self, num_tokens: int, given: Mapping[str, BaseMask], replaced: Sequence[int]
    ) -> bool:
        """Whether a graph with these calls replaced can be compiled for many lengths, and shall."""
        calls = [self._calls[at] for at in replaced]
        sizes = [size for call in calls for size in call.attention.lengths]
        fixed = [size for size in sizes if isinstance(size, int)]
        # Of chunks on a static cache queries and keys are as many as ever, and tokens are not.
        varies = len(fixed) < len(sizes) or num_tokens not in fixed
        return varies and all(tier_of(call, given) is Tier.INTERVALS for call in calls)

    def _mask_form(
        self,
        args: Sequence[Any],
        history: History,
        categories: Tensor,
        given: Mapping[str, BaseMask],
        any_length: bool,
    ) -> MaskForm:
        """Choose the form of this prompt's masks that are known as intervals.

        ``categories [N, H]`` are those of the calls that are replaced.
        """
        for call in self._calls:
            if (tier := tier_of(call, given)) is not Tier.INTERVALS:
                how = "evaluated" if tier is Tier.EXPRESSION else "read"
                self._state.forwards.warn_once(
                    f"a mask is {how} element by element, which is slower: {call.lifted.reason}. "
                    "The report says whose."
                )
        if any(mask.is_by_group for mask in given.values()):
            return MaskForm.GROUPED
        if not self._data.facts_hold(args):
            if self._data.facts_hold(args, by_groups_of=history):
                return MaskForm.GROUPED
            self._state.forwards.warn_once(
                "a mask is evaluated element by element: what its interval form rests on does "
                f"not hold for this prompt ({self._data.names})."
            )
            return MaskForm.EXPRESSED
        if any_length:
            return MaskForm.SORTED
        num_queries = self._plan.sizes(args).num_queries
        return best_mask_form(history, num_queries, categories, self._device())

    def _capacity(self, at: int, args: Sequence[Any]) -> Capacity:
        size_of, device = self._plan.size_of(args), self._plan.device
        queries, keys = (
            capacity_of(size_of(size), size, device) for size in self._calls[at].attention.lengths
        )
        return queries, keys

    def _longer(self, at: int, capacity: Capacity) -> Capacity:
        """Return the capacity of a call in longer prompts, where the device has one for all."""
        device, lengths = self._plan.device, self._calls[at].attention.lengths
        queries, keys = (
            None if takes_any_number(size, device) else number
            for size, number in zip(lengths, capacity, strict=True)
        )
        return queries, keys

    def _call_size(
        self, profile: Profile, at: int, args: Sequence[Any], capacity: Capacity
    ) -> CallSize:
        """Return what a call computes on, with the heads of a profile."""
        attention = self._calls[at].attention
        num_heads, num_key_heads, head_dim = attention.head_sizes
        parts = profile.num_heads // self._plan.profile.num_heads
        sizes = attention.sizes(self._plan.size_of(args))
        return CallSize(
            num_heads=num_heads * parts,
            num_key_heads=num_key_heads * parts,
            head_dim=head_dim,
            is_masked=attention.attn_mask is not None,
            query_rows=capacity[0] or sizes["num_queries"],
            key_rows=capacity[1] or sizes["num_keys"],
            **sizes,
        )


def tier_of(call: PlannedCall, given: Mapping[str, BaseMask]) -> Tier:
    """Return how much is known of a call's mask, with what was found in the graph's inputs."""
    node = call.lifted.given
    return Tier.INTERVALS if node is not None and node.name in given else call.lifted.tier
