"""The testbed's model: a small Qwen2.5-VL of transformers, and a lean way to train it.

``Trainee`` runs the same weights as the transformers class without its padding, per-image loops and
casts; ``tests/test_testbed.py`` holds that the logits agree. Its auxiliary heads read the residual
stream between layers. They only shape the circuits, and are dropped at export.

Shapes: B prompts, N images, C cells (digits, image tokens) of all images of a prompt, T tokens,
Q questions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from collages import (
    MAX_COUNT,
    TASKS,
    TEMPLATES,
    Bank,
    Collages,
    Question,
    is_digit_argument,
)
from torch import Tensor, nn
from torch.nn import functional as F
from vocabulary import (
    DIGITS,
    LABELS,
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    TOKEN_ID,
    VOCAB_SIZE,
    ids,
)

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 192, 6, 6, 2, 384
VISION_HIDDEN, VISION_DEPTH, VISION_HEADS, VISION_MLP = 64, 2, 4, 128
HEAD_DIM = HIDDEN // HEADS


def build_model(seed: int) -> nn.Module:
    """The transformers model, with random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = TOKEN_ID
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.04,
            # high frequencies for the order of images, low ones to match contents at any distance
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
            },
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
        },
        vision_config={
            "depth": VISION_DEPTH,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "window_size": 16 * PATCH_SIZE * MERGE_SIZE,  # no collage is larger than a window
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [VISION_DEPTH - 1],
            "initializer_range": 0.04,
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = token["<|endoftext|>"]
    model.generation_config.eos_token_id = token["<|im_end|>"]
    return model


@dataclass(frozen=True)
class Batch:
    """Prompts of one layout, and where to look in them.

    Attributes:
        grids: of each image.
        ids: ``[B, T]``; image tokens are placeholders.
        positions: ``[3, T]``, M-RoPE's.
        bias: ``[T, T]``, what attention adds: 0 or -inf.
        patches: ``[B, C, 4, 16]``, one channel of one frame.
        image_at, image_of: ``[C]``, the place of each image token, and its image.
        end_at: ``[N]``, the place of each end delimiter.
        ask_at: ``[Q]``, the place of the token that predicts the answer.
        argument_at: for each question the places of its arguments.
        answers: ``[B, Q]`` token ids. valid: ``[B, Q]``, which of them count.
        labels: ``[B, N]``, which letter names each image.
        collages, questions: what it was made of.
    """

    grids: tuple[tuple[int, int], ...]
    ids: Tensor
    positions: Tensor
    bias: Tensor
    patches: Tensor
    image_at: Tensor
    image_of: Tensor
    end_at: Tensor
    ask_at: Tensor
    argument_at: tuple[tuple[int, ...], ...]
    answers: Tensor
    valid: Tensor
    labels: Tensor
    collages: Collages
    questions: tuple[Question, ...]


def build_batch(
    bank_patches: Tensor,
    collages: Collages,
    questions: tuple[Question, ...],
    *,
    labels: np.ndarray | None = None,
    isolated: bool = True,
    device: str = "cpu",
) -> Batch:
    """Packs prompts.

    Args:
        bank_patches: ``Bank.patches`` of the collages' bank.
        collages: The images.
        questions: Several, of each prompt.
        labels: ``[B, N]``, the letter that names each image; in order if None.
        isolated: Every question sees the images and itself only, and stands at the position of the
            first: several prompts of one question that share their images. Otherwise the turns of
            one conversation.
    """
    batch, n, _ = collages.digits.shape
    if labels is None:
        labels = np.tile(np.arange(n), (batch, 1))
    template: list[int] = ids("<|im_start|> user")
    positions = [[0, 0, 0], [1, 1, 1]]
    label_at, image_at, image_of, end_at, cells = [], [], [], [], []

    def text(tokens: list[int], start: int) -> int:
        template.extend(tokens)
        positions.extend([start + k] * 3 for k in range(len(tokens)))
        return start + len(tokens)

    position = 2
    for image, (rows, columns) in enumerate(collages.grids):
        position = text(ids("image A : <|vision_start|>"), position)
        label_at.append(len(template) - 3)
        image_at.extend(range(len(template), len(template) + rows * columns))
        image_of.extend([image] * (rows * columns))
        cells.append(collages.samples[:, image, : rows * columns])
        template.extend([TOKEN_ID["<|image_pad|>"]] * (rows * columns))
        positions.extend(
            [position, position + r, position + c] for r in range(rows) for c in range(columns)
        )
        position += max(rows, columns)
        end_at.append(len(template))
        position = text(ids("<|vision_end|>"), position)

    prefix, first = len(template), position
    fills: list[tuple[int, np.ndarray]] = []  # place, [B] token ids
    ask_at, argument_at, blocks = [], [], [-1] * prefix
    rows_ = np.arange(batch)
    letter = np.array([TOKEN_ID[x] for x in LABELS])
    digit = np.array([TOKEN_ID[x] for x in DIGITS])
    answers = []
    for k, question in enumerate(questions):
        if isolated:
            position = first
        elif k:
            position = text(ids("<|im_end|> <|im_start|> user"), position)
        places = []
        for word in TEMPLATES[question.task].split():
            if word.startswith("{"):
                argument = int(word[1])
                value = question.arguments[:, argument]
                places.append((argument, len(template)))
                is_digit = is_digit_argument(question.task, argument)
                fills.append(
                    (len(template), digit[value] if is_digit else letter[labels[rows_, value]])
                )
                position = text([0], position)
            else:
                position = text([TOKEN_ID[word]], position)
        argument_at.append(tuple(place for _, place in sorted(places)))
        position = text(ids("<|im_end|> <|im_start|> assistant"), position)
        ask_at.append(len(template) - 1)
        if question.task in ("find", "repeat"):
            said = letter[labels[rows_, question.answer]]
        elif question.task == "same_first":
            said = np.array([TOKEN_ID["no"], TOKEN_ID["yes"]])[question.answer]
        else:
            said = digit[question.answer]
        answers.append(said)
        fills.append((len(template), said))
        position = text([0], position)
        blocks.extend([k] * (len(template) - len(blocks)))

    all_ids = np.tile(np.array(template), (batch, 1))
    for image, place in enumerate(label_at):
        all_ids[:, place] = letter[labels[:, image]]
    for place, value in fills:
        all_ids[:, place] = value
    total = len(template)
    block = np.array(blocks)
    sees = np.tri(total, dtype=bool)
    if isolated:
        sees &= (block[None] < 0) | (block[:, None] == block[None])
    bias = np.where(sees, 0, -np.inf).astype(np.float32)

    def put(x: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(np.asarray(x)).to(device)

    return Batch(
        grids=collages.grids,
        ids=put(all_ids),
        positions=put(np.array(positions).T),
        bias=put(bias),
        patches=bank_patches[put(np.concatenate(cells, 1))],
        image_at=put(image_at),
        image_of=put(image_of),
        end_at=put(end_at),
        ask_at=put(ask_at),
        argument_at=tuple(argument_at),
        answers=put(np.stack(answers, 1)),
        valid=put(np.stack([q.valid for q in questions], 1)),
        labels=put(labels),
        collages=collages,
        questions=questions,
    )


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # forward and backward of these sizes take a third of SDPA's time in bfloat16 on a CPU
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, dtype: torch.dtype, w: dict[str, Tensor]
) -> Tensor:
    """One layer of the language model, ``[B, T, D]`` float32 to the same."""
    b, t, _ = x.shape
    y = _norm(x, w["input_layernorm.weight"]).to(dtype)
    a = "self_attn."
    q = _linear(y, w[a + "q_proj.weight"], w[a + "q_proj.bias"], dtype)
    k = _linear(y, w[a + "k_proj.weight"], w[a + "k_proj.bias"], dtype)
    v = _linear(y, w[a + "v_proj.weight"], w[a + "v_proj.bias"], dtype)
    q = _rotate(q.view(b, t, HEADS, HEAD_DIM).transpose(1, 2).float(), cos, sin).to(dtype)
    k = _rotate(k.view(b, t, KV_HEADS, HEAD_DIM).transpose(1, 2).float(), cos, sin).to(dtype)
    v = v.view(b, t, KV_HEADS, HEAD_DIM).transpose(1, 2)
    shared = HEADS // KV_HEADS
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    y = _attend(q, k, v, bias.to(dtype)).transpose(1, 2).reshape(b, t, HIDDEN)
    x = x + _linear(y, w[a + "o_proj.weight"], None, dtype).float()
    y = _norm(x, w["post_attention_layernorm.weight"]).to(dtype)
    gate = _linear(y, w["mlp.gate_proj.weight"], None, dtype)
    y = F.silu(gate) * _linear(y, w["mlp.up_proj.weight"], None, dtype)
    return x + _linear(y, w["mlp.down_proj.weight"], None, dtype).float()


def vision_layer(
    x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, w: dict[str, Tensor]
) -> Tensor:
    """One block of the vision tower on images of one grid, ``[images, patches, width]``."""
    b, t, d = x.shape
    y = _norm(x, w["norm1.weight"]).to(dtype)
    qkv = _linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"], dtype)
    q, k, v = qkv.view(b, t, 3, VISION_HEADS, d // VISION_HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (_rotate(z.float(), cos, sin).to(dtype) for z in (q, k))
    y = _attend(q, k, v, None).transpose(1, 2).reshape(b, t, d)
    x = x + _linear(y, w["attn.proj.weight"], w["attn.proj.bias"], dtype).float()
    y = _norm(x, w["norm2.weight"]).to(dtype)
    gate = _linear(y, w["mlp.gate_proj.weight"], w["mlp.gate_proj.bias"], dtype)
    y = F.silu(gate) * _linear(y, w["mlp.up_proj.weight"], w["mlp.up_proj.bias"], dtype)
    return x + _linear(y, w["mlp.down_proj.weight"], w["mlp.down_proj.bias"], dtype).float()


class Trainee(nn.Module):
    """The model with its auxiliary heads; ``model`` is what is shipped."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.aux = nn.ModuleDict(
            {
                "cell_digit": nn.Linear(HIDDEN, 10),  # image tokens as the vision tower leaves them
                "cell_row": nn.Linear(HIDDEN, 4),
                "cell_column": nn.Linear(HIDDEN, 4),
                "label": nn.Linear(HIDDEN, 12),  # after layer 1: of this token's image
                "first": nn.Linear(HIDDEN, 10),  # after layer 2: the end delimiter on its image
                "mode": nn.Linear(HIDDEN, 10),
                "cells": nn.Linear(HIDDEN, 12 * 10),
                "counts": nn.Linear(HIDDEN, 10 * (MAX_COUNT + 1)),
                "partner": nn.Linear(HIDDEN, 13),  # after layer 3: the earlier image it repeats
                "asked_first": nn.Linear(HIDDEN, 10),  # after layer 3: a label in a question
                "asked_mode": nn.Linear(HIDDEN, 10),
                "answer": nn.Linear(HIDDEN, VOCAB_SIZE),  # after layer 4: the last argument
            }
        )
        self.decoder_layer = decoder_layer
        self.vision_layer = vision_layer
        core = model.model
        self._layers = [dict(layer.named_parameters()) for layer in core.language_model.layers]
        self._blocks = [dict(block.named_parameters()) for block in core.visual.blocks]

    def compile(self) -> None:  # type: ignore[override]
        """Compiles one layer of each kind, for all lengths."""
        self.decoder_layer = torch.compile(decoder_layer, dynamic=True)
        self.vision_layer = torch.compile(vision_layer, dynamic=True)

    def see(self, patches: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """Image tokens of a batch, ``[B, C, 4, 16]`` to ``[B, C, D]``."""
        visual = self.model.model.visual
        weight = visual.patch_embed.proj.weight.sum((1, 2)).flatten(1)  # all channels are equal
        x = F.linear(patches, weight)  # [B, C, 4, width]
        sizes = [rows * columns for rows, columns in grids]
        parts = x.split(sizes, 1)
        done: list[Tensor] = [x] * len(grids)
        for grid in sorted(set(grids)):
            which = [k for k, other in enumerate(grids) if other == grid]
            y = torch.stack([parts[k] for k in which], 1)  # [B, images, cells, 4, width]
            b, n, c = y.shape[:3]
            y = y.reshape(b * n, c * 4, VISION_HIDDEN)
            cos, sin = self._vision_angles(*grid)
            for weights in self._blocks:
                y = self.vision_layer(y, cos, sin, self.dtype, weights)
            y = _norm(y, visual.merger.ln_q.weight).reshape(b, n, c, 4 * VISION_HIDDEN)
            up, _, down = visual.merger.mlp
            y = F.gelu(_linear(y, up.weight, up.bias, self.dtype))
            y = _linear(y, down.weight, down.bias, self.dtype).float()
            for k, image in zip(which, y.unbind(1), strict=True):
                done[k] = image
        return torch.cat(done, 1)

    def _vision_angles(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        inv = self.model.model.visual.rotary_pos_emb.inv_freq
        m = MERGE_SIZE
        h = torch.arange(rows * m).view(rows, 1, m, 1).expand(rows, columns, m, m).flatten()
        w = torch.arange(columns * m).view(1, columns, 1, m).expand(rows, columns, m, m).flatten()
        angles = torch.cat([x.to(inv)[:, None] * inv for x in (h, w)], -1)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def _text_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rotary = self.model.model.language_model.rotary_emb
        angles = positions[..., None].float() * rotary.inv_freq  # [3, T, head_dim / 2]
        parts = angles.split(rotary.mrope_section, -1)
        angles = torch.cat([part[k % 3] for k, part in enumerate(parts)], -1)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The logits ``[B, Q, V]`` that predict the answers, and the residual stream.

        The stream is ``[B, C, D]`` of the image tokens, then ``[B, T, D]`` after every layer.
        """
        text = self.model.model.language_model
        seen = self.see(batch.patches, batch.grids)
        x = text.embed_tokens(batch.ids)
        x = x.index_copy(1, batch.image_at, seen)
        cos, sin = self._text_angles(batch.positions)
        stream = [seen]
        for weights in self._layers:
            x = self.decoder_layer(x, cos, sin, batch.bias, self.dtype, weights)
            stream.append(x)
        at = torch.cat([batch.ask_at, batch.ask_at + 1])
        logits = F.linear(_norm(x[:, at], text.norm.weight), text.embed_tokens.weight)
        return logits, stream

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Each loss by name, and which answers were right ``[B, Q]``."""
        logits, stream = self(batch)
        count = len(batch.questions)
        answered, ended = logits[:, :count], logits[:, count:]
        each = F.cross_entropy(answered.flatten(0, 1), batch.answers.flatten(), reduction="none")
        weight = batch.valid.float()
        found = {
            "answer": (each.view_as(weight) * weight).sum() / weight.sum().clamp(min=1),
            "end": F.cross_entropy(
                ended.flatten(0, 1),
                torch.full_like(batch.answers, TOKEN_ID["<|im_end|>"]).flatten(),
            ),
        }
        found |= self._auxiliary(batch, stream)
        return found, answered.argmax(-1) == batch.answers

    def _auxiliary(self, batch: Batch, stream: list[Tensor]) -> dict[str, Tensor]:
        device = batch.ids.device
        digits = torch.as_tensor(batch.collages.digits, device=device)  # [B, N, M]
        counts = torch.as_tensor(batch.collages.counts, device=device)
        b, _, m = digits.shape

        def loss(name: str, x: Tensor, target: Tensor) -> Tensor:
            """x: ``[..., D]``; target: ``[..., *heads]``, -1 for none."""
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            logits = self.aux[name](x).view(-1, self.aux[name].out_features)
            target = target.reshape(len(logits), -1)
            classes = logits.shape[1] // target.shape[1]
            weight = None
            if classes == MAX_COUNT + 1:  # most digits do not occur: the others count more
                weight = logits.new_tensor([0.3, 1.0, 2.0, 2.5, 2.5])
            return F.cross_entropy(
                logits.view(-1, classes), target.reshape(-1), weight, ignore_index=-1
            )

        sizes = [rows * columns for rows, columns in batch.grids]
        cell = torch.cat([torch.arange(size, device=device) for size in sizes])
        columns = torch.cat([torch.full((r * c,), c, device=device) for r, c in batch.grids])
        label = batch.labels[:, batch.image_of]
        ends = [x[:, batch.end_at] for x in stream[1:]]
        padded = F.pad(digits, (0, 12 - m), value=-1)
        same = (digits[:, :, None] == digits[:, None]).all(-1).tril(-1)
        earlier = same.float().argmax(-1)
        partner = torch.where(same.any(-1), batch.labels.gather(1, earlier) + 1, 0)
        found = {
            "cell_digit": loss("cell_digit", stream[0], digits[:, batch.image_of, cell]),
            "cell_row": loss("cell_row", stream[0], (cell // columns).expand(b, -1)),
            "cell_column": loss("cell_column", stream[0], (cell % columns).expand(b, -1)),
            "label": loss("label", stream[1][:, batch.image_at], label),
            "end_label": loss("label", ends[0], batch.labels),
            "first": loss("first", ends[1], digits[..., 0]),
            "mode": loss("mode", ends[1], counts.argmax(-1)),
            "cells": loss("cells", ends[1], padded),
            "counts": loss("counts", ends[1], counts.clamp(max=MAX_COUNT)),
            "partner": loss("partner", ends[2], partner),
        }

        def name_loss(x: Tensor, names: tuple[str, ...], target: Tensor) -> Tensor:
            """What an image token says in the language model's own words: aligns the two spaces."""
            text = self.model.model.language_model
            words = text.embed_tokens.weight[[TOKEN_ID[name] for name in names]]
            logits = F.linear(_norm(x, text.norm.weight), words)
            return F.cross_entropy(logits.flatten(0, 1), target.flatten())

        found["digit_word"] = name_loss(stream[0], DIGITS, digits[:, batch.image_of, cell])
        found["label_word"] = name_loss(stream[1][:, batch.image_at], LABELS, label)
        places, images = [], []
        for question, at in zip(batch.questions, batch.argument_at, strict=True):
            for k, place in enumerate(at):
                if not is_digit_argument(question.task, k):
                    places.append(place)
                    images.append(question.arguments[:, k])
        if places:
            asked = torch.as_tensor(np.stack(images, 1), device=device)  # [B, A]
            x = stream[3][:, places]
            found["asked_first"] = loss("asked_first", x, digits[..., 0].gather(1, asked))
            found["asked_mode"] = loss("asked_mode", x, counts.argmax(-1).gather(1, asked))
        counted = [k for k, question in enumerate(batch.questions) if question.task == "count"]
        if counted:
            asked = torch.as_tensor(
                np.stack([batch.questions[k].arguments for k in counted], 1), device=device
            )  # [B, A, 2]: digit, image
            x = stream[3][:, [batch.argument_at[k][1] for k in counted]]
            histogram = counts.clamp(max=MAX_COUNT)
            histogram = histogram.gather(1, asked[..., 1:].expand(-1, -1, 10))
            found["asked_counts"] = loss("counts", x, histogram)
            found["asked_digit"] = loss("cell_digit", x, asked[..., 0])
        pairs = [k for k, question in enumerate(batch.questions) if question.task == "same_first"]
        if pairs:
            one = torch.as_tensor(
                np.stack([batch.questions[k].arguments[:, 0] for k in pairs], 1), device=device
            )
            x = stream[4][:, [batch.argument_at[k][1] for k in pairs]]
            found["other_first"] = loss("cell_digit", x, digits[..., 0].gather(1, one))
        found |= self._attention(batch, stream, digits[:, batch.image_of, cell], same)
        last = [max(at) for at in batch.argument_at]
        target = torch.where(batch.valid, batch.answers, -1)
        found["early_answer"] = loss("answer", stream[4][:, last], target)
        return found

    def _attention(
        self, batch: Batch, stream: list[Tensor], cells: Tensor, same: Tensor
    ) -> dict[str, Tensor]:
        """Where three heads should look: without it, matching by content stays at chance for long.

        Head 0 of the third layer: from the end of an image that repeats an earlier one to the end
        of that one. Head 0 of the fourth: from the digit in "which image has 7 ?" to image tokens
        that show it. Head 3 of the fourth: from the label in "which image repeats image C ?" to the
        end of the later one of the two, which knows both.

        Args:
            batch: The prompts.
            stream: The residual stream.
            cells: ``[B, C]``, the digit of each image token.
            same: ``[B, N, N]``, whether an image repeats an earlier one.
        """
        total = batch.ids.shape[1]
        found = {}
        wanted = batch.bias.new_zeros(len(same), len(batch.end_at), total)
        wanted[:, :, batch.end_at] = same.float()
        if same.any():
            found["look_partner"] = self._look(batch, stream, (2, 0), batch.end_at, wanted)
        finds = [k for k, question in enumerate(batch.questions) if question.task == "find"]
        if finds:
            asked = torch.as_tensor(
                np.concatenate([batch.questions[k].arguments for k in finds], 1),
                device=cells.device,
            )
            wanted = batch.bias.new_zeros(len(cells), len(finds), total)
            wanted[:, :, batch.image_at] = (asked[..., None] == cells[:, None]).float()
            at = torch.tensor([batch.argument_at[k][0] for k in finds], device=cells.device)
            found["look_digit"] = self._look(batch, stream, (3, 0), at, wanted)
        repeats = [k for k, question in enumerate(batch.questions) if question.task == "repeat"]
        if repeats:
            asked = [(q.arguments[:, 0], q.answer) for q in (batch.questions[k] for k in repeats)]
            later = torch.as_tensor(np.stack([np.maximum(*x) for x in asked], 1)).to(cells.device)
            wanted = batch.bias.new_zeros(len(cells), len(repeats), total)
            valid = batch.valid[:, repeats].float()
            wanted.scatter_(2, batch.end_at[later][..., None], valid[..., None])
            at = torch.tensor([batch.argument_at[k][0] for k in repeats], device=cells.device)
            found["look_repeat"] = self._look(batch, stream, (3, 3), at, wanted)
        return found

    def _look(
        self,
        batch: Batch,
        stream: list[Tensor],
        layer_head: tuple[int, int],
        at: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """Minus the log of a head's attention from ``at`` to ``wanted`` ``[B, at, T]``."""
        layer, head = layer_head
        w = self._layers[layer]
        y = _norm(stream[layer], w["input_layernorm.weight"])
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        cos, sin = self._text_angles(batch.positions)
        weight, bias = w["self_attn.q_proj.weight"], w["self_attn.q_proj.bias"]
        q = _rotate(F.linear(y[:, at], weight[part], bias[part]), cos[at], sin[at])
        group = head // (HEADS // KV_HEADS)
        part = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        weight, bias = w["self_attn.k_proj.weight"], w["self_attn.k_proj.bias"]
        k = _rotate(F.linear(y, weight[part], bias[part]), cos, sin)
        scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5 + batch.bias[at]
        hidden = torch.where(wanted > 0, 0.0, -1e4)
        mass = (scores.log_softmax(-1) + hidden).logsumexp(-1)
        return -(mass * wanted.amax(-1)).sum() / wanted.amax(-1).sum().clamp(min=1)


def bank_patches(bank: Bank, device: str = "cpu") -> Tensor:
    """``Bank.patches`` as a tensor."""
    return torch.as_tensor(bank.patches).to(device)


def task_accuracy(right: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """For each task of a batch how many were right, of how many."""
    found = dict.fromkeys(TASKS, (0, 0))
    for k, question in enumerate(batch.questions):
        valid = batch.valid[:, k]
        hits, total = found[question.task]
        found[question.task] = (
            hits + int((right[:, k] & valid).sum()),
            total + int(valid.sum()),
        )
    return {task: pair for task, pair in found.items() if pair[1]}
