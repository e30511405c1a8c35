"""LoRAE: its invariants, what its generators draw, and a test for each fault of the published code."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimtune as st

sys.path.insert(0, str(Path(__file__).parents[1]))

N = 6
PENALTIES = ["nuclear", "ratio", "batch"]


def small(layers=1, start="orthogonal", seed=0, bias=True):
    """8 -> 16 -> 6 -> M -> 16 -> 8 in fp64."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, N, bias=bias))
    decoder = nn.Sequential(nn.Linear(N, 16), nn.ReLU(), nn.Linear(16, 8))
    return st.LoRAE(encoder, decoder, N, layers, start).double()


def data(count=40, seed=1):
    return torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(rank):
    """A model whose M has this rank, and M."""
    model = small()
    U, s, Vh = torch.linalg.svd(torch.randn(N, N, dtype=torch.float64))
    with torch.no_grad():
        model.maps[0].weight.copy_((U[:, :rank] * s[:rank]) @ Vh[:rank])
    return model, model.matrix().detach()


# the model


def test_the_latent_is_after_the_maps():
    """The published code classifies E(x), from before M."""
    model, x = small(layers=3), data()
    M1, M2, M3 = model.matrices
    wanted = model.encoder(x) @ (M3 @ M2 @ M1).T
    torch.testing.assert_close(model.encode(x), wanted)
    torch.testing.assert_close(model.matrix(), M3 @ M2 @ M1)
    torch.testing.assert_close(model(x), model.decoder(wanted))


def test_without_layers_and_penalty_it_is_the_plain_autoencoder_to_the_bit():
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(a, 12), nn.ReLU(), nn.Linear(12, b)) for a, b in ((8, N), (N, 8))))
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(a, 12), nn.ReLU(), nn.Linear(12, b)) for a, b in ((8, N), (N, 8))]
    model = st.LoRAE(*parts, N, layers=0)
    x, found = data().float(), []
    for one, loss in (
        (plain, lambda: F.mse_loss(plain(x), x)),
        (model, lambda: st.lorae_loss(model, x, weight=0).loss),
    ):
        optimizer = torch.optim.Adam(one.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        found.append([p.detach() for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_without_layers_every_penalty_and_the_report_work(penalty):
    """The published `-l 0` crashes: it reads the first layer unconditionally."""
    model, x = small(layers=0), data()
    found = st.lorae_loss(model, x, 0.1, penalty)
    found.loss.backward()
    assert (found.penalty == 0) == (penalty != "batch")
    report = st.latent_report(model, [x])
    assert report.matrix_rank == N and report.penalties == {"nuclear": 0, "ratio": 0}


def test_starts():
    eye = torch.eye(N, dtype=torch.float64)
    M = small(start="orthogonal").matrix()
    torch.testing.assert_close(M @ M.T, eye, rtol=0, atol=1e-6)
    assert torch.equal(small(start="identity").matrix(), eye)
    assert small(start="linear").matrix().abs().max() <= N**-0.5


@pytest.mark.parametrize("start", ["orthogonal", "identity", "linear"])
def test_the_encoder_gets_a_gradient_at_the_start(start):
    """Under M = 0, as in a public implementation, it gets none."""
    gradients = []
    for zeroed in (False, True):
        model = small(start=start)
        if zeroed:
            nn.init.zeros_(model.maps[0].weight)
        st.lorae_loss(model, data()).loss.backward()
        gradients.append(model.encoder[0].weight.grad.abs().max().item())
    assert gradients[0] > 0 and gradients[1] == 0
    with pytest.raises(st.StructureError, match=r"no start 'zeros'.*no gradient"):
        small(start="zeros")


def test_sizes_of_the_papers_models():
    mnist = st.lorae_mnist()
    counts = [
        *(16 * a * b + b for a, b in ((1, 32), (32, 64), (64, 128), (128, 256))),
        1024 * 128 + 128,
        128 * 128,
        128 * 8192 + 8192,
        *(16 * a * b + b for a, b in ((128, 64), (64, 32))),
        32 + 1,
    ]
    assert sum(p.numel() for p in mnist.parameters()) == sum(counts)
    with torch.device("meta"):
        faces, shapes = st.lorae_64(), st.lorae_shapes()
        assert faces(torch.empty(2, 3, 64, 64)).shape == (2, 3, 64, 64)
        assert shapes(torch.empty(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert faces.encoder[-1].weight.shape == (256, 16384) and isinstance(faces.decoder[2], nn.ConvTranspose2d)
    assert faces.decoder[0].out_features == 64 * 1024 and faces.decoder[2].in_channels == 1024
    assert shapes.encoder[-2].weight.shape == (32, 256, 2, 2)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: small(layers=-1), "layers must be a whole number"),
        (lambda: st.LoRAE(nn.Identity(), nn.Identity(), 0), "latent must be a whole number"),
        (lambda: st.LoRAE(nn.Linear(8, 5), nn.Linear(6, 8), 6)(torch.zeros(2, 8)), r"\(batch, 6\), got \(2, 5\)"),
        (lambda: st.lorae_mnist(output="relu"), "no output 'relu'"),
        (lambda: st.lorae_loss(small(), data(), penalty="l1"), "no penalty 'l1'; there are nuclear, ratio, batch"),
        (lambda: st.lorae_loss(small(), data(), weight=-1.0), "weight must be"),
        (lambda: st.lorae_loss(small(), data(), target=data()[:3]), "images' shape"),
    ],
)
def test_bad_options_are_refused(build, said):
    with pytest.raises(st.StructureError, match=said):
        build()


# the loss


def test_every_layer_gets_the_nuclear_subgradient():
    """U V^T on each of l layers; the published code penalises the first one only."""
    model, x = small(layers=3), data()
    gradients = []
    for weight in (0.0, 0.3):
        model.zero_grad()
        st.lorae_loss(model, x, weight).loss.backward()
        gradients.append([W.grad.clone() for W in model.matrices])
    for M, without, with_penalty in zip(model.matrices, *gradients, strict=True):
        U, _, Vh = torch.linalg.svd(M.detach())
        torch.testing.assert_close(with_penalty - without, 0.3 * U @ Vh, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_are_their_formulas_and_apart_from_the_error(penalty):
    """The published code prints the whole loss as the reconstruction's."""
    model, x = small(layers=2), data()
    found = st.lorae_loss(model, x, 0.5, penalty)
    z = model.encode(x)
    shares = [torch.linalg.svdvals(M).sum() / M.square().sum().sqrt() for M in (*model.matrices, z - z.mean(0))]
    wanted = {
        "nuclear": sum(torch.linalg.svdvals(M).sum() for M in model.matrices),
        "ratio": shares[0] + shares[1],
        "batch": shares[2],
    }[penalty]
    torch.testing.assert_close(found.penalty, wanted)
    assert torch.equal(found.error, F.mse_loss(model(x), x))
    assert torch.equal(found.loss, found.error + 0.5 * found.penalty)


def test_scale_escapes_the_nuclear_penalty_alone():
    """E -> c E and M -> M / c change no output and divide |M|_* by c; c = 1024 does so without rounding."""
    model, x = small(), data()
    before = {penalty: st.lorae_loss(model, x, 1.0, penalty) for penalty in PENALTIES}
    with torch.no_grad():
        model.encoder[2].weight.mul_(1024)
        model.encoder[2].bias.mul_(1024)
        model.maps[0].weight.div_(1024)
    after = {penalty: st.lorae_loss(model, x, 1.0, penalty) for penalty in PENALTIES}
    for penalty in PENALTIES:
        assert torch.equal(before[penalty].error, after[penalty].error)
        torch.testing.assert_close(
            after[penalty].penalty, before[penalty].penalty / (1024 if penalty == "nuclear" else 1), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_of_zero_have_finite_gradients(penalty):
    model, x = small(), data()
    nn.init.zeros_(model.maps[0].weight)
    st.lorae_loss(model, x, 1.0, penalty).loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("penalty", "form"), [("nuclear", "subgradient"), ("ratio", "ratio")])
def test_the_controller_is_the_same_penalty(penalty, form):
    trained = []
    for controlled in (False, True):
        model, x = small(layers=2), data()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if controlled:
            st.attach(st.NuclearNorm(["maps.*"], 0.1, form=form), model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            st.lorae_loss(model, x, 0 if controlled else 0.1, penalty).loss.backward()
            optimizer.step()
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-8, atol=1e-10)


def test_the_penalty_lowers_the_rank_of_the_latent():
    """The specification's toy: a random tanh network of 5 Gaussians, N = 16; lambda = 1e-3 against none."""
    torch.manual_seed(0)
    mix = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 32)).requires_grad_(False)
    x = mix(2 * torch.randn(1000, 5))
    reports = []
    for weight in (0.0, 1e-3):
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
        model = st.LoRAE(encoder, decoder, 16)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(20):
            for rows in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                st.lorae_loss(model, x[rows], weight).loss.backward()
                optimizer.step()
        reports.append(st.latent_report(model, x.split(500)))
    plain, low = reports
    assert low.above[1e-4] < plain.above[1e-4]
    assert low.matrix_effective_rank < 0.7 * plain.matrix_effective_rank
    assert low.encoder_scale > plain.encoder_scale  # the loophole, used
    assert plain.matrix_rank == low.matrix_rank == 16  # a sub-gradient leaves no zeros


# folding


def conv(latent, **options):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, latent, 2, **options), nn.Flatten())


MODELS = {
    "linear": (lambda layers: st.LoRAE(nn.Linear(8, N), nn.Linear(N, 8), N, layers), (8,)),
    "nested": (lambda layers: small(layers), (8,)),
    "mnist": (lambda layers: st.lorae_mnist(N, layers, width=2), (1, 32, 32)),
    "64": (lambda layers: st.lorae_64(N, layers, width=2), (3, 64, 64)),
    "convolution": (lambda layers: st.lorae_shapes(N, layers, width=2), (3, 32, 32)),
}


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_folding_leaves_outputs_as_they_are(kind, layers):
    build, shape = MODELS[kind]
    torch.manual_seed(0)
    model = build(layers).double()
    x = torch.rand(3, *shape, dtype=torch.float64)
    z, y, held = model.encode(x), model(x), sum(p.numel() for p in model.parameters())
    report = model.fold(batches=[x])
    torch.testing.assert_close(model.encode(x), z, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-13)
    assert (model.layers, report.rank) == (0, N)
    assert sum(p.numel() for p in model.parameters()) == held - layers * N * N
    assert report.error_after == pytest.approx(report.error_before, rel=1e-12)
    assert report.error_before == pytest.approx(F.mse_loss(y, x).item())


def test_folding_with_a_rank_cuts_the_matrix():
    model, x = small(layers=2), data()
    raw, M, before = model.encoder(x), model.matrix().detach(), st.reconstruction_error(model, [x])
    U, s, Vh = torch.linalg.svd(M)
    report = model.fold(2, batches=[x[:7], x[7:]])
    torch.testing.assert_close(model.encode(x), raw @ ((U[:, :2] * s[:2]) @ Vh[:2]).T)
    assert report == st.FoldReport(2, pytest.approx(before), pytest.approx(F.mse_loss(model(x), x).item()))


@pytest.mark.parametrize("count", [4, 40])
def test_folding_onto_principal_directions_changes_z_least(count):
    """By the tail of the eigenvalues of cov(z) (Eckart-Young), and around the mean."""
    model, x = small(layers=2), data(count)
    z = model.encode(x).detach()
    tail = torch.linalg.svdvals(z - z.mean(0)).square()[2:].sum()
    model.fold(2, "pca", [x])
    cut = model.encode(x).detach()
    torch.testing.assert_close((cut - z).square().sum(), tail)
    torch.testing.assert_close(cut.mean(0), z.mean(0))
    assert int(torch.linalg.matrix_rank(cut - cut.mean(0))) == 2


def test_folding_by_name():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.body = nn.Linear(16, N), nn.Linear(8, 16)

        def forward(self, x):
            return self.out(F.relu(self.body(x)))

    model, x = st.LoRAE(Encoder(), nn.Linear(N, 8), N).double(), data()
    with pytest.raises(st.StructureError, match=r"encoder is a Encoder.*into="):
        model.fold()
    z = model.encode(x)
    model.fold(into="out")
    torch.testing.assert_close(model.encode(x), z)


@pytest.mark.parametrize(
    ("build", "arguments", "error", "said"),
    [
        (small, {"rank": 0}, st.StructureError, "rank must be in 1 to 6, got 0"),
        (small, {"rank": 7}, st.StructureError, "rank must be in 1 to 6, got 7"),
        (small, {"rank": 2, "by": "svd"}, st.StructureError, "no cut 'svd'; there are matrix, pca"),
        (small, {"rank": 2, "by": "pca"}, st.DataError, "needs batches"),
        (small, {"batches": [torch.zeros(0, 8)]}, st.DataError, "got none"),
        (small, {"into": "7"}, st.StructureError, "no module '7'"),
        (small, {"into": "0"}, st.StructureError, "encoder.0 has 16 outputs, and the latent has 6"),
        (
            lambda: small(bias=False),
            {"rank": 2, "by": "pca", "batches": [data() + 1]},
            st.StructureError,
            "needs a bias in encoder.2",
        ),
        (
            lambda: st.LoRAE(nn.Sequential(nn.Linear(8, N), nn.ReLU()), nn.Linear(N, 8), N),
            {},
            st.StructureError,
            "encoder.1 is a ReLU",
        ),
        (lambda: st.LoRAE(conv(N, groups=2), nn.Linear(N, 8), N), {}, st.StructureError, "ungrouped Conv2d"),
    ],
)
def test_folds_that_cannot_be_are_refused_and_change_nothing(build, arguments, error, said):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=said):
        model.fold(**arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_folding_refuses_a_layer_that_holds_a_structure():
    model = small()
    st.factorize(model, {"encoder.2": 2}, guard=False)
    with pytest.raises(st.StructureError, match=r"encoder\.2 is a .*Linear"):
        model.fold()


# generation


@pytest.mark.parametrize("rank", [1, 3, N])
def test_samples_stay_where_the_latents_are(rank):
    """rank cov(z) <= rank M, and draws lie in range(M) + mean though the covariance is singular."""
    model, M = low_rank(rank)
    z = model.encode(data(400)).detach()
    gaussian = st.LatentGaussian.fit(z)
    assert gaussian.rank <= rank
    torch.testing.assert_close(gaussian.covariance(), torch.cov(z.T), rtol=1e-9, atol=1e-10)
    U = torch.linalg.svd(M).U[:, :rank]
    for fitted in (gaussian, st.LatentMixture.fit(z, components=3)):
        centred = fitted.sample(50, torch.Generator().manual_seed(0), torch.float64) - z.mean(0)
        assert (centred - centred @ U @ U.T).abs().max() < 1e-9 * centred.abs().max()
    if rank < N:
        with pytest.raises(torch.linalg.LinAlgError):  # what the eigenvectors are for
            torch.linalg.cholesky(torch.cov(z.T) - 1e-12 * torch.eye(N))


def test_gaussian_draws_have_the_mean_and_covariance():
    z = data(500) @ torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 5
    gaussian = st.LatentGaussian.fit(z)
    drawn = gaussian.sample(40_000, torch.Generator().manual_seed(0), torch.float64)
    scale = torch.cov(z.T).abs().max()
    assert (drawn.mean(0) - z.mean(0)).abs().max() < 0.03 * scale.sqrt()
    assert (torch.cov(drawn.T) - torch.cov(z.T)).abs().max() < 0.03 * scale


def test_mixture_finds_planted_clusters():
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 1.0], [0.0, 9.0, 2.0]], dtype=torch.float64)
    k = torch.tensor([0] * 100 + [1] * 200 + [2] * 300)
    z = 1e3 * (centres[k] + torch.randn(600, 3, generator=draw, dtype=torch.float64))
    z = torch.cat([z, z[:, :1] + z[:, 1:2]], 1)  # a direction without variance
    mixture = st.LatentMixture.fit(z, components=3)
    order = mixture.weights.argsort()
    found = mixture.base.at(mixture.means[order]) / 1e3
    torch.testing.assert_close(found[:, :3], centres, rtol=0, atol=0.3)
    torch.testing.assert_close(mixture.weights[order], torch.tensor([1, 2, 3]).double() / 6, rtol=0, atol=0.01)
    drawn = mixture.sample(30_000, draw, torch.float64)
    assert (drawn.mean(0) - z.mean(0)).abs().max() < 0.03 * z.std()
    assert (torch.cov(drawn.T) - torch.cov(z.T)).abs().max() < 0.03 * z.var()
    assert (drawn[:, 3] - drawn[:, 0] - drawn[:, 1]).abs().max() < 1e-6


def test_generators_repeat_with_their_seed():
    z = data(100)
    for fitted in (st.LatentGaussian.fit(z), st.LatentMixture.fit(z, components=2)):
        first, second = (fitted.sample(5, torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(first, second) and first.dtype == torch.float32


def test_grid_spans_the_two_largest_directions():
    gaussian = st.LatentGaussian.fit(data(300) * torch.tensor([1, 1, 9, 1, 5, 1, 1, 1]).double())
    grid = gaussian.grid(steps=5, sigmas=2.0)
    torch.testing.assert_close(grid[2, 2], gaussian.mean)
    along = grid[4, 2] - grid[0, 2]
    torch.testing.assert_close(along.norm(), 4 * gaussian.values[0].sqrt())
    assert along.abs().argmax() == 2 and (grid[2, 4] - grid[2, 0]).abs().argmax() == 4
    with pytest.raises(st.StructureError, match="two directions, and the covariance has 1"):
        st.LatentGaussian.fit(torch.arange(4.0)[:, None] * torch.ones(3)).grid()


def test_mixture_without_scikit_learn_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(st.SlimtuneError, match="pip install scikit-learn"):
        st.LatentMixture.fit(data())


@pytest.mark.parametrize("kind", [st.LatentGaussian, st.LatentMixture])
@pytest.mark.parametrize(
    ("z", "said"),
    [
        (torch.zeros(1, 3), r"got \(1, 3\)"),
        (torch.zeros(3), r"got \(3,\)"),
        (torch.tensor([[0.0], [float("nan")]]), "1 values are not finite"),
    ],
)
def test_generators_refuse_what_has_no_covariance(kind, z, said):
    with pytest.raises(st.DataError, match=said):
        kind.fit(z)


def test_mixture_refuses_latents_that_are_all_alike():
    with pytest.raises(st.DataError, match="9 samples in 0 directions"):
        st.LatentMixture.fit(torch.ones(9, 3))


def test_frechet_distance_is_its_formula():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = data(60), 2 * data(50, seed=5) @ torch.randn(8, 8, dtype=torch.float64) + 1
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(linalg.sqrtm((A @ B).numpy()).real)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + (A + B - 2 * root).trace()
    assert st.frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-9)
    assert st.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    singular = torch.cat([a, a[:, :1]], 1)  # sqrtm fails or warns here
    assert st.frechet_distance(singular, singular) == pytest.approx(0, abs=1e-10)
    with pytest.raises(st.DataError, match="8 and 9"):
        st.frechet_distance(a, singular)


def test_pixels_are_clipped_before_the_cast():
    """The published code casts tanh outputs as they are: slightly negative pixels become white."""
    assert st.to_pixels(torch.tensor([-1.0, -0.004, 0.0, 0.25, 1.0, 1.004])).tolist() == [0, 0, 0, 64, 255, 255]
    with pytest.raises(st.DataError, match="1 values"):
        st.to_pixels(torch.tensor([0.0, float("nan")]))


# the report


def test_report_counts_what_is_there():
    scales = torch.tensor([1.0, 0.5, 0.05, 0.001, 0.0, 0.0], dtype=torch.float64)
    model = st.LoRAE(nn.Identity(), nn.Identity(), N, start="identity").double()
    with torch.no_grad():
        model.maps[0].weight.copy_(torch.diag(scales))
    Q = torch.linalg.qr(data(50)[:, :N] - data(50)[:, :N].mean(0)).Q  # centred, orthonormal columns
    report = st.latent_report(model, [Q[:20], Q[20:]], matrix_threshold=0.01)
    torch.testing.assert_close(report.eigenvalues, scales.square().tolist(), rtol=1e-9, atol=1e-12)
    assert report.above == {1e-2: 2, 1e-4: 3} and report.matrix_rank == 3
    p = scales[:4] / scales.sum()
    assert report.matrix_effective_rank == pytest.approx((-(p * p.log()).sum()).exp().item())
    assert report.latent_rank == pytest.approx(report.matrix_effective_rank)
    assert report.penalties["nuclear"] == pytest.approx(1.551)
    assert report.encoder_scale == pytest.approx(Q.std().item())
    assert report.as_dict()["above"] == {"0.01": 2, "0.0001": 3}


def test_evaluation_leaves_the_modes_as_they_were():
    encoder = nn.Sequential(nn.Linear(8, N), nn.Dropout(0.5))
    model = st.LoRAE(encoder, nn.Linear(N, 8), N).double()
    encoder[1].eval()
    modes = [m.training for m in model.modules()]
    x = data()
    assert st.reconstruction_error(model, [x]) == st.reconstruction_error(model, [x[:5], x[5:]])
    assert [m.training for m in model.modules()] == modes


# the example and the benchmark


def test_shapes_are_the_specified_ones():
    from examples.lorae import shapes

    images = shapes(500, seed=0)
    assert images.shape == (500, 3, 32, 32) and torch.equal(images, shapes(500, seed=0))
    full = 0
    for image in images:
        inside = image.sum(0) > 0
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        top, bottom, left, right = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
        # sizes and centres, clipped by the frame on the right and below only (24 + 8 = 32)
        size, centre = (bottom - top) // 2 if bottom < 31 else None, (top + bottom) // 2
        if size is not None and right < 31:
            assert 3 <= size <= 8 and 8 <= centre <= 24 and right - left == bottom - top
        assert (image[:, inside] == image[:, inside][:, :1]).all()  # one colour
        full += bool(inside[top : bottom + 1, left : right + 1].all())
    assert 200 < full < 300  # squares


def test_heads_see_what_the_maps_leave():
    """With M = 0 nothing can be told from z; from E(x), which the published code classifies, everything could."""
    from examples.lorae import few_labels

    labels = torch.arange(10).repeat(6)
    x = F.one_hot(labels, 10).float()
    model = st.LoRAE(nn.Identity(), nn.Identity(), 10, start="identity")
    assert few_labels(model, (x, labels), (x, labels), 5, seed=0) == 1.0
    nn.init.zeros_(model.maps[0].weight)
    assert few_labels(model, (x, labels), (x, labels), 5, seed=0) == pytest.approx(0.1)


def test_generators_are_fitted_on_training_images_and_judged_by_test_images(monkeypatch):
    """The published code takes the training images for both."""
    from bench import lorae as bench

    torch.manual_seed(0)
    model = st.lorae_mnist(4, width=2)
    train, test = (torch.rand(30, 1, 32, 32), torch.arange(30) % 10), (torch.rand(20, 1, 32, 32), torch.arange(20) % 10)
    judged, fitted = [], []
    for kind in (st.LatentGaussian, st.LatentMixture):
        own = kind.fit
        monkeypatch.setattr(kind, "fit", lambda z, own=own, **options: fitted.append(z) or own(z, **options))
    monkeypatch.setattr(bench, "PER_CLASS", (1,))
    monkeypatch.setattr(bench, "few_labels", lambda *_: 0.0)
    row = bench.measured(model, train, test, lambda x: judged.append(x) or x.flatten(1)[:, :5], seed=0)
    assert torch.equal(judged[0], test[0]) and all(len(x) == len(test[0]) for x in judged)
    with torch.no_grad():
        z = model.encode(train[0])
    assert all(torch.equal(seen.float(), z) for seen in fitted[:2])
    assert set(row["distance"]) == {"Gaussian", "mixture", "reconstruction"}
