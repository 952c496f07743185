"""The command ``tune``: measure what attention costs on a device.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import argparse
from typing import Any

from blindsight.cli.models import DEFAULT_DEVICE, DTYPES, add_progress


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the command; ``everywhere`` is the parent parser with the shared options."""
    tune = commands.add_parser(
        "tune",
        parents=[everywhere],
        help="measure what attention costs on this device",
        description="Measure what attention costs on this device, and keep the result for later "
        "runs, which choose by it how to compute attention.",
    )
    tune.add_argument("--device", help=f"such as cpu or cuda ({DEFAULT_DEVICE})")
    tune.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["float32", "bfloat16"],
        help="dtypes of the models that run here (default: float32 bfloat16)",
    )
    add_progress(tune)
    tune.set_defaults(run=_run_tune)


def _run_tune(arguments: argparse.Namespace) -> None:
    import torch

    from blindsight.progress import progress_bar
    from blindsight.ranks import local_device
    from blindsight.runtime.cost_model import check_cache_file, device_name, save_costs
    from blindsight.tune import measure_costs

    device = torch.device(local_device(arguments.device))
    check_cache_file()  # before minutes of measuring
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        steps = 4 if device.type == "cpu" else 6
        shown = progress_bar(arguments.progress, total=steps, desc=name, leave=False)
        with shown as bar, torch.inference_mode():

            def progress(text: str, bar: Any = bar) -> None:
                bar.set_postfix_str(text)
                bar.update()

            costs = measure_costs(device, dtype, progress=progress)
        path = save_costs(device, dtype, costs)
        print(
            f"{device_name(device)}, {name}: a pair of query and key takes {costs.causal:.3g} ns "
            f"under is_causal, {costs.masked:.3g} under a mask, {costs.flex:.3g} in FlexAttention"
        )
    print(f"kept in {path}")
