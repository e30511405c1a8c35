"""What inspect says of singular values, where they are known."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import slimtune as st
from slimtune.app.inspect import inspect, spectra_of_changes
from slimtune.app.spectra import Spectrum, cheapest, spectrum_of, together, worths
from slimtune.cli import app
from slimtune.errors import ConfigError
from slimtune.targets import hosts


def with_values(rows, columns, values, seed=0):
    """A matrix that has these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (12, 12)])
def test_values_are_those_of_the_matrix(shape):
    values = [5.0, 3.0, 1.0, 0.1, 1e-3, 1e-5]
    found = spectrum_of(with_values(*shape, values))
    assert found.shape == shape and len(found.values) == min(shape)
    assert found.values[:6] == pytest.approx(values, rel=1e-4)
    assert max(found.values[6:]) < 1e-6
    assert found.break_even == pytest.approx(math.prod(shape) / sum(shape))


def test_a_large_matrix_is_widened_part_by_part(monkeypatch):
    W = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    whole = spectrum_of(W).values
    monkeypatch.setattr("slimtune.app.spectra.CHUNK", 21)
    assert spectrum_of(W).values == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx(torch.linalg.svdvals(W.double()).tolist(), rel=1e-9)


def test_ranks_savings_and_errors():
    s = Spectrum((20, 30), (3.0, 2.0, 1.0, 0.0), 600)
    assert [s.cut(keep).rank for keep in (0.5, 0.64, 0.65, 0.93, 1.0)] == [1, 1, 2, 3, 3]  # the sheet's: 9, 13, 14 / 14
    cut = s.cut(0.9)
    assert (cut.rank, cut.parameters) == (2, 100)
    assert cut.saved == pytest.approx(1 - 100 / 600) and cut.error == pytest.approx(math.sqrt(1 / 14))
    assert s.ranks()["stable_rank"] == pytest.approx(14 / 9)
    p = [3 / 6, 2 / 6, 1 / 6]
    assert s.ranks()["effective_rank"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert Spectrum((4, 4), (1.0, 1.0, 1.0, 1.0), 16).at(2).saved is None  # 2 (4 + 4) = 4 * 4
    assert Spectrum((4, 4), (0.0,) * 4, 16).cut(0.9).error == 0


def spectra(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        rows, columns = (int(n) for n in torch.randint(6, 40, (2,), generator=generator))
        W = torch.randn(rows, columns, generator=generator) * torch.rand((), generator=generator)
        found.append(spectrum_of(W @ torch.diag(torch.logspace(0, -2, columns))))
    return found


def test_layers_together():
    found = spectra()
    at = together(found, 0.9)
    cuts = [s.cut(0.9) for s in found]
    squares = [sum(v * v for v in s.values) for s in found]
    lost = sum(cut.error**2 * square for cut, square in zip(cuts, squares, strict=True) if cut.saved is not None)
    assert at.error == pytest.approx(math.sqrt(lost / sum(squares)))
    kept = sum(s.parameters if cut.saved is None else cut.parameters for s, cut in zip(found, cuts, strict=True))
    assert at.parameters == kept and at.saved == pytest.approx(1 - kept / sum(s.parameters for s in found))


def test_the_cheapest_ranks_cost_least():
    """Where every layer is cut: error^2 + worth * numbers is the least over all ranks, tried one by one."""
    found = [Spectrum(s.shape, s.values, 10**6) for s in spectra()]
    total = sum(sum(v * v for v in s.values) for s in found)
    for worth in worths(found, 20):
        at = cheapest(found, worth)
        best = 0.0
        for s in found:
            tails = [sum(v * v for v in s.values[rank:]) for rank in range(len(s.values) + 1)]
            best += min(tails[rank] + worth * rank * sum(s.shape) for rank in range(1, len(s.values) + 1))
        assert at.error**2 * total + worth * at.parameters == pytest.approx(best, rel=1e-9)


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    tensors = {
        "layers.0.up.weight": with_values(16, 24, [4.0, 2.0, 1.0], 1).float(),
        "layers.1.up.weight": with_values(16, 24, [1.0] * 16, 2).bfloat16(),
        "conv.weight": with_values(8, 36, [2.0, 1.0], 3).float().view(8, 4, 3, 3),
        "layers.0.up.bias": torch.randn(16),
        "embed_tokens.weight": torch.randn(50, 24),
        "lm_head.weight": torch.randn(50, 24),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "row": torch.randn(1, 7),
    }
    save_file({key: t.contiguous() for key, t in tensors.items()}, place / "model.safetensors")
    return place


def test_a_model_folder_tensor_by_tensor(folder):
    assert all(row.spectrum is None for row in inspect(folder).rows)
    found = inspect(folder, spectrum=True)
    known = {row.name: row.spectrum for row in found.rows if row.spectrum is not None}
    assert set(known) == {"layers.0.up.weight", "layers.1.up.weight", "conv.weight"}
    assert known["layers.0.up.weight"].values[:4] == pytest.approx([4, 2, 1, 0], abs=1e-5)
    assert known["conv.weight"].shape == (8, 36) and known["conv.weight"].cut(0.99).rank == 2
    assert known["layers.1.up.weight"].ranks()["effective_rank"] == pytest.approx(16, rel=1e-3)
    facts = {row["name"]: row.get("spectrum") for row in json.loads(found.to_json())["rows"]}
    assert facts["layers.0.up.bias"] is None
    assert facts["layers.0.up.weight"]["energy"]["0.95"]["rank"] == 2
    assert facts["layers.0.up.weight"]["energy"]["0.95"]["error"] == pytest.approx(math.sqrt(1 / 21), rel=1e-4)
    assert facts["layers.0.up.weight"]["places"] == list(range(1, 17))
    line = next(text for text in str(found).splitlines() if text.startswith("layers.0.up.weight") and "16 x 24" in text)
    assert line.split()[1:] == ["16", "x", "24", "1.3", "2.6", "2", "2", "3", "9.6", "79,", "79,", "69"]
    assert "all at 90 %: 1,056 -> " in str(found)


def test_a_long_spectrum_is_thinned_out_in_json():
    facts = Spectrum((300, 400), tuple(float(300 - i) for i in range(300)), 120_000).facts()
    assert len(facts["places"]) == len(facts["singular_values"]) <= 256
    assert facts["places"][0] == 1 and facts["places"][-1] == 300
    assert facts["singular_values"] == [301.0 - place for place in facts["places"]]


def test_changes_of_adapters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Conv2d(3, 6, 3), nn.Linear(12, 12), nn.Linear(12, 9))
    st.adapt(model, st.lora(rank=3), ["0", "1"])
    st.adapt(model, st.dora(rank=2), ["2"], name="other")
    st.adapt(model, st.lora(rank=1), ["0"], name="second")
    for host in hosts(model).values():
        for adapter in host.adapters.values():
            nn.init.normal_(adapter.structure.B)
    st.activate(model, ["default", "other", "second"])
    found = spectra_of_changes(model)
    assert set(found) == {"0", "1", "2"}
    for name, rank in (("0", 4), ("1", 3)):
        host = hosts(model)[name]
        dW = sum(host.adapters[key].dense() for key in host.active_adapters).detach().double()
        assert found[name].values == pytest.approx(torch.linalg.svdvals(dW).tolist(), rel=1e-6, abs=1e-6)
        assert max(found[name].values[rank:]) < 1e-6 * found[name].values[0]  # no noise of a difference
    host = hosts(model)["2"]
    dW = (host.map().weight() - host.weight).detach().double()
    assert found["2"].values == pytest.approx(torch.linalg.svdvals(dW).tolist(), rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40))
    place = tmp_path_factory.mktemp("llama")
    model.save_pretrained(place / "model")
    return place / "model", model


def test_an_adapter_folder(llama, tmp_path):
    place, _ = llama
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place)
    st.adapt(model, st.lora(rank=2))
    for host in hosts(model).values():
        nn.init.normal_(host.adapters["default"].structure.B)
    st.save(model, tmp_path / "adapter", base=str(place))
    found = inspect(tmp_path / "adapter", spectrum=True)
    for row in found.rows:
        dW = hosts(model)[row.name].adapters["default"].dense().detach()
        assert row.spectrum.parameters == row.parameters == 2 * sum(dW.shape)
        assert row.spectrum.values == pytest.approx(torch.linalg.svdvals(dW).tolist(), abs=1e-5)
        assert row.spectrum.at(1).saved == pytest.approx(0.5) and row.spectrum.at(2).saved is None
    found.picture(tmp_path / "adapter.svg")
    assert "rank j" in (tmp_path / "adapter.svg").read_text()


def test_a_compressed_folder(llama, tmp_path):
    place, _ = llama
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place)
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    st.factorize(model, dict.fromkeys(names, 3))
    st.save_compressed(model, tmp_path / "small")
    found = inspect(tmp_path / "small", spectrum=True)
    rows = {row.name: row for row in found.rows}
    for name in names:
        row, W = rows[name], model.get_submodule(name).weight.detach()
        assert (row.method, row.rank, row.parameters) == ("LowRank", 3, 3 * (16 + 24))
        assert row.norm == pytest.approx(float(W.norm()), rel=1e-5)
        assert row.spectrum.values[:3] == pytest.approx(torch.linalg.svdvals(W)[:3].tolist(), rel=1e-5)
        assert row.spectrum.at(3).saved is None and row.spectrum.at(2).saved == pytest.approx(1 / 3)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert rows["model.layers.0.mlp.down_proj.weight"].spectrum.shape == (16, 24)


def test_on_the_command_line(folder, tmp_path):
    run = CliRunner()
    plain = run.invoke(app, ["inspect", str(folder)])
    assert plain.exit_code == 0 and "effective" not in plain.stdout
    told = run.invoke(app, ["inspect", str(folder), "--spectra"])
    assert told.stdout.startswith(plain.stdout) and "effective" in told.stdout
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"spectra{suffix}"
        assert run.invoke(app, ["inspect", str(folder), "--picture", str(file)]).exit_code == 0
        assert file.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "spectra.png", "spectra.svg"]
    assert "effective_rank" in run.invoke(app, ["inspect", str(folder), "--spectra", "--json"]).stdout


def test_pictures_that_cannot_be_drawn(folder, tmp_path):
    run = CliRunner()
    for name, words in (("a.gif", "ends with .png or .svg"), ("gone/a.png", "no such folder")):
        result = run.invoke(app, ["inspect", str(tmp_path / "nowhere"), "--picture", str(tmp_path / name)])
        assert isinstance(result.exception, ConfigError) and words in str(result.exception)
    with pytest.raises(ConfigError, match="no matrix whose singular values"):
        inspect(folder).picture(tmp_path / "a.png")
