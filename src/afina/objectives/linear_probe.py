"""A linear probe: a classifier's head fitted to the features of the frozen base.

    W, b = argmin  mean(-log softmax(W z + b)[class]) + penalty |W|^2,   z = (x - mean) / scale

Fine-tuning from a random head distorts the features while the head is still wrong; from the probe,
training only adds to what the base separates already (arXiv 2202.10054).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.models.classifier import Classifier

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
    seen: list[Tensor] = []
    hook = base.model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].float())
    )
    try:
        for inputs in batches:
            base.logits(inputs)
            if seen[-1].ndim == 3:
                last = inputs["attention_mask"].sum(1) - 1
                seen[-1] = seen[-1][torch.arange(len(last), device=last.device), last]
    finally:
        hook.remove()
    return torch.cat(seen)
