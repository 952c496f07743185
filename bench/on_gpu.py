"""All that only a GPU can tell, in one call of some minutes.

    python bench/on_gpu.py [--steps tests costs ...] [--minutes 9] [--logs DIR]

First, side by side: the tests that need a GPU, and the benches as far as they compile. Then the
tests are stopped, and one bench after another has the device for itself. A step that does not end
in time is stopped, and the rest goes on; their output is kept in DIR, by step, and the end of each
is printed. What is measured is appended to bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

TESTS = os.environ.get("BLINDSIGHT_GPU_TEST_ARGUMENTS", "tests/test_gpu.py")
WORKERS = os.environ.get("BLINDSIGHT_GPU_TEST_WORKERS", "9")
ATTENTION = "bench/attention.py --device cuda --dtype bfloat16"
TILES = {  # by shape: queries, keys, warps, stages; whether loads are the tensor accelerator's
    "internvl3-1b": [(64, 64, 4, 3, True), (64, 64, 4, 3, False), (64, 64, 4, 4, True)],
    "qwen2.5-vl-7b": [
        (128, 64, 8, 3, True),
        (128, 64, 8, 3, False),
        (128, 128, 8, 2, True),
        (64, 64, 4, 3, True),
    ],
    "gemma-3-12b": [
        (128, 64, 8, 2, True),
        (128, 64, 8, 2, False),
        (128, 32, 8, 2, True),
        (128, 32, 8, 3, True),
    ],
}
NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "USE_TMA")


def tiles(shape: str) -> str:
    """Return the command that sweeps the kernel's options for a shape."""
    options = [json.dumps(dict(zip(NAMES, tile, strict=True))) for tile in TILES[shape]]
    command = f"{ATTENTION} --shape {shape} --tokens 16384 --sparse 0.75 --forms flex,.dense|fused"
    return f"{command} --kernel-options {shlex.join(options)}"


def attention(shape: str, tokens: str, more: str = "") -> str:
    return f"{ATTENTION} --shape {shape} --tokens {tokens} {more}"


PREFILL = "bench/prefill.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b --layers 8"
OVERHEAD = "bench/overhead.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b"
IMAGES = "--image-tokens 256 1296"
FEW = "--forms SDPA|fused|split$|flex,.dense"  # create_block_mask takes long to compile
FEWEST = "--forms SDPA.is_causal$|SDPA.bool|fused|split$|flex,.dense"
OPTIONS = [
    {"num_chunks": 1},
    {"num_chunks": 4},
    dict(zip(NAMES, (64, 64, 4, 3, True), strict=True)),
    dict(zip(NAMES, (128, 64, 8, 3, True), strict=True)),
]


def options(tokens: str, image: int) -> str:
    """Return the command that times chunks of queries, and tiles, for a long prompt."""
    texts = shlex.join(map(json.dumps, OPTIONS))
    more = f"--image-tokens {image} --sparse 0.75 --repeats 3 --kernels"
    command = attention(
        "qwen2.5-vl-7b", tokens, f"{more} --forms 'SDPA.is_causal$|split(?!,.heads)'"
    )
    return f"{command} --kernel-options {texts}"


STEPS = {
    "tests": f"-m pytest -v -p no:cacheprovider -p on_gpu -n {WORKERS} --dist worksteal {TESTS}",
    "costs": "bench/costs.py --device cuda --dtype bfloat16 float32",
    "tiles-64": tiles("internvl3-1b"),
    "tiles-128": tiles("qwen2.5-vl-7b"),
    "tiles-256": tiles("gemma-3-12b"),
    "options-36k": options("36864", 256),
    "options-36k-large": options("36864", 1296),
    "options-100k": options("102400", 256),
    "options-300k": options("307200", 1296),
    "4k": attention("qwen2.5-vl-7b", "4096", IMAGES),
    "16k": attention("qwen2.5-vl-7b", "16384", IMAGES),
    "36k": attention("qwen2.5-vl-7b", "36864", f"{IMAGES} {FEW} --kernels"),
    "100k": attention("qwen2.5-vl-7b", "102400", f"{IMAGES} --sparse 0.75 0.9 --repeats 3 {FEW}"),
    "300k": attention("qwen2.5-vl-7b", "307200", f"--sparse 0.75 0.9 --repeats 2 {FEWEST}"),
    "300k-large": attention(
        "qwen2.5-vl-7b", "307200", f"--image-tokens 1296 --sparse 0.75 --repeats 2 {FEWEST}"
    ),
    "qwen2-vl-2b": attention("qwen2-vl-2b", "36864", f"--sparse 0.75 {FEW}"),
    "gemma-3-12b": attention("gemma-3-12b", "36864", f"--sparse 0.75 {FEW}"),
    "prefill": f"{PREFILL} --any-length --no-eager --tokens 36864 4096 102400 --longest-mask 40000",
    "overhead": f"{OVERHEAD} --tokens 4096 16384 36864 --parts work",
}
CHECKS = ["tests", "costs", "tiles-64", "tiles-128", "tiles-256", "16k"]


class Step:
    """A command of Python in a process of its own, which waits for its turn to measure."""

    def __init__(self, name: str, logs: Path) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self._turn = logs / name
        self._begin = time.monotonic()
        for ending in (".ready", ".go"):
            Path(f"{self._turn}{ending}").unlink(missing_ok=True)
        # Many compile at a time.
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *shlex.split(STEPS[name])],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **threads,
                    "PYTHONPATH": path,
                    "BLINDSIGHT_TURN": str(self._turn),
                },
                start_new_session=True,
            )

    @property
    def is_ready(self) -> bool:
        return self._process.poll() is not None or Path(f"{self._turn}.ready").exists()

    def go(self) -> None:
        Path(f"{self._turn}.go").touch()

    def wait(self, until: float) -> str:
        """Wait for the end, and make one of it when the time is over; return how it went."""
        try:
            status = self._process.wait(max(0.0, until - time.monotonic()))
            how = f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            how = "stopped"
        return f"{how} after {time.monotonic() - self._begin:.0f} s"


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: tell of a failure at once, as there may be no end of the tests."""
    if report.failed:
        print(f"\n== {report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)


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
    steps = [Step(name, arguments.logs.resolve()) for name in arguments.steps]
    until = begin + 60 * arguments.prepare_minutes
    while time.monotonic() < until and not all(step.is_ready for step in steps):
        time.sleep(0.2)
    late = [step.name for step in steps if not step.is_ready]
    print(f"prepared after {time.monotonic() - begin:.0f} s, but for {late}", flush=True)
    for step in steps:
        if not step.is_ready:
            print(f"{step.name}: {step.wait(until)}", flush=True)
    for step in steps:
        if step.name not in late:
            step.go()
            how = step.wait(begin + 60 * arguments.minutes)
            print(f"{step.name}: {how}", flush=True)
    for step in steps:
        print(f"== {step.name}")
        print("\n".join(step.log.read_text().splitlines()[-arguments.lines :]))


if __name__ == "__main__":
    main()
