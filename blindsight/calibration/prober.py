"""Run a model's own graphs, uncompiled, and measure what its heads would lose on a prompt.

Shapes: B batch, L layers, H query heads, C categories, T tokens, Y likeliest next tokens.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindsight.calibration.gradients import gradients_from_embeddings, losses_with_gradients
from blindsight.calibration.measurements import Measurements
from blindsight.calibration.probe import Losses, ProbedCall, empty_losses, measure_losses
from blindsight.compile_apart import (
    compile_apart,
    forget_compiled,
    num_compiled,
    without_limits,
)
from blindsight.configs import config_of, shares_keys, text_config, with_attention
from blindsight.data.processors import inputs_on
from blindsight.fingerprints import fingerprint, layer_types_of
from blindsight.modules import as_they_are, plain_name, unwrapped
from blindsight.passes.find_attention import Attention, find_attention, has_attention
from blindsight.passes.find_shard import check_is_whole
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.lift_mask import lift_masks
from blindsight.passes.probe_attention import probe_attention_pass
from blindsight.passes.recompute_layers import recompute_layers_pass
from blindsight.runtime.layers import LayerMap
from blindsight.template import Template, TemplateRule
from blindsight.text_tables import compact


class Prober:
    """Runs a model and measures its attention; one instance serves many prompts, until closed."""

    def __init__(self, model: nn.Module, rule: TemplateRule, *, next_token: bool = False) -> None:
        model = unwrapped(model)
        implementation = getattr(text_config(config_of(model)), "_attn_implementation", "sdpa")
        if implementation != "sdpa":
            raise ValueError(
                f"attention must be that of attn_implementation='sdpa', got {implementation!r}. "
                "Load the model with it."
            )
        check_is_whole(model, "calibration")
        self._model = model
        self._towers = _towers_of(model, rule.layer_pattern)
        self._rule = rule
        shape = fingerprint(model)
        self._layer_types = layer_types_of(shape)
        self._num_heads = int(shape["num_heads"])
        self._next_token = next_token
        self._backend = _ProbeBackend(model, rule, ProbedCall if next_token else _measure_at_once)
        self._num_compiled = num_compiled()
        self._compiled = compile_apart(model, self._backend)
        self._options: dict[str, Any] = {"use_cache": False}
        known = inspect.signature(model.forward).parameters
        if "logits_to_keep" in known and not shares_keys(model):
            self._options["logits_to_keep"] = 1

    def __call__(self, inputs: Mapping[str, Any]) -> Measurements:
        """Measure one batch of arguments of the model's forward, with ``input_ids [B, T]``."""
        inputs = inputs_on(self._model, inputs)
        template = self._rule.template_of_inputs(inputs)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        if template.restricts_queries_from(0):
            layers, shares = self._run(inputs, template, mask)
        else:
            layers, shares = {}, None
        num_gradients = 0 if shares is None else shares.shape[1]
        # For layers without attention, and for prompts that no category restricts.
        nothing = empty_losses(len(mask), self._num_heads, torch.device("cpu"), num_gradients)
        of_all = {at: layers.get(at, nothing) for at in range(len(self._layer_types))}
        return measurements_of(of_all, shares)

    def close(self) -> None:
        """End its use: what it compiled is in nobody's way."""
        forget_compiled(self._num_compiled)

    def _run(
        self, inputs: dict[str, Any], template: Template, mask: Tensor
    ) -> tuple[dict[int, Losses], Tensor | None]:
        """Return the losses by layer, and the probabilities of the likeliest next tokens."""
        self._backend.begin(template)
        options = dict(self._options)
        if not bool(mask[:, -1].all()):
            options.pop("logits_to_keep", None)  # the last position is not every prompt's last
        with gradients_from_embeddings(self._model) if self._next_token else torch.no_grad():
            with without_limits(), as_they_are(*self._model.modules()), _untraced(self._towers):
                logits = self._compiled(**{**inputs, **options}).logits
            calls = self._backend.end()
            expected = with_attention(self._layer_types)
            if missing := sorted(set(expected) - set(calls)):
                raise ValueError(
                    f"the attention of layers {compact(expected)} must be met, got none of layers "
                    f"{compact(missing)}. Load the model with attn_implementation='sdpa', let "
                    "torch._dynamo compile (no stance of torch.compiler against it), or give a "
                    "rule whose layer_pattern fits the model's modules."
                )
            if self._next_token:
                losses, shares = losses_with_gradients(calls, logits, mask)
            else:
                losses, shares = {n: x for n, x in calls.items() if isinstance(x, Losses)}, None
        _check_deviation(losses, inputs["input_ids"].shape, self._model)
        return losses, shares


def _towers_of(model: nn.Module, layer_pattern: str) -> list[nn.Module]:
    """Return the modules beside the decoder that have attention of their own: vision towers."""
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    layers = [name for name, _ in modules if re.search(layer_pattern + "$", name)]
    around = {name[:at] for name in layers for at, letter in enumerate(name) if letter == "."}
    towers = []
    for name, module in modules:
        beside = name.rpartition(".")[0] in around | {""} and name not in around | {""}
        inside = any(name.startswith(f"{layer.rpartition('.')[0]}.") for layer in layers)
        if beside and not inside:
            kinds = (type(part).__name__ for part in module.modules())
            if any("Attention" in kind for kind in kinds):
                towers.append(module)
    return towers


@contextmanager
def _untraced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep Dynamo out of modules: it would trace a vision tower anew for other sizes of images."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def measurements_of(layers: Mapping[int, Losses], shares: Tensor | None = None) -> Measurements:
    """Return the measurements of one batch: what the losses of its layers are per row.

    Args:
        layers: The losses of the batch, by layer.
        shares: ``[B, Y]``, the probabilities of the tokens whose gradients were taken.
    """
    stacked = Losses(
        *(
            torch.stack([part.cpu() for part in column], dim=1)
            for column in zip(*(layers[at] for at in sorted(layers)), strict=True)
        )
    )
    num_rows = stacked.num_rows.amax(1)  # none in layers without attention
    per_row = stacked.num_rows[..., None, None].clamp(min=1)
    relative = (stacked.error / stacked.norm[..., None]).nan_to_num(nan=0.0, posinf=math.inf)
    effect = torch.full_like(relative, math.nan)
    if shares is not None:
        squares = stacked.influence.square() * shares.cpu()[:, None, None, None]
        effect = (squares.sum(-1) / 2).sqrt()
    return Measurements(
        num_rows=num_rows.float(),
        error=relative.sqrt().float(),
        lost_mass=(stacked.lost / per_row).float(),
        mass=(stacked.mass / per_row).float(),
        offset_mass=(stacked.offsets / per_row).float(),
        effect=effect.float(),
        pairs=stacked.pairs.float(),
    )


def _measure_at_once(*fields: Any, **options: Any) -> Losses:
    """Measure a call where it happens, so that nothing of it has to be kept."""
    return measure_losses(ProbedCall(*fields, **options))


class _ProbeBackend:
    """A backend for ``torch.compile`` that runs graphs as they are, and measures beside them."""

    def __init__(
        self, model: nn.Module, rule: TemplateRule, measure: Callable[..., Losses | ProbedCall]
    ) -> None:
        self._measure = measure
        self._pattern = rule.layer_pattern
        self._layer_map = LayerMap(rule.layer_pattern, model)
        self._template: Template | None = None
        self._losses: dict[int, Losses | ProbedCall] = {}

    def begin(self, template: Template) -> None:
        """Set where the images of the next forward are."""
        self._template, self._losses = template, {}

    def end(self) -> dict[int, Losses | ProbedCall]:
        """Return what the last forward measured, by layer."""
        found, self._template, self._losses = self._losses, None, {}
        return found

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., tuple[Any, ...]]:
        if not has_attention(gm):
            return gm.forward
        gm = copy_graph_module(gm)
        calls = [
            call
            for call in find_attention(gm, layer_pattern=self._pattern)
            if self._is_ours(call, example_inputs)
        ]
        if not calls:
            return gm.forward
        lifted = lift_masks(gm, calls)
        probe_attention_pass(gm, attention=calls, lifted=lifted, measure=self._measure)
        if self._measure is ProbedCall:
            gm = recompute_layers_pass(gm, attention=calls)

        def run(*args: Any) -> tuple[Any, ...]:
            if self._template is None:
                raise ValueError(
                    "a probed model must be run by its Prober, got a call from elsewhere."
                )
            outputs = gm(*args, *self._template.tensors())
            for call, losses in zip(calls, outputs[-len(calls) :], strict=True):
                layer = call.layer
                if layer is None:
                    layer = self._layer_map.layer_of(args[at] for at in call.parameters)
                assert layer is not None
                self._losses[layer] = losses
            own: tuple[Any, ...] = outputs[: -len(calls)]
            return own

        return run

    def _is_ours(self, call: Attention, example_inputs: Sequence[Any]) -> bool:
        """Whether a call belongs to the decoder, in a layer that can be told."""
        if call.layer is not None:
            return True
        examples = [example_inputs[at] for at in call.parameters]
        return self._layer_map.layer_of(examples) is not None


def _check_deviation(layers: Mapping[int, Losses], shape: Sequence[int], model: nn.Module) -> None:
    """Check that the dense output, as it was computed here, is the model's own."""
    weight = next(model.parameters())
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    # Rounding explains this much (half precision, TF32 products); a wrong mask is more.
    limit = 0.05 if is_half or torch.is_autocast_enabled(weight.device.type) else 0.005
    for layer, losses in layers.items():
        found = (losses.deviation.sum() / losses.norm.sum().clamp(min=1e-30)).sqrt().item()
        if not found <= limit:
            raise ValueError(
                f"attention of layer {layer} must be softmax(q k^T) v under its mask within "
                f"{limit}, got outputs that differ by {found:.3g}, for {shape[1]} tokens. "
                "Attention with dropout or other extras cannot be calibrated."
            )
