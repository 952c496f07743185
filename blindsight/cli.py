"""The command line: ``blindsight demo``, ``show``, ``explain`` and so on; see ``--help``.

Each command imports what it needs, so that help does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blindsight.calibrate_cli import add_commands as add_calibration_command
from blindsight.evaluation_cli import add_commands as add_evaluation_commands

if TYPE_CHECKING:
    from blindsight.demo import DemoOptions
    from blindsight.profile import Profile


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error, which is one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("blindsight: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"blindsight: error: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blindsight", description="Per-head sparse attention for vision-language models."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--traceback", action="store_true", help="show where an error is from")

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

    show = commands.add_parser("show", parents=[everywhere], help="print what a profile says")
    show.add_argument("profile", type=Path)
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw the heads by category")
    show.set_defaults(run=_run_show)

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

    tune = commands.add_parser(
        "tune",
        help="measure this device, for the choice of how to compute attention",
        description="Measure what attention costs on this device, and keep it for later runs.",
    )
    tune.add_argument("--device", default="cpu")
    tune.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), nargs="+", default=["float32"]
    )
    tune.set_defaults(run=_run_tune)
    add_calibration_command(commands, everywhere)
    add_evaluation_commands(commands, everywhere)
    return parser


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder (default: two sample photographs)")
    parser.add_argument("--num-images", type=int, default=12, help="in the prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="about as many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of crops and weights (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")


def _options(arguments: argparse.Namespace) -> DemoOptions:
    import torch

    from blindsight.demo import DemoOptions

    return DemoOptions(
        images=arguments.images,
        num_images=arguments.num_images,
        tokens=arguments.tokens,
        model=arguments.model,
        profile=arguments.profile,
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
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
    from blindsight.demo_prompt import load
    from blindsight.explanation import explain
    from blindsight.profile import Profile
    from blindsight.progress import quiet

    profile = Profile.load(arguments.profile)
    with quiet():
        model, inputs, _ = load(_options(arguments))
        report = explain(model, inputs, profile, lowering=arguments.lowering)
    print(report)


def _run_tune(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from blindsight.cost_model import device_name, save_costs
    from blindsight.tune import measure_costs

    device = torch.device(arguments.device)
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        with tqdm(total=5, desc=name, leave=False) as bar, torch.inference_mode():

            def progress(text: str, bar: tqdm = bar) -> None:
                bar.set_postfix_str(text)
                bar.update()

            costs = measure_costs(device, dtype, progress=progress)
        path = save_costs(device, dtype, costs)
        print(
            f"{device_name(device)}, {name}: a pair of query and key takes {costs.causal:.3g} ns "
            f"under is_causal, {costs.masked:.3g} under a mask, {costs.flex:.3g} in FlexAttention"
        )
    print(f"kept in {path}")


def _run_show(arguments: argparse.Namespace) -> None:
    from blindsight.profile import Profile

    profile = Profile.load(arguments.profile)
    print(describe(profile))
    if arguments.plot is not None:
        from blindsight.plots import plot_profile

        plot_profile(profile, arguments.plot)


def describe(profile: Profile) -> str:
    """Return what a profile says, as text."""
    shape = ", ".join(f"{name}={value}" for name, value in profile.fingerprint.items())
    rule = profile.rule
    lines = [
        f"model        {' @ '.join(profile.model.values()) or 'not named'}",
        f"fingerprint  {shape}",
        f"images       token ids {_ids(rule.image_token_ids)}, between "
        f"{_ids(rule.start_token_ids)} and {_ids(rule.end_token_ids)}",
        *(
            f"{name:13}token ids {_ids(ids)}"
            for name, ids in (
                ("first tiles", rule.leading_tile_ids),
                ("later tiles", rule.trailing_tile_ids),
                ("videos", rule.video_token_ids),
            )
            if ids
        ),
        f"sinks        at {_ids(rule.sink_offsets)} from the start of an image",
        f"layers       {rule.layer_pattern}",
        f"calibration  {', '.join(f'{k}={v}' for k, v in profile.calibration.items()) or 'none'}",
        f"evidence     {', '.join(profile.evidence) or 'none'}",
        f"digest       {profile.digest}",
        "",
    ]
    return "\n".join([*lines, *heads_by_layer(profile)])


def heads_by_layer(profile: Profile) -> list[str]:
    """Return a table: the heads of each category, by layer with attention."""
    from blindsight.categories import NUM_CATEGORIES, HeadCategory

    total = len(profile.layers) * profile.num_heads
    names = HeadCategory.names()
    widths = [max(len(name), len(str(total))) for name in names]

    def row(first: str, cells: Sequence[object]) -> str:
        numbers = (str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.rjust(5), *numbers])

    lines = [row("layer", names)]
    for layer in profile.layers:
        codes = profile.categories[layer].tolist()
        lines.append(row(str(layer), [codes.count(code) for code in range(NUM_CATEGORIES)]))
    counts = list(profile.counts().values())
    lines.append(row("all", counts))
    lines.append(row("", [f"{count / max(total, 1):.0%}" for count in counts]))
    return lines


def _ids(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
