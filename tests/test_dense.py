"""Fast forward against the dense definition: values and gradients, and autograd against finite differences."""

import pytest
import torch
from torch import nn

import slimtune as st
from cases import (
    LAYERS,
    METHODS,
    Diagonal,
    adapted,
    dense_forward,
    dense_weight,
    gradients,
    layers,
    methods,
    methods_with,
)
from slimtune.ops.dropout import draw_seed, dropped, keep_probability


@methods
@layers
def test_forward_and_gradients_equal_the_definition(method, layer):
    model, x = adapted(method, layer)
    fast, slow = model(x), dense_forward(model.layer, x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.layer.map().weight(), dense_weight(model.layer), rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(fast, model, x), gradients(slow, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@methods
@layers
def test_no_grad_path_equals_grad_path(method, layer):
    model, x = adapted(method, layer)
    with torch.no_grad():
        quiet = model(x)
    torch.testing.assert_close(quiet, model(x), rtol=1e-12, atol=1e-13)


@methods_with(lambda m: m.exact)  # a detached norm is held against the definition above
@pytest.mark.parametrize(
    "layer", [x for x in LAYERS if x.id in ("linear", "linear-flat", "conv2d-strided")], ids=lambda m: m.id
)
def test_gradcheck(method, layer):
    model, x = adapted(method, layer)
    parameters = [p for _, p in st.trainable_parameters(model)]

    def f(x, *_):
        return model(x)

    assert torch.autograd.gradcheck(f, (x, *parameters))


@methods_with(lambda m: m.parameters)
@layers
def test_parameter_count_is_the_papers(method, layer):
    model, _ = adapted(method, layer)
    sizes = model.layer.layout.sizes(model.layer)
    assert st.summary(model).trainable == method.parameters(*sizes)


@methods
@pytest.mark.parametrize("layer", [x for x in LAYERS if not x.id.startswith("embedding")], ids=lambda m: m.id)
@pytest.mark.parametrize("p", [0.3, 0.02])
def test_dropout_touches_only_the_branch_of_the_change(method, layer, p):
    model, x = adapted(method, layer, dropout=p)
    model.train()
    torch.manual_seed(5)
    fast = model(x)
    torch.manual_seed(5)
    host = model.layer
    base, adapter = host.layout(host), host.adapters["default"]
    z = dropped(x, p, draw_seed()) / keep_probability(p)
    change = adapter.scale * adapter.structure.dense()
    if isinstance(adapter.composition, (st.Magnitude, st.ColumnMagnitude, st.BiMagnitude)):
        # W' is d e^T times W + dW, entry by entry: only dW sees the dropped input, and d e^T is that of the whole
        W = host.layout(host).weight()
        factor = adapter.composition.weight(W, change) / (W + change)
        if not method.exact:  # W' / V holds the norms alone constant, and so its gradient in V must go
            factor = adapter.composition.weight(W, change.detach()) / (W + change.detach())
        slow = base.with_weight(x, factor * W, base.bias) + base.with_weight(z, factor * change, None)
    else:  # the whole of what the adapter changes sees the dropped input
        slow = base(x) + base.with_weight(z, dense_weight(host) - base.weight(), None)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(fast, model, x), gradients(slow, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@methods_with(lambda m: m.rank_dropout)
@layers
def test_rank_dropout_keeps_the_expectation(method, layer):
    model, x = adapted(method, layer, rank_dropout=0.5)
    with torch.no_grad():
        sure = model(x)
        model.train()
        mean = torch.stack([model(x) for _ in range(400)]).mean(0)
    assert not torch.equal(model(x), model(x))
    assert (mean - sure).abs().mean() < 0.12 * (sure - model.layer.layout(model.layer)(x)).abs().mean() + 1e-3
    gradients(model(x), model, x)


def test_rank_dropout_gradient_follows_its_mask():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    st.adapt(model, st.lora(rank=4, rank_dropout=0.5), ["0"])
    with torch.no_grad():
        model[0].adapters["default"].structure.B.normal_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(x, *_):
        torch.manual_seed(3)
        return model(x)

    assert torch.autograd.gradcheck(f, (x, *[p for _, p in st.trainable_parameters(model)]))


def test_dora_zero_row_and_tiny_magnitude():
    """Real checkpoints have rows of zeros: output, loss and gradients stay finite, and right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
    st.adapt(model, st.dora(rank=2, detach=False), ["0"])
    adapter = model[0].adapters["default"]
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    with torch.no_grad():
        adapter.structure.B.normal_()
        adapter.composition.magnitude[1] = 0.0
        adapter.composition.magnitude[3] = -0.5
    x.requires_grad_(True)
    fast, slow = model(x), dense_forward(model[0], x)
    for a, b in zip(gradients(fast, model, x), gradients(slow, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_magnitude_over_an_unfactored_structure_uses_the_definition():
    for layer in LAYERS:
        torch.manual_seed(0)
        model = nn.Sequential(layer.make().double())
        x = layer.inputs(torch.float64)
        before = model(x)
        st.adapt(model, st.Recipe(Diagonal, {}, st.Magnitude, dropout=0.2), ["0"])
        torch.testing.assert_close(model.eval()(x), before)
        with torch.no_grad():
            model[0].adapters["default"].structure.v.normal_()
        torch.testing.assert_close(model(x), dense_forward(model[0], x))
        with st.merged(model):
            again = model(x)
        torch.testing.assert_close(model(x), again)
        model.train()(x).sum().backward()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.id)
def test_trainable_scale_receives_its_gradient(method):
    model, x = adapted(method, LAYERS[0])
    adapter = model.layer.adapters["default"]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    adapter._buffers["scale"] = scale
    fast, slow = model(x), dense_forward(model.layer, x)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), [scale]) for y in (fast, slow))
    torch.testing.assert_close(a, b)


@methods
def test_nothing_remembered_without_gradients_goes_stale(method):
    """Repeated no-grad calls may reuse work; every way of changing a weight must be seen."""
    model, x = adapted(method, LAYERS[0])
    host = model.layer
    adapter = host.adapters["default"]
    x = x.detach()

    def check():
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(x), dense_forward(host, x), rtol=1e-10, atol=1e-12)

    check()
    with torch.no_grad():
        for t in (host.weight, *adapter.parameters(), adapter.scale):
            t.mul_(1.5)
            check()
        host.weight.data = host.weight.data * 2
        check()
        next(adapter.structure.parameters()).data.mul_(3)  # behind autograd's back: a mode switch is what makes it seen
        model.eval()
        check()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.1))
    model(x).sum().backward()
    optimizer.step()
    check()
    st.adapt(model, st.lora(rank=2), ["layer"], name="under")
    st.activate(model, ["under", "default"])
    check()
    with torch.no_grad():
        host.adapters["under"].structure.B.normal_()  # of the LoRA below
    check()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense_forward(host, x), rtol=1e-10, atol=1e-12)
