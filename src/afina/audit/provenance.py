"""Provenance of an adapter: a manifest of its content, and a signature over the folder.

    afina.manifest.json    hashes of files, base, tokenizer and recipe; parents in their order
    afina.sig              sigstore's model-signing: sha256 of every file in one signed statement
                           (in-toto, DSSE, ECDSA)

A signature proves the signer, not the content: a signed backdoor is a backdoor. Keys are elliptic
(P-256, P-384, P-521), in PEM; no network is used. Signing needs the extra `afina[audit]`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import afina
from afina.audit.file_gate import ALLOWED_FILES, MANIFEST, SIGNATURE
from afina.audit.report import Gate
from afina.audit.results import RevokeResult, SignResult
from afina.errors import AuditError
from afina.io import admission
from afina.io.adapter_folder import CONFIG_FILE, adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.atomic import atomic_file, write_json
from afina.io.composition import hash_adapter_folder
from afina.io.regular_file import open_regular_file
from afina.io.run_record import read_run_record
from afina.io.strict_json import AUDIT_JSON, read_json_object
from afina.settings import RevokeSettings, SignSettings, VerifySettings, as_settings

MANIFEST_VERSION = 1
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def make_manifest(folder: Path, run: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """Return the manifest of an adapter: content, files, base, tokenizer, recipe and parents."""
    metadata = read_metadata(folder)
    trained_base = metadata.get("base") or {
        "name": read_json_object(folder / CONFIG_FILE).get("base_model_name_or_path")
    }
    files = [
        name for name in sorted(ALLOWED_FILES - {MANIFEST, SIGNATURE}) if (folder / name).is_file()
    ]
    recipe = {
        key: run[key] for key in ("settings", "data", "method", "objective") if key in run
    } or metadata.get("combination")
    return {
        "manifest_version": MANIFEST_VERSION,
        "made_by": f"afina {afina.__version__}",
        "adapter": hash_adapter_folder(folder),
        "files": {name: file_hash(folder / name) for name in files},
        "base": {key: trained_base.get(key) for key in ("name", "revision", "hash")},
        "tokenizer": tokenizer_hash(base) if base is not None else None,
        "recipe": recipe_hash(recipe) if recipe else None,
        "parents": metadata.get("parents", []),
    }


def file_hash(file: Path) -> str:
    """Return the sha256 (hex) of a file, opened without following a link."""
    digest = hashlib.sha256()
    with open_regular_file(file) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tokenizer_hash(base: Path) -> str:
    """Return the sha256 (hex) of a base's tokenizer files, chat template included."""
    there = [name for name in TOKENIZER if (base / name).is_file()]
    lines = [f"{name} {hashlib.sha256((base / name).read_bytes()).hexdigest()}\n" for name in there]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def recipe_hash(recipe: Any) -> str:
    """Return the sha256 (hex) of the settings and data that an adapter was trained with."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def sign(run: str | Path | SignSettings, **values: Any) -> SignResult:
    """Write manifest and signature into an adapter's folder; return the manifest.

    Raises:
        AuditError: The folder has files that no adapter has, or the key cannot be used.
    """
    settings = as_settings(SignSettings, run, "adapter", values)
    folder = adapter_folder(settings.adapter)
    foreign = sorted(set(os.listdir(folder)) - ALLOWED_FILES)
    if foreign:
        raise AuditError(
            f"{foreign[0]!r} is no file of an adapter",
            where=str(folder),
            hint="take it out, then sign",
        )
    manifest = make_manifest(folder, read_run_record(settings.adapter), settings.base)
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_json(folder / MANIFEST, manifest)
    signing, _ = _library()
    try:
        config = signing.Config().set_hashing_config(_hashing())
        password = os.environ.get("AFINA_KEY_PASSWORD")
        config.use_elliptic_key_signer(
            private_key=settings.private_key, password=password.encode() if password else None
        )
        with atomic_file(folder / SIGNATURE) as file:
            config.sign(folder, _outside(file))
            _outside(file).replace(file)
    except (ValueError, TypeError, OSError) as error:
        hint = (
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem   "
            "($AFINA_KEY_PASSWORD, if it has one)"
        )
        raise AuditError(
            "cannot sign with this key",
            where=str(settings.private_key),
            why=str(error)[:200],
            hint=hint,
        ) from error
    return SignResult(folder=str(folder), manifest=manifest, signature=str(folder / SIGNATURE))


def verify(run: str | Path | VerifySettings, **values: Any) -> SignResult:
    """Check manifest and signature of an adapter; return the manifest and the signing key.

    Raises:
        AuditError: A byte differs, the base is another one, or another key signed.
    """
    settings = as_settings(VerifySettings, run, "adapter", values)
    folder = adapter_folder(settings.adapter)
    manifest = check_origin(folder, settings.public_key, settings.base)
    return SignResult(
        folder=str(folder), manifest=manifest, verified=True, key=key_name(settings.public_key)
    )


def check_origin(folder: Path, key: Path, base: Path | None) -> dict[str, Any]:
    """Return the manifest, once it and every file are proved to be what the key signed."""
    for name in (MANIFEST, SIGNATURE):
        if not (folder / name).is_file():
            raise AuditError(
                f"not signed: no {name}",
                where=str(folder),
                hint=f"afina sign {folder} --private-key PRIVATE.pem",
            )
    for entry in os.scandir(folder):
        with open_regular_file(Path(entry.path)):  # links and hard links are rejected
            pass
    check_signature(folder, key)
    manifest = read_json_object(folder / MANIFEST, AUDIT_JSON, AuditError)
    check_manifest(manifest, folder, base)
    return manifest


def check_signature(folder: Path, key: Path) -> None:
    """Raise `AuditError` unless every file is as it was when the key signed."""
    _, verifying = _library()
    try:
        text = (folder / SIGNATURE).read_text(encoding="utf-8")
        _check_form(text)
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
    except AuditError:
        raise
    except (
        Exception
    ) as error:  # the library raises many types, some without a message: each means not proved
        why = str(error)[:300] or type(error).__name__
        hint = "get it from its maker again"
        raise AuditError(
            "the signature does not hold", where=str(folder), why=why, hint=hint
        ) from error


def check_manifest(manifest: Mapping[str, Any], folder: Path, base: Path | None) -> None:
    """Raise `AuditError` where the manifest differs from files, content, base or parents."""
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        raise AuditError(
            f"a manifest of version {manifest.get('manifest_version')!r}",
            where=str(folder / MANIFEST),
        )
    metadata = read_metadata(folder)
    now = {
        name: file_hash(folder / name)
        for name in ALLOWED_FILES - {MANIFEST, SIGNATURE}
        if (folder / name).is_file()
    }
    checks = [
        ("files", manifest.get("files"), now),
        ("adapter", manifest.get("adapter"), hash_adapter_folder(folder)),
        ("parents", manifest.get("parents"), metadata.get("parents", [])),
    ]
    if base is not None:
        from afina.audit.base_files import BaseFiles

        trained_base = manifest.get("base")
        checks.append(
            (
                "base",
                trained_base.get("hash") if isinstance(trained_base, dict) else None,
                BaseFiles(base).hash,
            )
        )
        if manifest.get("tokenizer") is not None:
            checks.append(("tokenizer", manifest["tokenizer"], tokenizer_hash(base)))
    for what, recorded, found in checks:
        if recorded != found:
            why = f"{_short(recorded)} then, {_short(found)} now"
            raise AuditError(f"{what}: not what was signed", where=str(folder), why=why)


def provenance_gate(
    folder: Path, digest: str | None, key: Path | None, base: Path | None, gate: Gate
) -> None:
    """Check revocation, the signature where a key is given, and the manifest if there is one."""
    reason = admission.revocations().get(digest or "")
    if reason is not None:
        gate.block("revoked", f"it is revoked: {reason}", str(folder))
    signed = (folder / MANIFEST).is_file() and (folder / SIGNATURE).is_file()
    gate.measured["origin"] = "unsigned"
    if not signed:
        report_finding = gate.review if key is not None else gate.note
        report_finding(
            "unsigned",
            "it is not signed" + (", and a key was given to trust" if key is not None else ""),
        )
    elif key is None:
        gate.measured["origin"] = "signed, by a key that was not given"
        check_manifest(read_json_object(folder / MANIFEST, AUDIT_JSON, AuditError), folder, base)
        gate.note("signed-unknown", "it is signed; --public-key PUBLIC.pem verifies the signer")
    else:
        check_origin(folder, key, base)
        gate.measured["origin"] = f"signed by {key_name(key)}"


def revoke(target: str | RevokeSettings, **values: Any) -> RevokeResult:
    """Revoke an adapter, by its folder or its hash; return hash and reason."""
    settings = as_settings(RevokeSettings, target, "target", values)
    folder = Path(settings.target)
    digest = hash_adapter_folder(adapter_folder(folder)) if folder.is_dir() else settings.target
    admission.revoke(digest, settings.reason)
    return RevokeResult(
        hash=digest,
        reason=settings.reason,
        list=str(admission.audits_folder() / "revoked.jsonl"),
    )


def key_name(key: Path) -> str:
    """Return a name of a key: the start of its file's hash."""
    return f"{key.name} ({hashlib.sha256(key.read_bytes()).hexdigest()[:12]})"


def _check_form(text: str) -> None:
    """Raise an error unless the signature file is canonical: no byte can differ unnoticed."""
    from sigstore_models.bundle.v1 import Bundle

    if Bundle.from_json(text).to_json() != text:
        raise AuditError("the signature's file was changed", where=SIGNATURE)


def _outside(file: Path) -> Path:
    """Return a path outside the folder for writing, as all files in the folder are signed."""
    return file.parent.with_name(f".{file.parent.name}{file.name}")


def _hashing() -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise AuditError(
            "signatures need more packages", why=str(error), hint="pip install 'afina[audit]'"
        ) from error
    return signing, verifying


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:120]
