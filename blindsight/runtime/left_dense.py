"""What to say of layers that ran outside of a backend's graphs, and so dense."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch

from blindsight.text_tables import compact

_COMPILE_DECODER = (
    "Compile the decoder alone, in models of transformers "
    "model.get_decoder().compile(backend=backend)."
)
_RAISE_LIMIT = (
    "model.compile(backend=backend, recompile_limit=64)"
    if "recompile_limit" in inspect.signature(torch.compile).parameters
    else "torch._dynamo.config.recompile_limit = 64, in every thread that runs it"
)
# What Dynamo has given up stays given up.
_AGAINST_LIMIT = (
    f"{_COMPILE_DECODER} Or raise the limit, in a new process or after torch._dynamo.reset(): "
    f"{_RAISE_LIMIT}."
)
DECODER_NOT_SEEN = (
    "a forward ran its decoder outside of this backend's graphs, so dense, as Dynamo gave up "
    f"compiling it. {_AGAINST_LIMIT}"
)


def layers_of_forward(missing: Iterable[int], never: Iterable[int], *, certain: bool) -> str:
    """Return what to say of a forward whose tokens are known.

    Args:
        missing: Layers that it did not run in the backend's graphs.
        never: Layers that no forward ever did.
        certain: Whether it ended well.
    """
    never_met = sorted(never)
    other_causes = (
        "Load the model with attn_implementation='sdpa', call it without output_attentions "
        "and without gradient checkpointing (model.eval()), and set no stance of torch.compiler "
        "that compiles nothing new. generate(compile_config=...) compiles decoding alone: compile "
        "in place, model.get_decoder().compile(backend=backend)."
    )
    if recompile_limit_was_hit():
        causes = (
            "torch._dynamo has reached its recompile_limit, and runs what it gave up as it is. "
            f"{_AGAINST_LIMIT} If that is not why: {other_causes}"
        )
    else:
        causes = f"{other_causes} If torch._dynamo warned of its recompile_limit: {_AGAINST_LIMIT}"
    return (
        f"the attention of layers {compact(sorted(missing))} of the profile did not run through "
        "this backend, so it was dense"
        + (f" (layers {compact(never_met)} were never met)" if never_met else "")
        + f". {causes}"
        + ("" if certain else " If the last forward ended with an error of its own, call again.")
    )


def layers_under_template(missing: Iterable[int], served: Iterable[int]) -> str:
    """Return what to say of a call under a template given by hand.

    Args:
        missing: Sparse layers that did not run in the backend's graphs.
        served: Layers that did.
    """
    return (
        f"the attention of layers {compact(sorted(missing))} of the profile did not run through "
        f"this backend under the template, layers {compact(sorted(served))} did. If this is a "
        "stage of a pipeline, give its backend the stage's profile: profile.stage(first, stop, "
        f"keeps_numbers=...). If torch._dynamo warned of its recompile_limit: {_AGAINST_LIMIT}"
    )


def recompile_limit_was_hit() -> bool:
    """Whether Dynamo ever gave up compiling a frame in this process: it then runs as it is."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return any("recompile limit exceeded" in reason for reason in reasons)
