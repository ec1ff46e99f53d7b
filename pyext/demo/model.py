"""A small character-level transformer: pre-norm, causal, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention. Query, key and value are three matrices, so that Muon sees each map on its own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )  # each (batch, heads, context, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Token ids (batch, context) to logits (batch, context, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, seed: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"demo: width {width} is not a multiple of {heads} heads")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise(layers, torch.Generator().manual_seed(seed))

    def _initialise(self, layers: int, generator: torch.Generator) -> None:
        """GPT-2's rule: normal(0, 0.02), and 1/sqrt(2 layers) of that where a branch joins the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                joins = name.endswith(("attention.output.weight", "down.weight"))
                std = 0.02 / (2 * layers) ** 0.5 if joins else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_norm(x))
