"""Any recipe through Hugging Face code: PEFT's verbs, transformers' adapters, TRL, and files both ways."""

import copy
import dataclasses
import doctest
import json
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
from cases import DORA, LORA, Chain, adapt, made_up, methods, shake, tiny_llama

peft = pytest.importorskip("peft")

from slimtune.hf import ControllerCallback, SlimtuneConfig  # noqa: E402
from slimtune.targets import hosts  # noqa: E402


class Permuted(st.Factored):
    """dW = B A P with a random permutation P, whose buffers a file must hold (`order`) or restore (`place`)."""

    def __init__(self, out_features, in_features, *, rank=2, device=None, dtype=None):
        super().__init__(out_features, in_features)
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        index = {"dtype": torch.long, "device": device}
        self.register_buffer("order", torch.empty(in_features, **index))
        self.register_buffer("place", torch.empty(in_features, **index), persistent=False)

    def factors(self):
        return self.B, self.A[:, self.place]

    @torch.no_grad()
    def reset_parameters(self):
        self.A.normal_()
        self.B.zero_()
        self.order.copy_(torch.randperm(self.in_features))

    def prepare(self, weight):
        self.place.copy_(self.order.argsort())

    def options(self):
        return {"rank": self.A.shape[0]}


def permuted():
    return st.Recipe(Permuted, {"rank": 2}, st.Magnitude, alpha=2.0, overrides={"up": {"rank": 3, "alpha": 1.0}})


RECIPES = {
    "lora": lambda: st.lora(rank=3, alpha=4),
    "dora-of-lora": lambda: dataclasses.replace(st.lora(rank=3, alpha=4), composition=st.Magnitude),
    "permuted": permuted,
}
IDS = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(0))
three = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT on Conv1D
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
        yield


def chain():
    torch.manual_seed(0)
    return Chain().eval()


def wrapped(recipe, targets=Chain.targets, **fields):
    """A PEFT model of a Chain, moved away from its start."""
    base = chain()
    torch.manual_seed(1)
    fields["stats"] = made_up(base, recipe, targets)
    config = SlimtuneConfig(recipe=recipe, target_modules=list(targets), modules_to_save=["classifier"], **fields)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    move(model)
    return base, model


@torch.no_grad()
def move(model):
    """Shake, and turn up the scales, of which some begin at 0."""
    shake(model)
    for name, buffer in model.named_buffers():
        if name.endswith("scale"):
            buffer.add_(0.5)


def status(model):
    """PEFT's status of the adapted layers; its wrappers of modules_to_save tell another story."""
    layers = peft.get_layer_status(model)
    return {s.name.removeprefix("model."): s for s in layers if s.module_type.startswith("Adapted")}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- PEFT


@methods
def test_is_what_adapt_makes(method):
    base, theirs = wrapped(method.recipe(), Chain.targets_of(method))
    torch.manual_seed(1)
    adapt(base, method.recipe(), Chain.targets_of(method), modules_to_save=["classifier"])
    move(base)
    y, z = base.eval()(IDS), theirs(IDS)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    ours, others = ([p for _, p in st.trainable_parameters(m)] for m in (base, theirs))
    assert len(ours) == len(others)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, others, strict=True))
    assert st.summary(theirs).rows == [r for r in st.summary(base).rows if r.method != "full"]


@methods
def test_files_both_ways(method, tmp_path):
    base, theirs = wrapped(method.recipe(), Chain.targets_of(method))
    y = theirs(IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", low_cpu_mem_usage=low)
        same(again.eval()(IDS), y)
        assert not [n for n, p in again.named_parameters() if p.requires_grad and ".adapters." in n]
    ours = copy.deepcopy(base)
    assert sorted(st.load(ours, tmp_path / "theirs")) == sorted(Chain.targets_of(method))
    assert torch.equal(ours.eval()(IDS), y)
    st.save(ours, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(IDS), y)


def test_both_write_the_same_file(tmp_path):
    base, theirs = wrapped(permuted())
    theirs.save_pretrained(tmp_path / "theirs")
    st.load(base, tmp_path / "theirs")
    st.save(base, tmp_path / "ours")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(a) == set(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert "base_model.model.up.adapters.structure.order" in a
    assert not [k for k in a if k.endswith("place")]
    a, b = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    for key in ("peft_type", "modules_to_save", "inference_mode"):
        assert a[key] == b[key] or key == "inference_mode"
    assert a["slimtune"]["layers"] == b["slimtune"]["layers"]
    assert a["slimtune"]["modules_to_save"] == b["slimtune"]["modules_to_save"] == ["classifier"]


def test_a_scale_that_changed_is_saved(tmp_path):
    base, theirs = wrapped(st.lora(rank=3))
    for name, buffer in theirs.named_buffers():
        if name.endswith("scale"):
            buffer.mul_(0.25)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(IDS), theirs(IDS))
    st.load(base, tmp_path)
    assert torch.equal(base(IDS), theirs(IDS))


def test_a_configuration_serves_again(tmp_path):
    config = SlimtuneConfig(recipe=st.lora(rank=2, alpha=2), target_modules=["up"])
    model = peft.get_peft_model(chain(), config)
    move(model)
    model.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(chain(), config)
    assert fresh.get_base_model().up.adapters["default"].scale == 1
    assert torch.equal(fresh(IDS), chain()(IDS))
    config.save_pretrained(tmp_path / "config")
    again = peft.PeftConfig.from_pretrained(tmp_path / "config")
    assert type(again) is SlimtuneConfig and again.recipe == config.recipe and again.target_modules == ["up"]
    assert dataclasses.replace(again, modules_to_save=["classifier"]).recipe == config.recipe
    assert copy.deepcopy(config) == config


@three
def test_several_adapters(recipe, tmp_path):
    base, model = wrapped(recipe())
    y = model(IDS)
    model.add_adapter("second", SlimtuneConfig(recipe=st.dora(rank=2), target_modules=["up", "hf"]))
    assert torch.equal(model(IDS), y)
    model.set_adapter("second")
    with model.disable_adapter():
        assert torch.equal(model(IDS), base(IDS))
    same(model(IDS), base(IDS))  # dW = 0, from the base and not from the first adapter's weight
    assert {n.split(".adapters.")[1].split(".")[0] for n, _ in st.trainable_parameters(model)} == {"second"}
    shake(model)
    z = model(IDS)
    assert not torch.equal(y, z)
    assert peft.get_model_status(model).peft_types == {"default": "SLIMTUNE", "second": "SLIMTUNE"}
    assert all(s.active_adapters == ["second"] for s in status(model).values())
    assert status(model)["up"].available_adapters == ["default", "second"]

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(IDS), y)
    again.load_adapter(tmp_path / "second", "other")
    again.set_adapter("other")
    assert torch.equal(again(IDS), z)

    model.base_model.set_adapter(["default", "second"])
    ours = copy.deepcopy(base)
    st.load(ours, tmp_path, "default")
    st.load(ours, tmp_path / "second", "second")
    assert torch.equal(ours.eval()(IDS), model(IDS))  # stacked in that order

    model.set_adapter("default")
    assert torch.equal(model(IDS), y)
    model.delete_adapter("second")
    assert torch.equal(model(IDS), y)
    assert status(model)["up"].available_adapters == ["default"]


def test_tensors_into_an_adapter_that_has_run():
    _, model = wrapped(permuted())
    config = SlimtuneConfig(recipe=permuted(), target_modules=list(Chain.targets), modules_to_save=["classifier"])
    other = peft.get_peft_model(chain(), config).eval()  # another permutation
    assert not torch.equal(other(IDS), model(IDS))
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert torch.equal(other(IDS), model(IDS))


@three
def test_merge_and_back(recipe):
    base, model = wrapped(recipe())
    y = model(IDS)
    model.merge_adapter(safe_merge=True)
    same(model(IDS), y)
    assert all(s.merged_adapters == ["default"] for s in status(model).values())
    with model.disable_adapter():
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), y)  # switching adapters off took them out of the weight
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(IDS), y)
    with st.merged(model):
        same(model(IDS), y)
    plain = copy.deepcopy(model).merge_and_unload()
    same(plain(IDS), y)
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert {n: set(vars(m)) for n, m in plain.named_modules()} == {n: set(vars(m)) for n, m in base.named_modules()}
    assert not [m for m in plain.modules() if m._load_state_dict_post_hooks or m._forward_pre_hooks]
    model.merge_adapter()
    bare = model.unload()
    for name, t in base.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(bare.state_dict()[name], t)


def test_merging_part_of_a_stack_keeps_the_rest():
    _, model = wrapped(st.lora(rank=2))
    model.add_adapter("second", SlimtuneConfig(recipe=st.dora(rank=2), target_modules=["up"]))
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    y = model(IDS)
    model.merge_adapter(["default"])
    same(model(IDS), y)
    model.unmerge_adapter()
    assert torch.equal(model(IDS), y)


def test_merging_a_tied_head_unties_it():
    base = tiny_llama(tied=True)
    ids = torch.randint(0, 31, (2, 5))
    model = peft.get_peft_model(copy.deepcopy(base), SlimtuneConfig(recipe=st.dora(rank=2), target_modules=["lm_head"]))
    shake(model)
    y = model(ids).logits
    with pytest.warns(UserWarning, match="no longer tied"):
        plain = model.merge_and_unload()
    same(plain(ids).logits, y)
    assert torch.equal(plain.model.embed_tokens.weight, base.model.embed_tokens.weight)


@three
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(recipe, copied):
    _, model = wrapped(recipe())
    other = copied(model)
    assert torch.equal(other(IDS), model(IDS))
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    shake(other)
    other.set_adapter("default")
    assert not torch.equal(other(IDS), model(IDS))
    assert other.merge_and_unload() is not None


def test_bf16_base_keeps_fp32_adapters(tmp_path):
    base = chain().bfloat16()
    model = peft.get_peft_model(copy.deepcopy(base), SlimtuneConfig(recipe=st.dora(rank=2), target_modules=["up"]))
    shake(model)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert {p.dtype for n, p in again.named_parameters() if ".adapters." in n} == {torch.float32}
        assert torch.equal(again(IDS), model(IDS))


def test_compiles_to_one_graph():
    _, model = wrapped(DORA.recipe())
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    same(compiled(IDS), model(IDS))


def test_sequence_classification_trains_its_head(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=31, pad_token_id=0, **shape)).eval()
    model = peft.get_peft_model(
        copy.deepcopy(base), SlimtuneConfig(recipe=st.dora(rank=2), task_type="SEQ_CLS", exclude_modules=["o_proj"])
    ).eval()
    assert "score.modules_to_save.default.weight" in " ".join(n for n, _ in st.trainable_parameters(model))
    assert not [r for r in st.summary(model).rows if "o_proj" in r.name or "score" in r.name]
    shake(model)
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 31, (2, 5))
    assert st.load(base, tmp_path)
    assert torch.equal(base(ids).logits, model(ids).logits)


def test_export_for_everyone_else(tmp_path):
    base = chain()
    model = peft.get_peft_model(copy.deepcopy(base), SlimtuneConfig(recipe=DORA.recipe(), target_modules=["up"]))
    shake(model)
    st.export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    same(peft.PeftModel.from_pretrained(base, tmp_path)(IDS), model(IDS))


def test_the_docstring_example():
    from slimtune.hf import peft as module

    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# ---------------------------------------------------------------- another process


def test_a_fresh_process(tmp_path):
    base, model = wrapped(LORA.recipe())
    model.save_pretrained(tmp_path / "adapter")
    torch.save((base.state_dict(), IDS, model(IDS)), tmp_path / "case.pt")
    code = f"""
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(sys.path[0])!r})
        import slimtune.hf.models
        assert not [m for m in ("peft", "transformers") if m in sys.modules]
        import peft, torch
        from cases import Chain
        folder = {str(tmp_path)!r}
        state, ids, y = torch.load(folder + "/case.pt")
        base = Chain().eval()
        base.load_state_dict(state)
        try:
            peft.PeftModel.from_pretrained(base, folder + "/adapter")
        except KeyError as error:
            assert "SLIMTUNE" in str(error)
        else:
            raise AssertionError("PEFT cannot know the type yet")
        from slimtune.hf import SlimtuneConfig
        assert torch.equal(peft.PeftModel.from_pretrained(base, folder + "/adapter").eval()(ids), y)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- transformers


@methods
def test_transformers_loads_every_method(method, tmp_path):
    if "linear" in method.refuses:
        pytest.skip(method.refuses["linear"])
    base, ids = tiny_llama(), torch.randint(0, 31, (2, 5))
    model = copy.deepcopy(base)
    recipe, targets = method.recipe(), ["q_proj", "down_proj"]
    model.add_adapter(SlimtuneConfig(recipe=recipe, target_modules=targets, stats=made_up(base, recipe, targets)))
    move(model)
    model.save_pretrained(tmp_path)
    info = base.load_adapter(tmp_path)
    assert not info.missing_keys and not info.unexpected_keys
    same(base(ids).logits, model(ids).logits)


@three
def test_transformers_adapters(recipe, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    ids = torch.randint(0, 31, (2, 5))
    model = type(base).from_pretrained(tmp_path / "base").eval()
    targets = ["q_proj", "down_proj"]
    plain = dataclasses.replace(recipe(), overrides={})
    model.add_adapter(SlimtuneConfig(recipe=plain, target_modules=targets, modules_to_save=["lm_head"]))
    same(model(ids).logits, base(ids).logits)
    shake(model)
    y = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")

    other = copy.deepcopy(base)
    info = other.load_adapter(tmp_path / "adapter")
    assert not info.missing_keys and not info.unexpected_keys
    same(other(ids).logits, y)
    assert torch.equal(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(ids).logits, y)
    same(type(base).from_pretrained(tmp_path / "adapter").eval()(ids).logits, y)
    other.disable_adapters()
    assert torch.equal(other(ids).logits, base(ids).logits)
    other.enable_adapters()
    other.delete_adapter("default")
    assert torch.equal(other.model(ids)[0], base.model(ids)[0])

    ours = copy.deepcopy(base)
    st.load(ours, tmp_path / "adapter")
    assert torch.equal(ours(ids).logits, y)
    st.save(ours, tmp_path / "ours")
    if plain.structure is Permuted:  # transformers 5.23 itself loses the magnitudes of PEFT's DoRA
        other = copy.deepcopy(base)
        other.load_adapter(tmp_path / "ours")
        same(other(ids).logits, y)


# ---------------------------------------------------------------- TRL


class Halve(st.Controller):
    """Halves every scale after each step."""

    def __init__(self):
        self.steps = 0

    def after_step(self, model):
        self.steps += 1
        for name, buffer in model.named_buffers():
            if name.endswith("scale"):
                buffer.mul_(0.5)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def finetune(recipe, folder, steps, resume=None, callbacks=(), **arguments):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    rows = Dataset.from_dict({"text": ["abcdefgh", "hgfedcba", "xyzabc", "aabbccdd"] * 3})
    trainer = SFTTrainer(
        tiny_llama(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)) if arguments else None,
        processing_class=tokenizer(),
        peft_config=SlimtuneConfig(recipe=dataclasses.replace(recipe, overrides={}, dropout=0.1)),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@three
def test_trl_resumes_to_the_same_bits(recipe, tmp_path):
    pytest.importorskip("trl")
    straight = finetune(recipe(), tmp_path / "straight", 4)
    finetune(recipe(), tmp_path / "two", 2)
    resumed = finetune(recipe(), tmp_path / "two", 4, resume=str(tmp_path / "two" / "checkpoint-2"))
    state, other = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[k], other[k]) for k in state)
    trained = [n for n, p in straight.model.named_parameters() if p.requires_grad]
    assert trained and all(".adapters.default." in n for n in trained)
    assert all(torch.equal(state[f"base_model.model.{k}"], t) for k, t in tiny_llama().state_dict().items())
    base, ids = tiny_llama(), torch.randint(3, 29, (2, 6))
    st.load(base, tmp_path / "two" / "checkpoint-4")
    assert torch.equal(base(ids).logits, resumed.model.eval()(ids).logits)
    assert not torch.equal(base(ids).logits, tiny_llama()(ids).logits)


def test_trl_runs_and_resumes_controllers(tmp_path):
    pytest.importorskip("trl")
    recipe = dataclasses.replace(st.lora(rank=2, alpha=2), controllers={"Halve": {}})
    straight = finetune(recipe, tmp_path / "straight", 4, callbacks=[ControllerCallback()])
    finetune(recipe, tmp_path / "two", 2, callbacks=[ControllerCallback()])
    callback = ControllerCallback()
    checkpoint = str(tmp_path / "two" / "checkpoint-2")
    resumed = finetune(recipe, tmp_path / "two", 4, resume=checkpoint, callbacks=[callback])
    state, other = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[k], other[k]) for k in state)
    assert {float(t) for k, t in state.items() if k.endswith("scale")} == {0.5**4}
    assert callback.attached[0].state_dict() == {"steps": 4}
    finetune(recipe, tmp_path / "bare", 2)
    with pytest.raises(st.SlimtuneError, match="holds the state of 0 controllers, the recipe names 1"):
        finetune(recipe, tmp_path / "bare", 4, str(tmp_path / "bare" / "checkpoint-2"), [ControllerCallback()])


class Trade(st.Controller):
    """Every other step the layers get ranks by statistics kept beside Adam's moments; the last rank is masked."""

    def __init__(self):
        self.done, self.ranks = 0, {}

    def begin(self, model, optimizer):
        self._optimizer = optimizer
        self._layers = {name: host.adapters["default"].structure for name, host in hosts(model).items()}
        present = {name: structure.rank for name, structure in self._layers.items()}
        assert self.ranks in ({}, present)

    @torch.no_grad()
    def after_step(self, model):
        self.done += 1
        scores = {}
        for name, structure in self._layers.items():
            state = self._optimizer.state[structure.B]
            new = (structure.B * structure.B.grad).abs()
            state["trade_mean"] = state.get("trade_mean", torch.zeros_like(new)).mul(0.8).add(new)
            scores[name] = float(state["trade_mean"].mean())
            structure.B[:, -1] = 0
        if self.done % 2:
            order = sorted(scores, key=scores.get)
            ranks = {name: 2 + (place + self.done) % 4 for place, name in enumerate(order)}
            st.resize(model, ranks, self._optimizer, seed=self.done)
        self.ranks = {name: structure.rank for name, structure in self._layers.items()}

    def note(self):
        return {"ranks": dict(self.ranks)} if self.done % 2 else None

    def end(self, model):
        st.compact(model, self._optimizer)


MOVING = {
    "trade": lambda: dataclasses.replace(st.lora(rank=3), controllers={"Trade": {}}),
    "adalora": lambda: st.adalora(rank=2, t_init=1, t_final=2, delta_t=1),
    "elalora": lambda: st.elalora(rank=2, warmup=1, final=2, interval=1),
    "ardlora": lambda: st.ardlora(rank=3, penalty=4.0, warmup=1, interval=1, final=1),
}


def ranks_of(model):
    return {row.name: row.rank for row in st.summary(model).rows}


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING)
def test_ranks_that_change_under_a_trainer(make, tmp_path):
    """The checkpoint's ranks are others than the recipe's: the run goes on from it to the same bits."""
    pytest.importorskip("trl")
    straight = finetune(make(), tmp_path / "straight", 6, callbacks=[ControllerCallback()])
    logged = [e for e in straight.state.log_history if "ranks" in e]
    assert logged and len({tuple(e["ranks"].values()) for e in logged}) > 1
    for step in (2, 4):
        folder = tmp_path / "straight" / f"checkpoint-{step}"
        resumed = finetune(make(), tmp_path / str(step), 6, resume=str(folder), callbacks=[ControllerCallback()])
        assert ranks_of(resumed.model) == ranks_of(straight.model)
        state, other = straight.model.state_dict(), resumed.model.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
        assert [e for e in resumed.state.log_history if "ranks" in e] == logged
    base, ids = tiny_llama(), torch.randint(3, 29, (2, 6))
    y = straight.model.eval()(ids).logits
    straight.model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()(ids).logits, y)
    st.load(base, tmp_path / "adapter")
    assert torch.equal(base.eval()(ids).logits, y)
    assert ranks_of(base) == ranks_of(straight.model)


@pytest.mark.parametrize("name", ["trade", "adalora"])
def test_the_best_checkpoint_is_tidied_up_at_its_own_ranks(name, tmp_path):
    pytest.importorskip("trl")
    make = MOVING[name]
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(use_reentrant|pin_memory|os.fork|the run ended after 2 of its 6)")
        trained = finetune(
            make(), tmp_path, 6, callbacks=[ControllerCallback()], metric_for_best_model="loss", **options
        )
    best = trained.state.best_model_checkpoint
    assert not best.endswith("-6")  # the worst loss: the first
    base, ids = tiny_llama(), torch.randint(3, 29, (2, 6))
    st.load(base, best)
    same(trained.model.eval()(ids).logits, base.eval()(ids).logits)
    if name == "trade":
        assert {n: r - 1 for n, r in ranks_of(base).items()} == ranks_of(trained.model)


def test_a_file_of_other_ranks_is_read_only_where_it_is_whole(tmp_path):
    """A model from the recipe takes a file's ranks; one that the folder describes takes no other than described."""
    config = SlimtuneConfig(recipe=st.lora(rank=3), target_modules=["up", "hf"])
    model = peft.get_peft_model(chain(), config)
    move(model)
    st.resize(model, {"up": 5, "hf": 1})
    move(model)
    model.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(chain(), SlimtuneConfig(recipe=st.lora(rank=3), target_modules=["up", "hf"])).eval()
    parameters = [p for _, p in st.trainable_parameters(fresh)]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    broken = tensors | {KEY + "A": tensors[KEY + "A"][:4].clone()}
    with pytest.raises(st.FileFormatError, match=r"up.* has shape \(\d, \d+\), expected"):
        peft.set_peft_model_state_dict(fresh, broken)
    assert ranks_of(fresh) == {"up": 3, "hf": 3}
    peft.set_peft_model_state_dict(fresh, tensors)
    assert ranks_of(fresh) == {"up": 5, "hf": 1}
    assert torch.equal(fresh(IDS), model.eval()(IDS))
    assert all(p is q for p, (_, q) in zip(parameters, st.trainable_parameters(fresh), strict=True))
    described = peft.PeftModel.from_pretrained(chain(), tmp_path)
    whole = {k: t[:2] if k.endswith("up.adapters.structure.A") else t for k, t in tensors.items()}
    whole = {k: t[:, :2] if k.endswith("up.adapters.structure.B") else t for k, t in whole.items()}
    with pytest.raises(st.FileFormatError, match=r"up.* has shape"):
        peft.set_peft_model_state_dict(described, whole)


def test_a_start_from_the_data(tmp_path):
    """Statistics reach the layers and no file; without them the layer is named; a file needs none."""
    base, recipe = chain(), st.gora(rank=2, floor=1)
    targets, batches = ["up", "hf"], [IDS, IDS.flip(0)]
    recipe, stats = st.calibrate.fit(recipe, base, batches, lambda m, x: m(x).square().mean(), targets)
    config = SlimtuneConfig(recipe=recipe, target_modules=targets, stats=stats)
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    ours = copy.deepcopy(base)
    st.adapt(ours, recipe, targets, stats=stats)
    assert torch.equal(model(IDS), ours(IDS)) and not torch.equal(model(IDS), base(IDS))
    model.save_pretrained(tmp_path)
    assert "stats" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert torch.equal(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(IDS), model(IDS))
    with pytest.raises(st.StructureError, match=r"(up|hf): gora starts from the data: calibrate first"):
        peft.get_peft_model(base, SlimtuneConfig(recipe=recipe, target_modules=targets))


# ---------------------------------------------------------------- refusals


def folder_of(recipe, tmp_path):
    base, model = wrapped(recipe)
    model.save_pretrained(tmp_path)
    return base, tmp_path


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda d: d["recipe"].update(structure="os.system"), "unknown structure 'os.system'"),
        (lambda d: d["recipe"].update(structure="Structure"), "unknown structure 'Structure'"),
        (lambda d: d["recipe"].update(composition=["Additive"]), "unknown composition"),
        (lambda d: d["recipe"].update(options={"rank": 2, "hook": "x"}), "no option 'hook'"),
        (lambda d: d["recipe"].update(evil=1), "unknown field 'evil'"),
        (lambda d: d["recipe"].update(dropout=2), "dropout"),
        (lambda d: d["layers"]["up"].update(scale="1"), "up: scale must be a number"),
        (lambda d: d["layers"].update(up=3), "lacks or misplaces"),
        (lambda d: d.pop("recipe"), "lacks or misplaces"),
        (lambda d: d.update(modules_to_save="classifier"), "must be a list of names"),
    ],
)
def test_a_hostile_description_is_refused(tmp_path, edit, match):
    base, folder = folder_of(LORA.recipe(), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    edit(config["slimtune"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    with pytest.raises(st.FileFormatError, match=match):
        peft.PeftModel.from_pretrained(base, folder)
    with pytest.raises(st.FileFormatError, match=match):
        st.load(base, folder)
    assert set(sys.modules) == before
    assert [type(m) for m in base.modules()] == [type(m) for m in chain().modules()]


@pytest.mark.parametrize("slimtune", [None, [], "lora", 3, {"recipe": []}], ids=repr)
def test_a_description_that_is_none(tmp_path, slimtune):
    base, folder = folder_of(LORA.recipe(), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"slimtune": slimtune}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(st.SlimtuneError):
        peft.PeftModel.from_pretrained(base, folder)


KEY = "base_model.model.up.adapters.structure."


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(KEY + "A"), "missing"),
        (lambda t: t.update({KEY + "C": torch.zeros(1)}), "unexpected"),
        (lambda t: t.update({"base_model.model.up.adapters.scale": torch.zeros(2)}), r"scale has shape \(2,\)"),
        (lambda t: t.update({KEY + "A": torch.zeros(3, 9)}), r"has shape \(3, 9\), expected \(3, 8\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, edit, match):
    base, folder = folder_of(LORA.recipe(), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    for load in (peft.PeftModel.from_pretrained, st.load):
        with pytest.raises(st.FileFormatError, match=match):
            load(copy.deepcopy(base), folder)


def test_what_cannot_work_is_refused(tmp_path):
    config = SlimtuneConfig(recipe=LORA.recipe(), target_modules=["up"])
    with pytest.raises(st.StructureError, match="recipe must be a Recipe"):
        SlimtuneConfig(target_modules=["up"])
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(chain(), config, mixed=True)
    with pytest.raises(st.SlimtuneError, match="adapter_names"):
        peft.get_peft_model(chain(), config)(IDS, adapter_names=["default"])
    with pytest.raises(st.TargetError, match=r"'inner\.adapters\.0'"):
        model = nn.ModuleDict({"inner": nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(2, 2)])})})
        peft.get_peft_model(model, SlimtuneConfig(recipe=LORA.recipe(), target_modules=["0"]))
    adapted = chain()
    st.adapt(adapted, LORA.recipe(), ["up"])
    with pytest.raises(st.TargetError, match="'up' carries a slimtune adapter"):
        peft.get_peft_model(adapted, config)
    _, model = wrapped(LORA.recipe())
    with pytest.raises(st.SlimtuneError, match="use its save_pretrained"):
        st.save(model, tmp_path)


def test_a_refused_layer_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(st.TargetError, match=r"'1' \(ReLU\) cannot be adapted"):
        peft.get_peft_model(model, SlimtuneConfig(recipe=LORA.recipe(), target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == ["0.weight", "0.bias"]
    assert all(p.requires_grad for p in model.parameters())
    assert vars(model[0]).keys() == vars(nn.Linear(3, 3)).keys()
