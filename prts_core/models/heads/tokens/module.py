"""The tokens action head: every number of a chunk is one of a few bins, all of them told in one pass (OpenVLA-OFT).

The language model itself reads one query a number behind the prompt's kept keys and values; queries see the prompt and
each other. The head owns what a query is (the embedding of its row and of its dimension; OpenVLA-OFT's are zeros) and
the matrix from hidden states to bins.

The public layout says bin c by token `vocabulary - 1 - c`, the last ids of its language model, through the matrix that
predicts words. Here bins have a matrix of their own: the last ids of our vocabularies are FAST tokens, whose embeddings
mean other things, and no softmax over words has to be masked.

Shape legend: S samples, T chunk length, A padded action width, Q = T A queries, P prompt tokens, H language hidden,
C bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.model import TokensConfig
from prts_core.models.attention import Behind
from prts_core.models.tokens import Prefix


class TokensHead(nn.Module):
    """Logits of a chunk's bins given the language model's keys and values of every layer."""

    def __init__(self, config: TokensConfig, *, width: int, action_dim: int, chunk_length: int) -> None:
        super().__init__()
        self.config, self.action_dim, self.chunk_length = config, action_dim, chunk_length
        self.row_embedding = nn.Embedding(chunk_length, width)
        self.dimension_embedding = nn.Embedding(action_dim, width)
        for table in (self.row_embedding, self.dimension_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.out = nn.Linear(width, config.bins)

    def forward(self, prefix: Prefix, dof_mask: Tensor, language_model: Any) -> Tensor:
        """dof_mask (S, T, A) -> logits (S, T, A, C). Queries of padded dimensions are seen by no other."""
        queries = (self.row_embedding.weight[:, None] + self.dimension_embedding.weight).flatten(0, 1)
        if torch.is_autocast_enabled(queries.device.type):  # as PrtsModel.encode has it
            queries = queries.to(torch.get_autocast_dtype(queries.device.type))
        samples, count = len(dof_mask), len(queries)
        # All dimensions of a row stand at one position: a wider padding moves nothing.
        row = torch.arange(self.chunk_length, device=queries.device).repeat_interleave(self.action_dim)
        real = dof_mask.flatten(1) > 0
        visible = torch.cat([prefix.visible, real], 1)[:, None].expand(-1, count, -1)
        hidden = language_model(
            inputs_embeds=queries.expand(samples, -1, -1),
            position_ids=(prefix.following[:, None] + row).expand(3, -1, -1),
            past_key_values=Behind(prefix.keys, prefix.values),
            use_cache=True,
            visible=visible,
        ).last_hidden_state
        return self.out(hidden).unflatten(1, (self.chunk_length, self.action_dim))
