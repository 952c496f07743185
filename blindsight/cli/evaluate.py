"""The commands ``evaluate``, ``sweep`` and ``refine``: their options, and what they write.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindsight.cli.models import add_arguments, add_progress
from blindsight.cli.numbers import count, not_negative, path, positive

if TYPE_CHECKING:
    from blindsight.data.samples import Samples
    from blindsight.profile import Profile


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the commands; ``everywhere`` is the parent parser with the shared options."""
    _add_evaluate(commands, everywhere)
    _add_refine(commands, everywhere)
    _add_sweep(commands, everywhere)


def _add_evaluate(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "evaluate",
        parents=[everywhere],
        help="answer a dataset dense and with a profile, and compare",
        description="Answer a dataset dense and with a profile: accuracy by task, answers "
        "changed, KL of the next token, exact FLOPs, prefill time. An answer is right if it equals "
        "the expected one, but for case and spaces; by default no more tokens are decoded than "
        "that has. (In Python, evaluate() takes another rule, is_right.) Without answers in the "
        "dataset, accuracy is left out. Writes evaluation.json and evaluation.md. An interrupted "
        "run resumes where it stopped. Under torchrun, the processes share the questions.",
    )
    _add_arguments(parser, "evaluation", "questions, with answers or all without")
    parser.add_argument(
        "--engine",
        choices=("reference", "compiled"),
        default="reference",
        help="answer with explicit masks, or with the compiled decoder, which compiles for every "
        "shape (%(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=5,
        help="how often to time prefill, dense and sparse each; 0 compiles nothing (%(default)s)",
    )
    parser.set_defaults(run=_run_evaluate, resumes=True)


def _add_refine(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "refine",
        parents=[everywhere],
        help="choose the categories of a profile again, by their measured effect",
        description="Try categories in one head or one layer at a time, measure how far each moves "
        "the token after the prompt, and choose the categories by that.",
    )
    _add_inputs(parser, "prompts to try categories on, such as those of the calibration")
    parser.add_argument("-o", "--output", type=path, required=True, help="the profile to write")
    parser.add_argument(
        "--budget",
        type=not_negative,
        default=0.005,
        help="how far one head may move the next token: square root of the KL divergence in nats "
        "(%(default)s)",
    )
    parser.add_argument(
        "--by",
        choices=("head", "layer"),
        default="head",
        help="what to try at a time; layer is faster and coarser (%(default)s)",
    )
    parser.set_defaults(run=_run_refine)


def _add_sweep(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "sweep",
        parents=[everywhere],
        help="measure accuracy over cost, from dense to the sparsest profile",
        description="Answer a dataset at many budgets, and with baselines; answers are right by "
        "the rule of evaluate. Writes sweep.json, sweep.md and sweep.png. An interrupted run "
        "resumes where it stopped.",
    )
    _add_arguments(parser, "sweep", "questions with answers")
    parser.add_argument(
        "--points", type=positive, default=12, help="points of the curve (%(default)s)"
    )
    parser.add_argument(
        "--budgets",
        type=not_negative,
        nargs="+",
        help="budgets of calibration, instead of --points",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="answer only for the curve itself"
    )
    parser.add_argument(
        "--seeds", type=count, default=3, help="random points for each budget (%(default)s)"
    )
    parser.add_argument(
        "--no-plot", action="store_true", help="draw no picture; matplotlib is not needed then"
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=0,
        help="how often to time prefill at each point, dense and sparse each; each point compiles "
        "(%(default)s)",
    )
    parser.set_defaults(run=_run_sweep, resumes=True)


def _add_inputs(parser: argparse.ArgumentParser, what: str) -> None:
    add_arguments(parser)
    parser.add_argument("--profile", type=path, required=True, help="file of the profile")
    parser.add_argument("--data", required=True, help=f"JSON-lines file, folder or hub id: {what}")
    parser.add_argument("--split", help="part of the dataset, if it has several")
    parser.add_argument("--limit", type=positive, help="how many samples to use at most")
    parser.add_argument(
        "--sample-seed", type=int, help="draw the samples with this seed (default: take the first)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="prompts that run together (%(default)s)"
    )
    add_progress(parser)


def _add_arguments(parser: argparse.ArgumentParser, folder: str, what: str) -> None:
    _add_inputs(parser, what)
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        help="longest answer (default: as long as the expected one; 32 without answers)",
    )
    parser.add_argument(
        "--inner", default="inductor", help="what compiles the graphs (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    parser.add_argument(
        "--out",
        type=path,
        default=Path(folder),
        help="folder for the results, and for the answers so far (%(default)s)",
    )


def _run_evaluate(arguments: argparse.Namespace) -> None:
    from blindsight.cli.targets import results_replaced_at, say_saved
    from blindsight.evaluate import evaluate
    from blindsight.progress import quiet
    from blindsight.ranks import shared_run

    with quiet(), shared_run() as ranks:
        model, processor, samples, profile = _load(arguments)
        found = evaluate(
            model,
            processor,
            samples,
            profile,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            engine=arguments.engine,
            inner=arguments.inner,
            repeats=arguments.repeats,
            checkpoint=arguments.out / "answers.jsonl",
            seed=arguments.seed,
            progress=arguments.progress,
        )
    if not ranks.is_first:
        return
    paths = [arguments.out / "evaluation.json", arguments.out / "evaluation.md"]
    replaced = results_replaced_at(paths[0], found.to_json())
    for target in paths:
        found.save(target)
    print(found.to_markdown())
    say_saved(paths, replaced)


def _run_refine(arguments: argparse.Namespace) -> None:
    from blindsight.calibration.refine import refine
    from blindsight.cli.targets import profile_replaced_at, say_saved
    from blindsight.progress import quiet
    from blindsight.ranks import check_is_alone

    check_is_alone("refine")

    output: Path = arguments.output
    replaced = profile_replaced_at(output)
    with quiet():
        model, processor, samples, profile = _load(arguments)
        found = refine(
            model,
            processor,
            samples,
            profile,
            budget=arguments.budget,
            by=arguments.by,
            batch_size=arguments.batch_size,
            progress=arguments.progress,
        )
    found.save(output)
    print(found)
    say_saved([output], replaced)


def _run_sweep(arguments: argparse.Namespace) -> None:
    from blindsight.cli.targets import results_replaced_at, say_saved
    from blindsight.progress import quiet
    from blindsight.ranks import check_is_alone
    from blindsight.sweep import sweep

    check_is_alone("sweep")
    if not arguments.no_plot:
        from blindsight.plots import check_can_plot

        check_can_plot()
    with quiet():
        model, processor, samples, profile = _load(arguments)
        found = sweep(
            model,
            processor,
            samples,
            profile,
            budgets=arguments.budgets,
            num_points=arguments.points,
            baselines=not arguments.no_baselines,
            num_seeds=arguments.seeds,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
            inner=arguments.inner,
            checkpoint=arguments.out / "answers.jsonl",
            seed=arguments.seed,
            progress=arguments.progress,
        )
    names = ["sweep.json", "sweep.md", *([] if arguments.no_plot else ["sweep.png"])]
    paths = [arguments.out / name for name in names]
    replaced = results_replaced_at(paths[0], found.to_json())
    found.save(arguments.out)
    if not arguments.no_plot:
        from blindsight.evaluation.sweep_plot import plot_sweep

        plot_sweep(found, paths[-1])
    print(found.to_markdown())
    say_saved(paths, replaced)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, Samples, Profile]:
    """Load what a command works with; first what may be wrong, then weights, which take long."""
    import transformers

    from blindsight.cli.models import load_model
    from blindsight.data.processors import load_processor
    from blindsight.data.samples import load_samples
    from blindsight.files import check_can_be_made
    from blindsight.profile import Profile

    if hasattr(arguments, "out"):
        check_can_be_made(arguments.out / "answers.jsonl", "answers.jsonl in --out")
    profile = Profile.load(arguments.profile)
    samples = load_samples(
        arguments.data, split=arguments.split, limit=arguments.limit, seed=arguments.sample_seed
    )
    transformers_logging: Any = transformers.logging
    transformers_logging.disable_progress_bar()
    try:
        model = load_model(arguments.model, arguments.dtype, arguments.device, has_rule=True)
    finally:
        transformers_logging.enable_progress_bar()
    processor = load_processor(arguments.model)
    return model, processor, samples, profile
