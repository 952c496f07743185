"""What tests/test_distributed.py runs on several ranks: a script for torch.distributed.run."""

import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from transformers.distributed import DistributedConfig

from blindsight import Profile, blindsight_backend, use_template
from blindsight.calibration.prober import Prober
from blindsight.cli import main as command_line
from blindsight.evaluation.prefill import Decoder
from blindsight.passes import sparse_attention_pass
from blindsight.passes.graph import copy_graph_module
from blindsight.runtime import rewriting
from blindsight.runtime.choose import Fastest, choose_layouts
from models import (
    END_ID,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    generation_options,
    make_inputs,
    tiny_model,
)
from oracles import oracle_template

# Qwen3-VL comes without a plan of its own.
PLAN = {
    **{f"model.language_model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.language_model.layers.*.self_attn.o_proj": "rowwise",
}


def prompt(family: str, *, is_padded: bool = True) -> dict[str, torch.Tensor]:
    small = Image()
    rows: list[list[Any]] = [[5, small, 4, small, small, 7]]
    if is_padded:
        rows.append([6, small, 4, small, 0, small, 3])
    return make_inputs(family, rows, pad_side="left")


def template_of(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_template(inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,))


def num_heads_of(size: int) -> int:
    """How many heads a model has for so many ranks: each gets a key head of two."""
    return 2 * max(size, 2)


def model_of(family: str, size: int) -> Any:
    return tiny_model(family, num_heads=num_heads_of(size))


def load(family: str, folder: Path) -> Any:
    model_class: Any = type(tiny_model(family))
    plan: dict[str, Any] = {"tp_plan": PLAN} if family == "qwen3_vl" else {}
    config = DistributedConfig(tp_size=dist.get_world_size(), **plan)
    path = folder / family
    model = model_class.from_pretrained(path, distributed_config=config, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def split_by_hand(model: Any) -> None:
    """Split a whole model's attention, with plain tensors that do not say what part they are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            for kind, parameter in list(linear.named_parameters()):
                part = parameter.data.chunk(size, 0)[rank].clone()
                setattr(linear, kind, torch.nn.Parameter(part, requires_grad=False))
        part = attention.o_proj.weight.data.chunk(size, 1)[rank].clone()
        attention.o_proj.weight = torch.nn.Parameter(part, requires_grad=False)

        def add_up(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return all_reduce(output, "sum", dist.group.WORLD)

        attention.o_proj.register_forward_hook(add_up)


def categories_of(size: int) -> list[list[int]]:
    """Of a model for so many ranks, no two of which have the same."""
    num_heads = num_heads_of(size)
    return [[(head + head // 4 + 3 * layer) % 4 for head in range(num_heads)] for layer in (0, 1)]


def profile_of(model: Any, size: int = 2) -> Profile:
    return Profile.for_model(model, categories_of(size))


def run_backend(
    family: str,
    folder: Path,
    *,
    how: str,
    inner: str = "eager",
    lowering: str = "fused",
    only_text: bool = False,
    is_padded: bool = True,
    gains_from: float | None = None,
) -> dict[str, Any]:
    """One prompt, sparse, in one of several ways to say whose heads they are.

    With ``only_text`` the text model alone is compiled, which is faster. With ``gains_from``
    sparse attention is said to be faster from that share of sparse heads on.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if how.startswith("by hand"):
        model = model_of(family, size)
        split_by_hand(model)
    else:
        model = load(family, folder)
    inputs, profile = prompt(family, is_padded=is_padded), profile_of(model, size)
    given = profile
    if how in ("shard", "by hand, shard", "by hand, shard and model"):
        given = profile.shard(rank, size)
    elif how == "wrong shard":
        given = profile.shard(1 - rank, size)
    backend = blindsight_backend(
        given,
        inner=inner,
        lowering=lowering,
        model=model if "model" in how or how == "layers" else None,
    )
    if "unknown class" in how:
        for layer in model.model.language_model.layers:
            kind = type(layer.self_attn)
            layer.self_attn.__class__ = type("AnotherAttention", (kind,), {})
            layer.self_attn.compile(backend=backend)
    if how == "layers":
        for layer in model.model.language_model.layers:
            layer.compile(backend=backend)
    elif how == "pass":
        span_id, is_sink = template_of(inputs)

        def with_pass(gm: Any, example_inputs: Any) -> Any:
            gm = copy_graph_module(gm)
            before = len(example_inputs)
            sparse_attention_pass(gm, profile=profile, add_inputs=True)
            added = sum(node.op == "placeholder" for node in gm.graph.nodes) - before
            return lambda *args: gm(*args, *(span_id.int(), is_sink)[:added])

        model.compile(backend=with_pass)
    elif only_text:
        model.model.language_model.compile(backend=backend)
    elif "unknown class" not in how:
        model.compile(backend=backend)
    try:
        with (
            use_template(*template_of(inputs)) if only_text else nullcontext(),
            nullcontext() if gains_from is None else estimates(gains_from),
        ):
            logits = model(**inputs, use_cache=False).logits
    except ValueError as error:
        return {"error": str(error)}
    categories = [v.categories for v in backend.state.verdicts if v.rewritten]
    return {"logits": logits, "runs": runs_of(backend), "categories": categories}


@contextmanager
def estimates(gains_from: float) -> Iterator[None]:
    def choose(calls: Any, *args: Any, **options: Any) -> Any:
        is_sparse = [code > 0 for call in calls for code in call.categories]
        slower = sum(is_sparse) < gains_from * len(is_sparse)
        fastest = Fastest.OWN_GRAPH if slower else Fastest.SPARSE
        return replace(choose_layouts(calls, *args, **options), fastest=fastest)

    with mock.patch.object(rewriting, "choose_layouts", choose):
        yield


def runs_of(backend: Any) -> dict[str, int]:
    """How often the decoder's attention ran in which way."""
    runs: dict[str, int] = {}
    for verdict in backend.state.verdicts:
        if verdict.rewritten:
            for run, count in verdict.runs.items():
                runs[run] = runs.get(run, 0) + count
    return runs


def run_generate(family: str, folder: Path, *, cache: str) -> dict[str, Any]:
    """``generate`` of a model that is split, its prefill sparse."""
    model, inputs = load(family, folder), prompt(family)
    backend = blindsight_backend(
        profile_of(model, dist.get_world_size()),
        inner="eager",
        lowering="fused",
    )
    model.compile(backend=backend)
    found = model.generate(**inputs, **generation_options(cache))
    return {"tokens": found.sequences, "scores": found.scores, "runs": runs_of(backend)}


def run_command(folder: Path, *, arguments: list[str], fail_at: int = 0) -> dict[str, Any]:
    """A command of ours; where asked to, process 1 fails at its so manieth batch."""
    done = 0

    def counted(work: Any) -> Any:
        def counting(self: Any, inputs: Any) -> Any:
            nonlocal done
            done += 1
            if done == fail_at and dist.get_rank() == 1:
                raise ValueError("no more memory.")
            return work(self, inputs)

        return counting

    prober, prepare = Prober.__call__, Decoder.prepare
    Prober.__call__ = counted(prober)  # type: ignore[method-assign]
    Decoder.prepare = counted(prepare)  # type: ignore[method-assign]
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = command_line(arguments)
    finally:
        Prober.__call__ = prober  # type: ignore[method-assign]
        Decoder.prepare = prepare  # type: ignore[method-assign]
    # A barrier, so that no process looks or goes on before all are done.
    dist.barrier()
    files = sorted(path.name for path in folder.glob("**/*.*-of-*"))
    dist.barrier()
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "done": done,
        "files": files,
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for case in cases:
        torch.compiler.reset()
        options = {k: v for k, v in case.items() if k not in ("name", "what")}
        found = globals()[case["what"]](folder=folder, **options)
        torch.save(found, folder / f"{case['name']}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
