"""What would a GPU run: the kernel of a fused call as Inductor writes it for Hopper, assembled.

    python bench/triton_kernels.py [--head-dims 64 128 256]

Needs no GPU, but triton and g++: see tests/without_gpu.py. One causal call of 4 heads of all four
categories, 2,100 tokens, bfloat16. Appends a row for each kernel to
bench/results/triton_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import append_rows, conditions, print_table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import without_gpu

RESULTS = Path(__file__).parent / "results" / "triton_kernels.jsonl"
FORMS = (("sorted", False), ("sorted", True), ("ordered", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    arguments = parser.parse_args()
    told = conditions()
    cases = [(*form, head_dim) for head_dim in arguments.head_dims for form in FORMS]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for order, any_length, head_dim in tqdm(cases, desc="assembling"):
            found = without_gpu.in_process(
                "test_triton:assemble_one", order, head_dim, any_length, folder=Path(folder)
            )
            (kernel,) = found["kernels"]
            length = "any" if any_length else "fixed"
            row = {"head_dim": head_dim, "mask": order, "length": length, **kernel}
            append_rows(RESULTS, [row], told)
            table.append(
                [
                    str(head_dim),
                    f"{order}, {length} length",
                    f"{kernel['block_m']} x {kernel['block_n']}",
                    f"{kernel['num_warps']}, {kernel['num_stages']}",
                    str(kernel["registers"]),
                    str(kernel["spilled"]),
                    f"{kernel['shared']:,}",
                    str(kernel["hgmma"]),
                ]
            )
    header = ["head dim", "mask", "tile", "warps, stages", "registers", "spilled, bytes"]
    print_table([*header, "shared, bytes", "HGMMA"], table)


if __name__ == "__main__":
    main()
