"""What a user gets wrong about controllers and calibration, and what slimtune says."""

import re
import warnings

import pytest
import torch
from torch import nn

import slimtune as st

LAYERS = ["0", "2"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 12), torch.randint(0, 8, (8,))) for _ in range(3)]


def loss(m: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(m(batch[0]), batch[1])


def start(recipe: st.Recipe, steps: int):
    m = model()
    st.adapt(m, recipe, LAYERS)
    optimizer = torch.optim.AdamW(st.param_groups(m))
    return m, optimizer, [st.attach(c, m, optimizer) for c in st.controllers_of(recipe, steps)]


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        loss(m, batches()[i % 3]).backward()
        optimizer.step()
        optimizer.zero_grad()


def finish(handles: list[st.Attached]) -> None:
    for handle in handles:
        handle.finish()


ADAPTIVE = {"adalora": st.adalora, "elalora": st.elalora, "ardlora": st.ardlora, "lorapro": st.lorapro}
ADAPTIVE["singlora"] = lambda rank: st.singlora(rank=rank, ramp_steps=10)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_controllers_attach_once(method: str) -> None:
    recipe = ADAPTIVE[method](rank=3)
    m, optimizer, handles = start(recipe, 20)
    kind = type(handles[0].controller).__name__
    with pytest.raises(st.SlimtuneError, match=f"{kind} is attached to this optimizer already"):
        st.attach(st.controllers_of(recipe, 20)[0], m, optimizer)
    with pytest.raises(st.SlimtuneError, match="already"):
        st.attach(handles[0].controller, m, optimizer)
    with pytest.raises(st.SlimtuneError, match="expected one controller, got list"):
        st.attach(st.controllers_of(recipe, 20), m, optimizer)  # type: ignore[arg-type]
    handles[0].remove()
    st.attach(st.controllers_of(recipe, 20)[0], m, optimizer)


def test_two_adapters_and_two_models_may_have_a_controller_each() -> None:
    a, b = model(), model()
    for m, name in ((a, "x"), (b, "y")):
        st.adapt(m, st.singlora(rank=2), LAYERS, name)
    st.adapt(a, st.singlora(rank=2), LAYERS, "z")
    optimizer = torch.optim.AdamW([p for m in (a, b) for p in m.parameters() if p.requires_grad])
    for m, name in ((a, "x"), (a, "z"), (b, None), (b, "y")):
        st.attach(st.Ramp(steps=5, adapter=name), m, optimizer)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_optimizer_that_never_steps_is_told(method: str) -> None:
    recipe = ADAPTIVE[method](rank=3)
    m, _, handles = start(recipe, 20)
    train(m, torch.optim.AdamW(st.param_groups(m)), 2)  # another one
    for handle in handles:
        with pytest.warns(UserWarning, match=f"{type(handle.controller).__name__}: the optimizer .* no step"):
            handle.finish()


SHORT = {
    "adalora": r"AdaLoRA: the run ended after 5 of its 100 steps, before the last pruning at step 50",
    "elalora": r"ElaLoRA: the run ended after 5 of its 100 steps; ranks were to move until step 75",
    "ardlora": r"ARD: the run ended after 5 steps, before step 80",
    "singlora": r"Ramp: the run ended after 5 of the ramp's 10 steps",
}


@pytest.mark.parametrize("method", SHORT)
def test_a_run_shorter_than_planned_is_told(method: str) -> None:
    m, optimizer, handles = start(ADAPTIVE[method](rank=3), 100)
    train(m, optimizer, 5)
    with pytest.warns(UserWarning, match="the run ended after 5") as told:
        finish(handles)
    assert len(told) == 1 and re.match(SHORT[method], str(told[0].message))
    assert told[0].filename == __file__


@pytest.mark.parametrize("method", ["adalora", "elalora"])
def test_a_run_longer_than_planned_is_told(method: str) -> None:
    m, optimizer, handles = start(ADAPTIVE[method](rank=3), 10)
    train(m, optimizer, 12)
    with pytest.warns(UserWarning, match="made for 10 steps, it has seen 12") as told:
        finish(handles)
    assert len(told) == 1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_run_as_planned_is_quiet_resumed_at_its_end_too(method: str) -> None:
    recipe = ADAPTIVE[method](rank=3)
    m, optimizer, handles = start(recipe, 12)
    train(m, optimizer, 12)
    states = [h.state_dict() for h in handles]
    again = st.controllers_of(recipe, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for handle, controller, state in zip(handles, again, states, strict=True):
            handle.remove()
            controller.load_state_dict(state)
            st.attach(controller, m, optimizer).finish()


@pytest.mark.parametrize("method", ["gora", "eva"])
def test_the_recipe_that_fit_returns_is_asked_for(method: str) -> None:
    recipe = {"gora": st.gora(rank=2, floor=1, ceiling=4), "eva": st.eva(rank=2)}[method]
    fitted, stats = st.calibrate.fit(recipe, model(), batches(), loss, LAYERS)
    with pytest.warns(UserWarning, match=f"{method} shares ranks out .* recipe that st.calibrate.fit returned"):
        st.adapt(model(), recipe, LAYERS, stats=stats)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.adapt(model(), fitted, LAYERS, stats=stats)
    with pytest.raises(st.StructureError, match=r"stats must be .* second of the two values .* got tuple"):
        st.adapt(model(), recipe, LAYERS, stats=(fitted, stats))


def test_calibration_is_told_what_it_was_given() -> None:
    with pytest.raises(st.StructureError, match=r"expected a Recipe .* got Sequential"):
        st.calibrate.fit(model(), st.gora(), batches(), loss)
    with pytest.raises(st.DataError, match="a batch is a tuple; expected a mapping"):
        st.calibrate.fit(st.eva(rank=2), model(), batches(), None, LAYERS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: st.adalora(t_init=0.6, t_final=0.5),
        lambda: st.elalora(warmup=0.9),
        lambda: st.elalora(rank=4, floor=5),
        lambda: st.ardlora(rank=4, least=9),
    ],
)
def test_options_that_cannot_go_together_are_refused_in_their_own_words(make) -> None:
    with pytest.raises(st.StructureError) as raised:
        make()
    assert "00000" not in str(raised.value)  # no number that the user has not given


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_optimizer_whose_groups_are_made_anew_is_followed(method: str) -> None:
    """As accelerate's prepare does, and as a checkpoint that is loaded after attaching."""
    found = []
    for anew in (False, True):
        m, optimizer, _ = start(ADAPTIVE[method](rank=3), 12)
        if anew:
            optimizer.load_state_dict(optimizer.state_dict())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
        for _ in range(12):
            train(m, optimizer, 1)
            schedule.step()
        found.append({n: p.detach().clone() for n, p in st.trainable_parameters(m)})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("method", ["adalora", "elalora", "singlora"])
def test_options_that_a_state_overrides_are_told(method: str) -> None:
    recipe = ADAPTIVE[method](rank=3)
    m, optimizer, handles = start(recipe, 20)
    train(m, optimizer, 2)
    state = handles[-1].state_dict()
    other = st.singlora(rank=3, ramp_steps=5) if method == "singlora" else recipe
    again = st.controllers_of(other, 30)[-1]
    told = "steps = 10 .now given: 5" if method == "singlora" else "total_steps = 20 .now given: 30"
    with pytest.warns(UserWarning, match=rf"goes on with what it was begun with: .*{told}"):
        again.load_state_dict(state)
    assert again.state_dict() == state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.controllers_of(recipe, 20)[-1].load_state_dict(state)
        again.load_state_dict(state)


def test_peft_is_told_of_statistics_that_are_none() -> None:
    hf = pytest.importorskip("slimtune.hf")
    recipe = st.gora(rank=2, floor=1, ceiling=4)
    fitted, stats = st.calibrate.fit(recipe, model(), batches(), loss, LAYERS)
    with pytest.raises(st.StructureError, match=r"second of the two values .* got tuple"):
        hf.SlimtuneConfig(recipe=recipe, stats=(fitted, stats))
    with pytest.warns(UserWarning, match="gora shares ranks out"):
        hf.SlimtuneConfig(recipe=recipe, stats=stats)
