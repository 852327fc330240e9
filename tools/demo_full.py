"""The demo model with full attention: LLaDA's network in small, and how it is trained and decoded.

LLaDA's recipe (arXiv 2502.09992, section 2): mask each token of the response with probability t ~ U(0, 1),
predict the masked ones, weigh the loss by 1/t; the response region has a fixed size and is filled up with
end-of-text tokens. Half of the samples are masked as block decoding sees them: a window is masked with ratio
t, everything right of it completely. Shape notation: B batch, L length, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import demo_task
import torch
import torch.nn.functional as F
from demo_checkpoint import EPS, HEADS, LAYERS, MASK_ID, MAX_LENGTH, MLP, THETA, VOCAB, WIDTH, save
from demo_network import Linear, heads_of, rotate, rotations
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

__all__ = ["Model", "exact_match", "load", "loss_of", "save"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH, EPS)
        self.ff_norm = nn.RMSNorm(WIDTH, EPS)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.ff_proj, self.up_proj, self.ff_out = Linear(WIDTH, MLP), Linear(WIDTH, MLP), Linear(MLP, WIDTH)
        nn.init.zeros_(
            self.attn_out.weight
        )  # the model starts as the identity: copying is then learnt at once
        nn.init.zeros_(self.ff_out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = heads_of(h, HEADS, self.q_proj, self.k_proj, self.v_proj)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(-2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Model(nn.Module):
    """The names of the attributes make the official tensor names of LLaDA (see `save`)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.RMSNorm(WIDTH, EPS)
        self.ff_out = Linear(WIDTH, VOCAB)
        nn.init.normal_(self.wte.weight, std=0.5)
        with torch.no_grad():
            self.ff_out.weight.copy_(self.wte.weight * 0.2)
        cos, sin = rotations(MAX_LENGTH, WIDTH // HEADS, THETA)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, first_row: int) -> Tensor:
        """Logits [B, L - first_row, V] of the rows from `first_row`."""
        x = self.wte(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.ff_out(self.ln_f(x[:, first_row:]))


def noise(response: Tensor) -> tuple[Tensor, Tensor]:
    """Masked positions of the response [B, G] (bool) and the loss weight of each (float)."""
    rows, length = response.shape
    # stratified over the batch: the same law for each row, less variance of the 1/t weights
    t = ((torch.rand(1) + torch.arange(rows) / rows) % 1).clamp_min(0.02)[torch.randperm(rows), None]
    position = torch.arange(length)
    window = torch.tensor([8, 16, 32, 32, 32, 48])[torch.randint(6, (rows, 1))]
    start = (torch.rand(rows, 1) * (length / window).ceil()).floor() * window
    block_wise = torch.rand(rows, 1) < 0.5
    start, end = torch.where(block_wise, start, 0), torch.where(block_wise, start + window, length)
    inside = (position >= start) & (position < end)
    drawn = inside & (torch.rand(rows, length) < t)
    return drawn | (position >= end), drawn / t


def loss_of(model: Model, ids: Tensor) -> Tensor:
    first = ids.shape[1] - demo_task.GEN_LENGTH
    response = ids[:, first:]
    masked, weight = noise(response)
    noisy = torch.cat([ids[:, :first], response.masked_fill(masked, MASK_ID)], 1)
    losses = F.cross_entropy(model(noisy, first).flatten(0, 1), response.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / response.numel()


@torch.inference_mode()
def exact_match(
    model: Model, tokenizer: Tokenizer, ids: Tensor, examples: list, threshold: float = 0.9
) -> float:
    """Share of right answers, decoded by blocks of 32 with a threshold and no cache: a progress figure, not
    the evaluation."""
    first = ids.shape[1] - demo_task.GEN_LENGTH
    canvas = torch.cat([ids[:, :first], torch.full((len(ids), demo_task.GEN_LENGTH), MASK_ID)], 1)
    for end in range(first + 32, ids.shape[1] + 1, 32):
        while (canvas[:, first:end] == MASK_ID).any():
            probabilities = model(canvas, first).softmax(-1)
            probabilities[..., MASK_ID] = 0
            confidence, token = probabilities.max(-1)
            confidence = confidence.masked_fill(canvas[:, first:] != MASK_ID, -1)
            confidence[:, end - first :] = -1
            commit = (confidence >= threshold) | (
                (confidence == confidence.amax(1, keepdim=True)) & (confidence >= 0)
            )
            canvas[:, first:] = torch.where(commit, token, canvas[:, first:])
    answers = tokenizer.decode_batch(canvas[:, first:].tolist())
    return sum(demo_task.is_right(a, e.plan) for a, e in zip(answers, examples, strict=True)) / len(examples)


def load(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """Weights saved by `save`; rows of the embedding and the head follow their tokens, should the vocabulary
    have changed."""
    tensors = {
        name.removeprefix("model.transformer."): t.float()
        for name, t in load_file(path / "model.safetensors").items()
    }
    old = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
    for name in ("wte.weight", "ff_out.weight"):
        rows = model.state_dict()[name].clone()
        for token, i in tokenizer.get_vocab().items():
            if token in old:
                rows[i] = tensors[name][old[token]]
        tensors[name] = rows
    model.load_state_dict(tensors)
