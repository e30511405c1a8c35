"""SingLoRA: the definition's properties, its ramp, and runs that stop inside it."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slimtune as st
import tinyrun
from slimtune.app.train import train
from test_train import cut
from tinyrun import same, text_config

SIZES = [(7, 7), (10, 6), (6, 10)]


def layer_of(out_features, in_features, make=nn.Linear, **options):
    torch.manual_seed(0)
    model = nn.Sequential(make(out_features, in_features) if make is Conv1D else make(in_features, out_features))
    model.double()
    st.adapt(model, st.singlora(**options))
    adapter = model[0].adapters["default"]
    adapter.awaited.clear()
    return model, adapter


@pytest.mark.parametrize("sizes", SIZES)
def test_gradient_is_the_papers(sizes):
    """GA[:o] += c G A[:i]; GA[:i] += c G^T A[:o], from the linear layer's own G = g^T x."""
    O, I = sizes
    model, adapter = layer_of(O, I, rank=3, alpha=5)
    c = 0.37
    adapter.scale.fill_(c)
    x = torch.randn(9, I, dtype=torch.float64)
    g = torch.randn(9, O, dtype=torch.float64)
    (model(x) * g).sum().backward()
    A, G = adapter.structure.A.detach(), g.t() @ x
    expected = torch.zeros_like(A)
    expected[:O] += c * G @ A[:I]
    expected[:I] += c * G.t() @ A[:O]
    assert A.shape == (max(O, I), 3)
    torch.testing.assert_close(adapter.structure.A.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_leading_block_is_symmetric_and_positive_semidefinite(sizes):
    dW = layer_of(*sizes, rank=3)[1].structure.dense()
    block = dW[: min(sizes), : min(sizes)]
    torch.testing.assert_close(block, block.t())
    assert torch.linalg.eigvalsh(block).min() > -1e-12
    assert torch.linalg.matrix_rank(dW) == 3


def test_forms_that_need_no_ramp_say_what_they_can():
    signed = layer_of(8, 8, rank=4, form="signed")[1]
    core = layer_of(8, 8, rank=4, form="core")[1]
    for adapter in (signed, core):
        assert adapter.scale == 1 and not adapter.structure.dense().any()
        with torch.no_grad():
            for p in adapter.structure.parameters():
                p.normal_()
    values = torch.linalg.eigvalsh(signed.structure.dense())
    assert (values > 1e-9).sum() == 2 and (values < -1e-9).sum() == 2
    a, b = (signed.structure.A[:, :2] + s * signed.structure.A[:, 2:] for s in (1, -1))
    torch.testing.assert_close(signed.structure.dense(), (a @ a.t() - b @ b.t()) / 2)
    dW = core.structure.dense()
    assert (dW - dW.t()).norm() > 0.1 * dW.norm()
    with torch.no_grad():
        core.structure.J.copy_(torch.eye(4))
    torch.testing.assert_close(core.structure.dense(), core.structure.A @ core.structure.A.t())
    centred = layer_of(8, 8, rank=4, form="centred")[1].structure
    assert not centred.dense().any()
    with torch.no_grad():
        centred.dA.normal_()
    A, A0 = centred.A0 + centred.dA, centred.A0
    torch.testing.assert_close(centred.dense(), A @ A.t() - A0 @ A0.t())


def test_start_is_bounded_by_the_size_and_not_by_the_rank():
    """Public code draws A from 1 / sqrt(R), and A A^T then dwarfs the weight (SimpleTuner's report)."""
    torch.manual_seed(0)
    norms = []
    for init in ("size", "rank"):
        structure = st.Symmetric(768, 768, rank=8, init=init)
        structure.reset_parameters()
        norms.append(torch.linalg.matrix_norm(structure.dense(), 2).item())
    assert norms[0] == pytest.approx(0.377, rel=0.1) and norms[1] == pytest.approx(38.2, rel=0.1)


def test_counts_of_llama_7b():
    sizes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    shapes = [st.Symmetric(o, i, rank=8, device="meta").A.numel() for o, i in sizes]
    assert 32 * sum(shapes) == 12_648_448


def test_sgd_does_not_see_a_rotation_of_the_columns_and_adam_does():
    Q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    x = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def trained(optimizer, rotated):
        model, adapter = layer_of(7, 7, rank=3)
        adapter.scale.fill_(1.0)
        with torch.no_grad():
            if rotated:
                adapter.structure.A.copy_(adapter.structure.A @ Q)
        step = optimizer(model.parameters(), lr=0.01)
        for _ in range(10):
            step.zero_grad()
            model(x).square().sum().backward()
            step.step()
        return adapter.structure.dense().detach()

    torch.testing.assert_close(trained(torch.optim.SGD, False), trained(torch.optim.SGD, True), rtol=1e-9, atol=1e-11)
    assert (trained(torch.optim.Adam, False) - trained(torch.optim.Adam, True)).norm() > 1e-3


def test_reaches_the_best_symmetric_approximation():
    """min |A A^T - M|^2 = |skew M|^2 + sum l_j^2 - sum over the R largest of max(l_j, 0)^2."""
    torch.manual_seed(0)
    M = torch.randn(6, 6, dtype=torch.float64)
    structure = st.Symmetric(6, 6, rank=2, dtype=torch.float64)
    structure.reset_parameters()
    optimizer = torch.optim.LBFGS(
        structure.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (structure.dense() - M).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    values = torch.linalg.eigvalsh((M + M.t()) / 2).flip(0)
    best = ((M - M.t()) / 2).square().sum() + values.square().sum() - values[:2].clamp_min(0).square().sum()
    torch.testing.assert_close(loss().detach(), best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
def test_exported_factors_are_a_lora(make):
    model, adapter = layer_of(6, 10, make, rank=3, alpha=5)
    adapter.scale.fill_(0.4)  # in the middle of a ramp
    lora = nn.Sequential(make(6, 10) if make is Conv1D else make(10, 6)).double()
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    st.adapt(lora, st.lora(rank=3, alpha=3))
    B, A = adapter.structure.exact_factors()
    with torch.no_grad():
        lora[0].adapters["default"].structure.B.copy_(B)
        lora[0].adapters["default"].structure.A.copy_(A)
    lora[0].adapters["default"].scale.fill_(adapter.scale)
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), lora(x))


# ---------------------------------------------------------------- the ramp


def ramped(steps=4, alpha=6.0):
    model = nn.Sequential(nn.Linear(5, 5))
    recipe = st.singlora(rank=2, alpha=alpha, ramp_steps=steps)
    st.adapt(model, recipe)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.01))
    return model, recipe, optimizer


def learn(model, optimizer, batches=1):
    optimizer.zero_grad()
    for _ in range(batches):
        model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()


def test_ramp_counts_optimizer_steps_from_one():
    model, recipe, optimizer = ramped()
    adapter = model[0].adapters["default"]
    plain = nn.functional.linear(torch.ones(2, 5), model[0].weight, model[0].bias)
    assert adapter.scale == 0 and torch.equal(model.eval()(torch.ones(2, 5)), plain)
    model.train()
    (ramp,) = st.controllers_of(recipe, total_steps=1000)
    handle = st.attach(ramp, model, optimizer)
    seen = []
    for _ in range(6):
        seen.append(adapter.scale.item())
        before = adapter.structure.A.detach().clone()
        learn(model, optimizer, batches=3)  # three forwards, one step
        assert not torch.equal(before, adapter.structure.A)
        model.eval()(torch.ones(2, 5))
        model.train()
    assert seen == [0.75, 1.5, 2.25, 3.0, 3.0, 3.0]  # s = alpha / R = 3
    handle.remove()
    adapter.scale.fill_(1.25)
    learn(model, optimizer)
    assert adapter.scale == 1.25


@pytest.mark.parametrize("stopped", [0, 2, 3, 5])
def test_ramp_goes_on_where_it_was(stopped):
    model, recipe, optimizer = ramped()
    handle = st.attach(st.controllers_of(recipe, 10)[0], model, optimizer)
    for _ in range(stopped):
        learn(model, optimizer)
    state = json.loads(json.dumps(handle.state_dict()))
    other = copy.deepcopy(model)
    again = torch.optim.SGD(st.param_groups(other, lr=0.01))
    late = st.attach(st.controllers_of(recipe, 10)[0], other, again)
    late.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(model[0].adapters["default"].scale, other[0].adapters["default"].scale)
        learn(model, optimizer)
        learn(other, again)
    assert torch.equal(model[0].adapters["default"].structure.A, other[0].adapters["default"].structure.A)


def test_scale_in_the_ramp_is_saved(tmp_path):
    model, recipe, optimizer = ramped(steps=8)
    base = copy.deepcopy(model)
    st.remove(base, "default")
    st.attach(st.controllers_of(recipe, 10)[0], model, optimizer)
    for _ in range(3):
        learn(model, optimizer)
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    x = torch.randn(3, 5)
    assert torch.equal(base(x), model(x)) and base[0].adapters["default"].scale == 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base(x)  # in training, yet not waiting for anybody
    with pytest.warns(UserWarning, match="singlora has reached 50.0% of its scale"):
        st.merge(base)


def test_a_ramp_touches_its_own_adapters_only():
    model, recipe, optimizer = ramped()
    st.adapt(model, st.lora(rank=2, alpha=2), name="other")
    handle = st.attach(st.controllers_of(recipe, 10)[0], model, optimizer)
    assert model[0].adapters["default"].scale == 0.75 and model[0].adapters["other"].scale == 1
    st.attach(st.Ramp(steps=2, adapter="other"), model, torch.optim.SGD(st.param_groups(model, lr=0.1)))
    assert model[0].adapters["other"].scale == 0.5
    with pytest.raises(st.SlimtuneError, match="no adapter called 'gone'"):
        st.attach(st.Ramp(steps=2, adapter="gone"), model, optimizer)
    handle.remove()
    st.remove(model, "default")
    with pytest.raises(st.SlimtuneError, match="no adapter whose recipe names a Ramp"):
        st.attach(st.Ramp(steps=2), model, optimizer)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forgotten_ramp_is_told_once(compiled):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    recipe = st.singlora(rank=2)
    st.adapt(model, recipe)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    run.eval()(torch.ones(1, 5))
    run.train()
    with pytest.warns(UserWarning, match="singlora is trained without Ramp") as told:
        run(torch.ones(1, 5))
    assert compiled or len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(torch.ones(1, 5))
        fresh = nn.Sequential(nn.Linear(5, 5))
        st.adapt(fresh, recipe)
        st.attach(st.controllers_of(recipe, 100)[0], fresh, torch.optim.SGD(st.param_groups(fresh, lr=0.1)))
        fresh(torch.ones(1, 5))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.Ramp(), "expected steps, or the total_steps"),
        (lambda: st.Ramp(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: st.singlora(ramp_share=0), r"share must be in \(0, 1\], got 0"),
        (lambda: st.Symmetric(4, 4, rank=3, form="signed"), "rank must be even for form signed, got 3; try 4"),
        (lambda: st.Symmetric(4, 4, form="skew"), "form must be one of plain, centred, signed, core, got 'skew'"),
        (
            lambda: st.controllers_of(st.Recipe(st.LowRank, controllers={"Nobody": {}}), 9),
            "unknown controller 'Nobody'",
        ),
        (lambda: st.controllers_of(st.Recipe(st.LowRank, controllers={"Ramp": {"a": 1}}), 9), "no option 'a'"),
        (lambda: st.Recipe.from_dict(st.singlora().to_dict() | {"controllers": {"Ramp": 3}}), "'Ramp' must be a table"),
    ],
)
def test_errors(make, message):
    with pytest.raises(st.StructureError, match=message):
        make()


def test_recipes_of_older_files_still_load():
    old = {k: v for k, v in st.lora().to_dict().items() if k not in ("controllers", "start_scale")}
    assert st.Recipe.from_dict(old) == st.lora()
    assert st.Recipe.from_dict(json.loads(json.dumps(st.singlora().to_dict()))) == st.singlora()


# ---------------------------------------------------------------- slimtune train


def settings(run, llama, text):
    # three batches to a step, and a last one with fewer: counting forwards would end the ramp too early
    options = {"rank": 2, "alpha": 8, "dropout": 0.1, "ramp_steps": 6}
    return text_config(llama, text, run, method="singlora", method_options=options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tinyrun.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tinyrun.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimtune.app.report.write_report", lambda run: None)
        yield


@pytest.fixture(scope="module")
def straight(llama, text, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trained without.*")
        train(settings(run, llama, text))
    return run


def test_train_ramps_by_optimizer_steps(straight):
    scales = {}
    for folder in straight.glob("checkpoint-*"):
        entry = next(iter(json.loads((folder / "adapter" / "slimtune.json").read_text())["adapter"]["layers"].values()))
        scales[int(folder.name.split("-")[1])] = entry["scale"]
        state = json.loads((folder / "run_state.json").read_text())["controllers"]
        assert state == {"Ramp": {"steps": 6, "adapter": None, "done": int(folder.name.split("-")[1])}}
    assert scales == {k: pytest.approx(4 * min((k + 1) / 6, 1)) for k in range(1, 13)}


@pytest.mark.parametrize("step", [1, 4, 5, 6, 9])
def test_resume_is_bit_exact_before_in_and_after_the_end_of_the_ramp(straight, llama, text, tmp_path, step):
    run = tmp_path / "run"
    cut(straight, run, step)
    train(settings(run, llama, text))
    same(straight, run)


def test_share_of_the_runs_own_length(llama, text, tmp_path):
    cfg = settings(tmp_path / "run", llama, text)
    options = {"rank": 2, "ramp_share": 0.25}
    train(cfg.model_copy(update={"method_options": options}))
    state = json.loads((tmp_path / "run" / "checkpoint-12" / "run_state.json").read_text())
    assert state["controllers"]["Ramp"] == {"steps": 3, "adapter": None, "done": 12}
