"""The command ``blindsight calibrate``: its options, and the summary that it prints.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindsight.cli.models import add_arguments, add_progress
from blindsight.cli.numbers import not_negative, path, positive, share

if TYPE_CHECKING:
    from blindsight.profile import Profile


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the command; ``everywhere`` is the parent parser with the shared options."""
    parser = commands.add_parser(
        "calibrate",
        parents=[everywhere],
        help="measure a model on prompts of images, and write a profile",
        description="Measure what every category of every head would lose on prompts with several "
        "images or videos, choose the cheapest categories within the budget, and write a profile. "
        "An interrupted calibration resumes where it stopped. Under torchrun, the processes share "
        "the prompts.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="JSON-lines file of {images, videos, messages}, folder with data.jsonl, folder that "
        "datasets saved, or hub id",
    )
    parser.add_argument("-o", "--output", type=path, required=True, help="the profile to write")
    parser.add_argument(
        "--budget",
        type=not_negative,
        help="how far one head may move the next token: square root of the KL divergence in "
        "nats; 0 allows no change (default: 0.005)",
    )
    parser.add_argument(
        "--rule",
        type=path,
        metavar="FILE",
        help="how images are found in prompts, for a family that is not known: a file with the "
        "result of blindsight.TemplateRule(...).to_json()",
    )
    parser.add_argument(
        "--limit", type=positive, default=64, help="how many prompts to use at most (%(default)s)"
    )
    parser.add_argument("--split", help="part of the dataset, if it has several")
    parser.add_argument(
        "--sample-seed",
        type=int,
        help="draw the prompts with this seed (default: take the first)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, help="prompts that run together (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint",
        type=path,
        help="file for what is measured so far (default: next to the profile; removed at the end)",
    )
    add_progress(parser)
    ablations = parser.add_argument_group("ablations, best left at their defaults")
    ablations.add_argument(
        "--criterion",
        choices=("next_token", "output_error", "attention_mass"),
        help="what counts as a loss (default: next_token, which takes gradients and their memory)",
    )
    ablations.add_argument(
        "--aggregate",
        choices=("quantile", "mean"),
        help="how the losses on the prompts become one (default: quantile)",
    )
    ablations.add_argument("--quantile", type=share, help="which quantile (default: 0.95)")
    ablations.add_argument(
        "--allocation",
        choices=("per_head", "global"),
        help="a budget for each head, or one for all (default: per_head)",
    )
    ablations.add_argument(
        "--sink-offsets",
        nargs="+",
        metavar="OFFSET",
        help="which tokens of an image are sinks, from its first (default: 0), or 'measure'",
    )
    parser.set_defaults(run=_run_calibrate, resumes=True)


def _run_calibrate(arguments: argparse.Namespace) -> None:
    import time
    import warnings

    from blindsight.calibrate import calibrate
    from blindsight.cli.models import load_model
    from blindsight.cli.targets import profile_replaced_at, say_saved
    from blindsight.data.processors import load_processor
    from blindsight.data.samples import load_samples
    from blindsight.progress import quiet
    from blindsight.ranks import shared_run
    from blindsight.template import TemplateRule

    output: Path = arguments.output
    replaced = profile_replaced_at(output)
    names = ("budget", "criterion", "aggregate", "quantile", "allocation")
    options = {name: getattr(arguments, name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.rule is not None:
        options["rule"] = TemplateRule.from_json(arguments.rule.read_text())
    if arguments.sink_offsets is not None:
        options["sink_offsets"] = _sink_offsets(arguments.sink_offsets)
    checkpoint = arguments.checkpoint or output.with_name(f"{output.name}.partial")
    with quiet(), shared_run() as ranks:
        warnings.filterwarnings("ignore", message="Only .* prompt")  # the summary has it
        samples = load_samples(arguments.data, split=arguments.split)
        model = load_model(
            arguments.model, arguments.dtype, arguments.device, has_rule="rule" in options
        )
        processor = load_processor(arguments.model)
        begin = time.perf_counter()
        profile = calibrate(
            model,
            processor,
            samples,
            num_samples=arguments.limit,
            seed=arguments.sample_seed,
            batch_size=arguments.batch_size,
            checkpoint=checkpoint,
            progress=arguments.progress,
            **options,
        )
        seconds = time.perf_counter() - begin
        # No process deletes its measurements before the profile is saved.
        ranks.on_first(lambda: profile.save(output))
    if arguments.checkpoint is None:
        for path in (checkpoint, checkpoint.with_name(f"{checkpoint.name}.sinks")):
            ranks.own(path).unlink(missing_ok=True)
    if not ranks.is_first:
        return
    print(summary(profile, seconds))
    say_saved([output], replaced)


def summary(profile: Profile, seconds: float) -> str:
    """Return a text on the result of a calibration that took ``seconds``."""
    from blindsight.calibrate import few_prompts, flops_cut
    from blindsight.cli.show import heads_by_layer

    noted = profile.calibration
    num_samples, used = int(noted["num_samples"]), int(noted["num_samples_used"])
    lines = [repr(profile), "", *heads_by_layer(profile)]
    lines += [
        "",
        f"attention FLOPs on these prompts: {flops_cut(profile):.1%} less",
        f"{num_samples} prompts, {used} with several images, in {seconds:.1f} s "
        f"({seconds / num_samples:.2f} s each)",
    ]
    if what := few_prompts(noted):
        lines.append(f"warning: {what}")
    return "\n".join(lines)


def _sink_offsets(words: list[str]) -> tuple[int, ...] | str:
    if words == ["measure"]:
        return "measure"
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        message = f"sink offsets must be ints or 'measure', got {' '.join(words)}."
        raise ValueError(message) from None
