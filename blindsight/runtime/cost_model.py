"""How long attention takes on a device, estimated from what it computes.

Constants are measured by ``blindsight tune`` once per device and kept in a file of the user's
cache; without them, those of a similar device serve. Only ratios decide, and between choices that
are all exact.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import torch

from blindsight.attention.attend import Group
from blindsight.attention.block_tables import ceil_div
from blindsight.files import write_whole

HEAD_DIM = 128  # that times are given for; attention takes time in proportion
# Of scaled_dot_product_attention on a CPU: from so many queries on, blocks of so many.
_CAUSAL_BLOCKS = ((768, 256), (192, 64), (0, 32))


@dataclass(frozen=True)
class Costs:
    """Times in nanoseconds, all threads of a device together.

    Attributes:
        causal: Of a pair of query and key in ``scaled_dot_product_attention`` with is_causal, if
            all threads of a CPU had as much to do, see :func:`causal_skew`.
        masked: Of a pair with a boolean mask; every pair counts, whether allowed or not.
        flex: Of a pair in a block that FlexAttention visits.
        move: Of an element that is moved to sort tokens or gather heads.
        call: Of a call of FlexAttention, however small.
    """

    causal: float
    masked: float
    flex: float
    move: float
    call: float

    @property
    def keys_per_move(self) -> float:
        """Keys that a query visits while a token of query, key, value and output is moved."""
        return 4 * HEAD_DIM * self.move / self.flex


# A CPU's by `blindsight tune`, on two cores of an AMD EPYC with AVX-512. A GPU's in bfloat16 from
# an H200's rows of bench/results, an empty call estimated; in float32 by `tune` on an H100.
_DEFAULTS = {
    "cpu": {
        "float32": Costs(causal=3.3, masked=3.5, flex=4.1, move=0.3, call=1_100_000.0),
        "bfloat16": Costs(causal=3.3, masked=3.2, flex=6.7, move=0.6, call=1_300_000.0),
    },
    "cuda": {
        "bfloat16": Costs(causal=7.5e-4, masked=1.8e-3, flex=1.3e-3, move=1e-3, call=20_000.0),
        "float32": Costs(causal=0.012, masked=0.014, flex=0.1, move=1.4e-3, call=20_000.0),
    },
}


def device_name(device: torch.device) -> str:
    """Return a name under which a device's costs are kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {cpu_model()}, {torch.get_num_threads()} threads"


def costs_of(device: torch.device, dtype: torch.dtype) -> Costs:
    """Return the measured costs of a device, or those of one like it."""
    name = str(dtype).removeprefix("torch.")
    measured = _load(str(cache_file())).get(device_name(device), {})
    by_dtype = {**_DEFAULTS.get(device.type, _DEFAULTS["cpu"]), **measured}
    return by_dtype.get(name) or next(iter(by_dtype.values()))


def save_costs(device: torch.device, dtype: torch.dtype, costs: Costs) -> Path:
    """Keep what was measured of a device for later processes; return where."""
    path = check_cache_file()
    known = {
        name: {kind: asdict(each) for kind, each in by_dtype.items()}
        for name, by_dtype in _load(str(path)).items()
    }
    name = str(dtype).removeprefix("torch.")
    known.setdefault(device_name(device), {})[name] = asdict(costs)
    write_whole(path, json.dumps(known, indent=2).encode())
    _load.cache_clear()
    return path


def check_cache_file() -> Path:
    """Return where costs are kept, in a folder that is made and can be written to.

    Raises:
        OSError: It cannot.
    """
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    return path


def cache_file() -> Path:
    """Return where costs are kept: ``$BLINDSIGHT_COSTS``, or in the user's cache folder."""
    if path := os.environ.get("BLINDSIGHT_COSTS"):
        return Path(path)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "blindsight" / "costs.json"


@cache
def _load(path: str) -> dict[str, dict[str, Costs]]:
    if not os.path.exists(path):
        return {}
    try:
        known = json.loads(Path(path).read_text())
        names = {field.name for field in fields(Costs)}
        return {
            device: {
                dtype: Costs(**{name: float(costs[name]) for name in names})
                for dtype, costs in by_dtype.items()
            }
            for device, by_dtype in known.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the costs that `blindsight tune` writes, got one that cannot be "
            f"read ({error!r}). Delete it, and run `blindsight tune` again."
        ) from None


@cache
def cpu_model() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CallSize:
    """What an attention call computes on.

    Attributes:
        num_heads, num_key_heads, head_dim: H, G and D.
        batch, num_queries, num_keys: B, Q and K.
        query_rows, key_rows: Q and K with the rows that fill them up to what the call is compiled
            for.
        is_masked: Whether the model's own call reads a mask of all pairs.
    """

    num_heads: int
    num_key_heads: int
    head_dim: int
    batch: int
    num_queries: int
    num_keys: int
    query_rows: int
    key_rows: int
    is_masked: bool


@lru_cache(maxsize=4096)
def causal_skew(num_rows: int, num_queries: int, num_threads: int) -> float:
    """Return how much longer than the mean of all threads the longest has to do under is_causal.

    PyTorch's kernel for CPUs deals out runs of neighbours: blocks of queries, of one head after
    another. Where heads are few for the threads, the last block of a head takes longest by far.

    Args:
        num_rows: B * H.
        num_queries: Q.
        num_threads: Of a CPU.
    """
    if num_threads == 1:
        return 1.0
    block = next(size for least, size in _CAUSAL_BLOCKS if num_queries >= least)
    blocks = ceil_div(num_queries, block)
    per_thread = ceil_div(num_rows * blocks, num_threads)

    def work_until(at: int) -> int:
        heads, rest = divmod(min(at, num_rows * blocks), blocks)
        return heads * blocks * (blocks + 1) // 2 + rest * (rest + 1) // 2

    until = [work_until(thread * per_thread) for thread in range(num_threads + 1)]
    longest = max(end - begin for begin, end in itertools.pairwise(until))
    return longest * num_threads / until[-1]


def time_of_own(costs: Costs, size: CallSize, num_threads: int = 1) -> float:
    """Return the nanoseconds of a call as the model makes it, on so many threads of a CPU."""
    rows = size.batch * size.num_heads * size.num_queries
    scale = size.head_dim / HEAD_DIM
    if size.is_masked:
        return scale * rows * size.num_keys * costs.masked
    return _time_of_causal(costs, size, size.num_heads, num_threads)


def time_of_groups(
    costs: Costs,
    size: CallSize,
    groups: Sequence[Group],
    categories: Sequence[int],
    listed_pairs: Sequence[int],
    *,
    is_sorted: bool,
    num_threads: int = 1,
) -> float:
    """Return the nanoseconds of a call whose heads are computed in groups.

    Args:
        costs: Of the device.
        size: Of the call.
        groups: See :mod:`blindsight.attention.attend`.
        categories: Codes of the heads, group by group.
        listed_pairs: Pairs in the blocks that a head of each category visits, batch included.
        is_sorted: Whether tokens are sorted.
        num_threads: Of a CPU.
    """
    scale = size.head_dim / HEAD_DIM
    tokens = size.batch * (size.query_rows + size.key_rows)
    time, begin = 0.0, 0
    for kind, num_heads in groups:
        codes = categories[begin : begin + num_heads]
        begin += num_heads
        key_heads = size.num_key_heads if kind == "all" else num_heads
        if kind != "all" or is_sorted:
            time += costs.move * size.head_dim * tokens * (num_heads + key_heads)
        if kind == "causal":
            time += _time_of_causal(costs, size, num_heads, num_threads)
        else:
            time += costs.call + scale * sum(listed_pairs[code] for code in codes) * costs.flex
    return time


def _time_of_causal(costs: Costs, size: CallSize, num_heads: int, num_threads: int) -> float:
    rows = size.batch * num_heads
    # Keys beyond the queries (of a static cache) are cut off.
    pairs = rows * size.num_queries * min(size.num_queries, size.num_keys) / 2
    skew = causal_skew(rows, size.num_queries, num_threads)
    return size.head_dim / HEAD_DIM * pairs * skew * costs.causal
