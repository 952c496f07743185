"""The commands ``demo`` and ``explain``, which both run a model on a prompt of photographs.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from blindsight.cli.models import DEFAULT_DEVICE, DTYPES
from blindsight.cli.numbers import positive


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the commands; ``everywhere`` is the parent parser with the shared options."""
    _add_demo(commands, everywhere)
    _add_explain(commands, everywhere)


def _add_demo(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[everywhere],
        help="answer questions and prefill a long prompt, dense and sparse",
        description="First, answer questions about images with a small trained model and its "
        "profile, dense and sparse side by side. Second, prefill one long prompt of photographs "
        "with one compiled model, dense and sparse, and compare the result with a plain reference; "
        "without --model, that model is small and has random weights. With --model, --images or "
        "--profile, only the second part runs.",
    )
    _add_prompt_arguments(parser)
    parser.add_argument("--model", help="folder or hub id of a pretrained model")
    parser.add_argument(
        "--profile", type=Path, help="a profile (default: a quarter of the heads for each category)"
    )
    parser.add_argument(
        "--layers", type=positive, default=2, help="layers of the small model (%(default)s)"
    )
    parser.add_argument(
        "--inner", default="inductor", help="what compiles the graphs (%(default)s)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="compile the vision tower too, not only the decoder"
    )
    parser.add_argument(
        "--part",
        choices=("answers", "speed", "both"),
        default="both",
        help="the answers, the timing of the long prompt, or both (default)",
    )
    parser.add_argument("--no-check", action="store_true", help="skip the reference, which is slow")
    parser.set_defaults(run=_run_demo)


def _add_explain(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "explain",
        parents=[everywhere],
        help="report what happens to every attention call of a model",
        description="Trace a model on one prompt of photographs, rewrite it, run it uncompiled, "
        "and print what became of its attention calls.",
    )
    _add_prompt_arguments(parser)
    parser.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--lowering", choices=("auto", "fused", "split"), default="auto")
    parser.set_defaults(run=_run_explain)


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of images (default: two sample photographs)"
    )
    parser.add_argument(
        "--num-images", type=positive, default=12, help="images in the prompt (%(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=4000,
        help="approximate length of the prompt (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the crops and the weights (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and computation (%(default)s)",
    )
    parser.add_argument("--device", help=f"such as cpu or cuda ({DEFAULT_DEVICE})")


def _prompt_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :class:`~blindsight.demo.DemoOptions` that both commands have."""
    import torch

    from blindsight.ranks import local_device

    names = ("images", "num_images", "tokens", "model", "profile", "seed")
    return {
        **{name: getattr(arguments, name) for name in names},
        "dtype": getattr(torch, arguments.dtype),
        "device": local_device(arguments.device),
    }


def _run_demo(arguments: argparse.Namespace) -> None:
    from blindsight.demo import DemoOptions, run_demo

    options = DemoOptions(
        **_prompt_options(arguments),
        layers=arguments.layers,
        inner=arguments.inner,
        whole=arguments.whole,
        check=not arguments.no_check,
        part=arguments.part,
    )
    print(run_demo(options))


def _run_explain(arguments: argparse.Namespace) -> None:
    from blindsight.demo import DemoOptions, load
    from blindsight.explanation import explain
    from blindsight.profile import Profile
    from blindsight.progress import quiet

    profile = Profile.load(arguments.profile)
    with quiet():
        model, inputs, _ = load(DemoOptions(**_prompt_options(arguments)))
        report = explain(model, inputs, profile, lowering=arguments.lowering)
    print(report)
