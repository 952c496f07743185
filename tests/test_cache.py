"""Inductor's caches across processes: what hits, what misses, and that no hit is a wrong one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blindsight import Profile
from blindsight.cache_keys import cacheable_functions
from decoders import PROMPT, check_decoder, decoder_prompt
from models import tiny_model

CATEGORIES = {"one": [[0, 1, 2, 3]], "other": [[3, 1, 0, 2]], "fewer": [[1, 1, 2, 2]]}

# Compiles a decoder in each of several ways; says what the caches did, and keeps the logits.
CHILD = """
import json, sys
import torch
from torch._dynamo.utils import counters
from blindsight import Profile, blindsight_backend
from blindsight.passes import GraphPass
from decoders import PROMPT, DecoderWithHead, decoder_prompt
from models import tiny_model

torch.set_grad_enabled(False)
model = tiny_model("qwen2_5_vl", num_layers=1)
found = {}
for name, categories, lowering, uuid in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    module, backend = DecoderWithHead(model), "inductor"
    if categories:
        profile = Profile.for_model(model, categories)
        passes = [GraphPass(lambda gm: None, uuid=uuid)] if uuid else []
        backend = blindsight_backend(profile, lowering=lowering, passes=passes)
    logits = torch.compile(module, backend=backend)(**decoder_prompt([PROMPT]))
    kinds = ("hit", "miss", "bypass")
    found[name] = {
        "fx": [counters["inductor"]["fxgraph_cache_" + kind] for kind in kinds],
        "aot": [counters["aot_autograd"]["autograd_cache_" + kind] for kind in kinds],
        "logits": logits.tolist(),
    }
print(json.dumps(found))
"""

HIT, MISS = [1, 0, 0], [0, 1, 0]


def run(folder: Path, ways: list[tuple[str, Any, str, str]]) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    path = [str(Path(__file__).parent), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", CHILD, json.dumps(ways)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.inductor
def test_caches_across_processes(tmp_path: Path) -> None:
    one, other, fewer = (CATEGORIES[name] for name in ("one", "other", "fewer"))
    control, same = ("control", None, "", ""), ("same", one, "fused", "")
    first = run(tmp_path, [control, same])
    second = run(
        tmp_path,
        [
            control,
            same,
            # Categories are an input: another profile runs the very same code, rightly.
            ("other", other, "fused", ""),
            # The groups of heads are in the code.
            ("split", fewer, "split", ""),
            # So says a user's pass of itself.
            ("pass", one, "fused", "of a pass"),
        ],
    )
    caches = {name: (way["fx"], way["aot"]) for name, way in second.items()}
    assert {name: (way["fx"], way["aot"]) for name, way in first.items()} == {
        "control": (MISS, MISS),
        "same": (MISS, MISS),
    }
    assert caches["control"][1] == caches["same"][1] == caches["other"][1] == HIT
    assert caches["control"][0] == caches["same"][0] == caches["other"][0] == HIT
    assert caches["split"] == caches["pass"] == (MISS, MISS)
    model = tiny_model("qwen2_5_vl", num_layers=1)
    of_way = {"same": one, "other": other, "split": fewer, "pass": one}
    for name, categories in of_way.items():
        profile = Profile.for_model(model, categories)
        logits = torch.tensor(second[name]["logits"])
        check_decoder(model, profile, decoder_prompt([PROMPT]), logits)
    assert second["same"]["logits"] != second["other"]["logits"]


def test_our_functions_are_vouched_for_by_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from blindsight import cache_keys

    known = cacheable_functions({"pass 0 a": "first"})
    assert known.pop("pass 0 a") == "first"
    assert "blindsight.attention.attend" in known
    assert len(set(known.values())) == 1
    monkeypatch.setattr(cache_keys.blindsight, "__version__", "another")
    cache_keys.source_digest.cache_clear()
    try:
        assert set(cacheable_functions().values()).isdisjoint(known.values())
    finally:
        cache_keys.source_digest.cache_clear()


def test_what_a_user_vouches_for_is_kept() -> None:
    """Both our functions and theirs are in the config that Inductor is called with."""
    import torch._inductor.compile_fx as home

    from blindsight.inner import Inner

    seen = []

    def compile_fx(gm: Any, example_inputs: Any, **options: Any) -> Any:
        seen.append(options["config_patches"]["unsafe_marked_cacheable_functions"])
        return gm

    original, home.compile_fx = home.compile_fx, compile_fx
    try:
        options = {"options": {"unsafe_marked_cacheable_functions": {"their.function": "1"}}}
        Inner("inductor", options)(torch.fx.GraphModule({}, torch.fx.Graph()), [])
    finally:
        home.compile_fx = original
    assert seen == [{"their.function": "1", **cacheable_functions()}]
