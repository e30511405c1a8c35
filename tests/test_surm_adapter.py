"""SURM's adapter placement: the formula, where it starts, what it refuses, and a BERT around it."""

import pytest
import torch
from torch import nn

import slimtune as st

STRUCTURES = [
    (st.Kronecker, {}),
    (st.Kronecker, {"rank": 2, "factor": -1, "split": "both"}),
    (st.KhatriRao, {}),
    (st.LowRank, {"rank": 2}),
]
structures = pytest.mark.parametrize(
    ("structure", "options"), STRUCTURES, ids=["kronecker", "kronecker-split", "khatri-rao", "low-rank"]
)


def shaken(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@structures
@pytest.mark.parametrize("norm", [None, "pre", "post"])
@pytest.mark.parametrize(("activation", "phi"), [("gelu", nn.functional.gelu), ("tanh", torch.tanh)])
def test_forward_is_the_formula(structure, options, norm, activation, phi):
    torch.manual_seed(0)
    adapter = shaken(st.surm_adapter(12, structure, options, activation, norm, dtype=torch.float64))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    M = adapter.structure.dense()
    z = adapter.layer_norm(x) if norm == "pre" else x
    slow = x + phi(z @ M.T) + adapter.bias
    if norm == "post":
        slow = adapter.layer_norm(slow)
    fast = adapter(x)
    torch.testing.assert_close(fast, slow)
    wanted = [x, *adapter.parameters()]
    probe = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, wanted, probe), torch.autograd.grad(slow, wanted, probe), strict=True):
        torch.testing.assert_close(a, b)


@structures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_identity_and_learns(structure, options, dtype):
    torch.manual_seed(0)
    adapter = st.surm_adapter(12, structure, options, dropout=0.1)
    x = torch.randn(3, 12, dtype=dtype)
    y = adapter.train()(x)
    assert torch.equal(y, x) and y.dtype == dtype
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x).float().square().sum().backward()
        optimizer.step()
    assert [n for n, p in adapter.named_parameters() if torch.equal(p, start[n])] == []


def test_post_norm_starts_as_a_layer_norm():
    adapter, x = st.surm_adapter(12, norm="post"), torch.randn(3, 12)
    torch.testing.assert_close(adapter(x), nn.functional.layer_norm(x, (12,)))


@pytest.mark.parametrize("norm", [None, "pre"])
def test_parameters_are_the_papers(norm):
    """Kronecker: r0 r1 + (N / r0)(N / r1) + N; two norm vectors more with a norm."""
    adapter = st.surm_adapter(768, options={"left": [32, 24]}, norm=norm)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 32 * 24 + (768 // 32) * (768 // 24) + 768 + (0 if norm is None else 2 * 768)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "relu"}, "relu has derivative 0 at 0: M starts at 0 and would never learn"),
        ({"activation": torch.relu}, "relu has derivative 0 at 0"),
        ({"activation": nn.ReLU()}, "ReLU has derivative 0 at 0"),
        ({"activation": "hardswish6"}, "no activation 'hardswish6'; there are elu, gelu"),
        ({"activation": "sigmoid"}, "sigmoid is 0.5 at 0, so the adapter would not start as the identity"),
        ({"activation": "softplus"}, "softplus is 0.6931 at 0"),
        ({"norm": "both"}, "norm must be None, 'pre' or 'post', got 'both'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"options": {"rnk": 5}}, "surm_adapter: Kronecker has no option 'rnk'; it has rank"),
        ({"structure": nn.Linear}, "structure must be a class of Structure"),
        ({"options": {"rank": 5}}, "rank 5 does not divide both 12 and 12; it can be 1, 2, 3, 4, 6, 12"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(st.StructureError, match=words):
        st.surm_adapter(12, **options)


def test_a_structure_must_be_square():
    from slimtune.models import SurmAdapter

    with pytest.raises(st.StructureError, match="must be square, got 6 x 4"):
        SurmAdapter(st.Kronecker(6, 4))


def test_meta_then_empty_then_reset():
    adapter = st.surm_adapter(12, norm="pre", device="meta").to_empty(device="cpu")
    adapter.reset_parameters()
    x = torch.randn(3, 12)
    assert torch.equal(adapter(x), x)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=31, **sizes)).requires_grad_(False)
    for layer in model.bert.encoder.layer:
        for output in (layer.attention.output, layer.output):
            output.dropout = nn.Sequential(output.dropout, st.surm_adapter(16, dropout=0.15))
    model.classifier.requires_grad_(True)
    return model


def test_in_bert_by_plain_torch(tmp_path):
    """As in the docstring: placed after each output's dropout, trained, saved and loaded."""
    model = bert()
    ids, labels = torch.randint(0, 31, (4, 6)), torch.tensor([0, 1, 0, 1])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum(model.get_parameter(n).numel() for n in trained if "classifier" not in n) == 4 * (16 + 16 + 16)
    optimizer = torch.optim.AdamW((model.get_parameter(n) for n in trained), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save({n: model.get_parameter(n) for n in trained}, tmp_path / "adapter.pt")
    other = bert().eval()
    missing, unexpected = other.load_state_dict(torch.load(tmp_path / "adapter.pt"), strict=False)
    assert not unexpected and not any("structure" in n for n in missing)
    assert torch.equal(other(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("norm", [None, "pre"])
def test_one_graph(norm):
    torch._dynamo.reset()
    adapter = shaken(st.surm_adapter(12, norm=norm))
    x = torch.randn(3, 12)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapter(x))
