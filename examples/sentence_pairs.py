"""A sentence encoder that compares two sentences: each is embedded alone, a linear layer reads the two embeddings.

    u, v = normalised means of the encoder's last layer over each sentence's tokens          (B, H) each
    logits = W [sqrt(H) |u - v|, H u * v] + b                                                 (B, outputs)

The features of Conneau et al. (2017, arXiv:1705.02364, section 3.2) without u and v themselves, scaled so that their
entries are of size 1. Sentence encoders are trained to embed one sentence; reading two at once they would have to
learn first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from slimtune.hf.models import quiet, resolve_model


class Pairs(nn.Module):
    """`encoder` on both sentences of a pair "[CLS] first [SEP] second [SEP]", `classifier` on their comparison."""

    def __init__(self, encoder: nn.Module, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.classifier = nn.Linear(2 * self.width, outputs)

    def embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, H)
        order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]  # no columns of padding
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        hidden = self.encoder(input_ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        first = attention_mask * (token_type_ids == 0)
        second = attention_mask * (token_type_ids == 1)
        second[:, 0] = 1  # each sentence has the leading [CLS]
        u, v = self.embed(input_ids, first), self.embed(input_ids, second)
        return self.classifier(torch.cat([math.sqrt(self.width) * (u - v).abs(), self.width * u * v], 1))


def minilm(outputs: int) -> tuple[Pairs, str]:
    """The embedded MiniLM and its tokenizer."""
    name = resolve_model("embedded:minilm")
    with quiet():
        encoder = AutoModel.from_pretrained(name, add_pooling_layer=False)
    return Pairs(encoder, outputs), name
