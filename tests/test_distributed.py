"""Two processes do what one does: the same plans and tensors under DDP and FSDP2, calibration, `slimtune train`."""

import datetime
import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

import slimtune as st
import tinyrun
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
        np.testing.assert_allclose(found["outputs"], physical["outputs"], rtol=1e-9, atol=1e-9)
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
