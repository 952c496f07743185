"""The commands ``demo`` and ``explain``: both run a model on a prompt of photographs.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindsight.demo import DemoOptions


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Add them to the subparsers of the command line; ``everywhere`` holds what all share."""
    demo = commands.add_parser(
        "demo",
        parents=[everywhere],
        help="answer questions and prefill a long prompt, dense and sparse",
        description="Answer questions about images with a small trained model and its profile, "
        "dense and sparse side by side. Then prefill one long prompt of photographs with one "
        "compiled model, dense and sparse, and compare it with a plain reference. Without --model: "
        "a small one, random weights. With --model, --images or --profile: only that.",
    )
    _add_prompt_arguments(demo)
    demo.add_argument("--model", help="folder or hub id of a pretrained model")
    demo.add_argument("--profile", type=Path, help="default: a quarter of the heads each")
    demo.add_argument("--layers", type=int, default=2, help="of the small model (%(default)s)")
    demo.add_argument("--inner", default="inductor", help="what compiles the graphs (%(default)s)")
    demo.add_argument(
        "--whole", action="store_true", help="compile the vision tower too, not only the decoder"
    )
    demo.add_argument(
        "--part",
        choices=("answers", "speed", "both"),
        default="both",
        help="the testbed's answers, the timing of a long prompt, or both (default)",
    )
    demo.add_argument("--no-check", action="store_true", help="do not run the slow reference")
    demo.set_defaults(run=_run_demo)

    explain = commands.add_parser(
        "explain",
        parents=[everywhere],
        help="say what becomes of every attention call of a model",
        description="Trace a model on one prompt of photographs, rewrite it, run it uncompiled, "
        "and print a row per attention call.",
    )
    _add_prompt_arguments(explain)
    explain.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    explain.add_argument("--profile", type=Path, required=True)
    explain.add_argument("--lowering", choices=("auto", "fused", "split"), default="auto")
    explain.set_defaults(run=_run_explain)


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder (default: two sample photographs)")
    parser.add_argument("--num-images", type=int, default=12, help="in the prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="about as many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of crops and weights (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="such as cuda (%(default)s)")


def _options(arguments: argparse.Namespace) -> DemoOptions:
    import torch

    from blindsight.demo import DemoOptions
    from blindsight.ranks import local_device

    return DemoOptions(
        images=arguments.images,
        num_images=arguments.num_images,
        tokens=arguments.tokens,
        model=arguments.model,
        profile=arguments.profile,
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        device=local_device(arguments.device),
        layers=getattr(arguments, "layers", 1),
        inner=getattr(arguments, "inner", "eager"),
        whole=getattr(arguments, "whole", False),
        check=not getattr(arguments, "no_check", True),
        part=getattr(arguments, "part", "speed"),
    )


def _run_demo(arguments: argparse.Namespace) -> None:
    from blindsight.demo import run_demo

    print(run_demo(_options(arguments)))


def _run_explain(arguments: argparse.Namespace) -> None:
    from blindsight.demo.prompt import load
    from blindsight.explanation import explain
    from blindsight.profile import Profile
    from blindsight.progress import quiet

    profile = Profile.load(arguments.profile)
    with quiet():
        model, inputs, _ = load(_options(arguments))
        report = explain(model, inputs, profile, lowering=arguments.lowering)
    print(report)
