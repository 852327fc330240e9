"""The block-causal demo model: SDAR's network in small, and how it is trained and decoded.

The recipe of block diffusion (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303): one sequence holds the clean
tokens and a noisy copy of the answer's blocks. A noisy block sees itself and the clean blocks before it, as
when it is decoded; so one forward trains every block. Where the prompt ends inside a block, its last tokens
are part of the noisy copy too.
Shape notation: B batch, L length, G positions of the noisy copy, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import demo_task
import torch
import torch.nn.functional as F
from demo_checkpoint import (
    BLOCK_LENGTH,
    END_ID,
    EPS,
    HEADS,
    LAYERS,
    MASK_ID,
    MAX_LENGTH,
    MLP,
    THETA,
    VOCAB,
    WIDTH,
    save_block_causal,
    stored_name,
)
from demo_network import Linear, heads_of, rotate, rotations
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

HEAD_DIM = WIDTH // HEADS
save = save_block_causal


class Block(nn.Module):
    """A Qwen3 layer: q and k pass an RMSNorm over the head before they are rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH, EPS)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, EPS)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM, EPS), nn.RMSNorm(HEAD_DIM, EPS)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(WIDTH, MLP),
            Linear(WIDTH, MLP),
            Linear(MLP, WIDTH),
        )
        nn.init.zeros_(self.o_proj.weight)  # the model starts as the identity: copying is then learnt at once
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = heads_of(h, HEADS, self.q_proj, self.k_proj, self.v_proj)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Model(nn.Module):
    """With a tied head. The names of the attributes make the official tensor names (see `save`)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, EPS)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.constant_(self.norm.weight, 0.2)
        cos, sin = rotations(MAX_LENGTH, HEAD_DIM, THETA)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, first_row: int) -> Tensor:
        """Logits [B, L - first_row, V] of the rows from `first_row`. positions [L], mask [L, L] (bool)."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[positions], self.sin[positions]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return F.linear(self.norm(x[:, first_row:]), self.embed_tokens.weight)


def start_from_full(model: Model, path: Path) -> None:
    """Take what fits from the demo model with full attention: the network is the same but for the norms of
    q and k, and the head."""
    tensors = {name.removeprefix("model.transformer."): t.float() for name, t in load_file(path).items()}
    names = {
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "attn_out": "o_proj",
        "ff_proj": "gate_proj",
        "ff_out": "down_proj",
    }
    state = model.state_dict()
    state["embed_tokens.weight"] = tensors["wte.weight"]
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            _, layer, kind, leaf = name.split(".")
            state[f"blocks.{layer}.{names.get(kind, kind)}.{leaf}"] = tensor
    for layer in range(LAYERS):
        for name in ("q", "k"):  # heads of random inputs keep their size
            scale = tensors[f"blocks.{layer}.{name}_proj.weight"].norm() / WIDTH**0.5
            scale = scale * tensors[f"blocks.{layer}.attn_norm.weight"].square().mean().sqrt()
            state[f"blocks.{layer}.{name}_norm.weight"] = torch.full((HEAD_DIM,), float(scale))
    model.load_state_dict(state)


def load(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """Weights saved by `save`."""
    tensors = load_file(path / "model.safetensors")
    model.load_state_dict({name: tensors[stored_name(name)].float() for name in model.state_dict()})


def loss_of(model: Model, ids: Tensor) -> Tensor:
    """Of a batch [B, L] whose last GEN_LENGTH tokens are the answer: each of its blocks is masked with a
    ratio of its own, and counts once."""
    length = ids.shape[1]
    first = length - demo_task.GEN_LENGTH
    start = first // BLOCK_LENGTH * BLOCK_LENGTH
    whole = -(-(length - start) // BLOCK_LENGTH) * BLOCK_LENGTH
    ids = F.pad(ids, (0, start + whole - length), value=END_ID)
    answer = ids[:, start:]
    rows, count = len(ids), whole // BLOCK_LENGTH
    # the number of masks in a block is uniform: stratified over the batch
    ratio = ((torch.rand(1, count) + torch.arange(rows)[:, None] / rows) % 1)[torch.randperm(rows)]
    masks = (ratio * BLOCK_LENGTH).floor() + 1
    order = torch.rand(rows, count, BLOCK_LENGTH).argsort(-1).argsort(-1)
    drawn = (order < masks[..., None]).flatten(1)
    weight = (BLOCK_LENGTH / masks).repeat_interleave(BLOCK_LENGTH, 1) / BLOCK_LENGTH
    is_answer = torch.arange(start, start + whole) >= first
    # blocks after the one that ends the answer are never decoded
    ended = (answer == END_ID).long().cumsum(1).unflatten(1, (count, -1))[..., -1] > BLOCK_LENGTH
    counted = drawn & is_answer & ~ended.repeat_interleave(BLOCK_LENGTH, 1)
    noisy = answer.masked_fill(drawn & is_answer, MASK_ID)
    clean_at, noisy_at = torch.arange(start + whole), torch.arange(start, start + whole)
    positions = torch.cat([clean_at, noisy_at])
    block, is_noisy = positions // BLOCK_LENGTH, torch.arange(len(positions)) >= start + whole
    same, before = block[:, None] == block, block[:, None] > block
    clean_keys = ~is_noisy & (before | (~is_noisy[:, None] & same))
    mask = clean_keys | (is_noisy[:, None] & is_noisy & same)
    logits = model(torch.cat([ids, noisy], 1), positions, mask, start + whole)
    losses = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="none").view(rows, -1)
    return (losses * weight * counted).sum() / counted.new_tensor(rows * count, dtype=torch.float32)


@torch.inference_mode()
def exact_match(
    model: Model, tokenizer: Tokenizer, ids: Tensor, examples: list, threshold: float = 0.9
) -> float:
    """Share of right answers, decoded block by block with a threshold and no cache: a progress figure, not
    the evaluation."""
    first = ids.shape[1] - demo_task.GEN_LENGTH
    total = -(-ids.shape[1] // BLOCK_LENGTH) * BLOCK_LENGTH
    canvas = torch.cat([ids[:, :first], torch.full((len(ids), total - first), MASK_ID)], 1)
    at = torch.arange(total)
    mask = at[:, None] // BLOCK_LENGTH >= at // BLOCK_LENGTH
    for end in range((first // BLOCK_LENGTH + 1) * BLOCK_LENGTH, total + 1, BLOCK_LENGTH):
        start = end - BLOCK_LENGTH
        while (is_masked := canvas[:, start:end] == MASK_ID).any():
            probabilities = model(canvas[:, :end], at[:end], mask[:end, :end], start).softmax(-1)
            probabilities[..., MASK_ID] = 0
            confidence, token = probabilities.max(-1)
            confidence = confidence.masked_fill(~is_masked, -1)
            best = confidence == confidence.amax(1, keepdim=True)
            commit = is_masked & ((confidence >= threshold) | best)
            canvas[:, start:end] = torch.where(commit, token, canvas[:, start:end])
        if (canvas[:, first:end] == END_ID).any(1).all():
            break
    answers = tokenizer.decode_batch([_until_end(row) for row in canvas[:, first:].tolist()])
    return sum(demo_task.is_right(a, e.plan) for a, e in zip(answers, examples, strict=True)) / len(examples)


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END_ID)] if END_ID in ids else ids
