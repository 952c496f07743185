"""The torch.compile backend: per graph, decide what to rewrite; per call, decide what to run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import fx, nn

from blindsight.attention.lowering import Lowering
from blindsight.passes.contract import PassList
from blindsight.profile import Profile
from blindsight.report import Report, Verdict
from blindsight.runtime.attached import AttachedModels
from blindsight.runtime.compiled_graph import CompiledGraph
from blindsight.runtime.forwards import Forwards
from blindsight.runtime.inner import OPTIONS_OF_INDUCTOR, Inner
from blindsight.runtime.state import BackendState
from blindsight.runtime.warmup import warm_up

# Arguments of torch.compile itself, which say nothing to a backend.
_OF_TORCH_COMPILE = ("backend", "dynamic", "fullgraph", "isolate_recompiles", "recompile_limit")
_OF_COMPILE_FX = ("decompositions", "inner_compile")

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


class BlindsightBackend:
    """See :func:`blindsight_backend`. One instance keeps the state of one compiled model."""

    def __init__(
        self,
        profile: Profile,
        *,
        inner: str | Callable[..., Any],
        model: nn.Module | None,
        strict: bool,
        lowering: Lowering,
        passes: PassList,
        inner_options: dict[str, Any],
    ) -> None:
        self.__name__ = "blindsight"
        profile = dataclasses.replace(profile)  # nobody else can write to its tensors
        self.inner = Inner(inner, inner_options, passes.identities)
        forwards = Forwards(profile, strict=strict)
        reference = weakref.ref(self)

        def is_this(compiler: object) -> bool:
            return _backend_of(compiler) is reference() is not None

        models = AttachedModels(profile, forwards, is_this)
        self.state = BackendState(profile, strict, lowering, forwards, models, passes)
        self._lock = threading.Lock()
        self._num_graphs = 0
        if model is not None:
            models.attach(model)

    def __repr__(self) -> str:
        profile = self.state.profile
        return (
            f"<blindsight backend: lowering {self.state.lowering.value!r}, inner "
            f"{self.inner.name!r}, profile {profile.digest[:8]} of {len(profile.layers)} layers; "
            f"{self._num_graphs} graphs so far>"
        )

    def __deepcopy__(self, memo: object) -> BlindsightBackend:
        """Return itself: a copy of a compiled model goes on with its backend, as with any."""
        return self

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's; ``options`` are those of ``torch.compile``."""
        with self._lock:
            number = self._num_graphs
            self._num_graphs += 1
        self.state.models.attach_to_called()
        graph = CompiledGraph(
            self.state, gm, example_inputs, number, self.inner.with_options(options)
        )
        return graph.as_callable()

    def report(self) -> Report:
        """Return what became of every attention call that was compiled so far."""
        state = self.state
        layers = state.forwards.layers
        return Report(
            tuple(map(Verdict.copy, state.verdicts)),
            missing_layers=tuple(sorted(layers - state.forwards.met)),
            layers=tuple(sorted(layers)),
        )

    def warmup(
        self,
        model: Callable[..., Any],
        inputs: Mapping[str, Any],
        lengths: int | Sequence[int],
        *,
        generate: bool = False,
        progress: bool | None = None,
    ) -> None:
        """Compile ahead for prompts of these lengths, so that no user waits for it.

        Runs a prompt, made longer with text, at each length: as any call, and under
        :func:`~blindsight.disabled`. A graph for many lengths is compiled once for all those up to
        a power of two: ``lengths`` of powers of two are enough, with one to begin with that Dynamo
        compiles for itself. Of the graphs around a vision tower, Dynamo may compile some again when
        the number of images changes.

        ``generate()`` runs other graphs than a call does: it gives the decoder other positions, and
        a cache that is empty at first and then grows by one token at a time. A server that uses it
        needs ``generate=True``, and at least two lengths, as Dynamo compiles for any length when
        it sees the second.

        Args:
            model: What is compiled with this backend, called as ``model(**inputs)``.
            inputs: Of a short prompt with two images or more, as the processor makes them, and
                whatever else a call is given (``use_cache``, ``logits_to_keep``).
            lengths: In tokens, none less than that of the prompt; or one such number.
            generate: Whether to run ``model.generate(**inputs)`` for a few tokens instead. It has
                to be compiled in place: ``model.compile(backend=backend)``, or its decoder.
            progress: See :func:`~blindsight.progress.progress_bar`.

        Raises:
            ValueError: The prompt has no ``input_ids``, fewer than two images, no text, or is
                longer than one of the lengths; or the model is not compiled with this backend, or
                has no ``generate``.
        """
        before = self._num_runs()
        rule = self.state.profile.rule
        warm_up(model, rule, inputs, lengths, generate=generate, progress=progress)
        if self._num_runs() == before:
            advice = (
                "generate() of what torch.compile returns runs the uncompiled model: compile it in "
                "place, model.compile(backend=backend)."
                if generate
                else "Give what torch.compile returned."
            )
            raise ValueError(
                f"model must be what is compiled with this backend, got {type(model).__name__} "
                f"that did not run through it. {advice}"
            )

    def _num_runs(self) -> int:
        return sum(sum(row.runs.values()) for row in self.report().rows)

    def detach(self) -> None:
        """Remove the hooks from the model."""
        self.state.models.detach()


def _with_a_profile(
    function: Callable[_Parameters, _Returned],
) -> Callable[_Parameters, _Returned]:
    """Tell a user who gave torch.compile the function itself, which Dynamo calls with a graph."""

    @functools.wraps(function)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        if args and isinstance(args[0], fx.GraphModule):
            raise ValueError(
                "blindsight_backend must be called with a profile, got a graph of Dynamo's. Say "
                f"torch.compile(model, backend={function.__name__}(profile))."
            )
        return function(*args, **kwargs)

    return checked


@_with_a_profile
def blindsight_backend(
    profile: Profile | str | os.PathLike[str],
    *,
    inner: str | Callable[..., Any] = "inductor",
    model: nn.Module | None = None,
    strict: bool = True,
    lowering: str = "auto",
    passes: Sequence[Any] = (),
    **inner_options: Any,
) -> BlindsightBackend:
    """Return a backend for ``torch.compile`` that makes a model's prefill attention sparse.

    Prompts with several images run attention in which every head keeps what its category in the
    profile keeps; everything else, decoding included, runs the model's own graphs.

    Args:
        profile: A profile, or the path of one.
        inner: The backend that compiles the graphs: a name, or a callable
            ``(gm, example_inputs, **options)``.
        model: The whole model, or the stage of a pipeline. By default it is found in the first
            call that is compiled. Give it to learn at once that a profile does not fit, or where a
            function is compiled as a whole (``fullgraph=True``). The model is not kept
            alive. Two hooks on it show its ``input_ids`` where it runs eagerly, and make what
            Dynamo gives up on an error; :meth:`BlindsightBackend.detach` removes them.
        strict: Whether it is an error if attention that the profile covers cannot be rewritten,
            or never reaches the backend. If false it stays dense, with one warning.
        lowering: How heads of several categories are computed: ``"fused"`` in one call of
            FlexAttention, ``"split"`` with dense heads apart on ``scaled_dot_product_attention``
            where the model's own mask is plain causal, or ``"auto"``: whichever is estimated to be
            the fastest for a prompt (see ``blindsight tune``), and dense where that is.
        passes: Functions of a ``GraphModule`` that run on every variant of a graph right before it
            is compiled, in this order; or :class:`blindsight.passes.GraphPass`, which may also run
            before attention is found, and say what they require of each other.
        **inner_options: Passed on to ``inner``, for example ``mode="max-autotune-no-cudagraphs"``.

    Raises:
        ValueError: The profile is damaged or does not fit the model, the inner backend or the
            lowering does not exist, an option is torch.compile's own or none of Inductor's, or
            looks like a misspelt one of these for another backend by name, or a pass requires
            what no pass before it ensures.
    """
    if isinstance(inner, str):
        _check_options(inner, inner_options)
    if not isinstance(strict, bool):
        raise ValueError(f"strict must be True or False, got {strict!r}.")
    return BlindsightBackend(
        Profile.of(profile),
        inner=inner,
        model=model,
        strict=strict,
        lowering=Lowering.of(lowering),
        passes=PassList(passes),
        inner_options=inner_options,
    )


def _check_options(inner: str, options: Mapping[str, Any]) -> None:
    """Check the options for an inner backend by name: few of torch's would complain themselves.

    Raises:
        ValueError: One is for torch.compile, looks like one of ours, misspelt, or is unknown to
            Inductor.
    """
    ours = [*inspect.signature(blindsight_backend).parameters][:-1]
    known = [*ours, *OPTIONS_OF_INDUCTOR] if inner == "inductor" else ours
    for name in options:
        if name in (*OPTIONS_OF_INDUCTOR, *_OF_COMPILE_FX):
            continue
        if name in _OF_TORCH_COMPILE:
            raise ValueError(
                f"options must be the backend's, got {name!r}. Give it to torch.compile, not to "
                f"the backend: torch.compile(model, backend=backend, {name}=...)."
            )
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            raise ValueError(f"options must be spelt as documented, got {name!r} for {meant[0]!r}.")
        if inner == "inductor":
            raise ValueError(
                f"options must be among {', '.join(known[1:])}, got {name!r}. What is of "
                f"Inductor's config goes into options={{{name!r}: ...}}."
            )


def _backend_of(compiler: object) -> object:
    """Return the backend that Dynamo's compiler leads to, whichever way it was asked for."""
    found = getattr(compiler, "compiler_fn", compiler)
    by_name = getattr(found, "backend_for", None)
    if by_name is None:
        return found
    arguments = getattr(compiler, "kwargs", {})
    return by_name(arguments.get("options"), arguments.get("mode"))
