"""GraLoRA, MiSS, Bat and sums: oracles from the papers and from PEFT's own layers, and the published faults."""

import copy
import math

import pytest
import torch
from torch import nn

import slimtune as st
from cases import Chain, One, dense_forward, gradients, shake

F64 = torch.float64


def filled(structure):
    """Random parameters, in double precision."""
    structure.double()
    with torch.no_grad():
        for p in structure.parameters():
            p.normal_()
    return structure


def one(recipe, layer, **options):
    model = One(layer.to(F64)).eval()
    st.adapt(model, recipe, ["layer"], **options)
    shake(model)
    return model, model.layer.adapters["default"].structure


RECIPES = {
    "gralora-k2": lambda **o: st.gralora(rank=4, alpha=4, k=2, **o),
    "gralora-k4": lambda **o: st.gralora(rank=8, alpha=4, k=4, **o),
    "hybrid": lambda **o: st.gralora(rank=4, alpha=4, k=2, hybrid_rank=3, **o),
    "miss": lambda **o: st.bone(rank=3, **o),
    "mini": lambda **o: st.bone(rank=3, form="mini", mini_rank=5, **o),
    "bat": lambda **o: st.bone(rank=4, form="bat", **o),
    "bat-cut": lambda **o: st.bone(rank=5, form="bat", **o),
    "row": lambda **o: st.bone(rank=4, form="row", **o),
    "row-cut": lambda **o: st.bone(rank=6, form="row", **o),
    "left": lambda **o: st.bone(rank=4, form="left", **o),
    "miss-large": lambda **o: st.bone(rank=16, **o),
    "bat-large": lambda **o: st.bone(rank=16, form="bat", **o),
    "row-large": lambda **o: st.bone(rank=16, form="row", **o),
    "left-cut": lambda **o: st.bone(rank=8, form="left", **o),
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@recipes
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 2, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_any_leading_dimensions(recipe, shape, dropout):
    """PEFT's GraLoRA takes 2-D and 3-D inputs only. Sizes that K divides, which the shared layers hardly have."""
    torch.manual_seed(0)
    model, _ = one(recipe(dropout=dropout), nn.Linear(8, 12))
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    fast, slow = model(x), dense_forward(model.layer, x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(fast, model, x), gradients(slow, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if dropout:
        model.train()
        model(x).sum().backward()  # equal to the definition by the shared tests
        assert x.grad.shape == x.shape


@recipes
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives(recipe, dropout):
    torch.manual_seed(0)
    model, _ = one(recipe(dropout=dropout), nn.Linear(8, 12))
    model.train()
    x = torch.randn(2, 8, dtype=F64, requires_grad=True)

    def f(x, *_):
        torch.manual_seed(3)
        return model(x)

    inputs = (x, *[p for _, p in st.trainable_parameters(model)])
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


# ---------------------------------------------------------------- GraLoRA


def grid(O, I, K, R):
    return filled(st.BlockLowRank(O, I, rank=R, blocks=K))


@pytest.mark.parametrize(("O", "I", "K", "R"), [(12, 8, 4, 8), (6, 9, 3, 3), (8, 8, 2, 6), (5, 7, 1, 3)])
def test_gralora_is_the_papers_block_formula(O, I, K, R):
    s = grid(O, I, K, R)
    A, B, S, o, i = s.A, s.B, R // K, O // K, I // K
    for j in range(K):
        for n in range(K):
            block = (A[n][:, j * S : (j + 1) * S] @ B[j][n * S : (n + 1) * S]).T
            torch.testing.assert_close(s.dense()[j * o : (j + 1) * o, n * i : (n + 1) * i], block)
    x = torch.randn(3, I, dtype=F64)
    torch.testing.assert_close(s(x), x @ s.dense().T)
    index = torch.arange(I).flip(0).view(1, -1)
    torch.testing.assert_close(s.columns(index), s.dense().T[index])
    tall, wide = s.exact_factors()
    assert tall.shape == (O, K * R) and wide.shape == (K * R, I)
    torch.testing.assert_close(tall @ wide, s.dense())


def test_gralora_with_one_block_is_lora():
    s, lora = grid(6, 5, 1, 3), st.LowRank(6, 5, rank=3).double()
    with torch.no_grad():
        lora.A.copy_(s.A[0].T)
        lora.B.copy_(s.B[0].T)
    torch.testing.assert_close(s.dense(), lora.dense())


@pytest.mark.parametrize(("K", "rank"), [(1, 8), (2, 16), (4, 32), (8, 64)])
def test_gralora_has_rank_k_r_for_the_same_parameters(K, rank):
    s = grid(64, 64, K, 8)
    assert torch.linalg.matrix_rank(s.dense()) == rank
    assert sum(p.numel() for p in s.parameters()) == 8 * (64 + 64)


def test_gralora_gradients_are_local():
    """Inputs of block n reach A[n] and rows nS to (n+1)S of every B[j], nothing else."""
    model, s = one(RECIPES["gralora-k4"](), nn.Linear(8, 12))
    for n in range(4):
        x = torch.zeros(5, 8, dtype=F64)
        x[:, 2 * n : 2 * n + 2] = torch.randn(5, 2)
        a, b = torch.autograd.grad(model(x).square().sum(), [s.A, s.B])
        for m in range(4):
            assert (a[m].abs().max() > 0) == (m == n)
            assert (b[:, 2 * m : 2 * m + 2].abs().max() > 0) == (m == n)


def test_gralora_permuted_inputs_permute_a():
    s, other = grid(8, 12, 4, 4), grid(8, 12, 4, 4)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        other.A.copy_(s.A[order])
        other.B.copy_(s.B.view(4, 4, 1, 2)[:, order].reshape(4, 4, 2))
    torch.testing.assert_close(other.dense(), s.dense().view(8, 4, 3)[:, order].flatten(1))


def test_gralora_start():
    torch.manual_seed(0)
    s = st.BlockLowRank(64, 128, rank=32, blocks=4)
    s.reset_parameters()
    assert not s.B.any()
    assert s.A.std().item() == pytest.approx(math.sqrt(4 / (3 * 128)), rel=0.03)  # sqrt(K) times LoRA's
    assert s.A.abs().max() <= math.sqrt(4 / 128)


@pytest.mark.parametrize(
    ("O", "I", "rank", "k"),
    [
        (64, 128, 32, 2),
        (64, 128, 8, 2),
        (768, 768, 127, 1),
        (64, 128, 128, 4),
        (64, 128, 512, 8),
        (12, 6, 128, 2),
        (9, 15, 12, 3),
        (7, 5, 32, 1),
    ],
)
def test_gralora_chooses_its_blocks(O, I, rank, k):
    """The largest power of two with R / k^2 >= 8, at least 2, and what divides instead of an error."""
    s = st.BlockLowRank(O, I, rank=rank)
    assert s.options() == {"rank": rank, "blocks": k} and f"{k} x {k} blocks" in repr(s)


def test_gralora_refuses_blocks_that_do_not_divide():
    with pytest.raises(st.StructureError, match="12 outputs, 8 inputs and rank 4, that is be one of 1, 2, 4; got 3"):
        st.BlockLowRank(12, 8, rank=4, blocks=3)
    model = Chain()
    with pytest.raises(st.StructureError, match=r"down: BlockLowRank: .* 8 outputs, 12 inputs"):
        st.adapt(model, st.gralora(rank=6, k=3), ["down"])
    assert type(model.down) is nn.Linear


def test_hybrid_is_one_adapter_with_one_scale(tmp_path):
    recipe = st.gralora(rank=4, alpha=12, k=2, hybrid_rank=2, rank_pattern={"down": 6}, alpha_pattern={"up": 3})
    assert st.Recipe.from_dict(recipe.to_dict()) == recipe
    base = Chain(F64)
    model = copy.deepcopy(base)
    st.adapt(model, recipe, ["up", "down", "hf"])
    shake(model)
    scales = {n: model.get_submodule(n).adapters["default"].scale.item() for n in ("up", "down", "hf")}
    assert scales == pytest.approx({"up": 3 / 6, "down": 12 / 8, "hf": 12 / 6})
    names = {n for n, _ in model.hf.adapters["default"].named_parameters()}
    assert names == {"structure.parts.0.A", "structure.parts.0.B", "structure.parts.1.A", "structure.parts.1.B"}
    lora, grid = (model.hf.adapters["default"].structure.parts[n] for n in (1, 0))
    whole = model.hf.map().weight() - base.hf.weight.T
    torch.testing.assert_close(whole, 2 * (grid.dense() + lora.dense()))
    fast = [g for g in st.param_groups(model, lr=1.0, b_ratio=4) if g["name"] == "fast"]
    assert len(fast[0]["params"]) == 3 * 2  # both B
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    ids = Chain.ids()
    assert torch.equal(base(ids), model(ids))


# ---------------------------------------------------------------- MiSS


@pytest.mark.parametrize(("O", "I", "R"), [(6, 12, 4), (5, 10, 4), (3, 7, 7), (4, 3, 5)])
def test_miss_is_the_index_formula_and_lora_with_tiled_identities(O, I, R):
    s = filled(st.Tiled(O, I, rank=R))
    dense = s.dense()
    for o in range(O):
        for i in range(I):
            assert dense[o, i] == s.D[i % R, o]
    A = torch.eye(R, dtype=F64).repeat(1, I)[:, :I]
    torch.testing.assert_close(dense, s.D.T @ A)
    tall, wide = s.exact_factors()
    assert torch.equal(tall, s.D.T) and torch.equal(wide, A)
    x = torch.randn(4, I, dtype=F64)
    torch.testing.assert_close(s(x), x @ dense.T)


def test_miss_sees_only_the_sum_of_blocks():
    s = filled(st.Tiled(5, 12, rank=4))
    x, v = torch.randn(3, 12, dtype=F64), torch.randn(4, dtype=F64)
    moved = x + torch.cat([v, -v, torch.zeros(4)])
    torch.testing.assert_close(s(moved), s(x))


def test_mini_repeats_a_smaller_tile():
    s = filled(st.Tiled(7, 10, rank=4, period=3))
    dense = s.dense()
    assert all(dense[o, i] == s.M[i % 4, o % 3] for o in range(7) for i in range(10))
    whole, mini = st.Tiled(7, 10, rank=4).double(), filled(st.Tiled(7, 10, rank=4, period=7))
    with torch.no_grad():
        whole.D.copy_(mini.M)
    assert torch.equal(whole.dense(), mini.dense())
    with pytest.raises(st.StructureError, match="period must be a whole number of 1 to 7, got 8"):
        st.Tiled(7, 10, rank=4, period=8)


def test_miss_keeps_no_input():
    """Only the (T, R) sum: x may be changed or freed before the backward pass."""
    model, s = one(st.bone(rank=4), nn.Linear(8, 12))
    x = torch.randn(5, 8, dtype=F64)
    want = torch.autograd.grad(model(x).square().sum(), s.D)[0]
    z = x.clone()
    y = model(z)
    z.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), s.D)[0], want)


@pytest.mark.parametrize("form", ["miss", "mini", "bat", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merging_leaves_the_parameter_alone(form, dtype):
    """PEFT's mini overwrites its parameter with the expanded matrix when it merges in half precision on a CPU."""
    model = nn.Sequential(nn.Linear(8, 12)).to(dtype)
    st.adapt(model, st.bone(rank=4, form=form, mini_rank=3), ["0"])
    shake(model)
    p = next(model[0].adapters["default"].structure.parameters())
    before, W = p.detach().clone(), model[0].weight.clone()
    y = model(torch.ones(2, 8, dtype=dtype))
    for _ in range(20):  # PEFT inverts 1 + B to unmerge, and drifts
        with st.merged(model):
            assert not torch.equal(model[0].weight, W)
    assert torch.equal(p, before) and torch.equal(model[0].weight, W)
    assert torch.equal(model(torch.ones(2, 8, dtype=dtype)), y)


def test_adapters_of_different_form_on_one_layer():
    """PEFT keeps one form for a layer, that of its first adapter."""
    model = One(nn.Linear(8, 12).to(F64))
    x = torch.randn(3, 8, dtype=F64)
    forms = ("miss", "mini", "bat", "row", "left")
    for form in forms:
        st.adapt(model, st.bone(rank=4, form=form, mini_rank=3), ["layer"], name=form)
        shake(model)
    for names in [*([f] for f in forms), list(forms), list(forms)[::-1]]:
        st.activate(model, names)
        W = model.layer.weight
        for name in names:
            a = model.layer.adapters[name]
            W = a.composition.weight(W, a.structure.dense())
        torch.testing.assert_close(model(x), x @ W.T + model.layer.bias)


# ---------------------------------------------------------------- Bat


def blocks_of(W, r):
    return W.unflatten(0, (-1, r)).unflatten(2, (-1, r)).transpose(1, 2)  # (a, c, r, r)


FORMS = {
    "bat": lambda W, B: W + W @ B[:, None] + B[:, None],
    "row": lambda W, B: W + W @ B[None] + B[None],
    "left": lambda W, B: W + B[:, None] @ W + B[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_bat_is_the_papers_block_formula(form):
    model, s = one(st.bone(rank=4, form=form), nn.Linear(8, 12))
    want = FORMS[form](blocks_of(model.layer.weight, 4), s.B)
    torch.testing.assert_close(blocks_of(model.layer.map().weight(), 4), want)


@pytest.mark.parametrize(("form", "O", "I"), [("bat", 10, 7), ("row", 8, 7), ("left", 10, 8)])
def test_bat_of_sizes_that_the_block_does_not_divide(form, O, I):
    """The weight padded with zeros to whole blocks, changed, and cut again; dW has no rows beyond O."""
    r = 4
    model, s = one(st.bone(rank=r, form=form), nn.Linear(I, O))
    padded = nn.functional.pad(model.layer.weight, (0, -I % r, 0, -O % r))
    B = s.B.detach().clone()
    if form == "bat":
        B[-1, O % r :] = 0
    want = FORMS[form](blocks_of(padded, r), B).transpose(1, 2).flatten(2).flatten(0, 1)[:O, :I]
    torch.testing.assert_close(model.layer.map().weight(), want)
    x = torch.randn(3, I, dtype=F64)
    torch.testing.assert_close(model(x), x @ want.T + model.layer.bias)


def test_bat_on_a_zero_weight_and_with_multiples_of_one():
    model, s = one(st.bone(rank=4, form="bat"), nn.Linear(8, 12))
    W = model.layer.weight.detach().clone()
    with torch.no_grad():
        s.B.copy_(0.5 * torch.eye(4))
    torch.testing.assert_close(model.layer.map().weight(), 1.5 * W + 0.5 * torch.eye(4, dtype=F64).repeat(3, 2))
    with torch.no_grad():
        s.B.normal_()
        model.layer.weight.zero_()
    change = blocks_of(model.layer.map().weight(), 4)
    torch.testing.assert_close(change, s.B[:, None].expand_as(change))


def test_bat_has_full_rank():
    torch.manual_seed(0)
    model, _ = one(st.bone(rank=8, form="bat"), nn.Linear(64, 64))
    change = model.layer.map().weight() - model.layer.weight
    assert torch.linalg.matrix_rank(change) == 64


def test_bat_gradient():
    """The gradient of B_a is sum_c (W_ac^T + 1) G_ac with G = g^T x."""
    model, s = one(st.bone(rank=4, form="bat"), nn.Linear(8, 12))
    x, g = torch.randn(5, 8, dtype=F64), torch.randn(5, 12, dtype=F64)
    W, G = blocks_of(model.layer.weight, 4), blocks_of(g.T @ x, 4)
    want = (W.transpose(2, 3) @ G + G).sum(1)
    torch.testing.assert_close(torch.autograd.grad((model(x) * g).sum(), s.B)[0], want)


class Packed(nn.Linear):
    """A stand-in for a quantised layer: integers, unpacked in its own forward."""

    def __init__(self, I, O):
        super().__init__(I, O)
        packed = (self.weight * 100).round().to(torch.int8)
        del self._parameters["weight"]
        self.register_buffer("weight", packed)
        self.asked = []

    def forward(self, x):
        self.asked.append(x.shape[:-1].numel())
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias.to(x.dtype))


@pytest.mark.parametrize("form", ["bat", "row", "left"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_weights(form, dropout):
    """The row and the left form ask a quantised layer for products of the data only."""
    torch.manual_seed(0)
    model = One(Packed(8, 12))
    st.adapt(model, st.bone(rank=4, form=form, dropout=dropout), ["layer"])
    shake(model)
    x = torch.randn(5, 8, requires_grad=True)
    model.layer.asked.clear()
    model(x).square().sum().backward()
    rows = list(model.layer.asked)
    assert (set(rows) == {5}) == (form != "bat")  # bat reads the weight through 8 unit vectors
    assert x.grad.isfinite().all()
    model.eval()
    torch.testing.assert_close(model(x), dense_forward(model.layer, x), rtol=1e-4, atol=1e-5)


def test_recipes_refuse():
    with pytest.raises(st.StructureError, match="bone: form must be one of miss, mini, bat, row, left, got 'free'"):
        st.bone(form="free")
    with pytest.raises(st.StructureError, match="bone: rank"):
        st.bone(rank=0)
    with pytest.raises(st.StructureError, match="gralora: hybrid_rank"):
        st.gralora(hybrid_rank=-1)
    with pytest.raises(st.StructureError, match="gralora: rank"):
        st.gralora(rank=True)


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "at least one table"),
        ("LowRank", "at least one table"),
        ([{"rank": 2}], "part 0: expected a table with the key 'structure'"),
        ([{"structure": "LowRank"}, {"structure": "os"}], "part 1: unknown structure 'os'; known: .*LowRank"),
        ([{"structure": "Factored"}], "unknown structure 'Factored'"),
        ([{"structure": nn.Linear}], "unknown structure"),
        ([{"structure": "LowRank", "device": "cpu"}], "LowRank has no option 'device'"),
        ([{"structure": "LowRank", "rank": 0}], "LowRank: rank must be"),
    ],
)
def test_sums_refuse(parts, match):
    with pytest.raises(st.StructureError, match=match):
        st.Sum(4, 4, parts=parts)


def test_sum_is_its_parts():
    parts = [
        {"structure": "Tiled", "rank": 3},
        {"structure": st.LowRank, "rank": 2},
        {"structure": "BlockTiled", "block": 2},
    ]
    s = filled(st.Sum(6, 8, parts=parts))
    want = sum(part.dense() for part in s.parts)
    torch.testing.assert_close(s.dense(), want)
    x = torch.randn(4, 8, dtype=F64)
    torch.testing.assert_close(s(x), x @ want.T)
    torch.testing.assert_close(s.columns(torch.arange(8)), want.T)
    tall, wide = s.exact_factors()
    torch.testing.assert_close(tall @ wide, want)
    assert tall.shape[1] == s.rank == 3 + 2 + 2
    again = st.Sum(6, 8, **s.options()).double()
    again.load_state_dict(s.state_dict())
    assert torch.equal(again.dense(), s.dense())


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("name", ["gralora", "hybrid", "miss", "mini", "bat"])
def test_equals_peft(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    config, recipe = {
        "gralora": (
            peft.GraloraConfig(r=8, alpha=4, gralora_k=4, target_modules=["layer"]),
            st.gralora(rank=8, alpha=4, k=4),
        ),
        "hybrid": (
            peft.GraloraConfig(r=4, alpha=12, gralora_k=2, hybrid_r=2, target_modules=["layer"]),
            st.gralora(rank=4, alpha=12, k=2, hybrid_rank=2),
        ),
        "miss": (peft.MissConfig(r=5, target_modules=["layer"]), st.bone(rank=5)),
        "mini": (
            peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=["layer"]),
            st.bone(rank=4, form="mini", mini_rank=2),
        ),
        "bat": (
            peft.MissConfig(r=4, init_weights="bat", target_modules=["layer"]),
            st.bone(rank=4, form="bat"),
        ),
    }[name]
    ours = One(copy.deepcopy(layer))
    st.adapt(ours, recipe, ["layer"])
    theirs = peft.get_peft_model(One(copy.deepcopy(layer)), config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    shapes = [p.shape for p in trained]
    mine = [p for _, p in st.trainable_parameters(ours)]
    assert [p.shape for p in mine] == shapes
    with torch.no_grad():
        for a, b in zip(trained, mine, strict=True):
            b.copy_(a.normal_())
    x = torch.randn(3, 12)
    y, z = theirs(x), ours(x)
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad((y * g).sum(), trained), torch.autograd.grad((z * g).sum(), mine), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
