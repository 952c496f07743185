"""Which versions of torch and transformers pass the tests that lean on what they keep private?

For each combination: a virtual environment, the package with its test extra, and the tests of
whatever reads a graph of Dynamo's, calls FlexAttention's operator, or hands something to Inductor.

    python bench/versions.py --folder ENVIRONMENTS                  # all that this commit lacks
    python bench/versions.py --folder ENVIRONMENTS --only newest/newest --delete

A run takes about five minutes on one core, and an environment about 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import conditions, print_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "versions.jsonl"

# torch/transformers: the oldest supported, each end with the other's, the pinned, the newest
COMBINATIONS = ("2.11.0/5.17.0", "2.11.0/newest", "2.13.0/5.23.0", "newest/5.17.0", "newest/newest")
BOUND_TO_THEM = {"torch", "transformers", "triton", "tokenizers", "huggingface_hub"}
FILES = (
    "test_passes_alone.py",
    "test_export.py",
    "test_lift_mask.py",
    "test_given_mask.py",
    "test_any_length.py",
    "test_regions.py",
    "test_share_layers.py",
    "test_lowering.py",
    "test_backend.py",
    "test_block_tables.py",
    "test_probe.py",
    "test_cache.py",
    "test_families.py",
    "test_processors.py",
    "test_videos.py",
    "test_handwritten.py",
    "test_wrappers.py",
    "test_watch.py",
)
EXACT = (
    "test_exactness.py::test_prefill_equals_dense_masks",
    "test_exactness.py::test_whole_and_two_turns_agree",
    "test_exactness.py::test_generate_gives_the_tokens_of_the_reference",
    "test_exactness.py::test_lengths_change_from_call_to_call",
)
ON_INDUCTOR = (
    "test_exactness.py::test_prefill_on_inductor[qwen2_5_vl-left_padding-ORDERED-fused]",
    "test_exactness.py::test_prefill_on_inductor[gemma3-long-SORTED-split]",
    "test_any_length.py::test_one_kernel_for_many_lengths",
    "test_export.py::test_a_package_runs_without_us[qwen2_5_vl-fused-1]",
    "test_passes_alone.py::test_in_inductors_own_hook",
    "test_regions.py::test_layers_share_one_kernel",
    "test_cache.py::test_another_process_hits",
)
RUNS = {
    "graphs": ("not nightly and not inductor", (*FILES, *EXACT)),
    "inductor": ("inductor", ON_INDUCTOR),
}


def install(folder: Path, torch: str, transformers: str) -> Path:
    """Make or change the environment of this torch; return its Python."""
    python = folder / f"torch-{torch}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    constraints = folder / "constraints.txt"  # ours, but for what is varied
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text(
        "\n".join(line for line in lines if line.split("==")[0] not in BOUND_TO_THEM)
    )
    pins = [
        name if version == "newest" else f"{name}=={version}"
        for name, version in (("torch", torch), ("transformers", transformers))
    ]
    command = [python, "-m", "pip", "install", "-q", "--upgrade", "-c", constraints, *pins]
    subprocess.run([*command, "-e", f"{ROOT}[test]"], check=True)
    return python


def versions_of(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform\n"
        "found = {n: m.version(n) for n in ('torch', 'transformers', 'triton')}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test(
    python: Path, name: str, tests: Sequence[str], folder: Path, timeout_s: float
) -> dict[str, Any]:
    """Run one of RUNS; return counts, seconds, and what failed."""
    marker, _ = RUNS[name]
    report = folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BLINDSIGHT_HYPOTHESIS_PROFILE": "dev",
        "TORCHINDUCTOR_CACHE_DIR": str(python.absolute().parents[1] / "inductor"),
    }
    command = [python, "-m", "pytest", "-q", "-m", marker, f"--junitxml={report}"]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(f"tests/{t}" for t in tests)],
            cwd=ROOT,
            env=environment,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {timeout_s:.0f} s"}
    seconds = round(time.monotonic() - begin)
    if done.returncode not in (0, 1) or not report.exists():
        return {"error": f"pytest returned {done.returncode}", "seconds": seconds}
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    failed = []
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return {**counts, "seconds": seconds, "failed_tests": failed}


def known_rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def cell(run: dict[str, Any]) -> str:
    if "error" in run:
        return str(run["error"])
    return f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the environments are made")
    parser.add_argument("--only", nargs="+", default=COMBINATIONS, metavar="TORCH/TRANSFORMERS")
    parser.add_argument("--python", type=Path, help="of one environment, to be taken as it is")
    parser.add_argument("--files", nargs="+", default=RUNS["graphs"][1], help="of the run graphs")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--timeout", type=float, default=1200, help="of a run, in seconds")
    parser.add_argument("--again", action="store_true", help="also what this commit has a row of")
    parser.add_argument("--delete", action="store_true", help="the environment after its run")
    parser.add_argument("--table", action="store_true", help="print the last rows and do no more")
    args = parser.parse_args()
    begun = conditions()
    if args.python and (args.delete or len(args.only) > 1):
        parser.error("--python is of one environment, named by --only, and is never deleted")
    done = {row["asked"] for row in known_rows() if row["commit"] == begun["commit"]}
    for at, asked in enumerate(() if args.table else args.only):
        if asked in done and not args.again:
            continue
        if args.folder is None:
            parser.error("--folder must be given: environments take about 6 GB each")
        torch, _, transformers = asked.partition("/")
        args.folder.mkdir(parents=True, exist_ok=True)
        folder = args.folder.resolve()
        python = args.python or install(folder, torch, transformers)
        row = {**begun, **versions_of(python), "asked": asked}
        for name in args.runs:
            tests = args.files if name == "graphs" else RUNS[name][1]
            row[name] = {**test(python, name, tests, folder, args.timeout), "tests": tests}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if args.delete and not any(a.startswith(f"{torch}/") for a in args.only[at + 1 :]):
            shutil.rmtree(python.parents[1])
    last = {row["asked"]: row for row in known_rows()}
    print_table(
        ["torch", "transformers", "triton", "Python", *RUNS, "seconds", "date"],
        [
            [
                *(row[name] for name in ("torch", "transformers", "triton", "python")),
                *(cell(row[name]) if name in row else "-" for name in RUNS),
                str(sum(row.get(name, {}).get("seconds", 0) for name in RUNS)),
                row["date"][:10],
            ]
            for row in last.values()
        ],
    )


if __name__ == "__main__":
    main()
