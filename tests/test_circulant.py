"""Circulant, Toeplitz, LDR and block-circulant changes against the published definitions, their oracles, and the faults
of published code."""

import math

import pytest
import torch
from torch import nn

import slimtune as st
from cases import shake
from slimtune.ops import circulant_product, skew_circulant_matrix, skew_product, toeplitz_product
from slimtune.structures.blockcirculant import choose_block

SHAPES = [(1, 1), (8, 8), (7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (12, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
f64 = torch.float64


def random(structure: st.Structure) -> st.Structure:
    with torch.no_grad():
        for p in structure.parameters():
            p.normal_()
    return structure


def every(shape):
    O, I = shape
    makes = [
        (st.Circulant, {}),
        (st.Circulant, {"hadamard": False}),
        (st.Toeplitz, {}),
        (st.ToeplitzProduct, {}),
        (st.LDR, {"terms": 1}),
        (st.LDR, {"terms": 3}),
        *((st.BlockCirculant, {"block": b}) for b in (1, 2, 3, 4) if b <= max(O, I)),
        (st.BlockCirculant, {"normalization": "published"}),
    ]
    return [random(cls(O, I, dtype=f64, **options)) for cls, options in makes]


@shapes
def test_every_way_to_the_same_matrix(shape):
    """Definition, fast matrix, FFT product, columns, and parameter gradients without g^T x; odd orders included."""
    torch.manual_seed(0)
    O, I = shape
    for s in every(shape):
        x, g = torch.randn(6, I, dtype=f64), torch.randn(6, O, dtype=f64)
        dW = s.dense()
        assert dW.shape == (O, I)
        torch.testing.assert_close(s.matrix(), dW)
        torch.testing.assert_close(s(x), x @ dW.T)
        torch.testing.assert_close(s(x.view(2, 3, I)), (x @ dW.T).view(2, 3, O))
        torch.testing.assert_close(s.columns(torch.arange(I)).T, dW)
        own = list(s.parameters())
        wanted = torch.autograd.grad((g * (x @ dW.T)).sum(), own)
        for y in (x @ s.matrix().T, s(x)):
            for a, b in zip(torch.autograd.grad((g * y).sum(), own), wanted, strict=True):
                torch.testing.assert_close(a, b)
        for a, b in zip(s.gradients(x, g) or wanted, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4), (4, 3)], ids=str)
def test_first_and_second_derivatives(shape):
    torch.manual_seed(0)
    for s in every(shape):
        x = torch.randn(2, shape[1], dtype=f64, requires_grad=True)

        def f(x, *_, s=s):
            return s(x)

        assert torch.autograd.gradcheck(f, (x, *s.parameters()))
        assert torch.autograd.gradgradcheck(f, (x, *s.parameters()))


@shapes
def test_zero_start_and_live_gradients(shape):
    """dW = 0 exactly; the factor at zero receives a gradient and the other one exactly none. (SURM's trained alpha at
    zero on top of b = 0 left every gradient zero for ever; there is no such option here.)"""
    torch.manual_seed(0)
    for s in every(shape):
        s.reset_parameters()
        for dW in (s.dense(), s.matrix(), s(torch.randn(3, shape[1], dtype=f64))):
            assert torch.count_nonzero(dW) == 0
        s.dense().mul(torch.randn(shape, dtype=f64)).sum().backward()
        for name, p in s.named_parameters():
            assert (p.grad.abs().max() > 0) == (name in s.fast_parameters), name


@pytest.mark.parametrize("n", [6, 7])
def test_circulant_algebra(n):
    torch.manual_seed(0)
    one = [random(st.Circulant(n, n, hadamard=False, dtype=f64)) for _ in range(2)]
    (a, A), (b, B) = ((s.c.detach(), s.dense().detach()) for s in one)
    shifts = torch.stack([torch.roll(a, j) for j in range(n)], 1)  # column j is the first one moved down by j
    assert torch.equal(A, shifts)
    torch.testing.assert_close(A @ B, st.Circulant.dense(_with_c(n, circulant_product(b, a, n))))
    both = st.Circulant(n, n, dtype=f64)
    with torch.no_grad():
        both.a.copy_(a), both.b.copy_(b)
    torch.testing.assert_close(both.dense(), A * B)  # entry by entry, not A B
    spectrum = torch.fft.fft(a)
    torch.testing.assert_close(torch.linalg.svdvals(A), spectrum.abs().sort(descending=True).values)
    v = torch.exp(2j * math.pi * torch.arange(n, dtype=f64) / n)
    torch.testing.assert_close(A.to(v.dtype) @ v, spectrum[1] * v)
    torch.testing.assert_close(A.sum(1), a.sum().expand(n))


def _with_c(n, c):
    s = st.Circulant(n, n, hadamard=False, dtype=f64)
    with torch.no_grad():
        s.c.copy_(c)
    return s


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (7, 7)], ids=str)
def test_toeplitz_equals_scipys(shape):
    linalg = pytest.importorskip("scipy.linalg")
    O, I = shape
    s = random(st.Toeplitz(O, I, dtype=f64))
    d = s.diagonals.detach()
    theirs = torch.from_numpy(linalg.toeplitz(d[:O].flip(0).numpy(), d[O - 1 :].numpy()))
    assert torch.equal(s.dense(), theirs)
    x = torch.randn(3, I, dtype=f64)
    torch.testing.assert_close(toeplitz_product(x, d, O), x @ theirs.T)


def test_toeplitz_product_by_hand():
    """T([1, 2, 0]) T([3, 0, 1]) of symmetric factors, multiplied out; the corner where a layer is not square."""
    dW = torch.tensor([[3.0, 6.0, 1.0], [8.0, 3.0, 8.0], [1.0, 6.0, 3.0]])
    for O, I in ((3, 3), (3, 2), (2, 3)):
        s = st.ToeplitzProduct(O, I)
        with torch.no_grad():
            s.b.copy_(torch.tensor([1.0, 2.0, 0.0])), s.a.copy_(torch.tensor([3.0, 0.0, 1.0]))
        assert torch.equal(s.dense(), dW[:O, :I])


@pytest.mark.parametrize("n", [2, 5, 8])
def test_skew_circulant_root_is_of_minus_one(n):
    """The published code's root is one of order n + 1, so that its products are not skew-circulant."""
    h = torch.randn(n, dtype=f64)
    S = torch.tensor([[h[i - j] if i >= j else -h[n + i - j] for j in range(n)] for i in range(n)], dtype=f64)
    assert torch.equal(skew_circulant_matrix(h, n, n), S)
    x = torch.randn(3, n, dtype=f64)
    torch.testing.assert_close(skew_product(x, h), x @ S.T)
    if n == 2:
        assert torch.equal(S, torch.stack([torch.stack([h[0], -h[1]]), torch.stack([h[1], h[0]])]))


@pytest.mark.parametrize("n", [4, 5])
def test_any_toeplitz_matrix_is_circulant_plus_skew_circulant(n):
    """C(g) + S(h) with g_i + h_i = c_i, g_i - h_i = r_(n-i) is LDR of two terms, C(g) S(e_0) + C(e_0) S(h)."""
    t = random(st.Toeplitz(n, n, dtype=f64))
    d = t.diagonals.detach()
    c, r = d[:n].flip(0), d[n - 1 :]
    other = torch.cat([c[:1], r[1:].flip(0)])
    g, h = (c + other) / 2, (c - other) / 2
    e = torch.zeros(n, dtype=f64)
    e[0] = 1
    s = st.LDR(n, n, terms=2, dtype=f64)
    with torch.no_grad():
        s.g.copy_(torch.stack([g, e])), s.h.copy_(torch.stack([e, h]))
    torch.testing.assert_close(s.dense(), t.dense())
    torch.testing.assert_close(s.matrix(), t.dense())


@pytest.mark.parametrize(("shape", "b"), [((6, 9), 3), ((8, 8), 8), ((4, 6), 1)], ids=str)
def test_block_circulant_is_the_published_formula(shape, b):
    O, I = shape
    s = random(st.BlockCirculant(O, I, block=b, normalization="published", dtype=f64))
    w = s.kernel.detach()
    loops = torch.zeros(O, I, dtype=f64)
    for i in range(O // b):
        for j in range(I // b):
            for k in range(b):
                for m in range(b):
                    loops[i * b + k, j * b + m] = w[i, j, (m - k) % b] / I
    torch.testing.assert_close(s.dense(), loops, rtol=1e-14, atol=0)
    x = torch.randn(2, I, dtype=f64)  # the paper's own evaluation, block by block
    blocks = torch.fft.fft(torch.fft.fft(w) * torch.fft.ifft(x.view(2, 1, -1, b))).real
    torch.testing.assert_close(s(x), blocks.sum(2).flatten(1) / I)


def test_block_circulant_spectrum_shift_and_rank():
    b = 6
    s = st.BlockCirculant(b, b, block=b, dtype=f64)
    with torch.no_grad():
        s.kernel.zero_()[0, 0, 2] = 1
    x = torch.arange(b, dtype=f64)
    torch.testing.assert_close(s(x), x.roll(-2))
    random(s)
    values = torch.fft.fft(s.kernel.detach().view(-1)).abs()
    torch.testing.assert_close(torch.linalg.svdvals(s.dense()), values.sort(descending=True).values)
    with torch.no_grad():  # two bins of the spectrum
        s.kernel.copy_(torch.cos(2 * math.pi * torch.arange(b, dtype=f64) / b).view(1, 1, b))
    assert torch.linalg.matrix_rank(s.dense()) == 2
    c = random(st.Circulant(b, b, hadamard=False, dtype=f64))
    with torch.no_grad():  # first row w against first column c
        s.kernel.copy_(c.c[(-torch.arange(b)) % b].view(1, 1, b))
    assert torch.equal(s.dense(), c.dense())


@pytest.mark.parametrize("block", [3, 4])
@pytest.mark.parametrize("rows", [2, 600])
def test_input_gradient_is_the_transpose(block, rows):
    """Through the layer, in the FFT path (few rows) and in the GEMM path (many). The paper's algorithm and PEFT return
    the reflected dx[l] = sum_k g[k] w[l + k], which this test tells apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    st.adapt(model, st.c3a(block=block), ["0"])
    structure = random(model[0].adapters["default"].structure)
    with torch.no_grad():
        model[0].weight.zero_()
    assert structure._weight_pays(rows) == (rows == 600)
    x = torch.randn(rows, 12, dtype=f64, requires_grad=True)
    g = torch.randn(rows, 12, dtype=f64)
    (dx,) = torch.autograd.grad(model(x), x, g)
    dW = structure.dense().detach()
    torch.testing.assert_close(dx, g @ dW)
    k = torch.arange(block)
    w = structure.kernel.detach()[..., (k + k[:, None]) % block]  # Hankel blocks
    reflected = w.permute(0, 2, 1, 3).reshape(12, 12)
    assert (dx - g @ reflected).norm() > 0.1 * dx.norm()


def test_several_adapters_add_up():
    """PEFT feeds the output of one C3A adapter to the next."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    x = torch.randn(3, 8, dtype=f64)
    base = model(x)
    total = torch.zeros(8, 8, dtype=f64)
    for name in ("one", "two"):
        st.adapt(model, st.c3a(block=4), ["0"], name=name)
        total = total + random(model[0].adapters[name].structure).dense().detach()
    st.activate(model, ["one", "two"])
    torch.testing.assert_close(model(x), base + x @ total.T)


@shapes
def test_normalizations_convert_exactly(shape):
    O, I = shape
    for name, other in (("unit", "published"), ("published", "unit")):
        s = random(st.BlockCirculant(O, I, normalization=name, dtype=f64))
        t = st.BlockCirculant(O, I, block=s.block, normalization=other, dtype=f64)
        with torch.no_grad():
            t.kernel.copy_(s.kernel_for(other))
        torch.testing.assert_close(t.dense(), s.dense(), rtol=1e-14, atol=0)
    assert st.BlockCirculant(O, I, normalization="published").factor() == 1 / I
    # an AdamW step of published rate r moves dW by r / I, a step of rate r / I on "unit" by as much
    steps = []
    for name, rate in (("published", 0.3), ("unit", 0.3 / I)):
        s = st.BlockCirculant(O, I, normalization=name, dtype=f64)
        s.reset_parameters()
        optimizer = torch.optim.AdamW(s.parameters(), lr=rate, eps=0, weight_decay=0)
        s.dense().mul(torch.arange(1.0, O * I + 1, dtype=f64).view(O, I)).sum().backward()
        optimizer.step()
        steps.append(s.dense().detach())
    torch.testing.assert_close(*steps)
    assert steps[0].abs().max() > 0


def test_choice_of_block_is_told():
    assert choose_block(512, 512) == 64
    assert choose_block(4096, 11008) == 256 and choose_block(768, 768) == 96
    prime = st.BlockCirculant(101, 97)
    assert prime.options()["block"] == prime.block == 16 and prime.kernel.shape == (7, 7, 16)
    assert "block 16" in repr(prime) and "padded to 112 x 112" in repr(prime)
    assert "padded" not in repr(st.BlockCirculant(64, 32, block=8))
    assert st.BlockCirculant(64, 32, block=8).kernel.numel() == 64 * 32 // 8
    for block in (0, 65, 2.0, True):
        with pytest.raises(st.StructureError, match="1, 2, 4, 8, 16, 32"):
            st.BlockCirculant(64, 32, block=block)
    with pytest.raises(st.StructureError, match="'unit' or 'published'"):
        st.BlockCirculant(4, 4, normalization="paper")


def test_published_counts():
    """RoBERTa-base, queries and values: 768/1 trains 18,432 numbers and 768/6 110,592; SURM 2 * 768 a layer."""
    assert 24 * st.BlockCirculant(768, 768, block=768, device="meta").kernel.numel() == 18_432
    assert 24 * st.BlockCirculant(768, 768, block=128, device="meta").kernel.numel() == 110_592
    for cls in (st.Circulant, st.ToeplitzProduct):
        assert 24 * sum(p.numel() for p in cls(768, 768, device="meta").parameters()) == 36_864
    assert sum(p.numel() for p in st.Toeplitz(30, 20, device="meta").parameters()) == 49
    assert sum(p.numel() for p in st.LDR(30, 20, terms=3, device="meta").parameters()) == 2 * 30 * 3


@pytest.mark.parametrize("cls", [st.Circulant, st.Toeplitz, st.ToeplitzProduct, st.LDR, st.BlockCirculant])
def test_transforms_hold_fp32_precision_at_width(cls):
    """1e-5 at 768, also for a bf16 input, whose FFTs run in fp32 and whose product is rounded once."""
    torch.manual_seed(0)
    s = random(cls(768, 640))
    x = torch.randn(4, 640)
    exact = x.double() @ s.dense().double().T
    with torch.no_grad():
        assert (s(x) - exact).norm() < 1e-5 * exact.norm()
        assert (s.matrix() - s.dense()).norm() < 1e-5 * s.dense().norm()
        half = x.bfloat16()
        exact = half.double() @ s.dense().double().T
        assert s(half).dtype == torch.bfloat16
        assert (s(half) - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("cls", [st.Circulant, st.Toeplitz, st.BlockCirculant])
def test_sixteen_bit_gradients(cls):
    torch.manual_seed(0)
    s = random(cls(48, 40))
    x, g = torch.randn(256, 40).bfloat16(), torch.randn(256, 48).bfloat16()
    dW = s.dense()
    wanted = torch.autograd.grad((g.double() * (x.double() @ dW.double().T)).sum(), list(s.parameters()))
    for a, b in zip(s.gradients(x, g), wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("recipe", [st.ldr, st.toeplitz])
def test_autocast_does_not_sum_along_diagonals_in_16_bit(recipe, kind, grad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128) if kind == "linear" else nn.Conv1d(96, 128, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    st.adapt(model, recipe(), ["0"])
    shake(model, 0.1)
    x = torch.randn((200, 96) if kind == "linear" else (1, 96, 200))
    with torch.no_grad():
        exact = model(x)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x).float()
    assert (rounded - exact).norm() < 0.004 * exact.norm()


def test_options_are_checked():
    for cls in (st.Circulant, st.ToeplitzProduct, st.LDR):
        with pytest.raises(st.StructureError, match="std"):
            cls(4, 4, std=0)
    for terms in (0, 1.5, True):
        with pytest.raises(st.StructureError, match="terms"):
            st.LDR(4, 4, terms=terms)
    with pytest.raises(st.StructureError, match="'product' or 'general'"):
        st.toeplitz(form="hankel")
