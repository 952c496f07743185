"""Run a model on prompts and measure, for each, what every category of every head would lose.

The model runs its own graphs, uncompiled; beside each call of the decoder's attention its losses
are measured, see :mod:`blindsight.calibration.probe`.

Shapes: N prompts, B batch, L layers, H query heads, C categories, R regions, T tokens.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindsight.calibration.measurements import MeasurementFile, Measurements
from blindsight.calibration.probe import Call, Losses, empty_losses, measure_losses
from blindsight.configs import config_of, shares_keys, text_config, with_attention
from blindsight.data.processors import inputs_on, model_inputs
from blindsight.data.samples import Samples
from blindsight.fingerprints import fingerprint, layer_types_of
from blindsight.modules import digest_of_weights, in_eval_mode, plain_name
from blindsight.passes.find_attention import Attention, find_attention, has_attention
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.lift_mask import lift_mask
from blindsight.passes.probe_attention import probe_attention_pass
from blindsight.passes.recompute_layers import recompute_layers_pass
from blindsight.progress import progress_bar
from blindsight.ranks import Ranks, current_ranks
from blindsight.runtime.layers import LayerMap, compact, layer_of_path
from blindsight.runtime.shards import check_is_whole
from blindsight.template import Template, TemplateRule

logger = logging.getLogger(__name__)

# Of frames, each with its own number and sizes of images, and of frames of all models so far.
_RECOMPILE_LIMITS = {"recompile_limit": 64, "accumulated_recompile_limit": 100_000}
_NUM_TOKENS = 4  # that may follow a prompt, and are looked at


def measure(
    model: nn.Module,
    processor: Any,
    samples: Samples,
    *,
    rule: TemplateRule,
    next_token: bool = False,
    batch_size: int = 1,
    padding_side: str = "left",
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Measurements:
    """Measure what the categories of all heads would lose on each sample.

    Args:
        model: A transformers model that reads images, with ``attn_implementation="sdpa"``. It
            stays as it is, and its outputs too.
        processor: Its processor.
        samples: From :func:`~blindsight.data.samples.load_samples`.
        rule: How the images of a prompt are found, and which tokens are sinks.
        next_token: Whether to measure the effect on the next token too. That takes gradients, for
            which every layer is computed once more, and the memory of what attention reads and
            writes, in all layers.
        batch_size: Prompts that run together.
        padding_side: Of shorter prompts in a batch.
        progress: See :func:`~blindsight.progress.progress_bar`.
        checkpoint: A file that keeps what was measured so far. Where it exists, the measurement
            goes on from there. It stays when all is done. In a
            :func:`~blindsight.ranks.shared_run` each process has its own, named after it.

    Raises:
        ValueError: A sample cannot be read, the model's attention cannot be measured, or the
            checkpoint is of something else; the message says which.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    ranks = current_ranks()
    samples.check()
    positions = ranks.positions(len(samples), batch_size)

    def work() -> tuple[list[int], Measurements | None]:
        if not positions:
            return [], None
        own = samples if ranks.size == 1 else samples.take(positions)
        found = _measure_own(
            model,
            processor,
            own,
            ranks,
            rule=rule,
            next_token=next_token,
            batch_size=batch_size,
            padding_side=padding_side,
            progress=progress,
            checkpoint=checkpoint,
        )
        return positions, found

    everyone = ranks.gather(work)
    found = Measurements.join([part for _, part in everyone if part is not None])
    if ranks.size == 1:
        return found
    order = torch.tensor([at for own, _ in everyone for at in own]).argsort()
    return Measurements(**{name: values[order] for name, values in found.tensors().items()})


def _measure_own(
    model: nn.Module,
    processor: Any,
    samples: Samples,
    ranks: Ranks,
    *,
    rule: TemplateRule,
    next_token: bool,
    batch_size: int,
    padding_side: str,
    progress: bool | None,
    checkpoint: str | os.PathLike[str] | None,
) -> Measurements:
    """Measure the samples of this process."""
    saved = None
    parts: list[Measurements] = []
    if checkpoint is not None:
        saved = MeasurementFile(
            ranks.own(checkpoint),
            {
                "process": ranks.name,
                "model": json.dumps(fingerprint(model), sort_keys=True),
                "weights": digest_of_weights(model),
                "samples": samples.digest(),
                "num_samples": len(samples),
                "rule": rule.to_json(),
                "next_token": next_token,
                "batch_size": batch_size,
                "padding_side": padding_side,
                "torch": torch.__version__,
            },
        )
        parts = saved.load()
    done = sum(map(len, parts))
    prober = Prober(model, rule, next_token=next_token)
    bar = progress_bar(
        progress, total=len(samples), initial=done, desc="calibrating", unit="prompt"
    )
    try:
        # Gradients are taken, and what inference mode makes has none.
        with bar, in_eval_mode(model), torch.inference_mode(False):
            while done < len(samples):
                batch = list(samples[done : done + batch_size])
                inputs = model_inputs(processor, batch, padding_side=padding_side)
                parts.append(prober(inputs))
                done += len(batch)
                bar.update(len(batch))
                if saved is not None:
                    saved.save_now_and_then(parts)
    finally:
        if saved is not None and parts:
            saved.save(parts)
    return Measurements.join(parts)


class Prober:
    """Runs a model and measures its attention; one instance serves many prompts."""

    def __init__(self, model: nn.Module, rule: TemplateRule, *, next_token: bool = False) -> None:
        model = getattr(model, "_orig_mod", model)
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
        self._backend = _ProbeBackend(model, rule, Call if next_token else measure_losses)
        self._compiled: Callable[..., Any] = torch.compile(model, backend=self._backend)
        self._options: dict[str, Any] = {"use_cache": False}
        known = inspect.signature(model.forward).parameters
        if "logits_to_keep" in known and not shares_keys(model):
            self._options["logits_to_keep"] = 1

    def __call__(self, inputs: Mapping[str, Any]) -> Measurements:
        """Measure one batch: arguments of the model's forward, with ``input_ids [B, T]``."""
        inputs = inputs_on(self._model, inputs)
        template = self._rule.template_of_inputs(inputs)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        if template.restricts_queries_from(0):
            layers, shares = self._run(inputs, template, mask)
        else:
            layers, shares = {}, None
        num_gradients = 0 if shares is None else shares.shape[1]
        # Of layers without attention, and of prompts that no category restricts.
        nothing = empty_losses(len(mask), self._num_heads, torch.device("cpu"), num_gradients)
        of_all = {at: layers.get(at, nothing) for at in range(len(self._layer_types))}
        return measurements_of(of_all, shares)

    def _run(
        self, inputs: dict[str, Any], template: Template, mask: Tensor
    ) -> tuple[dict[int, Losses], Tensor | None]:
        """Return the losses by layer, and the probabilities of the tokens that may follow."""
        self._backend.begin(template)
        options = dict(self._options)
        if not bool(mask[:, -1].all()):
            options.pop("logits_to_keep", None)  # the last position is not every prompt's last
        with _gradients_from_embeddings(self._model) if self._next_token else torch.no_grad():
            with torch._dynamo.config.patch(_RECOMPILE_LIMITS), _untraced(self._towers):
                logits = self._compiled(**{**inputs, **options}).logits
            calls = self._backend.end()
            expected = with_attention(self._layer_types)
            if missing := sorted(set(expected) - set(calls)):
                raise ValueError(
                    f"the attention of layers {compact(expected)} must be met, got none of layers "
                    f"{compact(missing)}. Load the model with attn_implementation='sdpa', or give "
                    "a rule whose layer_pattern fits its modules."
                )
            if self._next_token:
                losses, shares = _with_gradients(calls, logits, mask)
            else:
                losses, shares = {n: x for n, x in calls.items() if isinstance(x, Losses)}, None
        _check_deviation(losses, inputs["input_ids"].shape, self._model)
        return losses, shares


def _with_gradients(
    calls: Mapping[int, Losses | Call], logits: Tensor, mask: Tensor
) -> tuple[dict[int, Losses], Tensor]:
    """Measure calls with the gradients of the likeliest next tokens' log-probabilities.

    The KL divergence of a small change is half the mean of its squared effect on the
    log-probabilities, over tokens as the model draws them: the Fisher information.

    Returns:
        The losses by layer, and the probabilities ``[B, Y]`` of those tokens.
    """
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # of each prompt
    at = torch.arange(len(mask), device=mask.device)
    next_logits = logits[at, last if logits.shape[1] == mask.shape[1] else -1]
    log_p = next_logits.float().log_softmax(-1)
    likeliest = log_p.detach().topk(min(_NUM_TOKENS, log_p.shape[-1]), dim=-1)
    # Prompts of a batch do not see each other: one number for each token serves all.
    chosen = log_p.gather(1, likeliest.indices).sum(0)
    kept = {layer: call for layer, call in calls.items() if isinstance(call, Call)}
    gradients = _gradients_of(chosen, [call.output for call in kept.values()])
    losses = {
        layer: call.losses(of_call)
        for (layer, call), of_call in zip(kept.items(), gradients, strict=True)
    }
    return losses, likeliest.values.exp()


def _gradients_of(numbers: Tensor, outputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield, for each output, the gradients of all numbers ``[Y]`` with respect to it."""
    each = torch.eye(len(numbers), dtype=numbers.dtype, device=numbers.device)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    batched: Sequence[Tensor | None] | None
    found: Sequence[Sequence[Tensor | None]]
    try:  # all at once: every pass computes the layers again
        batched = torch.autograd.grad(numbers, outputs, each, is_grads_batched=True, **options)
    except RuntimeError as error:  # an operator that knows no batches, or too little memory
        logger.info("gradients one after the other: %s", error)
        batched = None
    if batched is None:  # the error is gone by now, and with it what its frames kept
        passes = [torch.autograd.grad(numbers, outputs, one, **options) for one in each]
        found = list(zip(*passes, strict=True))
    else:
        found = [len(each) * (None,) if part is None else part.unbind() for part in batched]
    for parts, output in zip(found, outputs, strict=True):
        yield [torch.zeros_like(output) if part is None else part for part in parts]


@contextmanager
def _gradients_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Let gradients flow from the token embeddings on, and none into the weights."""
    parameters = list(model.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    embeddings: Any = model
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        embeddings.get_input_embeddings().weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def _towers_of(model: nn.Module, layer_pattern: str) -> list[nn.Module]:
    """Return the parts with attention of their own, beside the decoder: vision towers."""
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
    """Keep Dynamo out of modules: it would trace a vision tower anew for unlike images."""
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
    """Return the means over rows of what was measured of each layer.

    Args:
        layers: The losses of one batch, by layer.
        shares: ``[B, Y]``, the probabilities of the tokens that gradients are of.
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


class _ProbeBackend:
    """A backend for ``torch.compile`` that runs the graphs as they are, and measures."""

    def __init__(
        self, model: nn.Module, rule: TemplateRule, measure: Callable[..., Losses | Call]
    ) -> None:
        self._measure = measure
        self._pattern = rule.layer_pattern
        self._layer_map = LayerMap(rule.layer_pattern, model)
        self._template: Template | None = None
        self._losses: dict[int, Losses | Call] = {}

    def begin(self, template: Template) -> None:
        """Say where the images of the next forward are."""
        self._template, self._losses = template, {}

    def end(self) -> dict[int, Losses | Call]:
        """Return what was measured of each layer in the forward that is over."""
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
        lifted = [lift_mask(gm, call) for call in calls]
        probe_attention_pass(gm, attention=calls, lifted=lifted, measure=self._measure)
        if self._measure is Call:
            gm = recompute_layers_pass(gm, attention=calls)

        def run(*args: Any) -> tuple[Any, ...]:
            if self._template is None:
                raise ValueError(
                    "a probed model must be run by its Prober, got a call from elsewhere."
                )
            outputs = gm(*args, *self._template.tensors())
            for call, losses in zip(calls, outputs[-len(calls) :], strict=True):
                layer = layer_of_path(call)
                if layer is None:
                    layer = self._layer_map.layer_of(args[at] for at in call.parameters)
                assert layer is not None
                self._losses[layer] = losses
            own: tuple[Any, ...] = outputs[: -len(calls)]
            return own

        return run

    def _is_ours(self, call: Attention, example_inputs: Sequence[Any]) -> bool:
        """Whether a call is the decoder's, and its layer can be told."""
        if layer_of_path(call) is not None:
            return True
        examples = [example_inputs[at] for at in call.parameters]
        return self._layer_map.layer_of(examples) is not None


def _check_deviation(layers: Mapping[int, Losses], shape: Sequence[int], model: nn.Module) -> None:
    """Check that the dense output, as it was computed here, is the model's own."""
    dtype = next(model.parameters()).dtype
    # What rounding (of half-precision weights, or of TF32 products) explains, and no wrong mask.
    limit = 0.05 if dtype in (torch.bfloat16, torch.float16) else 0.005
    for layer, losses in layers.items():
        found = (losses.deviation.sum() / losses.norm.sum().clamp(min=1e-30)).sqrt().item()
        if not found <= limit:
            raise ValueError(
                f"attention of layer {layer} must be softmax(q k^T) v under its mask within "
                f"{limit}, got outputs that differ by {found:.3g}, for {shape[1]} tokens. "
                "Attention with dropout or other extras cannot be calibrated."
            )
