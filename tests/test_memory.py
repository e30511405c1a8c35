"""What an adapter keeps for the backward pass, and mixed precision."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimtune as st
from cases import METHODS, Chain, adapt, methods, shake

T, I, O = 256, 48, 40


def saved_bytes(model, x):
    """Bytes of distinct storages kept for backward, parameters apart."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in owned:
            kept[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(kept.values()), y


OPTIONS = [
    (m, options)
    for m in METHODS
    for options in ({}, {"dropout": 0.1}, {"rank_dropout": 0.1})
    if "rank_dropout" not in options or m.rank_dropout
]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=lambda v: getattr(v, "id", None) or "-".join(v) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_keeps_x_and_nothing_else_of_its_size(method, options, dtype, bias):
    model = nn.Sequential(nn.Linear(I, O, bias=bias)).to(dtype)
    adapt(model, method.recipe(**options), ["0"])
    x = torch.randn(T, I, dtype=dtype, requires_grad=True)
    size = x.element_size()
    kept, y = saved_bytes(model, x)
    assert kept <= T * (I + method.outputs * O) * size + 4 * method.kept(T, O, I)
    y.sum().backward()


def test_convolution_dropout_keeps_x_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    st.adapt(model, st.lora(rank=1), ["0"])
    without, _ = saved_bytes(model, x)
    st.remove(model, "default")
    st.adapt(model, st.lora(rank=1, dropout=0.1), ["0"])
    shake(model)
    # hooks nest: the inner ones of the dropout see the tensors first, so count what the graph holds by hand
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [p for _, p in st.trainable_parameters(model)] + [x])
    assert all(g.isfinite().all() for g in grads)
    kept, _ = saved_bytes(model, x)
    assert kept <= without + x.nelement() // 8


@methods
def test_bf16_base_fp32_adapter(method):
    model = Chain(torch.bfloat16)
    adapt(model, method.recipe(), Chain.targets_of(method))
    shake(model)
    y = model(Chain.ids())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for n, p in st.trainable_parameters(model):
        assert p.dtype == p.grad.dtype == torch.float32, n
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, n


@methods
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_close_to_fp32(method, dropout):
    torch.manual_seed(0)
    model = Chain()
    adapt(model, method.recipe(dropout=dropout), Chain.targets_of(method))
    shake(model, 0.1)
    ids = Chain.ids()

    def run():
        torch.manual_seed(1)
        model.zero_grad()
        y = model(ids)
        y.float().square().sum().backward()
        return y.float(), {n: p.grad.clone() for n, p in st.trainable_parameters(model)}

    y, grads = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y16, grads16 = run()
    assert (y16 - y).norm() < 0.05 * y.norm()
    for n, g in grads.items():
        assert grads16[n].dtype == torch.float32
        assert (grads16[n] - g).norm() < 0.15 * g.norm() + 1e-3, n


REPLAYED = [(m, o) for m in METHODS for o in ("dropout", "rank_dropout") if o == "dropout" or m.rank_dropout]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "option"), REPLAYED, ids=lambda v: getattr(v, "id", v))
def test_gradient_checkpointing_gives_the_same_gradients(method, option, reentrant):
    """Recomputation draws the same dropout masks, also where the first pass ran without gradients."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    adapt(model, method.recipe(**{option: 0.3}))
    shake(model)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(7)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().sum().backward()
        results.append([p.grad.clone() for _, p in st.trainable_parameters(model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_statistics():
    from slimtune.ops.dropout import dropped, keep_probability, replayed_dropout

    x = torch.ones(400, 333)
    for p in (0.001, 0.05, 0.5, 0.999):
        kept = dropped(x, p, 3).mean().item()
        assert abs(kept - keep_probability(p)) < 4 * (0.25 / x.numel()) ** 0.5 + 1e-9
        assert torch.equal(dropped(x, p, 3), dropped(x, p, 3)) and not torch.equal(dropped(x, p, 3), dropped(x, p, 4))
    for column in dropped(x, 0.5, 1).mean(0)[:16]:  # no byte of the random words is biased
        assert 0.35 < column < 0.65
    assert abs(replayed_dropout(lambda z: z, x, 0.3).mean().item() - 1) < 0.01


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@methods
def test_nothing_grows_with_the_square_of_a_vocabulary(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(1200, 8))
    with Largest() as largest:
        adapt(model, method.recipe(), ["0"])
        shake(model)
        model(torch.randint(0, 1200, (2, 3))).sum().backward()
        st.adapt(model, st.dora(rank=2, axis="column"), ["0"], name="above")
        model(torch.randint(0, 1200, (2, 3))).sum().backward()
        st.merge(model)
    assert largest.numel <= 12 * 8 * 1200
