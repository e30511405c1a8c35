"""torch.compile: one graph, no recompilation, same numbers."""

import pytest
import torch

import slimtune as st
from cases import DORA, LORA, Chain, adapt, adapted, dense_forward, kinds, methods, shake, tiny_llama


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@methods
@kinds
def test_every_layer_is_one_graph(method, layer):
    model, x = adapted(method, layer)
    y = dense_forward(model.layer, x)
    compiled = torch.compile(model, backend=Counter(), fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-9, atol=1e-11)


@methods
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_model_is_one_graph_and_changes_do_not_recompile(method, dropout):
    model = Chain().train()
    adapt(model, method.recipe(dropout=dropout), Chain.targets_of(method), modules_to_save=["classifier"])
    shake(model)
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.01))
    for _ in range(3):
        compiled(Chain.ids()).sum().backward()
        optimizer.step()
        for host in {"up", "down"} & set(Chain.targets_of(method)):
            model.get_submodule(host).adapters["default"].scale.mul_(0.9)
    assert counter.graphs == 1
    if not dropout:
        ids = Chain.ids()
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_equal_layers_share_their_code():
    """Six equal layers compile one frame each way, not six: the extended class is cached."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
    st.adapt(model, st.lora(rank=2))
    assert len({type(m) for m in model}) == 1
    counter = Counter()
    run = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = torch.randn(3, 8)
    for layer in model:
        x = run(layer, x)
    assert counter.graphs == 2  # the second because from then on x wants a gradient


@pytest.mark.parametrize("method", [LORA, DORA], ids=lambda m: m.id)
def test_gradients_through_the_compiler(method):
    """AOT autograd differentiates what the compiler sees as the eager kernels do."""
    model = tiny_llama()
    adapt(model, method.recipe())
    shake(model, 0.1)
    ids = torch.randint(0, 31, (2, 6))
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in st.trainable_parameters(model)})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-3, atol=1e-6)


def test_switching_adapters_recompiles_once_and_is_right():
    model = Chain().eval()
    ids = Chain.ids()
    base = model(ids)
    st.adapt(model, st.lora(rank=2), Chain.targets)
    shake(model)
    y = model(ids)
    compiled = torch.compile(model, backend=Counter(), fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(ids), y, rtol=1e-5, atol=1e-5)
        with st.disabled(model):
            torch.testing.assert_close(compiled(ids), base, rtol=1e-5, atol=1e-5)


MASKED = {
    "adalora": lambda: st.adalora(rank=2, initial_rank=4, t_init=2, t_final=4, delta_t=2),
    "adalora-for-good": lambda: st.adalora(rank=2, initial_rank=4, t_init=2, t_final=4, delta_t=2, regrow=False),
    "elalora": lambda: st.elalora(rank=3, ceiling=5, rule="published", warmup=2, final=3, interval=2),
    "ardlora": lambda: st.ardlora(rank=3, rows=4, most=4, heads=2, penalty=2.0, warmup=2, final=3, interval=2),
}


@pytest.mark.parametrize("name", MASKED)
def test_ranks_switched_off_and_on_do_not_recompile(name):
    """Masked capacity: one graph for all of training, the numbers of a run not compiled, compacted at the end."""
    recipe, steps, ends, counter = MASKED[name](), 14, [], Counter()
    targets = ["up", "down", "hf"]
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Chain().double()
        st.adapt(model, recipe, targets)
        run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.01))
        controllers = st.controllers_of(recipe, steps)
        for controller in controllers:
            if hasattr(controller, "masked"):
                controller.masked = True
        attached = [st.attach(controller, model, optimizer) for controller in controllers]
        ids, plans, outputs = Chain.ids(), [], []
        for _ in range(steps):
            optimizer.zero_grad()
            y = run(ids)
            y.square().sum().backward()
            optimizer.step()
            outputs.append(y.detach())
            plans += [note["ranks"] for c in controllers if (note := c.note())]
        ranks = [row.rank for row in st.summary(model).rows]
        seen = {tuple(plan.values()) for plan in plans}
        assert len(set(ranks)) == 1  # slots
        assert len(seen) > 1 or len(set(*seen)) > 1  # ranks do move
        if compiled:
            assert counter.graphs == 1
        for one in attached:
            one.finish()
        assert {row.name: row.rank for row in st.summary(model).rows} == plans[-1]
        ends.append((plans, torch.stack(outputs), model(ids).detach()))
    assert ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1:], ends[1][1:], rtol=1e-9, atol=1e-10)
