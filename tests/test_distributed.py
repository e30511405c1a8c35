"""Two processes do what one does: the same plans and tensors under DDP and FSDP2, calibration, `slimtune train`."""

import datetime
import json
import multiprocessing
import os
import shutil
import socket
import traceback
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

import slimtune as st
import tinyrun
from slimtune.structured import Structured
from slimtune.targets import hosts

TIMEOUT = 60


# ---------------------------------------------------------------- two processes


def serve(rank, port, pipe):
    """Carry out the jobs that come through a pipe, as one of two processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    while (job := pipe.recv()) is not None:
        function, arguments, options = job
        try:
            pipe.send((function(*arguments, **options), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    distributed.destroy_process_group()


class Two:
    """Two gloo processes, as torchrun would start them, that do one job after the other."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "slimtune.app.setup", "slimtune.app.finish", "tinyrun"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(2):
            own, theirs = context.Pipe()
            self.pipes.append(own)
            self.processes.append(context.Process(target=serve, args=(rank, port, theirs), daemon=True))
            self.processes[-1].start()

    def __call__(self, function, *arguments, **options):
        """What each of the two returns."""
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(2 * TIMEOUT), "no answer"
            answers.append(pipe.recv())
        problems = [problem for _, problem in answers if problem]
        assert not problems, "\n".join(problems)
        return [answer for answer, _ in answers]

    def stop(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def two():
    processes = Two()
    yield processes
    processes.stop()


# ---------------------------------------------------------------- what they do

STEPS = 24
RECIPES = {
    "adalora": lambda: st.adalora(rank=2, initial_rank=4, t_init=3, t_final=8, delta_t=3),
    "adalora-for-good": lambda: st.adalora(
        rank=2, initial_rank=4, t_init=3, t_final=8, delta_t=3, regrow=False, unit="parameters"
    ),
    "elalora": lambda: st.elalora(rank=3, ceiling=5, warmup=3, final=5, interval=3),
    "elalora-published": lambda: st.elalora(rank=3, ceiling=5, rule="published", warmup=3, final=5, interval=3),
    "ardlora": lambda: st.ardlora(rank=3, rows=4, most=4, heads=2, penalty=2.0, warmup=3, final=5, interval=3),
    "ardlora-depth": lambda: st.ardlora(
        rank=3, rows=4, most=4, heads=2, over="depth", budget=0.6, warmup=3, final=5, interval=3
    ),
}


def network(recipe):
    torch.manual_seed(0)
    parts = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)]
    model = nn.Sequential(*parts).double()
    if recipe is not None:
        st.adapt(model, recipe, ["0", "2", "4"])
    return model


def data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(64, 16, generator=draw).double(), torch.randn(64, 8, generator=draw).double()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def state(model):
    """All tensors of the adapters, gathered."""
    return {
        f"{layer}.{key}": whole(t).detach().numpy().copy()
        for layer, host in hosts(model).items()
        for key, t in host.adapters["default"].saved_tensors().items()
    }


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (0, 2, 4):
        fully_shard(model[layer], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(recipe, how="alone", masked=None, folder=None):
    """A short run on this process's share of each batch."""
    recipe = RECIPES[recipe]()
    world, rank = (2, distributed.get_rank()) if how != "alone" else (1, 0)
    model = network(recipe)
    runner = {"alone": lambda m: m, "ddp": nn.parallel.DistributedDataParallel, "fsdp": sharded}[how](model)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    controllers = st.controllers_of(recipe, STEPS)
    if masked is not None:
        for controller in controllers:
            if hasattr(controller, "masked"):
                controller.masked = masked
    attached = [st.attach(controller, model, optimizer) for controller in controllers]
    x, y = data()
    plans, losses = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (runner(x[rank::world]) - y[rank::world]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        plans += [note for controller in controllers if (note := controller.note())]
    before = state(model)
    for one in attached:
        one.finish()
    outputs = runner(x)
    if folder is not None:
        st.save(model, folder)
    return {
        "plans": json.loads(json.dumps(plans)),
        "slots": before,
        "tensors": state(model),
        "outputs": whole(outputs).detach().numpy(),
        "ranks": {row.name: row.rank for row in st.summary(model).rows},
        "losses": losses,
    }


def close(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_allclose(left[key], right[key], rtol=1e-10, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ddp_is_one_process(recipe, two):
    """The same plan, and the same tensors: those with masks, and those left once it is over."""
    alone, physical = trained(recipe, masked=True), trained(recipe, masked=False)
    both = two(trained, recipe, "ddp")
    for found in both:
        assert found["plans"] == alone["plans"] == physical["plans"]
        assert len({json.dumps(plan["ranks"]) for plan in found["plans"]}) > 1  # ranks do move
        close(found["slots"], alone["slots"])
        close(found["tensors"], alone["tensors"])
        np.testing.assert_allclose(found["outputs"], alone["outputs"], rtol=1e-10, atol=1e-10)
        # a soft gate that physical ranks drop was not quite closed
        near = 1e-4 if recipe.startswith("ard") else 1e-9
        np.testing.assert_allclose(found["outputs"], physical["outputs"], rtol=near, atol=near)
        assert found["ranks"] == alone["ranks"] == physical["ranks"]
        assert sum(t.size for t in found["tensors"].values()) < sum(t.size for t in found["slots"].values())
    assert all((both[0]["slots"][key] == both[1]["slots"][key]).all() for key in both[0]["slots"])  # to the bit


@pytest.mark.parametrize("recipe", RECIPES)
def test_fsdp2_is_one_process(recipe, two, tmp_path):
    """Sharded tensors, whose shapes stay: masked to the end, saved whole, compacted on a plain model."""
    alone = trained(recipe, masked=True)
    both = two(trained, recipe, "fsdp", folder=tmp_path)
    for found in both:
        assert found["plans"] == alone["plans"]
        close(found["slots"], alone["slots"])
        close(found["tensors"], alone["slots"])  # what is sharded stays as it is at the end
    model = network(None)
    st.load(model, tmp_path)
    x, _ = data()
    np.testing.assert_allclose(model(x).detach(), alone["outputs"], rtol=1e-10, atol=1e-10)
    assert {row.name: row.rank for row in st.summary(model).rows} != alone["ranks"]
    assert st.compact(model) == alone["ranks"]
    np.testing.assert_allclose(model(x).detach(), alone["outputs"], rtol=1e-10, atol=1e-10)


def resized(how="alone"):
    """Plain LoRA whose ranks are changed by hand, DDP wrapped anew."""
    world, rank = (2, distributed.get_rank()) if how != "alone" else (1, 0)
    wrap = nn.parallel.DistributedDataParallel if how == "ddp" else lambda model: model
    model = network(st.lora(rank=4))
    runner = wrap(model)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
    x, y = data()
    for number in range(12):
        optimizer.zero_grad()
        (runner(x[rank::world]) - y[rank::world]).square().mean().backward()
        optimizer.step()
        if number in (3, 7):
            st.resize(model, {"0": 2 + number, "2": 1}, optimizer)
            runner = wrap(model)
    return state(model)


def test_ranks_changed_by_hand_under_ddp(two):
    alone = resized()
    for found in two(resized, "ddp"):
        close(found, alone)


# ---------------------------------------------------------------- before the first step


def calibrated(recipe, **options):
    """What a recipe that starts from the data makes of this process's share of eight batches."""
    several = distributed.is_initialized()
    x, y = data()
    batches = list(zip(x.split(8), y.split(8), strict=True))[distributed.get_rank() if several else 0 :: 1 + several]
    model, targets = network(None), ["0", "2", "4"]
    recipe, stats = st.calibrate.fit(
        getattr(st, recipe)(**options), model, batches, lambda m, b: (m(b[0]) - b[1]).square().mean(), targets
    )
    st.adapt(model, recipe, targets, stats=stats)
    return {row.name: row.rank for row in st.summary(model).rows}, state(model), dict(recipe.init)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("gora", {"rank": 4, "floor": 1, "ceiling": 8}),
        ("gora", {"rank": 4, "floor": 1, "ceiling": 8, "importance": "union_frobenius_probes"}),
        ("loraga", {"rank": 2}),
    ],
    ids=["gora", "gora-probes", "loraga"],
)
def test_calibration_is_that_of_one_process(recipe, options, two):
    """Gradients of all batches together: the same ranks, and a start equal to rounding."""
    ranks, tensors, init = calibrated(recipe, **options)
    assert recipe != "gora" or len(set(ranks.values())) > 1
    for found in two(calibrated, recipe, **options):
        assert (found[0], found[2]) == (ranks, init)
        close(found[1], tensors)


def test_calibration_from_inputs_spans_what_one_process_finds(two):
    ranks, tensors, _ = calibrated("eva", rank=3, rho=8.0)
    for found in two(calibrated, "eva", rank=3, rho=8.0):
        assert found[0] == ranks
        for key in (key for key in tensors if key.endswith(".A")):
            for A in (one := found[1][key], two_ := tensors[key]):
                np.testing.assert_allclose(A @ A.T, np.eye(len(A)), atol=1e-10)
            np.testing.assert_allclose(one.T @ one, two_.T @ two_, atol=1e-8)


def test_a_gamma_that_is_tried_is_one_for_all(two):
    found = two(calibrated, "gora", rank=4, floor=1, ceiling=8, gamma=None)
    assert found[0][2] == found[1][2] and found[0][2]["gora"]["gamma"] is not None
    close(found[0][1], found[1][1])


def lorded():
    """What LORD makes of this process's share of eight batches."""
    several = distributed.is_initialized()
    batches = list(data()[0].split(8))[distributed.get_rank() if several else 0 :: 1 + several]
    model = network(None)
    report = st.lord(model, batches, ["0", "2", "4"], keep=0.7)
    dense = {n: tuple(p.shape) for n, p in model.named_parameters()}
    errors = [(layer.predicted, layer.measured or 0.0) for layer in report.layers]
    return report.ranks, dense, errors, dict(model.state_dict())


def test_lord_is_that_of_one_process(two):
    ranks, shapes, errors, tensors = lorded()
    assert len(ranks) > 1 and all(predicted == pytest.approx(measured, rel=1e-8) for predicted, measured in errors)
    for found in two(lorded):
        assert found[:2] == (ranks, shapes)
        for ours, theirs in zip(errors, found[2], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-8, abs=1e-8)
        close(tensors, found[3])


# ---------------------------------------------------------------- slimtune train


def images():
    """Without dropout, whose masks are those of a process."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, 2),
    )


def run(config):
    """As `slimtune train` does it."""
    from slimtune.app import report
    from slimtune.app.train import train

    report.write_report = lambda run: None
    train(config)


def changes(folder):
    """{layer: s dW}; which slot a rank has does not matter."""
    model = images()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*saved on other base weights")
        st.load(model, folder)
    return {layer: host.adapters["default"].dense().detach() for layer, host in hosts(model).items()}


METHODS = {
    "adalora": {"rank": 2, "initial_rank": 4, "t_init": 2, "t_final": 3, "delta_t": 2},
    "elalora": {"rank": 2, "ceiling": 4, "warmup": 1, "final": 2, "interval": 2},
    "ardlora": {"rank": 3, "rows": 4, "most": 4, "heads": 1, "penalty": 2.0, "warmup": 2, "final": 3, "interval": 2},
    "trp": {"period": 3, "tail": 0.2},
}


def configured(folder, method, **options):
    return tinyrun.image_config(
        folder,
        model_factory="test_distributed:images",
        method=method,
        method_options=METHODS[method],
        target_modules=["0", "4", "6"],
        modules_to_save=None if method == "trp" else ["8"],
        augment=False,
        max_steps=12,
        eval_steps=12,
        save_steps=4,
        save_total_limit=9,
        **options,
    )


@pytest.mark.parametrize("method", [method for method in METHODS if method != "trp"])
def test_train_on_two_processes_makes_the_plan_of_one(method, two, tmp_path, monkeypatch):
    """Batches of two processes, or twice as many of one."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)
    config = configured(tmp_path, method, output_dir=str(tmp_path / "one"))
    from slimtune.app.train import train

    train(config)
    two(run, config.model_copy(update={"gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "two")}))
    rounds = [tinyrun.events(tmp_path / number, "ranks") for number in ("one", "two")]
    plans = [[{k: e.get(k) for k in ("step", "ranks", "heads")} for e in found] for found in rounds]
    assert plans[0] == plans[1]
    assert len({json.dumps(plan["ranks"]) for plan in plans[0]}) > 1
    one, both = (changes(tmp_path / number / "adapter") for number in ("one", "two"))
    assert one.keys() == both.keys() and len(one) == 3
    for key, t in one.items():
        assert (both[key] - t).norm() < 1e-3 * t.norm()


def test_whole_weights_on_two_processes_are_those_of_one(two, tmp_path, monkeypatch):
    """TRP: the same ranks after the same steps, the same weights up to the order of sums; resumed to the bit."""
    pytest.importorskip("transformers")
    from slimtune.app.loading import load_run
    from slimtune.app.train import train

    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)
    config = configured(tmp_path, "trp", output_dir=str(tmp_path / "one"))
    train(config)
    shared = config.model_copy(update={"gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "two")})
    two(run, shared)
    rounds = [[(e["step"], e["ranks"]) for e in tinyrun.events(tmp_path / n, "ranks")] for n in ("one", "two")]
    assert rounds[0] == rounds[1] and len(rounds[0]) > 2
    left, right = (load_run(tmp_path / n).model for n in ("one", "two"))
    assert isinstance(left[4], Structured)
    for name in ("0", "4", "6", "8"):
        W = left[int(name)].weight
        assert (right[int(name)].weight - W).norm() < 1e-3 * W.norm()
    again = tmp_path / "from-4"
    again.mkdir()
    shutil.copytree(tmp_path / "two" / "checkpoint-4", again / "checkpoint-4")
    two(run, shared.model_copy(update={"output_dir": str(again)}))
    stored = [load_file(tmp_path / n / "model" / "compressed-00001.safetensors") for n in ("two", "from-4")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(t, stored[1][key]) for key, t in stored[0].items())


def test_parameters_that_are_replaced_want_one_process(two, tmp_path):
    pytest.importorskip("transformers")
    config = tinyrun.image_config(
        tmp_path, method="cuttlefish", method_options={}, target_modules=None, modules_to_save=None
    )
    for said in two(refusal, config):
        assert said == (
            "ConfigError: method cuttlefish puts new parameters in the place of the model's own while it trains, which "
            "2 processes cannot follow; start it as one process"
        )
    assert not (tmp_path / "run").exists()


def refusal(config):
    """What a run that cannot be says."""
    try:
        run(config)
    except st.SlimtuneError as error:
        return f"{type(error).__name__}: {error}"


def test_a_run_of_two_processes_is_resumed_to_the_bit(two, tmp_path):
    """Which slots are off comes back with the controller's state, scores and moments with the optimizer's."""
    pytest.importorskip("transformers")
    straight = tmp_path / "straight"
    config = configured(tmp_path, "elalora", gradient_accumulation_steps=1, output_dir=str(straight))
    two(run, config)
    assert any(event["step"] > 8 for event in tinyrun.events(straight, "ranks"))
    for step in (4, 8):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        shutil.copytree(straight / f"checkpoint-{step}", again / f"checkpoint-{step}")
        two(run, config.model_copy(update={"output_dir": str(again)}))
        tinyrun.same(straight, again)
