"""The audit as a whole: verdicts, reports by hash, signatures, revocation, SARIF, and the arithmetic of the weight gate."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afina.adapters.attach import detach
from afina.adapters.saving import save_adapter
from afina.audit import update_statistics as statistics
from afina.audit.audit import audit
from afina.audit.calibration import (
    MIN_POPULATION,
    RIDGE,
    Calibration,
    PopulationKey,
    calibrate,
    conformal,
    logistic,
)
from afina.audit.file_gate import MANIFEST, SIGNATURE
from afina.audit.provenance import revoke, sign, verify
from afina.audit.report import Gate, run_gate
from afina.audit.sarif import as_sarif
from afina.cli.main import run as cli
from afina.errors import AuditError
from afina.io import admission
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.composition import hash_adapter_folder
from afina.merging.combine import combine
from afina.merging.merge_into_base import merge
from afina.models.loading import load_base
from helpers import put


@pytest.fixture(autouse=True)
def _own_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))


@pytest.fixture(scope="session")
def originals(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two loras and a dora on the tiny base."""
    base, folder = load_base(str(tiny)), tmp_path_factory.mktemp("adapters")
    for number, method in enumerate(["lora", "lora", "dora"]):
        made = put(base, method=method, rank=4, seed=number)
        save_adapter(made, base, folder / str(number))
        detach(base.model, made)
    return folder


@pytest.fixture
def adapter(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "0", tmp_path / "adapter"))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A private key, its public one, and somebody else's public one."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
        )
        public = key.public_key().public_bytes(
            form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder / "mine.pem", folder / "mine.pub", folder / "other.pub"


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


# ---- verdicts and reports


def test_without_calibration_nothing_is_claimed(adapter: Path, tiny: Path) -> None:
    report = audit(adapter, base=str(tiny), time_budget_seconds=0)
    assert report["verdict"] == "review" and report["exit_status"] == 3
    assert report["hash"] == hash_adapter_folder(adapter)
    assert {"no-calibration", "not-run"} <= {finding["rule"] for finding in report["findings"]}
    assert json.loads(Path(report["kept"]).read_text())["verdict"] == "review"
    assert audit(adapter, base=str(tiny), time_budget_seconds=0, strict=True)["verdict"] == "block"


def test_a_blocked_file_gate_ends_it(adapter: Path) -> None:
    (adapter / "evil.py").write_text("raise SystemExit('loaded')")
    report = audit(adapter)
    assert (report["verdict"], report["hash"], report["exit_status"]) == ("block", None, 4)
    assert [gate["name"] for gate in report["gates"]] == ["files"]
    assert not (admission.audits_folder() / "log.jsonl").exists()


def test_what_is_changed_in_the_story_blocks(adapter: Path) -> None:
    flip(adapter / WEIGHTS_FILE, -1)
    assert "hash-differs" in {
        finding["rule"] for finding in audit(adapter, time_budget_seconds=0)["findings"]
    }


def test_another_base_blocks(adapter: Path, tied: Path) -> None:
    assert "other-base" in {
        f["rule"] for f in audit(adapter, base=str(tied), time_budget_seconds=0)["findings"]
    }


def test_a_gate_that_breaks_is_a_finding() -> None:
    for error, level in (
        (ValueError("x"), "block"),
        (MemoryError(), "review"),
        (AuditError("bad"), "block"),
    ):
        gate = Gate("weights")

        def fail(error: BaseException = error) -> None:
            raise error

        run_gate(gate, fail, level)  # type: ignore[arg-type]
        assert [finding.level for finding in gate.findings] == [level]


def test_a_broken_weight_gate_never_allows(
    adapter: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.audit.weight_gate.measure", lambda *_: 1 / 0)
    report = audit(adapter, base=str(tiny), time_budget_seconds=0)
    assert report["verdict"] == "review" and "gate-error" in {
        finding["rule"] for finding in report["findings"]
    }


def test_a_composition_is_looked_at_in_its_parts(
    originals: Path, tmp_path: Path, tiny: Path
) -> None:
    made = combine([originals / "0", originals / "2"], output_dir=tmp_path / "sum", base=str(tiny))
    report = audit(tmp_path / "sum", base=str(tiny), time_budget_seconds=0)
    assert report["hash"] == made["hash"] and len(report["parts"]) == 2
    shutil.copy(
        originals / "1" / WEIGHTS_FILE, next((tmp_path / "sum" / "parts").iterdir()) / WEIGHTS_FILE
    )
    assert audit(tmp_path / "sum", base=str(tiny), time_budget_seconds=0)["verdict"] == "block"


def test_a_part_outside_its_composition_blocks(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "sum").mkdir()
    line = {"path": f"../{originals.name}/0", "hash": "0" * 64, "weight": 1.0}
    (tmp_path / "sum" / METADATA_FILE).write_text(
        json.dumps({"format_version": 1, "composition": [line]})
    )
    assert audit(tmp_path / "sum")["verdict"] == "block"


# ---- who may use it


def test_merge_and_combine_demand_a_report(
    adapter: Path, originals: Path, tiny: Path, tmp_path: Path
) -> None:
    for call in (
        lambda: merge(adapter, output_dir=tmp_path / "m", require_audit=True),
        lambda: combine([adapter], output_dir=tmp_path / "c", require_audit=True),
    ):
        with pytest.raises(AuditError, match="not been audited"):
            call()
    audit(adapter, base=str(tiny), time_budget_seconds=0)
    with pytest.raises(AuditError, match="verdict is review"):
        combine([adapter], output_dir=tmp_path / "c", require_audit=True)
    report = audit(
        adapter,
        base=str(tiny),
        time_budget_seconds=0,
        accept="ana: read the rows it was trained on",
    )
    assert report["exit_status"] == 0
    assert admission.approved_report(hash_adapter_folder(adapter))["accepted"].startswith("ana")
    assert combine([adapter], output_dir=tmp_path / "c", require_audit=True)["kind"] == "adapter"
    assert merge(adapter, output_dir=tmp_path / "m", require_audit=True)["greedy_agreement"] == 1.0
    with pytest.raises(
        AuditError, match="not been audited"
    ):  # the result is another adapter: it needs a report of its own
        admission.approved_report(hash_adapter_folder(tmp_path / "c"))


def test_a_block_cannot_be_accepted(adapter: Path, tiny: Path) -> None:
    report = audit(
        adapter, base=str(tiny), time_budget_seconds=0, strict=True, accept="somebody: let me"
    )
    assert report["verdict"] == "block" and report["exit_status"] == 4
    with pytest.raises(AuditError, match="verdict is block"):
        admission.approved_report(hash_adapter_folder(adapter))


def test_revoked_is_refused_whatever_the_report(adapter: Path, tiny: Path) -> None:
    audit(adapter, base=str(tiny), time_budget_seconds=0, accept="ana: fine")
    told = revoke(str(adapter), reason="its maker was robbed")
    assert told["hash"] == hash_adapter_folder(adapter)
    with pytest.raises(AuditError, match="revoked"):
        admission.approved_report(hash_adapter_folder(adapter))
    report = audit(adapter, base=str(tiny), time_budget_seconds=0)
    assert report["verdict"] == "block" and "revoked" in {
        finding["rule"] for finding in report["findings"]
    }
    with pytest.raises(AuditError, match="no hash"):
        revoke("../../etc/passwd", reason="x")


def test_reports_and_lists_that_are_damaged_admit_nothing(adapter: Path, tiny: Path) -> None:
    report = audit(adapter, base=str(tiny), time_budget_seconds=0, accept="ana: fine")
    file = Path(report["kept"])
    file.rename(file.with_name("0" * 64 + ".json"))
    with pytest.raises(AuditError, match="no report on that"):
        admission.approved_report("0" * 64)
    file.write_text("{")
    with pytest.raises(AuditError, match="cannot be read"):
        admission.approved_report(hash_adapter_folder(adapter))
    (admission.audits_folder() / "revoked.jsonl").write_text("not a line\n")
    with pytest.raises(AuditError, match="cannot be read"):
        admission.approved_report(hash_adapter_folder(adapter))


def test_the_log_shows_where_it_was_changed(tmp_path: Path) -> None:
    for number in range(4):
        admission.revoke(f"{number}" * 64, "a reason")
    assert [line["hash"][0] for line in admission.read_log()] == list("0123")
    file = admission.audits_folder() / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for changed in (
        lines[1:],
        lines[:1] + lines[2:],
        [lines[0], lines[1].replace("a reason", "another"), *lines[2:]],
        [lines[0], lines[2], lines[1], lines[3]],
    ):
        file.write_text("".join(changed))
        with pytest.raises(AuditError, match="tampered"):
            admission.read_log()


# ---- signatures


def test_sign_and_verify(adapter: Path, tiny: Path, keys: tuple[Path, Path, Path]) -> None:
    private, public, other = keys
    before = hash_adapter_folder(adapter)
    signed = sign(adapter, private_key=private, base=tiny)
    assert signed["adapter"] == before == hash_adapter_folder(adapter)
    assert verify(adapter, public_key=public, base=tiny)["verified"] is True
    with pytest.raises(AuditError, match="does not hold"):
        verify(adapter, public_key=other)
    report = audit(adapter, base=str(tiny), time_budget_seconds=0, public_key=public)
    assert next(
        gate["origin"] for gate in report["gates"] if gate["name"] == "provenance"
    ).startswith("signed by mine.pub")
    assert (
        audit(adapter, base=str(tiny), time_budget_seconds=0, public_key=other)["verdict"]
        == "block"
    )
    sign(adapter, private_key=private)  # again, over what lies there
    verify(adapter, public_key=public)


def test_one_byte_anywhere_is_found(
    adapter: Path, tiny: Path, keys: tuple[Path, Path, Path]
) -> None:
    sign(adapter, private_key=keys[0], base=tiny)
    generator = np.random.default_rng(0)
    for file in sorted(adapter.iterdir()):
        raw = file.read_bytes()
        places = (
            range(len(raw))
            if file.name == SIGNATURE
            else generator.choice(len(raw), 6, replace=False)
        )
        for at in list(places)[:: 7 if file.name == SIGNATURE else 1]:
            flip(file, int(at))
            with pytest.raises(AuditError):
                verify(adapter, public_key=keys[1], base=tiny)
            file.write_bytes(raw)
    verify(adapter, public_key=keys[1], base=tiny)


def test_swapped_base_parents_and_files_are_found(
    adapter: Path, tiny: Path, tied: Path, keys: tuple[Path, Path, Path]
) -> None:
    private, public, _ = keys
    with pytest.raises(AuditError, match="not signed"):
        verify(adapter, public_key=public)
    story = json.loads((adapter / METADATA_FILE).read_text())
    parents = [
        {"name": "a", "hash": "1" * 64, "weight": 1.0},
        {"name": "b", "hash": "2" * 64, "weight": 1.0},
    ]
    (adapter / METADATA_FILE).write_text(json.dumps(story | {"parents": parents}))
    sign(adapter, private_key=private, base=tiny)
    with pytest.raises(AuditError, match="base"):
        verify(adapter, public_key=public, base=tied)
    manifest = json.loads((adapter / MANIFEST).read_text())
    signature = (adapter / SIGNATURE).read_bytes()
    (adapter / MANIFEST).write_text(json.dumps(manifest | {"parents": parents[::-1]}))
    with pytest.raises(AuditError):
        verify(adapter, public_key=public)
    assert (
        audit(adapter, base=str(tiny), time_budget_seconds=0)["verdict"] == "block"
    )  # even without a key: it contradicts itself
    (adapter / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    verify(adapter, public_key=public)
    for name in ("new.txt", ".gitignore", ".gitattributes"):
        (adapter / name).write_text("x")
        with pytest.raises(AuditError):
            verify(adapter, public_key=public)
        (adapter / name).unlink()
    (adapter / CONFIG_FILE).unlink()
    with pytest.raises(Exception, match="no adapter here"):
        verify(adapter, public_key=public)
    assert signature


def test_a_key_that_cannot_sign(
    adapter: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    for key in (tmp_path / "bad.pem", tmp_path / "missing.pem", keys[1]):
        with pytest.raises(AuditError, match="cannot sign"):
            sign(adapter, private_key=key)
        assert not (adapter / SIGNATURE).exists()


def test_the_commands_sign_verify_and_revoke(
    adapter: Path, keys: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["sign", str(adapter), "--private-key", str(keys[0])]) == 0
    assert cli(["verify", str(adapter), "--public-key", str(keys[1])]) == 0
    assert hash_adapter_folder(adapter) in capsys.readouterr().out
    assert cli(["verify", str(adapter), "--public-key", str(keys[2]), "--json"]) == 1
    assert cli(["revoke", str(adapter), "--reason", "a test"]) == 0
    assert "a test" in capsys.readouterr().out
    assert cli(["revoke", str(adapter)]) == 2  # without a reason


# ---- SARIF, the command


def test_sarif(adapter: Path, tmp_path: Path) -> None:
    (adapter / "evil.py").write_text("x")
    report = audit(adapter, sarif_file=tmp_path / "report.sarif")
    log = json.loads((tmp_path / "report.sarif").read_text())
    assert log == as_sarif(report)
    [run] = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    [result] = run["results"]
    assert (result["level"], result["ruleId"], rules[result["ruleIndex"]]) == (
        "error",
        *["files/foreign-file"] * 2,
    )
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "evil.py"
    sarif_pydantic = pytest.importorskip("sarif_pydantic")
    sarif_pydantic.Sarif.model_validate(log)


def test_the_command_ends_with_its_verdict(
    adapter: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli(["audit", str(adapter), "--base", str(tiny), "--time-budget-seconds", "0", "--json"])
        == 3
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == "review"
    (adapter / "adapter_model.bin").write_bytes(b"x")
    assert cli(["audit", str(adapter)]) == 4
    assert "do not load it" in capsys.readouterr().out
    assert cli(["audit", str(adapter / "nowhere")]) == 1


# ---- the arithmetic


def test_statistics_of_factors_are_those_of_the_product() -> None:
    generator = np.random.default_rng(0)
    b, a = generator.standard_normal((60, 5)), generator.standard_normal((5, 40))
    thin, core = statistics.of_factors(b, a, 0.7)
    dense, whole = statistics.of_dense(0.7 * b @ a)
    np.testing.assert_allclose(core.values, whole.values[:5], rtol=1e-12)
    assert np.all(np.abs(whole.values[5:]) < 1e-12)
    for name in set(dense) - {
        "stable",
        "entropy",
    }:  # these are by the rank, which the product does not tell
        assert thin[name] == pytest.approx(
            dense[name], rel=1e-6 if "participation" in name else 1e-9
        ), name
    u, s, vt = np.linalg.svd(0.7 * b @ a)
    assert abs(core.u @ u[:, 0]) == pytest.approx(1, abs=1e-6) and abs(
        core.v @ vt[0]
    ) == pytest.approx(1, abs=1e-6)
    assert thin["energy1"] == pytest.approx(s[0] ** 2 / (s**2).sum())
    rows = np.sort(((0.7 * b @ a) ** 2).sum(1))[::-1]
    assert thin["rows8"] == pytest.approx(np.log(rows[:8].sum() / rows.sum() * 60 / 8))


def test_the_root_of_a_tall_matrix_has_its_singular_values() -> None:
    for shape in ((2500, 7), (1024, 7), (3, 7), (7, 1), (1300, 600)):
        matrix = np.random.default_rng(0).standard_normal(shape)
        matrix[:, 0] = 0.0  # a direction that is not there
        found = statistics.root(matrix)
        np.testing.assert_allclose(found.T @ found, matrix.T @ matrix, atol=1e-10)
        wanted = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(
            np.linalg.svd(found, compute_uv=False)[: len(wanted)], wanted, atol=2e-8 * wanted[0]
        )


@pytest.mark.slow
def test_statistics_of_float32_factors_are_those_of_float64() -> None:
    generator = np.random.default_rng(0)
    b, a = (
        generator.standard_normal((3000, 16)).astype(np.float32),
        generator.standard_normal((16, 1500)).astype(np.float32),
    )
    b *= np.logspace(0, -6, 16, dtype=np.float32)  # of very different sizes
    narrow, wide = (
        statistics.of_factors(b.astype(kind), a.astype(kind), 0.7)[0]
        for kind in (np.float32, np.float64)
    )
    assert narrow == {
        name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in wide.items()
    }
    values = statistics.of_factors(b, a, 0.7)[1].values
    np.testing.assert_allclose(
        values,
        np.linalg.svd(0.7 * b.astype(np.float64) @ a, compute_uv=False)[:16],
        atol=2e-8 * values[0],
    )


def test_statistics_at_their_ends() -> None:
    one = np.zeros(9)
    one[3] = 1.0
    assert statistics.participation(one) == pytest.approx(1 / 9)
    assert statistics.participation(np.full(9, 1 / 3)) == pytest.approx(1)
    assert statistics.hoyer(one) == pytest.approx(1) and statistics.hoyer(
        np.ones(9)
    ) == pytest.approx(0)
    assert statistics.top_share(np.ones(16)) == pytest.approx(0) and statistics.top_share(
        one
    ) == pytest.approx(np.log(9 / 8))
    assert statistics.kurtosis(np.random.default_rng(0).standard_normal(200_000)) == pytest.approx(
        3, abs=0.05
    )
    assert statistics.coherence([one, one]) == pytest.approx(np.sqrt(np.pi * 9 / 2))
    assert statistics.of_factors(np.zeros((4, 2)), np.ones((2, 3)), 1.0)[0] == {}


def test_a_p_value_by_hand() -> None:
    assert conformal(np.array([1.0, 2.0, 3.0]), 2.0) == pytest.approx(3 / 4)
    assert conformal(np.array([1.0, 2.0, 3.0]), 9.0) == pytest.approx(1 / 4)


def rows(count: int, shift: float = 0.0, seed: int = 0) -> list[dict[str, float]]:
    values = np.random.default_rng(seed).standard_normal((count, 6)) + shift * np.array(
        [1, 0, 0, 0, 0, 1]
    )
    return [{f"f{i}": float(x) for i, x in enumerate(row)} for row in values]


KIND = PopulationKey("b" * 64, "lora", ("q_proj",), 8, True)


def test_the_limit_of_triggers_flags_as_many_as_was_said(tmp_path: Path) -> None:
    made = replace(calibrate(KIND, rows(40)), triggers=np.arange(1, 40) / 40, recipe="by hand")
    made.write(tmp_path / "c.json")
    made = Calibration.read(tmp_path / "c.json")
    assert made.recipe == "by hand"
    limit = made.trigger_limit(
        0.05
    )  # of 39 benign ones and the new one, at most 2 in 40 lie above the 38th
    assert limit == 38 / 40
    assert replace(made, triggers=np.arange(MIN_POPULATION - 1) / 40).trigger_limit(0.05) is None
    assert made.trigger_limit(0.01) is None  # 39 are too few to tell one in a hundred


def test_benign_ones_are_flagged_as_often_as_was_said(tmp_path: Path) -> None:
    """P(p <= alpha) <= alpha for benign ones; strange ones are found, also by the one-class score alone."""
    for poisoned in ([], rows(60, 4.0, 5)):
        made = calibrate(KIND, rows(400), poisoned)
        made.write(tmp_path / "c.json")
        again = Calibration.read(tmp_path / "c.json")
        benign = np.array([again.judge(row).p for row in rows(1000, seed=1)])
        assert np.mean(benign <= 0.05) < 0.08 and np.mean(benign <= 0.5) == pytest.approx(
            0.5 if not poisoned else 0.4, abs=0.12
        )
        strange = np.array([again.judge(row).p for row in rows(100, 5.0, 2)])
        assert np.mean(strange <= 0.05) > 0.9
        assert again.judge(rows(1, 30.0)[0]).outlier_features[0][0] in ("f0", "f5")


def test_an_alpha_that_no_p_can_reach_claims_nothing() -> None:
    made = calibrate(KIND, rows(60), rows(30, 3.0, 1))
    assert made.count == 30 and made.smallest_p == pytest.approx(2 / 31)
    assert min(made.judge(row).p for row in rows(50, 30.0, 2)) == pytest.approx(made.smallest_p)
    assert calibrate(KIND, rows(60)).smallest_p == pytest.approx(1 / 31)


def test_the_logistic_regression_is_at_its_minimum() -> None:
    good, bad = (
        np.array([list(row.values()) for row in rows(50, shift, 3)]) for shift in (0.0, 1.0)
    )
    w = logistic(good, bad)

    def loss(w: np.ndarray) -> float:
        both = [
            np.logaddexp(0, sign * (x @ w[:-1] + w[-1])).mean() / 2
            for x, sign in ((good, 1), (bad, -1))
        ]
        return float(sum(both) + 0.5 * RIDGE * (w[:-1] ** 2).sum() / len(w))

    steps = np.random.default_rng(0).standard_normal((50, len(w))) * 0.01
    assert all(loss(w + step) >= loss(w) for step in steps)


def test_calibrated_adapters_are_compared(
    originals: Path, adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    """A calibration of the right kind judges; one of few adapters, or of another kind, claims nothing."""
    report = audit(adapter, base=str(tiny), time_budget_seconds=0)
    numbers = next(gate for gate in report["gates"] if gate["name"] == "weights")
    kind = PopulationKey(
        **next(f["evidence"]["kind"] for f in report["findings"] if f["rule"] == "no-calibration")
    )
    kind = PopulationKey(kind.base, kind.method, tuple(kind.layers), kind.rank, kind.with_base)
    generator = np.random.default_rng(0)
    near = [
        {k: v + 0.1 * generator.standard_normal() for k, v in numbers["features"].items()}
        for _ in range(2 * MIN_POPULATION + 20)
    ]
    far = [{k: v + 3 for k, v in row.items()} for row in near]
    for benign, alpha, rule in (
        (near, 0.05, "weights-usual"),
        (far, 0.05, "weights-unusual"),
        (near[:10], 0.05, "few-benign"),
        (far, 0.001, "few-benign"),
    ):
        calibrate(kind, benign).write(tmp_path / "c.json")
        found = audit(
            adapter,
            base=str(tiny),
            time_budget_seconds=0,
            calibration=tmp_path / "c.json",
            max_false_positive_rate=alpha,
        )
        assert rule in {finding["rule"] for finding in found["findings"]}, rule
    calibrate(PopulationKey("0" * 64, "lora", kind.layers, kind.rank, True), near).write(
        tmp_path / "c.json"
    )
    found = audit(adapter, base=str(tiny), time_budget_seconds=0, calibration=tmp_path / "c.json")
    assert "no-calibration" in {finding["rule"] for finding in found["findings"]}
