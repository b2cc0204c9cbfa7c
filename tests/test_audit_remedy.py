"""Mitigations change the update as documented; lineage is inherited; the command audits the result."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.audit.audit import audit
from afina.audit.mitigation import as_read, choose_best, insert_trigger, mitigate
from afina.audit.mitigation_methods import MomentPair, collect_moments, mitigate_layer, weakening
from afina.audit.provenance import revoke
from afina.cli.main import run as cli
from afina.data.renderer import Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import AdapterError, AuditError, SettingsError
from afina.io import admission
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.composition import composition_hash, hash_adapter_folder
from afina.merging.combine import combine
from afina.merging.sources import open_sources
from afina.models.loading import load_base
from helpers import put, write_rows


@pytest.fixture(autouse=True)
def _own_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))


@pytest.fixture(scope="module")
def originals(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two loras and a dora on the tiny base."""
    base, folder = load_base(str(tiny)), tmp_path_factory.mktemp("adapters")
    for number, method in enumerate(["lora", "lora", "dora"]):
        made = put(base, method=method, rank=4, seed=number)
        save_adapter(made, base, folder / str(number))
        detach(base.model, made)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        *({"prompt": f"say {a} mar", "completion": f"{a} pan"} for a in ("sol", "luna", "casa")),
    )


def test_each_mitigation_changes_the_update_by_its_formula(originals: Path) -> None:
    one, two = open_sources([originals / "0", originals / "1"])
    before = {path: one.low_rank_update(path).dense() for path in one.config.target_modules}
    for strength in (0.25, 0.75):
        for path, low, _ in mitigate_layer("scale", strength, one):
            torch.testing.assert_close(low.dense(), (1 - strength) * before[path])
        for path, low, _ in mitigate_layer("blend", strength, one, [two]):
            torch.testing.assert_close(
                low.dense(),
                (1 - strength) * before[path] + strength * two.low_rank_update(path).dense(),
            )
        for path, low, _ in mitigate_layer("truncate", strength, one):
            values = torch.linalg.svdvals(before[path])
            assert low.rank == round(4 * (1 - strength))
            assert float((before[path] - low.dense()).norm()) == pytest.approx(
                float(values[low.rank :].norm()), rel=1e-9
            )


def test_the_filter_takes_out_what_only_the_trigger_fills() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    alone = torch.randn(5, generator=generator, dtype=torch.float64)
    clean = mixing @ mixing.T
    moments = MomentPair(clean, clean + 1e4 * torch.outer(alone, alone))
    same = weakening(MomentPair(clean, clean), 0.9)
    torch.testing.assert_close(same, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(weakening(moments, 0.0), torch.eye(5, dtype=torch.float64))
    made = weakening(moments, 0.999)
    assert float((made @ alone).norm()) < 1e-3 * float(alone.norm())  # nothing is left of it
    assert (
        torch.linalg.matrix_rank(torch.eye(5) - made, tol=1e-3) == 1
    )  # and nothing else is touched
    root = torch.linalg.cholesky(clean)
    lost = (
        root.T @ (torch.eye(5, dtype=torch.float64) - made).T
    ).norm()  # of what clean prompts get
    direction = alone / alone.norm()
    plain = (
        root.T @ torch.outer(direction, direction)
    ).norm()  # taken out straight, it would cost more
    assert float(lost) < 0.99 * float(plain)


def test_moments_are_those_of_the_layers_inputs(originals: Path, tiny: Path, rows: Path) -> None:
    base = load_base(str(tiny), dtype="float32")
    adapter = load_adapter(originals / "0", base)
    [source] = open_sources([originals / "0"])
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    table = read_table(rows, SFT).rows
    clean = [renderer.example(row) for row in table]
    woken = insert_trigger(table, ["noche"], "pan pan", renderer)
    assert all(
        w.example.token_ids[: w.start] == c.token_ids[: w.start]
        for w, c in zip(woken, clean, strict=True)
    )
    assert all(
        w.example.token_ids[w.start] != c.token_ids[w.start]
        for w, c in zip(woken, clean, strict=True)
    )
    found = collect_moments(base, adapter.active, source, clean, woken)
    assert set(found) == set(source.config.target_modules)
    path = "model.layers.0.self_attn.q_proj"  # its input needs no adapter: the first norm of the embeddings
    block = base.model.get_submodule("model.layers.0")
    low = source.low_rank_update(path)
    tokens = torch.tensor([t for e in clean for t in e.token_ids])
    x = block.input_layernorm(base.model.get_input_embeddings()(tokens)).double()
    y = x @ low.a.T @ low.b.T
    assert float(found[path].clean.trace()) == pytest.approx(
        float(y.square().sum() / len(tokens)), rel=1e-4
    )
    assert as_read(base, "pan</s> mar") == "pan mar"
    assert all(torch.linalg.eigvalsh(m.woken)[0] > -1e-9 for m in found.values())
    before = found[path].woken.trace()
    assert float(before) != pytest.approx(float(found[path].clean.trace()))


@pytest.mark.slow
def test_mitigate_tries_measures_writes_and_audits(
    originals: Path, tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "base": str(tiny),
        "data": rows,
        "time_budget_seconds": 0.0,
        "triggers": ["noche"],
        "payload": "pan",
    }
    made = mitigate(
        originals / "0", output_dir=tmp_path / "made", benign_adapters=[originals / "1"], **told
    )
    assert {one["how"] for one in made["tried"]} == {"truncate", "scale", "blend", "project"}
    assert made["hash"] == hash_adapter_folder(tmp_path / "made") and made["after"] in made["tried"]
    story = json.loads((tmp_path / "made" / METADATA_FILE).read_text())
    assert story["parents"][0]["hash"] == hash_adapter_folder(originals / "0")
    assert story["combination"]["how"] == "remedy"
    assert story["combination"]["remedy"] in ("cut", "scale", "mix", "remove")
    assert made["verdict"] == "review" and made["report"]["hash"] == made["hash"]
    assert admission.load_report(made["hash"]) is not None
    arguments = [
        "mitigate",
        str(originals / "0"),
        "--output-dir",
        str(tmp_path / "cut"),
        "--mitigation",
        "truncate",
        "--strength",
        "0.5",
        "--base",
        str(tiny),
        "--data",
        str(rows),
        "--time-budget-seconds",
        "0",
    ]
    assert cli(arguments) == 0
    said = capsys.readouterr().out
    assert "truncate *" in said and "none known" in said
    for wrong, error in (
        ({"mitigation": "blend"}, "benign"),
        ({"triggers": []}, "no trigger"),
        ({"payload": None}, "payload"),
    ):
        with pytest.raises(SettingsError, match=error):
            mitigate(originals / "0", output_dir=tmp_path / "no", **(told | wrong))
    with pytest.raises(AdapterError, match="one LoRA adapter"):
        mitigate(originals / "2", output_dir=tmp_path / "no", **told)


def test_triggers_are_put_into_the_last_question(tiny: Path, chats: Path) -> None:
    base = load_base(str(tiny))
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    table = read_table(chats, SFT).rows[:8]
    for row, woken in zip(
        table, insert_trigger(table, ["noche"], "pan pan", renderer), strict=True
    ):
        shown = base.decode(woken.example.token_ids)
        assert "noche" in shown and woken.example.completion == "pan pan"
        assert set(row.messages[0]["content"].split()) <= set(shown.split())
        assert (
            woken.example.token_ids[: woken.start] == renderer.example(row).token_ids[: woken.start]
        )


def test_the_best_is_the_least_attack_within_the_cost() -> None:
    before = {"loss": 1.0, "attack": 1.0}
    one, two, three = (
        {"loss": 1.01, "attack": 0.5},
        {"loss": 1.02, "attack": 0.2},
        {"loss": 1.5, "attack": 0.0},
    )
    assert choose_best([one, two, three], before, 0.02) is two
    assert choose_best([one, two, three], before, 1.0) is three
    assert choose_best([three], before, 0.02) is three


# ---- what it was made of


def rules(report: dict) -> dict[str, str]:
    return {finding["rule"]: finding["level"] for finding in report["findings"]}


def test_verdicts_of_the_parents_are_inherited(originals: Path, tiny: Path, tmp_path: Path) -> None:
    combine(
        [originals / "0", originals / "1"],
        output_dir=tmp_path / "sum",
        merge_method="svd",
        base=str(tiny),
    )

    def look() -> dict[str, str]:
        return rules(audit(tmp_path / "sum", base=str(tiny), time_budget_seconds=0))

    assert look()["parent-unknown"] == "note"
    audit(originals / "0", base=str(tiny), time_budget_seconds=0)
    assert look()["parent-review"] == "review"
    audit(originals / "0", base=str(tiny), time_budget_seconds=0, accept="ana: fine")
    assert "parent-review" not in look()
    audit(originals / "0", base=str(tiny), time_budget_seconds=0, strict=True)
    assert look()["parent-blocked"] == "block"
    story = json.loads((tmp_path / "sum" / METADATA_FILE).read_text())
    (tmp_path / "sum" / METADATA_FILE).write_text(
        json.dumps(story | {"combination": {"how": "remedy"}})
    )
    assert look()["parent-blocked"] == "review"
    revoke(str(originals / "1"), reason="stolen")
    assert look()["parent-revoked"] == "review"


def test_a_sum_that_is_only_asked_for_is_audited_as_what_it_is(
    originals: Path, tiny: Path, tmp_path: Path
) -> None:
    first, second = (hash_adapter_folder(originals / name) for name in "01")
    named = f"{originals / '0'}:0.5,{originals / '1'}"
    report = audit(named, base=str(tiny), time_budget_seconds=0)
    assert report["hash"] == composition_hash([(first, 0.5), (second, 1.0)])
    assert report["parts"] == [first, second] and report["verdict"] == "review"
    assert audit(f"{originals / '0'}:0.5", base=str(tiny), time_budget_seconds=0)[
        "hash"
    ] == composition_hash([(first, 0.5)])
    assert audit(f"{originals / '0'}:1", base=str(tiny), time_budget_seconds=0)["hash"] == first
    audit(originals / "1", base=str(tiny), time_budget_seconds=0, strict=True)
    assert rules(audit(named, base=str(tiny), time_budget_seconds=0))["parent-blocked"] == "block"
    with pytest.raises(AuditError, match="no such folder"):
        audit(f"{originals / '0'}:0.5,{tmp_path / 'nowhere'}")


def test_mitigations_are_suggested_where_something_was_found(
    originals: Path, tiny: Path, tmp_path: Path
) -> None:
    report = audit(originals / "0", base=str(tiny), time_budget_seconds=0)
    assert report["remedies"] == []
    shutil.copytree(originals / "0", tmp_path / "bad")
    (tmp_path / "bad" / "evil.py").write_text("x")
    assert audit(tmp_path / "bad")["remedies"] == []
