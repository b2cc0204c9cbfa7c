"""What was audited is what is read and served: no file changed in between gets in, no sum without a report of its own."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afina.audit.audit import audit
from afina.audit.provenance import revoke
from afina.engine.engine import Engine, EngineConfig
from afina.errors import AdapterError, AuditError
from afina.io import admission
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.composition import composition_hash, hash_adapter_folder
from afina.io.verified_copy import verified_copies
from afina.merging import combine as algebra
from afina.merging import export
from afina.merging import merge_into_base as merge
from afina.models.loading import load_base
from afina.server.errors import APIError
from afina.server.serve import build_server, close
from afina.settings import ServeSettings
from live import live, make_adapters

ACCEPT = {"time_budget_seconds": 0, "accept": "ana: a test"}


@pytest.fixture(autouse=True)
def _own_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))


@pytest.fixture(scope="module")
def originals(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three loras of one shape, so that the files of one fit into another's folder."""
    names = {name: {"rank": 4} for name in ("one", "two", "evil")}
    return make_adapters(tiny, tmp_path_factory.mktemp("originals"), **names)


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "adapters"))


def swap(folder: Path) -> None:
    """Put the bad one's files where the good one's are, each with the times of the old."""
    for name in (WEIGHTS_FILE, METADATA_FILE):
        times = os.stat(folder / "one" / name)
        shutil.copyfile(folder / "evil" / name, folder / "one" / name)
        os.utime(folder / "one" / name, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("verb", ["combine", "merge", "export"])
def test_files_swapped_after_the_check_are_not_read(
    verb: str, folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes the files in the moment after they were found good changes nothing."""
    audit(folder / "one", base=str(tiny), **ACCEPT)
    good, out = hash_adapter_folder(folder / "one"), tmp_path / "out"
    real = admission.approved_report

    def admitted(*told: Any) -> Any:
        report = real(*told)
        swap(folder)
        return report

    monkeypatch.setattr(admission, "approved_report", admitted)
    calls: dict[str, Callable[[], Any]] = {
        "combine": lambda: algebra.combine([folder / "one"], output_dir=out, require_audit=True)[
            "parents"
        ][0]["hash"],
        "merge": lambda: merge.merge(folder / "one", output_dir=out, require_audit=True)["adapter"],
        "export": lambda: [
            export.export(folder / "one", output=out, format="peft", require_audit=True),
            hash_adapter_folder(out),
        ][1],
    }
    assert calls[verb]() == good
    assert (
        hash_adapter_folder(folder / "one") == hash_adapter_folder(folder / "evil") != good
    )  # the swap was made


def test_sealed_copies_are_private_gone_and_no_links(folder: Path, tiny: Path) -> None:
    audit(folder / "one", base=str(tiny), **ACCEPT)
    with verified_copies(True, [f"{folder / 'one'}:0.5"]) as [copy]:
        place = Path(copy.rpartition(":")[0])
        assert (
            copy.endswith(":0.5")
            and place.name == "one"
            and hash_adapter_folder(place) == hash_adapter_folder(folder / "one")
        )
        assert place.parents[1].stat().st_mode & 0o77 == 0
    assert not place.exists()
    with verified_copies(False, [folder / "two"]) as same:
        assert same == [str(folder / "two")]
    with (
        pytest.raises(AuditError, match="not been audited"),
        verified_copies(True, [folder / "two"]),
    ):
        pass
    (folder / "one" / WEIGHTS_FILE).rename(folder / "kept")
    (folder / "one" / WEIGHTS_FILE).symlink_to(folder / "kept")
    with pytest.raises(AuditError, match="link"), verified_copies(True, [folder / "one"]):
        pass


def test_a_file_that_was_away_for_a_moment_is_found_by_the_audit(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped for the weight gate and put back after it: the very same file, and yet the audit blocks."""
    from afina.audit import weight_gate as weights

    real, file = weights.measure, folder / "one" / WEIGHTS_FILE

    def measure(*told: Any) -> Any:
        file.rename(folder / "kept")
        shutil.copyfile(folder / "evil" / WEIGHTS_FILE, file)
        seen = real(*told)
        file.unlink()
        (folder / "kept").rename(file)
        return seen

    monkeypatch.setattr(weights, "measure", measure)
    report = audit(folder / "one", base=str(tiny), time_budget_seconds=0)
    assert report["verdict"] == "block" and "changed" in {
        finding["rule"] for finding in report["findings"]
    }


# ---- serving


def settings(tiny: Path, folder: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "base": str(tiny),
        "adapters": [folder / "one"],
        "state_dir": tmp_path / "state",
        "max_training_jobs": 0,
        "insecure": True,
    } | more


@pytest.fixture
def state(folder: Path, tiny: Path, tmp_path: Path) -> Iterator[Any]:
    for name in ("one", "two"):
        audit(folder / name, base=str(tiny), **ACCEPT)
    told = settings(
        tiny,
        folder,
        tmp_path,
        adapters=[folder / "one", folder / "two"],
        require_audit=True,
        dtype="float32",
    )
    made = build_server(ServeSettings(**told))
    yield made
    close(made)


def test_a_server_starts_with_nothing_that_has_no_report(
    folder: Path, tiny: Path, tmp_path: Path
) -> None:
    none = build_server(ServeSettings(**settings(tiny, folder, tmp_path, require_audit=True)))
    assert not none.engine.registry.list_adapters()
    assert "not been audited" in none.unserved["one"].reason
    close(none)
    open_ = build_server(ServeSettings(**settings(tiny, folder, tmp_path, require_audit=False)))
    from afina.server.routes.models import register_adapter

    register_adapter(open_, "evil", folder / "evil", None)
    close(open_)
    audit(folder / "one", base=str(tiny), **ACCEPT)
    closed = build_server(
        ServeSettings(**settings(tiny, folder, tmp_path, require_audit=True))
    )  # the tables still name the bad one
    assert [entry.name for entry in closed.engine.registry.list_adapters()] == ["one"]
    close(closed)


def test_sums_need_a_report_of_their_own(state: Any, folder: Path, tiny: Path) -> None:
    from afina.server.auth import Principal

    caller = Principal(None, True)

    def ask(model: str) -> Any:
        return state.resolve_model(caller, model)

    assert [part.weight for part in ask("one").parts] == [1.0] and ask(state.base_name).parts == ()
    for model in ("one:0.5,two:0.5", "one:0.5", "one,two"):
        with pytest.raises(APIError, match="not been audited") as refused:
            ask(model)
        assert refused.value.status_code == 403
    sum_of = f"{folder / 'one'}:0.5,{folder / 'two'}:0.5"
    audit(sum_of, base=str(tiny), time_budget_seconds=0)
    with pytest.raises(APIError, match="review"):
        ask("one:0.5,two:0.5")
    report = audit(sum_of, base=str(tiny), **ACCEPT)
    assert len(ask("one:0.5,two:0.5").parts) == 2
    assert len(ask("two:0.5, one:0.5").parts) == 2  # the same sum
    for other in ("one:0.5,two:0.6", "one:-0.5,two:0.5", "one:0.5,two:0.5,one:0.5"):
        with pytest.raises(APIError):
            ask(other)
    audit(f"{folder / 'one'},{folder / 'two'}", base=str(tiny), **ACCEPT)
    assert len(ask("one,two").parts) == 2
    revoke(report["hash"], reason="found out")
    with pytest.raises(APIError, match="revoked"):
        ask("one:0.5,two:0.5")
    assert report["hash"] == composition_hash(
        [(hash_adapter_folder(folder / name), 0.5) for name in ("one", "two")]
    )
    revoke(str(folder / "two"), reason="found out")
    for model in ("two", "one,two"):  # while it is served
        with pytest.raises(APIError, match="revoked"):
            ask(model)


def test_what_comes_later_is_checked_by_what_was_hashed(state: Any, folder: Path) -> None:
    from afina.server.routes.models import register_adapter

    with pytest.raises(APIError, match="not been audited"):
        register_adapter(state, "evil", folder / "evil", None)
    with pytest.raises(AuditError):
        state.engine.registry.replace("one", folder / "evil")
    assert state.engine.registry.get("evil") is None


def test_a_report_on_another_base_does_not_count(folder: Path, tiny: Path, tied: Path) -> None:
    report = audit(folder / "one", base=str(tiny), **ACCEPT)
    admission.approved_report(report["hash"], "one", load_base(str(tiny)).hash)
    with pytest.raises(AuditError, match="another base"):
        admission.approved_report(report["hash"], "one", load_base(str(tied)).hash)


@pytest.mark.parametrize("admit", ["any", "audited"])
def test_numbers_changed_under_an_old_time_are_not_served(
    admit: Any, folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the time of change can be forged, the hash of the numbers that were read says it."""
    audit(folder / "one", base=str(tiny), **ACCEPT)
    engine = Engine(
        load_base(str(tiny)), EngineConfig(pool_bytes=1 << 24, require_audit=admit == "audited")
    )
    entry = engine.registry.add("one", folder / "one")
    content = engine.registry.acquire((entry.hash,))[0]
    monkeypatch.setattr("afina.engine.memory.fingerprint", lambda _: content.fingerprint)
    swap(folder)
    if admit == "audited":
        with pytest.raises(AdapterError, match="not the file"):
            engine.memory.load(content)
        shutil.copyfile(folder / "evil" / WEIGHTS_FILE, folder / "one" / WEIGHTS_FILE)
    assert engine.memory.load(content) if admit == "any" else True
    engine.stop()


def test_over_http(folder: Path, tiny: Path, tmp_path: Path) -> None:
    audit(folder / "one", base=str(tiny), **ACCEPT)
    with (
        live(**settings(tiny, folder, tmp_path, require_audit=True)) as running,
        running.http() as http,
    ):
        body = {"messages": [{"role": "user", "content": "say sol"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body | {"model": "one"}).status_code == 200
        refused = http.post("/v1/chat/completions", json=body | {"model": "one:0.5"})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_admitted"
