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

CATEGORIES = {
    name: [row, row]  # two layers, so that they share a region
    for name, row in {"one": [0, 1, 2, 3], "other": [3, 1, 0, 2], "fewer": [0, 1, 1, 2]}.items()
}

# Compiles a decoder in each of several ways; says what the caches did, and keeps the logits.
CHILD = """
import json, sys
import torch
from torch._dynamo.utils import counters
from blindsight import Profile, blindsight_backend
from blindsight.passes import GraphPass
from decoders import PROMPT, DecoderWithHead, decoder_prompt
from models import tiny_model

def global_configs():
    import torch._dynamo.config, torch._functorch.config, torch._inductor.config
    modules = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    return [module.get_config_copy() for module in modules]

torch.set_grad_enabled(False)
configs = global_configs()
model = tiny_model("qwen2_5_vl", num_layers=2)
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
assert global_configs() == configs
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


CONTROL = ("control", None, "", "")
SAME = ("same", CATEGORIES["one"], "fused", "")


def check_all(found: dict[str, Any], ways: list[tuple[str, Any, str, str]]) -> None:
    """Whatever hit or missed, the results are those of the profile that was asked for."""
    model = tiny_model("qwen2_5_vl", num_layers=2)
    for name, categories, _, _ in ways:
        if categories:
            profile = Profile.for_model(model, categories)
            logits = torch.tensor(found[name]["logits"])
            check_decoder(model, profile, decoder_prompt([PROMPT]), logits)


def caches_of(found: dict[str, Any]) -> dict[str, Any]:
    return {name: (way["fx"], way["aot"]) for name, way in found.items()}


@pytest.mark.inductor
def test_another_process_hits(tmp_path: Path) -> None:
    """Categories are an input of a graph: another profile runs the very same code, rightly."""
    other = ("other", CATEGORIES["other"], "fused", "")
    first = run(tmp_path, [CONTROL, SAME])
    assert caches_of(first) == {"control": (MISS, MISS), "same": (MISS, MISS)}
    second = run(tmp_path, [CONTROL, SAME, other])
    assert caches_of(second) == dict.fromkeys(("control", "same", "other"), (HIT, HIT))
    check_all(second, [SAME, other])
    assert second["same"]["logits"] == first["same"]["logits"] != second["other"]["logits"]


@pytest.mark.nightly
@pytest.mark.inductor
def test_another_process_misses_what_is_not_the_same(tmp_path: Path) -> None:
    run(tmp_path, [SAME])
    ways = [
        ("split", CATEGORIES["fewer"], "split", ""),  # the groups of heads are in the code
        ("pass", CATEGORIES["one"], "fused", "of a pass"),  # as a user's pass says
    ]
    found = run(tmp_path, ways)
    assert caches_of(found) == dict.fromkeys(("split", "pass"), (MISS, MISS))
    check_all(found, ways)


def test_our_functions_are_vouched_for_by_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from blindsight import cache_keys

    known = cacheable_functions({"pass 0 a": "first"})
    assert known.pop("pass 0 a") == "first"
    assert "blindsight.attention.attend.attend" in known
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

    from blindsight.runtime.inner import Inner

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
