"""Properties of an adapted model: identity at start, merging, restoring, stacking, switching, copying."""

import copy
import pickle

import pytest
import torch
from torch import nn

import slimtune as st
from cases import (
    DORA,
    DORA_EXACT,
    LORA,
    METHODS,
    Chain,
    adapt,
    adapted,
    controlled,
    layers,
    made_up,
    methods,
    methods_with,
    shake,
    tiny_llama,
)


def chain(method, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Chain(dtype).eval()
    before = copy.deepcopy(model)
    adapt(model, method.recipe(**options), Chain.targets_of(method), modules_to_save=["classifier"])
    return model, before, Chain.ids()


@methods_with(lambda m: m.starts_as_base)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base(method, dtype):
    model, before, ids = chain(method, dtype)
    assert torch.equal(model(ids), before(ids))
    assert torch.equal(model.train()(ids), before(ids))


@methods
def test_every_adapter_parameter_can_learn(method):
    model, _, ids = chain(method)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
    controlled(model, method, optimizer, 2)
    start = {n: p.detach().clone() for n, p in st.trainable_parameters(model)}
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    assert [n for n, p in st.trainable_parameters(model) if torch.equal(p, start[n])] == []
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(start)


@methods
@layers
def test_merged_equals_unmerged_on_every_layer(method, layer):
    model, x = adapted(method, layer)
    y, tensors = model(x), dict(model.named_parameters())
    with st.merged(model) as report:
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-11)
    after = dict(model.named_parameters())
    assert [*after] == [*tensors] and all(after[k] is t for k, t in tensors.items()) and torch.equal(model(x), y)
    assert report.share < 1e-12 and report.layers[0].delta_norm > 0
    dense = st.merge(model).densified
    before = type(layer.make())
    assert type(model.layer) is (before.dense_class if dense else before)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-11)


@methods
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.2), (torch.float16, 0.05)], ids=str
)
def test_merge_reports_what_the_cast_lost(method, dtype, bound):
    model, before, ids = chain(method, dtype)
    shake(model, 0.1)
    weights = {n: before.get_submodule(n).weight.double() for n in Chain.targets_of(method)}
    exact = copy.deepcopy(model).double()
    st.merge(exact)
    lost, changed = 0.0, 0.0
    report = st.merge(model)
    for entry in report.layers:
        W = exact.get_submodule(entry.name).weight
        lost += (model.get_submodule(entry.name).weight.double() - W).norm() ** 2
        changed += (W - weights[entry.name]).norm() ** 2
    assert 0 < report.share < bound
    assert report.share == pytest.approx(float((lost / changed).sqrt().detach()), rel=0.02, abs=1e-7)
    assert not any("adapters" in n for n, _ in model.named_parameters())
    assert torch.isfinite(model(ids)).all()


@methods
def test_disabled_and_remove_give_the_base_back(method):
    model, before, ids = chain(method)
    classes = {n: type(m) for n, m in before.named_modules()}
    shake(model)
    y = model(ids)
    assert not torch.equal(y, before(ids))
    with st.disabled(model):
        assert torch.equal(model(ids), before(ids))
    assert torch.equal(model(ids), y)
    with pytest.raises(RuntimeError, match="inside"), st.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids), y)
    st.remove(model, "default")
    assert torch.equal(model(ids), before(ids))
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert list(model.state_dict()) == list(before.state_dict())


PAIRS = [*((m, o) for m in METHODS for o in (LORA, DORA)), *((o, m) for m in METHODS for o in (LORA, DORA_EXACT))]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda m: m.id)
def test_stacks_are_compositions(first, second):
    """adapter2(adapter1(W)), forward equal to the merged weights, in either order, dropout or not."""
    model, before, ids = chain(first)
    adapt(model, second.recipe(), Chain.targets_of(second), name="second")
    shake(model)
    st.activate(model, "default")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".default." in n:
                p.add_(0.2 * torch.randn_like(p))
    for order in (["default", "second"], ["second", "default"]):
        st.activate(model, order)
        y = model(ids)
        host = model.up
        W = host.layout(host).weight()
        for name in order:
            a = host.adapters[name]
            W = a.composition.weight(W, a.scale * a.structure.dense())
        torch.testing.assert_close(host.map().weight(), W, rtol=1e-9, atol=1e-11)
        with st.merged(model):
            torch.testing.assert_close(model(ids), y, rtol=1e-9, atol=1e-10)
        y.sum().backward()
    st.activate(model, [])
    assert torch.equal(model(ids), before(ids))


def test_additive_stack_is_the_sum_in_any_order():
    model, _before, ids = chain(LORA)
    st.adapt(model, st.lora(rank=2), Chain.targets, name="b")
    shake(model)
    st.activate(model, ["default", "b"])
    y = model(ids)
    st.activate(model, ["b", "default"])
    torch.testing.assert_close(model(ids), y)


def test_second_adapter_freezes_the_first():
    model, _, _ = chain(LORA)
    st.adapt(model, st.lora(rank=2), ["up"], name="b")
    assert all(".b." in n for n, _ in st.trainable_parameters(model))


@methods
def test_copies_and_pickles(method):
    model, _, ids = chain(method)
    shake(model)
    y = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), y)
        assert type(other.up) is type(model.up)
        shake(other)
        assert torch.equal(model(ids), y)
        st.remove(other, "default")
        assert type(other.up) is nn.Linear


@methods
def test_state_dict_round_trip(method):
    model, before, ids = chain(method)
    shake(model)
    other, _, _ = chain(method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    assert set(before.state_dict()) <= set(model.state_dict())


def test_saved_module_is_a_private_copy():
    model, before, ids = chain(LORA)
    shake(model)
    assert torch.equal(model.classifier.weight, before.classifier.weight)
    y = model(ids)
    st.merge(model)
    assert type(model.classifier) is nn.Linear
    assert not torch.equal(model.classifier.weight, before.classifier.weight)
    torch.testing.assert_close(model(ids), y, rtol=1e-10, atol=1e-11)


@methods
def test_tied_weights(method):
    """An adapter on a tied embedding changes the embedding only; merging unties it and says so."""
    model = tiny_llama(tied=True)
    ids = torch.randint(0, 31, (2, 6))
    adapt(model, method.recipe(), ["embed_tokens", "q_proj"])
    shake(model)
    with torch.no_grad():
        y = model(ids).logits
        with st.merged(model):
            torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        report = st.merge(model)
        assert report.untied == ["model.embed_tokens.weight", "lm_head.weight"]
        assert model.config.tie_word_embeddings is False
        torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_merge_refuses_and_changes_nothing():
    model, before, _ids = chain(LORA, torch.float32)
    with pytest.raises(st.AdapterNameError, match="no adapter"):
        st.merge(before)
    st.activate(model, [])
    with pytest.raises(st.AdapterNameError, match="'default' is attached but not active"):
        st.merge(model)
    st.activate(model, "default")
    with torch.no_grad():
        model.up.adapters["default"].structure.B[0, 0] = float("nan")
    with pytest.raises(st.SlimtuneError, match=r"up.adapters.default.structure.B is not finite"):
        st.merge(model)
    with torch.no_grad():
        model.half()
        model.up.adapters["default"].structure.B.fill_(6e4)
        model.up.adapters["default"].structure.A.fill_(6e4)
    with pytest.raises(st.SlimtuneError, match="overflows float16"):
        st.merge(model)
    assert torch.equal(model.up.weight, before.half().up.weight)


@methods
def test_meta_model_then_real_weights(method):
    """Attach on meta, load the base, initialise: the same as attaching to the loaded base."""
    torch.manual_seed(0)
    real = Chain(torch.float32).eval()
    with torch.device("meta"):
        model = Chain().eval()
    adapt(model, method.recipe(), Chain.targets_of(method), modules_to_save=["classifier"])
    assert all(p.is_meta for p in model.parameters())
    for name, module in real.named_modules():
        for key, p in module.named_parameters(recurse=False):
            setattr(model.get_submodule(name), key, nn.Parameter(p.detach().clone(), requires_grad=False))
    torch.manual_seed(1)
    st.initialize(model, stats=made_up(model, method.recipe(), Chain.targets_of(method)))
    assert not any(p.is_meta for p in model.parameters())
    ids = Chain.ids()
    if method.starts_as_base:
        assert torch.equal(model(ids), real(ids))
    torch.manual_seed(1)
    adapt(real, method.recipe(), Chain.targets_of(method), modules_to_save=["classifier"])
    assert torch.equal(model(ids), real(ids))
    shake(model)
    assert {n for n, _ in st.trainable_parameters(model)} >= {"classifier.adapters.default.weight"}


def test_meta_adapter_refuses_to_merge_or_save(tmp_path):
    with torch.device("meta"):
        model = Chain()
    st.adapt(model, st.dora(), Chain.targets)
    with pytest.raises(st.SlimtuneError, match="meta"):
        st.merge(model)
    with pytest.raises(st.SlimtuneError, match="meta"):
        st.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_summary_counts():
    model, before, _ = chain(LORA)
    s = st.summary(model)
    assert s.trainable == sum(r.parameters for r in s.rows) == sum(p.numel() for _, p in st.trainable_parameters(model))
    assert s.total == s.trainable + sum(p.numel() for p in before.parameters())
    assert "trainable" in str(s) and "classifier" in str(s)
    assert {r.method for r in s.rows} == {"lora", "full"}


@methods_with(lambda m: not hasattr(m.recipe().composition, "norm"))
def test_weight_decay_pulls_towards_the_base(method):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4)).double()
    adapt(model, method.recipe(), ["0"])
    shake(model)
    with torch.no_grad():
        for group in st.param_groups(model, lr=1.0, weight_decay=0.1):
            for p in group["params"]:
                p.mul_(0.0 if group["weight_decay"] else 1.0)
    torch.testing.assert_close(model[0].map().weight(), model[0].weight)


def test_param_groups():
    model, _, _ = chain(DORA)
    groups = {g["name"]: g for g in st.param_groups(model, lr=0.1, b_ratio=16, weight_decay=0.01)}
    up = model.up.adapters["default"]
    assert any(p is up.structure.B for p in groups["fast"]["params"]) and groups["fast"]["lr"] == pytest.approx(1.6)
    assert any(p is up.structure.A for p in groups["base"]["params"]) and groups["base"]["lr"] == 0.1
    assert any(p is up.composition.magnitude for p in groups["plain"]["params"])
    assert groups["plain"]["weight_decay"] == 0 and groups["base"]["weight_decay"] == 0.01
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in st.trainable_parameters(model))
    with pytest.raises(st.ConfigError, match="b_ratio must be positive"):
        st.param_groups(model, lr=0.1, b_ratio=0)
    with pytest.raises(st.ConfigError, match="no trainable parameter"):
        st.param_groups(nn.Linear(2, 2).requires_grad_(False), lr=0.1)


def test_param_groups_without_a_rate_take_the_recipes_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    st.adapt(model, st.kronecker(), ["0"], name="a", modules_to_save=["2"])
    st.adapt(model, st.bone(rank=2), ["1"], name="b")
    for module, name in ((model[0], "a"), (model[2], "a")):
        module.adapters[name].requires_grad_(True)
    rates = {id(p): g["lr"] for g in st.param_groups(model, b_ratio=2) for p in g["params"]}
    wanted = {"0": st.kronecker().learning_rate, "1": st.bone().learning_rate, "2": 1e-3}
    for name, p in st.trainable_parameters(model):
        layer = name.split(".")[0]
        fast = layer != "2" and name.rpartition(".")[2] in model.get_submodule(name.rpartition(".")[0]).fast_parameters
        assert rates[id(p)] == pytest.approx(wanted[layer] * (2 if fast else 1)), name
    with pytest.raises(st.ConfigError, match="bias trains but belongs to no adapter; give lr"):
        model[0].bias.requires_grad_(True)
        st.param_groups(model)


class Recorder(st.Controller):
    def __init__(self):
        self.steps, self.norms = 0, []

    def before_step(self, model):
        for _, p in st.trainable_parameters(model):
            p.grad.mul_(0.5)

    def after_step(self, model):
        self.steps += 1
        self.norms.append(float(sum(p.grad.norm() for _, p in st.trainable_parameters(model))))


def test_controller_counts_optimizer_steps_and_edits_gradients():
    model, _, ids = chain(LORA)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
    recorder = Recorder()
    handle = st.attach(recorder, model, optimizer)
    start = {n: p.detach().clone() for n, p in st.trainable_parameters(model)}
    grads = {n: torch.zeros_like(p) for n, p in start.items()}
    for _ in range(3):  # accumulation: three backwards, one step
        model(ids).square().sum().backward()
    for n, p in st.trainable_parameters(model):
        grads[n] = p.grad.clone()
    optimizer.step()
    assert recorder.steps == 1
    for n, p in st.trainable_parameters(model):
        torch.testing.assert_close(p, start[n] - 0.5 * grads[n])
    again = Recorder()
    again.load_state_dict(recorder.state_dict())
    assert again.steps == 1 and again.norms == recorder.norms
    with pytest.raises(st.SlimtuneError, match="other keys"):
        again.load_state_dict({"steps": 1})
    handle.remove()
    optimizer.step()
    assert recorder.steps == 1
    with pytest.raises(st.SlimtuneError, match="torch optimizer"):
        st.attach(recorder, model, object())


@pytest.mark.parametrize("keyword", [False, True])
def test_gradients_that_a_closure_makes_are_edited_too(keyword):
    """The step's pre-hooks run before its closure, when there is no gradient yet."""
    moved = []
    for way in ("plain", "closure"):
        model, _, ids = chain(LORA)
        optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
        recorders = [Recorder(), Recorder()]
        for recorder in recorders:
            st.attach(recorder, model, optimizer)

        def closure(model=model, ids=ids, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(ids).square().sum()
            loss.backward()
            return loss

        if way == "plain":
            closure()
            optimizer.step()
        else:
            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert loss.item() > 0
        assert [r.steps for r in recorders] == [1, 1]
        moved.append([p.detach().clone() for _, p in st.trainable_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


class Derived(torch.optim.SGD):
    """Its step and that of its base are both called with hooks, once the base has been made by itself."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closed", [False, True])
def test_a_step_within_a_step_counts_once(closed):
    moved = []
    for kind in (torch.optim.SGD, Derived):
        model, _, ids = chain(LORA)
        optimizer = kind(st.param_groups(model, lr=1.0), lr=1.0)
        recorder = Recorder()
        st.attach(recorder, model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()

            def closure(model=model, ids=ids):
                loss = model(ids).square().sum()
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert recorder.steps == 2
        moved.append([p.detach().clone() for _, p in st.trainable_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_a_closure_that_fails_is_forgotten():
    model, _, ids = chain(LORA)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
    recorder = Recorder()
    st.attach(recorder, model, optimizer)

    def fails():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(fails)
    model(ids).square().sum().backward()
    grads = [p.grad.clone() for _, p in st.trainable_parameters(model)]
    optimizer.step()
    assert recorder.steps == 1
    halved = [p.grad for _, p in st.trainable_parameters(model)]
    assert all(torch.equal(a, b / 2) for a, b in zip(halved, grads, strict=True))
