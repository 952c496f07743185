"""Trains the testbed's model from scratch, on a CPU or a GPU.

    python bench/testbed/train.py --out RUN [--steps 5000] [--device cuda]

Run it again with the same --out to resume. RUN/log.jsonl gets a line every few steps and a line for
every evaluation; RUN/last.pt is the checkpoint, RUN/best.safetensors the weights that did best on
held-out digits. The schedule is warm-up, constant, linear to zero over the last --decay steps, so
--steps may be chosen late. Muon (Keller Jordan, 2024; torch.optim.Muon) trains the matrices, AdamW
everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collages import GRIDS, TASKS, Bank, ask, load_bank, make_collages
from network import Batch, Trainee, bank_patches, build_batch, build_model, task_accuracy
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from vocabulary import LABELS

MAX_IMAGES = (3, 5, 8, 12)  # of each stage
PROMOTE_AT = 0.85  # mean accuracy on training prompts that ends a stage
STAGE_STEPS = (1200, 800, 600, 0)  # the stage ends after these steps at the latest


@dataclass(frozen=True)
class Options:
    """What to train.

    Attributes:
        out: The run's folder.
        steps: Where the rate reaches zero. decay: over how many steps. warmup: steps.
        muon_lr, adam_lr, weight_decay: of the two optimizers.
        aux: Weight of every auxiliary loss. skip: names of those to leave out.
        tokens: of a step. questions: of a prompt.
        seed, device, dtype, threads, compile: as they say; 0 threads leaves torch's choice.
        save_seconds, eval_seconds, log_every: how often; the last in steps.
        weights: Tasks that are asked more often than by how far they lag, ``find=2,count=1.5``.
    """

    out: Path
    steps: int = 5000
    decay: int = 2500
    warmup: int = 50
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.02
    aux: float = 0.3
    tokens: int = 4096
    questions: int = 12
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    compile: bool = True
    save_seconds: float = 180
    eval_seconds: float = 240
    log_every: int = 20
    threads: int = 0
    weights: str = ""
    skip: str = ""


@dataclass
class State:
    """What changes while training, besides weights and optimizers."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    recent: dict[str, float] | None = None


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` on a temporary file beside ``path``, then renames."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def draw_batch(
    options: Options, state: State, bank: Bank, patches: Tensor, lagging: dict[str, float]
) -> Batch:
    """The prompts of one step: a function of the seed, the step, the stage and what lags."""
    rng = np.random.default_rng((options.seed, state.step))
    most = MAX_IMAGES[state.stage]
    n = (
        int(rng.integers(2, most + 1))
        if rng.random() < 0.5
        else int(rng.integers(most // 2, most + 1))
    )
    n = max(n, 2)
    small = state.stage == 0
    choice = GRIDS[:4] if small or rng.random() < 0.4 else GRIDS
    shares = np.array([2, 1, 1, 4, 1, 1, 8][: len(choice)], float)
    two = [choice[k] for k in rng.choice(len(choice), size=2, p=shares / shares.sum())]
    grids = tuple(two[0] if two[0] == two[1] else two[k] for k in rng.integers(2, size=n))
    if rng.random() < 0.6:
        grids = (two[0],) * n
    rare = 1 if n < 4 else int(rng.integers(1, 4 if n > 6 else 3))
    pairs = 0 if n == 2 else int(rng.integers(1, min((n - rare) // 2, 3) + 1))
    asked = [task for task in TASKS if n > 2 or task != "repeat"]
    need = np.array([lagging.get(task, 1.0) for task in asked])
    extra = rng.choice(asked, size=max(options.questions - len(asked), 0), p=need / need.sum())
    tasks = [*asked, *extra]
    rng.shuffle(tasks)
    isolated = bool(rng.random() < 0.8)
    cells = sum(rows * columns for rows, columns in grids)
    length = cells + 5 * n + (11 if isolated else 14) * len(tasks)
    batch = max(4, round(options.tokens / length))
    collages = make_collages(rng, bank, batch=batch, grids=grids, num_rare=rare, num_pairs=pairs)
    labels = None
    if rng.random() < (0.7 if state.stage < len(MAX_IMAGES) - 1 else 0.3):
        labels = rng.random((batch, len(LABELS))).argsort(1)[:, :n]
    questions = tuple(ask(rng, collages, task) for task in tasks)
    return build_batch(
        patches, collages, questions, labels=labels, isolated=isolated, device=options.device
    )


@torch.no_grad()
def evaluate(
    trainee: Trainee, *, num_images: int, grid: tuple[int, int], prompts: int, device: str
) -> dict[str, float]:
    """Accuracy of each task on held-out digits, one question a prompt."""
    bank = load_bank("test")
    patches = bank_patches(bank, device)
    hits: dict[str, list[int]] = {task: [0, 0] for task in TASKS}
    for part in range(prompts // 32):
        rng = np.random.default_rng((77, num_images, part))
        collages = make_collages(
            rng, bank, batch=32, grids=(grid,) * num_images, num_rare=1, num_pairs=1
        )
        questions = tuple(ask(rng, collages, task) for task in (*TASKS, *TASKS))
        batch = build_batch(patches, collages, questions, device=device)
        logits, _ = trainee(batch)
        right = logits[:, : len(questions)].argmax(-1) == batch.answers
        for task, (right_ones, total) in task_accuracy(right, batch).items():
            hits[task][0] += right_ones
            hits[task][1] += total
    return {task: round(good / max(total, 1), 4) for task, (good, total) in hits.items()}


def build_optimizers(trainee: Trainee, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for embeddings, norms, biases, auxiliary heads."""
    matrices, rest = [], []
    for name, parameter in trainee.named_parameters():
        inside = ".layers." in name or ".blocks." in name or ".merger." in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=options.weight_decay),
        torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(options: Options, step: int) -> float:
    """Share of the full rate at a step."""
    left = (options.steps - step) / max(options.decay, 1)
    return max(0.0, min(1.0, (step + 1) / options.warmup, left))


def train(options: Options) -> None:
    """Trains until ``options.steps``."""
    if options.threads:
        torch.set_num_threads(options.threads)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    trainee = Trainee(build_model(options.seed), getattr(torch, options.dtype)).to(options.device)
    optimizers = build_optimizers(trainee, options)
    state = State()
    if (out / "last.pt").exists():
        saved = torch.load(out / "last.pt", map_location=options.device, weights_only=True)
        trainee.load_state_dict(saved["weights"])
        for optimizer, was in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(was)
        state = State(**saved["state"])
    if options.compile:
        trainee.compile()
    bank = load_bank("train", 4)
    patches = bank_patches(bank, options.device)
    fixed = {k: float(v) for k, v in (x.split("=") for x in options.weights.split(",") if x)}
    skipped = {"answer", "end", *options.skip.split(",")}
    recent = state.recent or dict.fromkeys(TASKS, 0.0)
    log = (out / "log.jsonl").open("a", buffering=1)
    shown = {k: str(v) for k, v in asdict(options).items() if k != "out"}
    log.write(json.dumps({"step": state.step, "options": shown, "date": time.ctime()}) + "\n")
    sums: dict[str, float] = {}
    since, last_save, last_eval = 0, time.time(), time.time()
    bar = tqdm(total=options.steps, initial=state.step, mininterval=5)
    started = time.time() - state.seconds

    def save() -> None:
        state.recent, state.seconds = dict(recent), time.time() - started
        saved = {
            "weights": trainee.state_dict(),
            "optimizers": [x.state_dict() for x in optimizers],
            "state": asdict(state),
        }
        write_atomically(out / "last.pt", lambda path: torch.save(saved, path))

    def score() -> None:
        found = {
            f"{n} x {grid[0] * grid[1]}": evaluate(
                trainee, num_images=n, grid=grid, prompts=64, device=options.device
            )
            for n, grid in ((4, (3, 3)), (12, (3, 3)), (8, (4, 4)))
        }
        mean = float(np.mean([x for part in found.values() for x in part.values()]))
        line = {"step": state.step, "seconds": round(time.time() - started), "eval": found}
        log.write(json.dumps(line | {"mean": round(mean, 4), "stage": state.stage}) + "\n")
        if mean > state.best:
            state.best = mean
            weights = {k: v.contiguous() for k, v in trainee.model.state_dict().items()}
            weights.pop("lm_head.weight")  # tied
            write_atomically(out / "best.safetensors", lambda path: save_file(weights, path))

    while state.step < options.steps:
        lagging = {t: fixed.get(t, 1.0) * (1.05 - recent[t]) for t in TASKS}
        batch = draw_batch(options, state, bank, patches, lagging)
        rate = learning_rate(options, state.step)
        for optimizer, full in zip(optimizers, (options.muon_lr, options.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate
        losses, right = trainee.losses(batch)
        aux = [x for name, x in losses.items() if name not in skipped]
        total = losses["answer"] + 0.1 * losses["end"] + options.aux * torch.stack(aux).sum()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for task, (good, count) in task_accuracy(right, batch).items():
            recent[task] += 0.03 * (good / count - recent[task])
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        since += 1
        state.step += 1
        state.stage_step += 1
        mean = sum(recent.values()) / len(recent)
        limit = STAGE_STEPS[state.stage]
        if limit and (mean > PROMOTE_AT or state.stage_step >= limit):
            state.stage, state.stage_step = state.stage + 1, 0
        if state.step % options.log_every == 0:
            line = {
                "step": state.step,
                "seconds": round(time.time() - started, 1),
                "stage": state.stage,
                "rate": round(rate, 4),
                "losses": {k: round(v / since, 4) for k, v in sums.items()},
                "train": {k: round(v, 3) for k, v in recent.items()},
            }
            log.write(json.dumps(line) + "\n")
            sums, since = {}, 0
        bar.set_postfix(stage=state.stage, mean=f"{mean:.2f}", refresh=False)
        bar.update()
        if time.time() - last_eval > options.eval_seconds or state.step == options.steps:
            score()
            last_eval = time.time()
        if time.time() - last_save > options.save_seconds or state.step == options.steps:
            save()
            last_save = time.time()
        if stop.is_set():
            save()
            return


def parse_args() -> Options:
    """Options from the command line, one flag a field."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, field in Options.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        if field.type == "Path":
            parser.add_argument(flag, type=Path, required=True)
        elif field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    return Options(**vars(parser.parse_args()))


if __name__ == "__main__":
    train(parse_args())
