"""The model factories of `examples/`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def test_sentence_pairs_embed_each_sentence_alone():
    from examples.sentence_pairs import Pairs
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = Pairs(BertModel(config, add_pooling_layer=False), 3).eval()
    first, second = [5, 6, 7, 2], [8, 9, 2]  # 1 opens, 2 closes a sentence, 0 pads
    short = [1, 10, 2, 11, 2]
    ids = torch.tensor([[1, *first, *second], [*short, 0, 0, 0]])
    types = torch.tensor([[0] * 5 + [1] * 3, [0] * 3 + [1] * 2 + [0] * 3])
    found = model(ids, (ids > 0).long(), types)

    def alone(*tokens: int) -> torch.Tensor:
        return torch.nn.functional.normalize(model.encoder(torch.tensor([tokens])).last_hidden_state.mean(1), dim=-1)

    for row, (a, b) in zip(found, (([1, *first], [1, *second]), ([1, 10, 2], [1, 11, 2])), strict=True):
        u, v = alone(*a), alone(*b)
        wanted = model.classifier(torch.cat([8**0.5 * (u - v).abs(), 8 * u * v], 1))[0]
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-5)


def test_resnet20_has_its_papers_size():
    from examples.resnet_cifar import resnet20

    model = resnet20()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.27e6, rel=0.02)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
