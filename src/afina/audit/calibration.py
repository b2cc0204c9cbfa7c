"""How unusual an adapter is among benign ones, as a p-value (split conformal prediction).

    p = (1 + number of benign scores as large or larger) / (n + 1)

Half of the benign adapters fit the score, the others calibrate it. If the adapter is benign and of
the same kind, P(p <= alpha) <= alpha, whatever the score is (Vovk et al. 2005). Two scores:
one-class, the distance from the benign ones, needs no attack; supervised, a logistic regression,
knows the attacks that it was fitted on. Together they give min(1, 2 min(p1, p2)), which is valid
however they depend on each other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afina.errors import AuditError
from afina.io.atomic import write_json

MIN_POPULATION = (
    20  # calibrating adapters below which nothing is claimed: the smallest p would exceed 0.05
)
SHRINK = 0.5  # weight of the diagonal in the covariance: features are many, adapters few
RIDGE = 10.0  # L2 penalty of the logistic regression, on standardized features
CLIP = 20.0  # larger robust z are clipped: they carry no more information


@dataclass(frozen=True)
class PopulationKey:
    """What comparable adapters share: base, method, modules, rank rounded up to a power of two."""

    base: str
    method: str
    layers: tuple[str, ...]
    rank: int
    with_base: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"layers": list(self.layers)}


@dataclass(frozen=True)
class CalibrationResult:
    """The p-values of one adapter, and the features that are farthest from benign (robust z)."""

    p: float
    one_class: float
    supervised: float | None
    outlier_features: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Benign adapters of one kind; `scores` are those that calibrate, ascending."""

    kind: PopulationKey
    names: tuple[str, ...]
    middle: np.ndarray  # (f), medians
    spread: np.ndarray  # (f), 1.4826 MAD
    precision: np.ndarray  # (f, f), of the standardized features
    scores: np.ndarray  # (n)
    weights: np.ndarray | None = None  # (f + 1), logistic regression and its constant
    supervised: np.ndarray | None = None  # (n)
    fewest: int = MIN_POPULATION
    triggers: np.ndarray | None = (
        None  # (m), the behavior gate's best scores of benign adapters, ascending
    )
    recipe: str = ""  # how and from which commit the population was trained

    @property
    def count(self) -> int:
        """Number of calibrating adapters."""
        return len(self.scores)

    @property
    def smallest_p(self) -> float:
        """The smallest possible p: a smaller alpha can never be reached."""
        return (1 if self.weights is None else 2) / (self.count + 1)

    def fits(self, kind: PopulationKey) -> bool:
        """Return whether an adapter of `kind` is comparable with these."""
        return kind == self.kind

    def trigger_limit(self, alpha: float) -> float | None:
        """Return the score that a ratio `alpha` of benign adapters exceeds; None for too few."""
        count = 0 if self.triggers is None else len(self.triggers)
        index_needed = int(np.ceil((count + 1) * (1 - alpha)))
        if self.triggers is None or count < self.fewest or index_needed > count:
            return None
        return float(self.triggers[index_needed - 1])

    def judge(self, features: Mapping[str, float]) -> CalibrationResult:
        """Return the p-values of an adapter with these features."""
        z = self._z(features)
        one = conformal(self.scores, self._distance(z))
        two = None
        if self.weights is not None and self.supervised is not None:
            two = conformal(self.supervised, float(z @ self.weights[:-1] + self.weights[-1]))
        p = one if two is None else min(1.0, 2 * min(one, two))
        far = np.argsort(np.abs(z))[::-1][:4]
        return CalibrationResult(p, one, two, tuple((self.names[i], float(z[i])) for i in far))

    def _z(self, features: Mapping[str, float]) -> np.ndarray:
        values = np.array([features[name] for name in self.names])
        return np.clip((values - self.middle) / self.spread, -CLIP, CLIP)

    def _distance(self, z: np.ndarray) -> float:
        return float(np.sqrt(max(z @ self.precision @ z, 0.0) / len(z)))

    def write(self, file: Path) -> None:
        """Return JSON, 6 digits per number."""

        def plain(array: np.ndarray | None) -> Any:
            return (
                None
                if array is None
                else np.vectorize(lambda x: float(f"{x:.6g}"))(array).tolist()
                if array.size
                else []
            )

        arrays = ("middle", "spread", "precision", "scores", "weights", "supervised", "triggers")
        about = {"format_version": 1, "recipe": self.recipe, "kind": self.kind.as_dict()}
        write_json(
            file,
            about
            | {"names": list(self.names), "fewest": self.fewest}
            | {name: plain(getattr(self, name)) for name in arrays},
        )

    @classmethod
    def read(cls, file: Path) -> "Calibration":
        """Return a calibration from disk; raise `AuditError` where it is damaged."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format_version"] != 1:
                what = f"a calibration of version {content['format_version']}"
                raise AuditError(what, where=str(file), hint="pip install -U afina")
            kind = PopulationKey(**{**content["kind"], "layers": tuple(content["kind"]["layers"])})
            middle, spread, precision, scores = (
                np.array(content[n]) for n in ("middle", "spread", "precision", "scores")
            )
            some = (
                None if content.get(n) is None else np.array(content[n])
                for n in ("weights", "supervised", "triggers")
            )
            weights, supervised, triggers = some
            names, fewest, recipe = (
                tuple(content["names"]),
                int(content["fewest"]),
                str(content.get("recipe", "")),
            )
            return cls(
                kind,
                names,
                middle,
                spread,
                precision,
                scores,
                weights,
                supervised,
                fewest,
                triggers,
                recipe,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AuditError(
                "this is no calibration", where=str(file), why=str(error)[:200]
            ) from error


def conformal(benign: np.ndarray, score: float) -> float:
    """Return (1 + number of benign scores >= score) / (n + 1)."""
    return float((1 + np.count_nonzero(benign >= score)) / (len(benign) + 1))


def calibrate(
    kind: PopulationKey,
    benign: Sequence[Mapping[str, float]],
    poisoned: Sequence[Mapping[str, float]] = (),
    seed: int = 0,
) -> Calibration:
    """Return a calibration from benign adapters of one kind: half fit the scores, half calibrate.

    Adapters with known attacks in `poisoned` add the supervised score.

    Raises:
        AuditError: There are fewer than four benign adapters.
    """
    if len(benign) < 4:
        raise AuditError(f"{len(benign)} benign adapters are too few to calibrate with")
    names = tuple(sorted(set.intersection(*(set(features) for features in (*benign, *poisoned)))))
    table = np.array([[features[name] for name in names] for features in benign])
    order = np.random.default_rng(seed).permutation(len(table))
    fit, kept_out = table[order[: len(table) // 2]], table[order[len(table) // 2 :]]
    middle = np.median(fit, 0)
    spread = 1.4826 * np.median(np.abs(fit - middle), 0)
    spread = np.where(spread > 0, spread, np.maximum(fit.std(0), 1e-9))
    z = np.clip((fit - middle) / spread, -CLIP, CLIP)
    covariance = np.cov(z, rowvar=False).reshape(len(names), len(names))
    covariance = (1 - SHRINK) * covariance + np.diag(SHRINK * np.diag(covariance) + 1e-3)
    calibrated = Calibration(kind, names, middle, spread, np.linalg.inv(covariance), np.zeros(0))
    as_rows = [dict(zip(names, row, strict=True)) for row in kept_out]
    scores = np.sort([calibrated._distance(calibrated._z(row)) for row in as_rows])
    weights = supervised = None
    if len(poisoned) >= 4:
        bad = np.stack([calibrated._z(features) for features in poisoned])
        weights = logistic(z, bad)
        supervised = np.sort(
            [float(calibrated._z(row) @ weights[:-1] + weights[-1]) for row in as_rows]
        )
    return Calibration(
        kind, names, middle, spread, calibrated.precision, scores, weights, supervised
    )


def logistic(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Return logistic regression weights `(f + 1)`, balanced classes, L2 penalty, constant last."""
    from scipy.optimize import minimize  # 40 MB, and only calibrating needs it

    x = np.concatenate([good, bad])
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    sign = np.concatenate([-np.ones(len(good)), np.ones(len(bad))])
    each = np.concatenate([np.full(len(good), 0.5 / len(good)), np.full(len(bad), 0.5 / len(bad))])
    penalty = np.append(np.full(x.shape[1] - 1, RIDGE / x.shape[1]), 0.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w)
        slope = -sign * each / (1 + np.exp(np.clip(margin, -500, 500)))
        return float(
            (each * np.logaddexp(0, -margin)).sum() + 0.5 * (penalty * w**2).sum()
        ), x.T @ slope + penalty * w

    return np.asarray(minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x)
