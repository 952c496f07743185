"""Passes of a user around ours, ours without the backend, and nothing global changed by either."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.functional import scaled_dot_product_attention

from blindsight import Profile, blindsight_backend
from blindsight.passes import GraphPass, SparseAttention, sparse_attention_pass
from blindsight.passes.find_attention import count_attention, find_attention
from blindsight.passes.find_key_cache import find_key_cache
from blindsight.passes.graph import copy_graph_module, node_of_size, placeholders
from blindsight.passes.lift_mask import lift_mask
from blindsight.passes.replace_attention import replace_attention_pass
from decoders import (
    OTHER_PROMPT,
    PROMPT,
    DecoderWithHead,
    check_decoder,
    decoder_prompt,
    template_of,
)
from models import Image, make_inputs, skip_unless_traced_whole, tiny_model, valid_positions
from oracles import assert_close_to_reference, reference_copy, run_reference

CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 0]]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_model("qwen2_5_vl")


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return decoder_prompt([PROMPT])


def profile_of(model: Any) -> Profile:
    return Profile.for_model(model, CATEGORIES)


def has_flex(gm: fx.GraphModule) -> bool:
    return any(getattr(node.target, "__name__", "") == "attend" for node in gm.graph.nodes)


# A user's passes around ours


def test_passes_see_both_forms_in_order(qwen: Any, inputs: Any) -> None:
    seen: list[tuple[str, bool, int]] = []

    def note(name: str) -> Any:
        return lambda gm: seen.append((name, has_flex(gm), count_attention(gm)))

    passes = [
        note("first after"),
        GraphPass(note("before"), when="before"),
        GraphPass(note("second after"), when="after"),
    ]
    profile = profile_of(qwen)
    backend = blindsight_backend(profile, inner="eager", lowering="fused", passes=passes)
    compiled = torch.compile(DecoderWithHead(qwen), backend=backend)
    check_decoder(qwen, profile, inputs, compiled(**inputs))
    compiled(**decoder_prompt([[inputs["input_ids"].shape[1]]]))  # text: the model's own form
    assert seen == [
        ("before", False, 2),
        ("first after", True, 0),
        ("second after", True, 0),
        ("first after", False, 2),
        ("second after", False, 2),
    ]


def test_what_a_pass_does_is_compiled_in_both_forms(qwen: Any, inputs: Any) -> None:
    def double(gm: fx.GraphModule) -> fx.GraphModule:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            doubled = [gm.graph.call_function(torch.mul, (x, 2)) for x in output.args[0]]
        output.args = (tuple(doubled),)
        return gm

    text = decoder_prompt([[inputs["input_ids"].shape[1]]])
    plain, doubling = (
        torch.compile(
            DecoderWithHead(qwen),
            backend=blindsight_backend(
                profile_of(qwen), inner="eager", lowering="fused", passes=passes
            ),
        )
        for passes in ([], [double])
    )
    for prompt in (inputs, text):
        torch._dynamo.reset()
        expected = 2 * plain(**prompt)
        torch._dynamo.reset()
        torch.testing.assert_close(doubling(**prompt), expected, rtol=0, atol=0)


def test_a_pass_before_ours_may_change_the_graph(qwen: Any, inputs: Any) -> None:
    """It runs before attention is found: what it leaves is what is rewritten."""

    def as_positional(gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
                mask = node.kwargs["attn_mask"]
                node.args = (*node.args[:3], mask)
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}

    profile = profile_of(qwen)
    passes = [GraphPass(as_positional, when="before", requires={"sdpa"})]
    backend = blindsight_backend(profile, inner="eager", lowering="fused", passes=passes)
    logits = torch.compile(DecoderWithHead(qwen), backend=backend)(**inputs)
    check_decoder(qwen, profile, inputs, logits)
    assert backend.report().num_rewritten == 2


def nothing(gm: fx.GraphModule) -> None:
    pass


@pytest.mark.parametrize("how", ["eager attention", "decomposed"])
def test_attention_that_is_written_out(how: str, inputs: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    profile = profile_of(model)
    if how == "eager attention":
        model.set_attn_implementation("eager")
    program = torch.export.export(DecoderWithHead(model), (), kwargs=inputs, strict=False)
    if how == "decomposed":
        program = program.run_decompositions()
    gm = program.graph_module
    before = gm.print_readable(print_output=False)
    with pytest.raises(ValueError, match=r"self_attn must be one call of scaled.*written out"):
        sparse_attention_pass(gm, profile=profile, add_inputs=True)
    assert gm.print_readable(print_output=False) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_dispatch": True}, "which module each node is of .*, got none"),
        ({}, "got aten._scaled_dot_product_"),
        ({"decomposition_table": core_aten_decompositions()}, "each node is of .*, got none"),
    ],
)
def test_a_graph_that_tells_no_layer(options: Any, message: str, qwen: Any) -> None:
    heads = torch.randn(1, profile_of(qwen).num_heads, 8, 16)
    attend = lambda x: scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
    gm = make_fx(attend, **options)(heads)
    with pytest.raises(ValueError, match=message):
        sparse_attention_pass(gm, profile=profile_of(qwen))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [GraphPass(nothing, name="late", requires={"sdpa"})],
            r"'late' must have 'sdpa'.* pass 'blindsight', which runs before it, breaks it",
        ),
        (
            [GraphPass(nothing, name="early", when="before", requires={"flex_attention"})],
            r"'early' must have 'flex_attention'.* pass 'blindsight', which ensures it, runs later",
        ),
        (
            [GraphPass(nothing, name="eater", when="before", breaks={"sdpa"})],
            r"'blindsight' must have 'sdpa'.* pass 'eater', which runs before it, breaks it",
        ),
        (
            [GraphPass(nothing, name="b", requires={"x"}), GraphPass(nothing, ensures={"x"})],
            r"'b' must have 'x'.* pass 'nothing', which ensures it, runs later",
        ),
        ([GraphPass(nothing, name="b", requires={"x"})], r"'b' .* no pass before it ensures it"),
        ([3], r"a pass must be a function of a GraphModule, got 3"),
        ("nothing", r"passes must be a list of functions, got 'nothing'"),
    ],
)
def test_a_list_of_passes_that_cannot_work(qwen: Any, passes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blindsight_backend(profile_of(qwen), inner="eager", passes=passes)


def test_passes_that_fit(qwen: Any) -> None:
    passes = [
        GraphPass(nothing, requires={"x", "flex_attention"}),
        GraphPass(nothing, when="before", requires={"sdpa"}, ensures={"x"}),
    ]
    blindsight_backend(profile_of(qwen), inner="eager", passes=passes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "now"}, r"when must be 'before' or 'after', got 'now'"),
        ({"requires": "sdpa"}, r"requires must be a set of strings, got 'sdpa'"),
    ],
)
def test_a_pass_that_is_malformed(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphPass(nothing, **arguments)


def _drop_an_input(gm: fx.GraphModule) -> None:
    node = next(node for node in gm.graph.nodes if node.op == "placeholder")
    with gm.graph.inserting_after(node):
        node.replace_all_uses_with(gm.graph.call_function(torch.ones, (1,)))
    gm.graph.erase_node(node)


def _use_before_it_is_made(gm: fx.GraphModule) -> None:
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    nodes[0].args = (nodes[-1], *nodes[0].args[1:])


def _raise(gm: fx.GraphModule) -> None:
    raise KeyError("lost")


def _eat_attention(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


@pytest.mark.parametrize(
    ("function", "when", "message"),
    [
        (_drop_an_input, "after", r"'_drop_an_input' must leave the graph's \d+ inputs"),
        (_use_before_it_is_made, "after", r"'_use_before_it_is_made' .* well formed"),
        (_raise, "after", r"'_raise' must run on every graph, got KeyError: 'lost'"),
        (lambda gm: 7, "before", r"must return a GraphModule or None, got int"),
        (
            _eat_attention,
            "before",
            r"'_eat_attention' must leave the 2 calls .*'blindsight' requires, got 0.*when='after'",
        ),
    ],
)
def test_a_pass_that_breaks_the_graph(
    qwen: Any, inputs: Any, function: Any, when: str, message: str
) -> None:
    backend = blindsight_backend(
        profile_of(qwen),
        inner="eager",
        lowering="fused",
        passes=[GraphPass(function, when=when)],
    )
    with pytest.raises(Exception, match=message):
        torch.compile(DecoderWithHead(qwen), backend=backend)(**inputs)


def test_identities_of_passes_are_in_the_keys_of_inductor(qwen: Any) -> None:
    class Mine:
        def __call__(self, gm: fx.GraphModule) -> None: ...

        def uuid(self) -> bytes:
            return b"\x01\x02"

    passes = [nothing, GraphPass(nothing, when="before", name="a", uuid="first"), Mine()]
    inner = blindsight_backend(profile_of(qwen), passes=passes).inner
    assert inner.identities == {"pass 0 a": "first", "pass 2 Mine": "0102"}
    assert inner.with_options({"mode": "default"}).identities == inner.identities


# Ours alone


def compile_with(module: Any, function: Any) -> Any:
    """Somebody else's backend: our pass, then eager."""

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        result = function(gm)
        return getattr(result, "graph_module", result)

    return torch.compile(module, backend=backend, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("lowering", ["fused", "split"])
def test_in_another_backend(qwen: Any, lowering: str) -> None:
    profile = profile_of(qwen)
    compiled = compile_with(
        DecoderWithHead(qwen),
        lambda gm: sparse_attention_pass(gm, profile=profile, lowering=lowering),
    )
    batch = decoder_prompt([PROMPT, [3, Image(), Image(2, 5), 2]], "left")
    for prompt in (decoder_prompt([PROMPT]), decoder_prompt([OTHER_PROMPT]), batch):
        check_decoder(qwen, profile, prompt, compiled(**prompt))


def test_in_a_pass_manager(qwen: Any, inputs: Any) -> None:
    profile = profile_of(qwen)
    manager = PassManager(passes=[SparseAttention(profile)])
    compiled = compile_with(DecoderWithHead(qwen), manager)
    check_decoder(qwen, profile, inputs, compiled(**inputs))


def test_masks_that_rest_on_the_data_are_evaluated() -> None:
    """Gemma's images may be anywhere, and nobody checks facts when only the pass is used."""
    skip_unless_traced_whole("gemma3")
    model = tiny_model("gemma3")
    profile = profile_of(model)
    inputs = make_inputs("gemma3", [[5, Image(), 4, Image(), 0, Image(), 7]])
    called: set[str] = set()

    def note(gm: fx.GraphModule) -> fx.GraphModule:
        SparseAttention(profile)(gm)
        called.update(getattr(node.target, "__name__", "") for node in gm.graph.nodes)
        return gm

    found = compile_with(model, note)(**inputs, use_cache=False).logits
    assert "expressed_mask" in called
    assert called.isdisjoint({"sorted_mask", "ordered_mask"})
    template = template_of(inputs["input_ids"])
    references = [
        run_reference(m, profile.categories, *template, inputs, use_cache=False).logits
        for m in (model, reference_copy(model))
    ]
    assert_close_to_reference(found, *references, valid_positions(inputs))


class Embedded(torch.nn.Module):
    """The same decoder from embeddings: its graph shows no tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = DecoderWithHead(model)

    def forward(self, inputs_embeds: torch.Tensor, **template: torch.Tensor) -> torch.Tensor:
        inner = self.decoder
        if template:  # read by nobody but the pass
            inputs_embeds = inputs_embeds + 0 * template["span_id"][..., None]
            inputs_embeds = inputs_embeds + 0 * template["is_sink"][..., None]
        hidden = inner.language_model(inputs_embeds=inputs_embeds, use_cache=False)
        return inner.lm_head(hidden.last_hidden_state)


@pytest.mark.parametrize("given", [True, False])
def test_the_template_as_inputs_of_the_graph(qwen: Any, inputs: Any, given: bool) -> None:
    profile = profile_of(qwen)
    span_id, is_sink = template_of(inputs["input_ids"])
    embeds = qwen.get_input_embeddings()(inputs["input_ids"])
    function = SparseAttention(profile, add_inputs=not given)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        gm = copy_graph_module(gm)  # Dynamo goes on using its own, and knows its inputs
        function(gm)
        return gm.forward if given else lambda *args: gm(*args, span_id.int(), is_sink)

    compiled = torch.compile(Embedded(qwen), backend=backend, fullgraph=True)
    template = {"span_id": span_id, "is_sink": is_sink} if given else {}
    check_decoder(qwen, profile, inputs, compiled(embeds, **template))


def test_a_graph_that_does_not_tell_the_images(qwen: Any, inputs: Any) -> None:
    embeds = qwen.get_input_embeddings()(inputs["input_ids"])
    compiled = compile_with(Embedded(qwen), SparseAttention(profile_of(qwen)))
    with pytest.raises(Exception, match=r"must have an input called input_ids.*add_inputs=True"):
        compiled(embeds)


def test_symbolic_sizes(qwen: Any, inputs: Any) -> None:
    function = SparseAttention(profile_of(qwen))
    compiled = torch.compile(
        DecoderWithHead(qwen), backend=lambda gm, _: function(gm).graph_module, dynamic=True
    )
    with pytest.raises(Exception, match=r"sizes of attention must be fixed, got .*num_queries"):
        compiled(**inputs)


def test_what_is_left_alone(qwen: Any) -> None:
    """Decoding, layers of dense heads, and graphs without attention."""
    modified = []

    def note(function: SparseAttention) -> Any:
        def run(gm: fx.GraphModule) -> fx.GraphModule:
            modified.append(function(gm).modified)
            return gm

        return run

    module = DecoderWithHead(qwen)
    one = decoder_prompt([[1]])
    compile_with(module, note(SparseAttention(profile_of(qwen))))(**one)
    torch._dynamo.reset()
    dense = Profile.for_model(qwen, "dense")
    compile_with(module, note(SparseAttention(dense)))(**decoder_prompt([PROMPT]))
    torch._dynamo.reset()
    compile_with(torch.sin, note(SparseAttention(profile_of(qwen))))(torch.ones(2))
    assert modified == [False, False, False]


@pytest.mark.parametrize(
    ("kept", "is_causal", "is_found"),
    [
        (slice(7), True, True),
        (slice(0, 7), True, True),
        (slice(7), False, False),
        (slice(1, 8), True, False),
        (slice(0, 14, 2), True, False),
    ],
)
def test_a_static_cache_is_found_behind_the_keys_of_a_prompt(
    kept: slice, is_causal: bool, is_found: bool
) -> None:
    """transformers repeats the keys, and cuts off those that the cache has no token for yet."""
    graphs: list[fx.GraphModule] = []

    def prefill(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        repeated = cache[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, 20, 8)
        keys = repeated[:, :, kept, :]
        return scaled_dot_product_attention(query, keys, keys, is_causal=is_causal)

    def note(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(prefill, backend=note)(torch.ones(1, 4, 7, 8), torch.ones(1, 2, 20, 8))
    (call,) = find_attention(graphs[0], layer_pattern=r"(\d+)")
    assert call.lengths == (7, len(range(20)[kept]))  # attention is of those keys alone
    before = find_key_cache(graphs[0], call).before
    assert str(before) == ("l_cache_" if is_found else "None")


def test_sizes_are_computed_from_the_symbols_of_a_graph() -> None:
    graphs: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(copy_graph_module(gm))
        return gm.forward

    def join(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y]) + 1

    torch._dynamo.reset()
    torch.compile(join, backend=note, dynamic=True)(torch.ones(5), torch.ones(9))
    (gm,) = graphs
    x, y = (n.meta["example_value"].shape[0] for n in placeholders(gm) if n.type is torch.Tensor)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        sizes = (x + y, torch.sym_max(x, y - 1), 3)
        output.args = (tuple(node_of_size(gm, size) for size in sizes),)
    gm.recompile()
    assert gm(5, torch.ones(5), 9, torch.ones(9)) == (14, 8, 3)
    assert gm(12, torch.ones(12), 2, torch.ones(2)) == (14, 12, 3)


def test_a_mask_may_be_made_among_the_nodes_of_another() -> None:
    """What makes the first mask is dropped with its call; the second mask is put beside it."""

    def function(x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(6)
        row, column = position[:, None], position
        second = column <= row
        first = (column <= row) & (column > row - 3)
        out = scaled_dot_product_attention(x, x, x, attn_mask=first)
        return scaled_dot_product_attention(out, x, x, attn_mask=second)

    found = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        gm = copy_graph_module(gm)
        calls = find_attention(gm, layer_pattern=r"layers\.(\d+)")
        lifted = [lift_mask(gm, call) for call in calls]
        assert [proof.tier for proof in lifted] == [1, 1]
        assert lifted[1].before in calls[0].attn_mask.all_input_nodes
        replace_attention_pass(gm, attention=calls, lifted=lifted)
        nodes = list(gm.graph.nodes)
        assert list(reversed(gm.graph.nodes)) == nodes[::-1]
        found.append([getattr(node.target, "__name__", "") for node in nodes])
        return gm.forward

    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(TypeError):  # it wants the inputs that were added
        torch.compile(function, backend=backend)(x)
    assert found[0].count("attend") == found[0].count("sorted_mask") == 2
    assert "scaled_dot_product_attention" not in found[0]


def test_what_a_mask_is_made_beside_is_still_written() -> None:
    """Of the mask nothing is left, but what was written in making it is read later."""

    class Function(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            mask = torch.ones_like(y[0, 0, :, :3].mul_(2), dtype=torch.bool)
            return scaled_dot_product_attention(x, x, x, attn_mask=mask) + y.sum()

    gm = torch.export.export(Function(), (torch.randn(1, 2, 3, 4),)).module()
    calls = find_attention(gm, layer_pattern=r"layers\.(\d+)")
    lifted = [lift_mask(gm, call) for call in calls]
    assert [proof.form for proof in lifted] == [("nothing",)]
    replace_attention_pass(gm, attention=calls, lifted=lifted)
    targets = [node.target for node in gm.graph.nodes]
    assert torch.ops.aten.ones_like.default not in targets
    assert torch.ops.aten.mul_.Tensor in targets


def test_auto_is_the_backends(qwen: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'fused' or 'split'.*Use the backend"):
        SparseAttention(profile_of(qwen), lowering="auto")


def test_the_uuid_covers_profile_and_options(qwen: Any) -> None:
    profile, other = profile_of(qwen), Profile.for_model(qwen, CATEGORIES[::-1])
    uuids = [
        SparseAttention(profile).uuid(),
        SparseAttention(other).uuid(),
        SparseAttention(profile, lowering="split").uuid(),
        SparseAttention(profile, add_inputs=True).uuid(),
    ]
    assert len(set(uuids)) == 4
    assert uuids[0] == SparseAttention(profile_of(qwen)).uuid()


@pytest.mark.inductor
def test_in_inductors_own_hook() -> None:
    """Given for one compiled model, never assigned to the process."""
    model = tiny_model("qwen2_5_vl", num_layers=1)
    profile = Profile.for_model(model, CATEGORIES[:1])
    inputs = decoder_prompt([PROMPT])
    options = {"pre_grad_custom_pass": SparseAttention(profile)}
    compiled = torch.compile(DecoderWithHead(model), fullgraph=True, options=options)
    check_decoder(model, profile, inputs, compiled(**inputs))


# Nothing global


def global_configs() -> list[dict[str, Any]]:
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    modules = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    return [copy.deepcopy(module.get_config_copy()) for module in modules]


@pytest.mark.parametrize(
    "inner",
    ["eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.nightly])],
)
def test_no_global_config_is_changed(inner: str) -> None:
    model = tiny_model("qwen2_5_vl", num_layers=1)
    profile = Profile.for_model(model, CATEGORIES[:1])
    inputs = decoder_prompt([PROMPT])
    during: list[Any] = []
    before = global_configs()
    backend = blindsight_backend(
        profile,
        inner=inner,
        lowering="fused",
        passes=[lambda gm: during.append(global_configs())],
        **({"options": {"max_autotune": False}} if inner == "inductor" else {}),
    )
    check_decoder(
        model, profile, inputs, torch.compile(DecoderWithHead(model), backend=backend)(**inputs)
    )
    assert during
    # What Dynamo itself sets while it calls a backend is not ours.
    assert all(configs[1:] == before[1:] for configs in during)
    assert global_configs() == before
