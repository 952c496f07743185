"""What does attention cost on this device? The numbers that `auto` estimates with.

    python bench/costs.py [--device cuda] [--dtype float32 bfloat16] [--repeats 5]

As `blindsight tune` measures them; what the package ships as defaults was measured here. Appends a
row for each dtype to bench/results/costs.jsonl.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from common import alone_on_device, append_rows, conditions, print_table

from blindsight.ranks import local_device
from blindsight.runtime.cost_model import device_name
from blindsight.tune import measure_costs

RESULTS = Path(__file__).parent / "results" / "costs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    arguments.device = local_device(arguments.device)
    device = torch.device(arguments.device)
    told = conditions(arguments.device)
    rows = []
    with ExitStack() as stack, torch.inference_mode():

        def progress(text: str) -> None:
            print(text, flush=True)
            if text == "timing":
                stack.enter_context(alone_on_device())

        for name in arguments.dtype:
            dtype = getattr(torch, name)
            costs = measure_costs(device, dtype, repeats=arguments.repeats, progress=progress)
            rows.append({"name": device_name(device), "dtype": name, **asdict(costs)})
    append_rows(RESULTS, rows, told)
    header = list(rows[0])
    print_table(header, [[str(row[name]) for name in header] for row in rows])


if __name__ == "__main__":
    main()
