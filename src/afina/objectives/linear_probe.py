"""A linear probe: a classifier's head fitted to the features of the frozen base.

    W, b = argmin  mean(-log softmax(W z + b)[class]) + penalty |W|^2,   z = (x - mean) / scale

Fine-tuning from a random head distorts the features while the head is still wrong; from the probe,
training only adds to what the base separates already (arXiv 2202.10054).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.attach import Adapter
from afina.io.atomic import write_json
from afina.io.strict_json import read_json_object
from afina.models.classifier import Classifier
from afina.objectives.padded import PaddedObjective

PROBE_FILE = "probe.json"
PENALTIES = (1e-4, 1e-3, 1e-2)
DEFAULT_PENALTY = 1e-3  # with fewer rows than MIN_ROWS_TO_CHOOSE
MIN_ROWS_TO_CHOOSE = 50
MAX_PROBE_ROWS = 10_000  # one forward pass over them takes a third of their training epoch
MAX_ITERATIONS = 100


def fit_linear_probe(
    features: Tensor, targets: Tensor, num_classes: int, with_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Return weight `(num_classes, width)` and bias `(num_classes,)` of logistic regression.

    The penalty is chosen on every fifth row, with the others fitted.

    Args:
        features: `(num_rows, width)`.
        targets: `(num_rows,)`, class indices.
        with_bias: Fit a bias; without it, features are not centered and the bias is zero.
    """
    x = features.float()
    mean = x.mean(0) if with_bias else torch.zeros_like(x[0])
    # The size of the features, not their deviation: where all rows look nearly the same, the
    # penalty then bounds how much small differences, and rounding with them, are amplified.
    scale = x.square().mean().sqrt().clamp_min(1e-6)
    z = (x - mean) / scale
    weight, bias = _fit(z, targets, num_classes, _best_penalty(z, targets, num_classes), with_bias)
    weight = weight / scale
    return weight, bias - weight @ mean


def _best_penalty(z: Tensor, targets: Tensor, num_classes: int) -> float:
    if len(z) < MIN_ROWS_TO_CHOOSE:
        return DEFAULT_PENALTY
    is_eval = torch.arange(len(z), device=z.device) % 5 == 0

    def eval_loss(penalty: float) -> float:
        weight, bias = _fit(z[~is_eval], targets[~is_eval], num_classes, penalty, True)
        return F.cross_entropy(z[is_eval] @ weight.T + bias, targets[is_eval]).item()

    return min(PENALTIES, key=eval_loss)


def _fit(
    z: Tensor, targets: Tensor, num_classes: int, penalty: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    weight = z.new_zeros(num_classes, z.shape[1]).requires_grad_()
    bias = z.new_zeros(num_classes).requires_grad_(with_bias)
    parameters = [weight, bias] if with_bias else [weight]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, targets) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


class ProbedObjective(PaddedObjective):
    """An objective whose new head begins as the linear probe of the frozen features."""

    # scores of the head that training began with
    probe: Mapping[str, float] = MappingProxyType({})
    probe_scores: ClassVar[tuple[str, ...]] = ("accuracy",)  # recorded of the probe, where known

    def initialize(self, adapter: Adapter) -> float | None:
        """Set a new head to the linear probe of the frozen features; return its eval loss."""
        if not self.fit_head(adapter):
            return None
        scores = self.evaluate(adapter.active)
        known = scores["classes"]
        names = [name for name in self.probe_scores if known.get(name) is not None]
        self.probe = {"loss": scores["loss"]} | {name: known[name] for name in names}
        return float(scores["loss"])

    def has_probe(self) -> bool:
        """Whether the head can be fitted by a logistic regression."""
        return True

    def probe_examples(self, path: str) -> tuple[Tensor, Tensor]:
        """Return what the head at `path` reads, `(n, width)`, and the class of each, `(n,)`."""
        raise NotImplementedError

    def fit_head(self, adapter: Adapter) -> bool:
        """Set a new head to the linear probe; return False where there is none to be set."""
        path = head_path(self.base)
        if path is None or self.options.head_init == "random" or not self.has_probe():
            return False
        features, targets = self.probe_examples(path)
        head: Any = adapter.layers[path]
        has_bias, num_outputs = getattr(head, "bias", None) is not None, len(self.base.labels)
        weight, bias = fit_linear_probe(features, targets.long(), max(2, num_outputs), has_bias)
        if num_outputs == 1:  # the sigmoid of a difference is the softmax of two
            weight, bias = weight.diff(dim=0), bias.diff(dim=0)
        with torch.no_grad():
            head.weight.copy_(weight)
            if has_bias:
                head.bias.copy_(bias)
        return True

    def start_run(self, folder: Path) -> None:
        """Record the scores of the linear probe, or read them where the run is resumed."""
        file = folder / PROBE_FILE
        if self.probe:
            write_json(file, self.probe)
        elif file.is_file():
            self.probe = read_json_object(file)


def head_path(base: Classifier) -> str | None:
    """Return the path of the new linear layer that gives the class scores; None without one."""
    for path in reversed(base.new_modules):
        module = base.model.get_submodule(path)
        module = getattr(module, "base", module)
        if isinstance(module, nn.Linear) and module.out_features == len(base.labels):
            return path
    return None


@torch.no_grad()
def head_features(base: Classifier, path: str, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return what the head at `path` reads, `(num_rows, width)` float32, adapters inactive.

    A decoder's head reads every position; the class is read off the last token.
    """
    parts = []
    for inputs in batches:
        features = _head_input(base, path, base.logits, inputs)
        if features.ndim == 3:
            last = inputs["attention_mask"].sum(1) - 1
            features = features[torch.arange(len(last), device=last.device), last]
        parts.append(features)
    return torch.cat(parts)


@torch.no_grad()
def token_features(base: Classifier, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the head at `path` reads of each token, `(num_tokens, width)` float32."""
    features = _head_input(base, path, base.token_logits, inputs)
    mask = inputs["attention_mask"].bool()
    return features[mask] if features.shape[:2] == mask.shape else features.flatten(0, -2)


def _head_input(
    base: Classifier,
    path: str,
    run: Callable[[dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
) -> Tensor:
    """Return the input of the module at `path` in one forward pass, float32."""
    seen: list[Tensor] = []
    hook = base.model.get_submodule(path).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].float())
    )
    try:
        run(inputs)
    finally:
        hook.remove()
    return seen[-1]
