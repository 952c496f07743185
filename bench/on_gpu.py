"""All that only a GPU can tell, in one call of some minutes.

    python bench/on_gpu.py [--steps tests tune ...] [--minutes 9] [--prepare-minutes 4] [--logs DIR]

First, side by side: the tests that need a GPU, and the benches with ``--compile-only``, which fill
Inductor's caches. Then the benches one after another, alone on the device. A step that does not
end in time is stopped, and the rest goes on; their output is kept in DIR, by step, and the end of
each is printed. What is measured is appended to bench/results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]

TESTS = "-m pytest -v -rs -p no:cacheprovider -n 8 --dist worksteal tests/test_gpu.py"
ATTENTION = "bench/attention.py --device cuda --dtype bfloat16"
TILES = {  # by shape: queries, keys, warps, stages
    "internvl3-1b": [(128, 128, 4, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    "qwen2.5-vl-7b": [
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 4),
        (128, 32, 8, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
    ],
    "gemma-3-12b": [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)],
}
NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


def tiles(shape: str) -> str:
    """Return the command that sweeps the kernel's options for a shape."""
    options = ['{"USE_TMA": true}']
    for tile in TILES[shape]:
        named = ", ".join(f'"{name}": {size}' for name, size in zip(NAMES, tile, strict=True))
        options.append(f"{{{named}}}")
    command = f"{ATTENTION} --shape {shape} --tokens 16384 --sparse 0.75 --forms flex,.dense|fused"
    return f"{command} --kernel-options {shlex.join(options)}"


def attention(shape: str, tokens: str, more: str = "") -> str:
    return f"{ATTENTION} --shape {shape} --tokens {tokens} {more}"


PREFILL = "bench/prefill.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b --any-length"
OVERHEAD = "bench/overhead.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b"
BOTH_IMAGES = "--image-tokens 256 1296"

# By step: the command, and whether it can fill the caches beforehand.
STEPS = {
    "tests": (TESTS, False),
    "tune": ("-m blindsight.cli tune --device cuda --dtype bfloat16 float32", True),
    "tiles-64": (tiles("internvl3-1b"), True),
    "tiles-128": (tiles("qwen2.5-vl-7b"), True),
    "tiles-256": (tiles("gemma-3-12b"), True),
    "one-length": (attention("qwen2.5-vl-7b", "16384", "--sparse 0.75"), True),
    "mixes": (attention("qwen2.5-vl-7b", "4096 16384 36864", BOTH_IMAGES), True),
    "long": (
        attention("qwen2.5-vl-7b", "102400", f"{BOTH_IMAGES} --sparse 0.75 0.9 --repeats 3"),
        True,
    ),
    "longest": (
        attention("qwen2.5-vl-7b", "307200", f"{BOTH_IMAGES} --sparse 0.75 0.9 --repeats 2"),
        True,
    ),
    "qwen2-vl-2b": (attention("qwen2-vl-2b", "16384 36864", "--sparse 0.5 0.75 0.9"), True),
    "gemma-3-12b": (attention("gemma-3-12b", "16384 36864", "--sparse 0.5 0.75 0.9"), True),
    "prefill": (f"{PREFILL} --tokens 4096 16384 36864 --repeats 3", True),
    "overhead": (f"{OVERHEAD} --tokens 4096 16384 36864", False),
}
CHECKS = ["tests", "tune", "tiles-64", "tiles-128", "tiles-256", "one-length"]


def run(command: str, log: Path, until: float, extra: dict[str, str]) -> str:
    """Run a command of Python until a time; return how it ended."""
    begin = time.monotonic()
    if until - begin < 5:
        return "not begun"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **extra},
            start_new_session=True,
        )
        try:
            how = f"exit status {process.wait(until - begin)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            how = "stopped"
    return f"{how} after {time.monotonic() - begin:.0f} s"


def prepare(names: list[str], logs: Path, until: float) -> None:
    """Run tests and fill caches, side by side."""
    few_threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "3"}

    def one(name: str) -> None:
        command, has_caches = STEPS[name]
        is_bench = command.startswith("bench/")
        if has_caches:
            command += " --compile-only" if is_bench else ""
        elif is_bench:
            return
        log = logs / f"{name}{'-compile' if has_caches else ''}.log"
        print(f"{name}, side by side: {run(command, log, until, few_threads)}", flush=True)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=CHECKS)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--prepare-minutes", type=float, default=4)
    parser.add_argument("--logs", type=Path, default=ROOT / "gpu-logs")
    parser.add_argument("--lines", type=int, default=14, help="of each log's end to print")
    arguments = parser.parse_args()
    begin = time.monotonic()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    prepare(arguments.steps, arguments.logs, begin + 60 * arguments.prepare_minutes)
    for name in arguments.steps:
        command, _ = STEPS[name]
        if name == "tests":
            continue
        log = arguments.logs / f"{name}.log"
        how = run(command, log, begin + 60 * arguments.minutes, {})
        print(f"{name}: {how} ({time.monotonic() - begin:.0f} s in all)", flush=True)
    for log in sorted(arguments.logs.glob("*.log")):
        if not log.name.endswith("-compile.log"):
            print(f"== {log.stem}")
            print("\n".join(log.read_text().splitlines()[-arguments.lines :]))


if __name__ == "__main__":
    main()
