"""Is a result what it claims to be? Hashes, numbers, shapes, the base, and whether outputs change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.loading import Place, find, load_run, probe_inputs
from slimtune.errors import SlimtuneError

if TYPE_CHECKING:
    from slimtune.app.loading import LoadedRun

SAME = 1e-3  # relative difference allowed between merged and unmerged outputs, of the adapter's own effect
NOISE = 1e-5


@dataclass(frozen=True)
class Check:
    """One line of a verification; `ok` None is a note."""

    name: str
    ok: bool | None
    text: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAIL", None: "note"}[self.ok]
        return f"{mark:<4}  {self.name:<12}  {self.text}"


@dataclass
class VerifyReport:
    """All checks on one folder; `str()` is one line each and a last one with the sum."""

    path: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok is not False for check in self.checks)

    def add(self, name: str, ok: bool | None, text: str) -> bool | None:
        """Append a check and return its outcome."""
        self.checks.append(Check(name, ok, text))
        return ok

    def __str__(self) -> str:
        failed = sum(check.ok is False for check in self.checks)
        done = sum(check.ok is not None for check in self.checks)
        last = f"{self.path}: {failed} of {done} checks FAILED" if failed else f"{self.path}: {done} checks passed"
        return "\n".join([*map(str, self.checks), last])


def verify(path: str | Path, model: str | None = None) -> VerifyReport:
    """Check a run, an adapter or a model folder.

    Files against their hashes, tensors finite, shapes against the base, the base against its fingerprint, and on a
    fixed probe batch: outputs finite, changed by the adapter (no effect is a failure), and the same once merged.

    Args:
        model: the base model, if not the one that is recorded.

    Raises:
        ConfigError: not such a folder. Everything found wrong in it is a failed check, not an exception.
    """
    report = VerifyReport(str(path))
    run = Path(path).expanduser()
    if not (run / "config.yaml").is_file():
        place = find(path)
    elif any((run / name).is_dir() for name in ("adapter", "model")):
        place = find(path)
        run = run.resolve()
    else:
        report.add("result", False, "the run is not finished: it has no adapter/ and no model/")
        _checkpoints(report, run)
        return report
    (_adapter if place.kind == "adapter" else _model)(report, place, str(path), model)
    if place.run is not None and place.run.resolve() == run:
        _checkpoints(report, run)
    return report


def _adapter(report: VerifyReport, place: Place, path: str, model: str | None) -> None:
    import slimtune as st
    from slimtune import io
    from slimtune.app.inspect import changes
    from slimtune.app.merge import logits, relative

    try:
        contents = io.check_files(place.folder)
        manifest = io.read_manifest(place.folder)
        size = sum(map(len, contents.values()))
        if manifest is None:
            report.add("files", None, f"no slimtune.json: {len(contents)} files ({size:,} bytes) have no hashes")
        else:
            report.add("files", True, f"{len(contents)} files match their SHA-256 ({size:,} bytes)")
        tensors = io.read_tensors(contents[io.TENSORS], place.folder / io.TENSORS)
        count = sum(t.numel() for t in tensors.values())
        report.add("numbers", True, f"{len(tensors)} tensors with {count:,} numbers, all finite")
    except SlimtuneError as error:
        report.add("files", False, str(error))
        return
    loaded = _load(report, path, model)
    if loaded is None:
        return
    report.add("shapes", True, f"{len(loaded.layers)} layers fit {type(loaded.model).__name__}")
    _fingerprint(report, loaded, manifest)
    moved = changes(loaded.model, ranks=False)
    still = [name for name, (norm, _, _) in moved.items() if norm == 0]
    if moved and len(still) == len(moved):
        report.add("weights", False, f"no effect: none of the {len(moved)} layers changes its weight")
    elif still:
        report.add("weights", None, f"{len(still)} of {len(moved)} layers change nothing (first: {still[0]})")
    else:
        largest = max(moved, key=lambda name: moved[name][1])
        report.add("weights", True, f"{len(moved)} layers change; most: {largest}, |dW|/|W| = {moved[largest][1]:.2%}")
    try:
        inputs = probe_inputs(loaded)
        loaded.model.float()
        after = logits(loaded, inputs)
        with st.disabled(loaded.model):
            before = logits(loaded, inputs)
        with st.merged(loaded.model):
            merged = logits(loaded, inputs)
    except (SlimtuneError, RuntimeError, ValueError, TypeError, IndexError) as error:
        report.add("outputs", False, f"the model fails on the probe batch: {str(error).splitlines()[0]}")
        return
    if not report.add("finite", bool(after.isfinite().all()), f"outputs {tuple(after.shape)} on the probe batch"):
        return
    effect, gap = relative(after, before), relative(merged, after)
    report.add("effect", effect > 0, f"the adapter changes the outputs by {effect:.2%} of their norm")
    same = gap <= SAME * effect + NOISE
    report.add("merged", same, f"merged weights give the same outputs (relative difference {gap:.1e})")


def _load(report: VerifyReport, path: str, model: str | None) -> LoadedRun | None:
    try:
        return load_run(path, model)
    except SlimtuneError as error:
        report.add("loads", False, str(error))
        return None


def _fingerprint(report: VerifyReport, loaded: LoadedRun, manifest: dict[str, Any] | None) -> None:
    from slimtune import io

    recorded = ((manifest or {}).get("base") or {}).get("fingerprint")
    found = io.fingerprint(loaded.model, loaded.layers)
    if not recorded or not found:
        report.add("base", None, "no fingerprint to hold the base against")
    elif recorded == found:
        report.add("base", True, f"the base is the one trained on (fingerprint {found[:12]})")
    else:
        report.add("base", False, f"other base weights: fingerprint {found[:12]}, expected {recorded[:12]}")


def _model(report: VerifyReport, place: Place, path: str, model: str | None) -> None:
    from slimtune.app import checkpoint
    from slimtune.app.inspect import finite_tensors
    from slimtune.app.merge import RECORD, logits, relative, sample
    from slimtune.compressed import is_compressed, read_compressed

    folder = place.folder
    if is_compressed(folder):
        try:
            stored = read_compressed(folder)
            problems = stored.problems()
        except SlimtuneError as error:
            report.add("files", False, str(error))
            return
        told = f"every file matches its SHA-256; {len(stored.structures)} layers hold structures"
        if not report.add("files", not problems, "; ".join(problems) or told):
            return
    elif (folder / checkpoint.MANIFEST).is_file():
        problems = checkpoint.verify(folder)
        if not report.add("files", not problems, "; ".join(problems) or "every file matches its SHA-256"):
            return
    else:
        report.add("files", None, f"no {checkpoint.MANIFEST}: there are no hashes")
    try:
        count, bad = finite_tensors(folder)
    except SlimtuneError as error:
        report.add("numbers", False, str(error))
        return
    report.add("numbers", not bad, f"not finite: {', '.join(bad[:3])}" if bad else f"{count:,} numbers, all finite")
    if bad:
        return
    if not (folder / "config.json").is_file() and place.run is None:
        report.add("outputs", None, "the weights of a factory's module: load them with model_weights to run it")
        return
    loaded = _load(report, path, model)
    if loaded is None:
        return
    try:
        inputs = probe_inputs(loaded)
        loaded.model.float()
        after = logits(loaded, inputs)
    except (SlimtuneError, RuntimeError, ValueError, TypeError, IndexError) as error:
        report.add("outputs", False, f"the model fails on the probe batch: {str(error).splitlines()[0]}")
        return
    if not report.add("finite", bool(after.isfinite().all()), f"outputs {tuple(after.shape)} on the probe batch"):
        return
    if place.run is not None:
        base = load_run(path, adapted=False)
        base.model.float()
        effect = relative(after, logits(base, inputs))
        report.add("effect", effect > 0, f"training changed the outputs by {effect:.2%} of their norm")
    if (folder / RECORD).is_file():
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        expected, found = recorded["probe"], sample(after)
        scale = max(max(map(abs, expected)), 1e-30)
        gap = max((abs(a - b) for a, b in zip(expected, found, strict=False)), default=float("inf")) / scale
        same = len(expected) == len(found) and gap <= SAME
        report.add("merged", same, f"outputs are those measured at the merge (largest difference {gap:.1e})")
        report.add("rounding", None, f"the merge to {recorded['dtype']} lost {recorded['share']:.2e} of the change")


def _checkpoints(report: VerifyReport, run: Path) -> None:
    from slimtune.app import checkpoint

    for path in checkpoint.checkpoints(run):
        problems = checkpoint.verify(path)
        said = "; ".join(problems) or "every file matches its SHA-256"
        report.add("checkpoint", not problems, f"{path.name}: {said}")
