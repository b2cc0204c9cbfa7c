"""Weight gate: statistics of an adapter's update by module, compared with benign adapters.

One module is in memory at a time. With the base's files each update is also compared with the
weight that it changes, and its leading directions with the vectors of the vocabulary: which tokens
activate it, which tokens it writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from afina.audit.base_files import BaseFiles, widened
from afina.audit.calibration import Calibration, PopulationKey
from afina.audit.file_gate import AuditedFolder
from afina.audit.report import Gate
from afina.audit.update_statistics import UpdateSpectrum, coherence, of_dense, of_factors, robust_z
from afina.errors import AuditError
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.regular_file import open_regular_file
from afina.io.safetensors import TensorEntry

ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "c_attn",
    "qkv_proj",
    "query",
    "key",
    "value",
    "out_proj",
)
WRITERS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "fc2",
    "wo",
    "w2",
)  # modules that write to the residual stream; the others read it
MAX_RELATIVE_NORM = 0.5  # ||D|| / ||W||: an update this large replaces the weight
TOKENS = 5  # shown as evidence
DENSE = 4096  # largest side of a matrix that is decomposed exactly
OUTLIER_Z = 12.0  # robust z of a module among the others of the adapter, from which it is reported


@dataclass
class WeightMeasurements:
    """Features of an adapter, statistics by module, and the tokens that its modules respond to."""

    kind: PopulationKey
    features: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    zero_layers: list[str] = field(default_factory=list)  # layers whose update is zero
    left_out: list[str] = field(default_factory=list)  # modules without statistics


def measure(package: AuditedFolder, base: BaseFiles | None) -> WeightMeasurements:
    """Return all statistics of an adapter that passed the file gate."""
    measured = WeightMeasurements(kind_of(package, base))
    directions: dict[str, tuple[str, UpdateSpectrum]] = {}
    with open_regular_file(package.folder / WEIGHTS_FILE) as stream:
        for path, stats, core in _updates(package, base, stream, measured):
            if not stats:
                measured.zero_layers.append(path)
                continue
            if base is not None and base.shape(path) is not None and package.method != "mora":
                stats |= _compare_with_base(path, core, base)
            measured.layers[path] = stats
            directions[path] = (group_of(path), core)
    if base is not None and package.method != "mora":
        _compare_with_vocabulary(measured, directions, base)
    measured.features = _features(measured, directions)
    return measured


def kind_of(package: AuditedFolder, base: BaseFiles | None) -> PopulationKey:
    """Return the key of comparable adapters: same base, method, modules and size."""
    recorded = package.metadata.get("base", {}).get("hash")
    leaves = tuple(sorted({path.rpartition(".")[2] for path in package.modules()}))
    size = 1 << (package.rank_of() - 1).bit_length()
    return PopulationKey(
        base.hash if base else recorded or "", package.method, leaves, size, base is not None
    )


def group_of(path: str) -> str:
    """Return "attention" or "mlp" (all others)."""
    return "attention" if path.rpartition(".")[2] in ATTENTION else "mlp"


def _updates(
    package: AuditedFolder, base: BaseFiles | None, stream: BinaryIO, measured: WeightMeasurements
) -> Iterator[tuple[str, dict[str, float], UpdateSpectrum]]:
    """Yield path, statistics and core of each module."""

    def array(entry: TensorEntry) -> np.ndarray:
        stream.seek(entry.begin)
        return widened(stream.read(entry.end - entry.begin), entry.dtype).reshape(entry.shape)

    for path, parts in package.modules().items():
        a = parts.get("lora_A.weight") or parts.get("lora_embedding_A")
        b = parts.get("lora_B.weight") or parts.get("lora_embedding_B")
        if path in package.fused_experts:  # one update per expert: no calibration knows them
            measured.left_out.append(path)
        elif a is not None and b is not None:
            factor_b, factor_a = array(b), array(a)
            yield (
                path,
                *of_factors(
                    factor_b.reshape(len(factor_b), -1),
                    factor_a.reshape(len(factor_a), -1),
                    package.scale_of(path),
                ),
            )
            if package.method == "dora" and base is not None:
                _lengths(
                    path,
                    next(array(e) for part, e in parts.items() if "magnitude" in part),
                    base,
                    measured,
                )
        elif "mora_M.weight" in parts and max(parts["mora_M.weight"].shape) <= DENSE:
            yield path, *of_dense(array(parts["mora_M.weight"]).astype(np.float64))
        elif (
            package.method == "full"
            and "weight" in parts
            and _comparable(parts["weight"].shape, path, base)
        ):
            assert base is not None
            trained = array(parts["weight"]).astype(np.float64)
            before = np.concatenate([rows for _, rows in base.rows(f"{path}.weight")]).reshape(
                trained.shape
            )
            yield path, *of_dense(trained - before)
        else:
            measured.left_out.append(path)


def _comparable(shape: tuple[int, ...], path: str, base: BaseFiles | None) -> bool:
    return (
        base is not None and len(shape) == 2 and base.shape(path) == shape and max(shape) <= DENSE
    )


def _lengths(path: str, lengths: np.ndarray, base: BaseFiles, measured: WeightMeasurements) -> None:
    """Return the spread of log m / ||W|| over DoRA's rows."""
    if base.shape(path) is None or path not in measured.layers:
        return
    before = np.concatenate(
        [np.sqrt((rows.astype(np.float64) ** 2).sum(1)) for _, rows in base.rows(f"{path}.weight")]
    )
    ratio = np.log(np.maximum(np.abs(lengths.reshape(-1)), 1e-12) / np.maximum(before, 1e-12))
    measured.layers[path] |= {
        "lengths_spread": float(ratio.std()),
        "lengths_largest": float(np.abs(ratio).max()),
    }


def _compare_with_base(path: str, core: UpdateSpectrum, base: BaseFiles) -> dict[str, float]:
    """Compare an update with the weight that it changes, in one pass over the weight's rows.

    rho: log ||D|| / ||W||. through_in, through_out: ||W v1||, ||W^T u1|| divided by that of a
    random direction.
    """
    squares, forward, backward = 0.0, 0.0, 0.0
    rows_of = base.shape(path)
    assert rows_of is not None
    v, u = core.v, core.u
    gathered = np.zeros(len(v), np.float32)
    for start, rows in base.rows(f"{path}.weight"):
        if rows.shape[1] != len(v):
            return {}  # stored transposed (Conv1D), or an embedding
        squares += float(np.dot(rows.ravel(), rows.ravel()))
        forward += float(((rows @ v) ** 2).sum())
        gathered += u[start : start + len(rows)] @ rows
    backward = float((gathered.astype(np.float64) ** 2).sum())
    return {
        "rho": float(np.log(core.norm / np.sqrt(squares))),
        "through_in": float(np.sqrt(forward * len(v) / squares)),
        "through_out": float(np.sqrt(backward * len(u) / squares)),
    }


def _compare_with_vocabulary(
    measured: WeightMeasurements, directions: dict[str, tuple[str, UpdateSpectrum]], base: BaseFiles
) -> None:
    """Record tokens whose vectors have outlying cosines with the leading directions (robust z)."""
    for side, name in (("reads", base.embedding()), ("writes", base.output())):
        if name is None:
            continue
        width = base.shape(name.removesuffix(".weight"))
        if width is None or len(width) != 2:
            continue
        vectors = {p: c.v if side == "reads" else c.u for p, (_, c) in directions.items()}
        fitting = [
            path
            for path, vector in vectors.items()
            if len(vector) == width[1]
            and path in measured.layers
            and (path.rpartition(".")[2] in WRITERS) == (side == "writes")
        ]
        if not fitting:
            continue
        stack = np.stack([vectors[path] for path in fitting], 1)  # (d, layers)
        pieces = []
        for _, rows in base.rows(name):
            lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            pieces.append((rows / lengths) @ stack)
        cosines = np.concatenate(pieces)  # (V, layers)
        for number, path in enumerate(fitting):
            z = np.abs(robust_z(cosines[:, number]))
            best = np.argsort(z)[::-1][:TOKENS]
            measured.layers[path][f"vocabulary_{side}"] = float(np.log(max(z[best[0]], 1e-12)))
            measured.tokens[f"{path} {side}"] = [(int(token), float(z[token])) for token in best]


def _features(
    measured: WeightMeasurements, directions: dict[str, tuple[str, UpdateSpectrum]]
) -> dict[str, float]:
    """Return one vector: mean, maximum and spread of each statistic, by attention and others."""
    features: dict[str, float] = {}
    for group in ("attention", "mlp"):
        paths = [path for path in measured.layers if group_of(path) == group]
        for name in sorted({name for path in paths for name in measured.layers[path]}):
            values = np.array(
                [measured.layers[path][name] for path in paths if name in measured.layers[path]]
            )
            features |= {
                f"{group}.{name}.mean": float(values.mean()),
                f"{group}.{name}.max": float(values.max()),
                f"{group}.{name}.spread": float(values.std()),
            }
    for leaf in sorted({path.rpartition(".")[2] for path in measured.layers}):
        paths = [path for path in measured.layers if path.rpartition(".")[2] == leaf]
        features[f"{leaf}.coherence_out"] = coherence([directions[path][1].u for path in paths])
        features[f"{leaf}.coherence_in"] = coherence([directions[path][1].v for path in paths])
    return features


def weight_gate(
    package: AuditedFolder,
    base: BaseFiles | None,
    calibrations: list[Calibration],
    alpha: float,
    gate: Gate,
) -> WeightMeasurements:
    """Measure, compare with benign adapters of the same kind, and report outliers."""
    measured = measure(package, base)
    gate.measured |= {"layers": len(measured.layers), "features": measured.features}
    if not measured.layers:
        gate.review(
            "weights-unknown",
            f"{package.method}: nothing of it could be measured"
            + (": its difference from the base needs --base" if package.method == "full" else ""),
        )
        return measured
    if measured.left_out:
        names = ", ".join(measured.left_out[:3])
        gate.review(
            "weights-part",
            f"{len(measured.left_out)} of its layers could not be measured, as {names}",
        )
    if measured.zero_layers:
        gate.note(
            "weights-zero",
            f"{len(measured.zero_layers)} of its layers change nothing",
            layers=measured.zero_layers[:20],
        )
    for path, stats in measured.layers.items():
        if stats.get("rho", -9.0) > np.log(MAX_RELATIVE_NORM):
            gate.review(
                "too-strong",
                f"its update is {np.exp(stats['rho']):.2f} times the base's weight",
                f"{WEIGHTS_FILE}: {path}",
            )
    _show_what_stands_out(measured, gate)
    _compare(measured, calibrations, alpha, gate)
    return measured


def _show_what_stands_out(measured: WeightMeasurements, gate: Gate) -> None:
    """Report modules unlike the adapter's others, as evidence.

    It is no verdict: without benign adapters the usual spread is unknown.
    """
    shown: dict[str, dict[str, float]] = {}
    paths = list(measured.layers)
    for name in sorted({name for stats in measured.layers.values() for name in stats}):
        there = [path for path in paths if name in measured.layers[path]]
        if len(there) < 8:
            continue
        for path, z in zip(
            there, robust_z(np.array([measured.layers[path][name] for path in there])), strict=True
        ):
            if abs(z) >= OUTLIER_Z:
                shown.setdefault(path, {})[name] = round(float(z), 1)
    for path, stats in sorted(shown.items(), key=lambda item: -max(map(abs, item[1].values())))[:3]:
        gate.note(
            "layer-stands-out",
            f"unlike its own other layers in {', '.join(stats)}",
            f"{WEIGHTS_FILE}: {path}",
            z=stats,
        )
    for direction_key, tokens in sorted(measured.tokens.items(), key=lambda item: -item[1][0][1])[
        :3
    ]:
        path, _, side = direction_key.partition(" ")
        gate.note(
            "tokens-stand-out",
            f"its strongest direction {side} these tokens",
            f"{WEIGHTS_FILE}: {path}",
            tokens=[{"token": token, "z": round(z, 1)} for token, z in tokens],
        )


def _compare(
    measured: WeightMeasurements, calibrations: list[Calibration], alpha: float, gate: Gate
) -> None:
    fitting = next((c for c in calibrations if c.fits(measured.kind)), None)
    if fitting is None:
        gate.review(
            "no-calibration",
            "no benign adapters of its kind to compare with: nothing is claimed about its weights",
            kind=measured.kind.as_dict(),
        )
        return
    missing = sorted(set(fitting.names) - set(measured.features))
    if missing:
        raise AuditError(f"no {missing[0]} to compare", why="the calibration has other modules")
    result = fitting.judge(measured.features)
    gate.measured |= {"p": result.p, "compared_with": fitting.count}
    if fitting.count < fitting.fewest or fitting.smallest_p > alpha:
        text = (
            f"only {fitting.count} benign adapters of its kind: too few to claim anything "
            f"(their least p is {fitting.smallest_p:.2g}, --alpha {alpha:g})"
        )
        gate.review("few-benign", text)
    elif result.p <= alpha:
        unusual = ", ".join(name for name, _ in result.outlier_features)
        gate.review(
            "weights-unusual",
            f"unlike {fitting.count} benign adapters of its kind (p = {result.p:.3g}): {unusual}",
            p=result.p,
            one_class=result.one_class,
            supervised=result.supervised,
            unusual={name: round(z, 1) for name, z in result.outlier_features},
        )
    else:
        gate.note(
            "weights-usual",
            f"like {fitting.count} benign adapters of its kind (p = {result.p:.3g})",
            p=result.p,
        )


def read_calibrations(file: Path | None) -> list[Calibration]:
    """Return calibrations of a file or folder, or those that come with the package."""
    direction_key = file or Path(__file__).parent / "calibrations"
    files = [direction_key] if direction_key.is_file() else sorted(direction_key.glob("*.json"))
    if file is not None and not files:
        raise AuditError("no calibration here", where=str(file))
    return [Calibration.read(each) for each in files]
