"""Mitigations of a LoRA adapter that an audit did not approve, module by module.

With D = B A, the update of one module:

    truncate   the smallest singular directions left out: the ratio `strength` of the rank
    scale      (1 - strength) D
    blend      (1 - strength) D + strength * mean of the benign adapters' updates
    project    D = Q z with z = R A x. A direction of z whose energy is g times as large on prompts
               with the trigger as on prompts without it is scaled by 1 / (1 + l (g - 1)), with
               l = strength / (1 - strength); directions with g <= 1 stay as they are

For `project`, g and its directions are the generalized eigenpairs of the second moments of z, with
the trigger (W) and without it (C): W v = g C v. Of all such filters, L V f V^T L^-1 with C = L L^T
changes the output on clean prompts least.

References:
    Zhang et al., Fine-mixing, 2022 (arXiv 2210.09545), for `blend`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from afina.adapters.active import ActiveAdapters
from afina.data.renderer import Example
from afina.merging.low_rank import LowRankUpdate, concatenate, truncate
from afina.merging.sources import AdapterSource
from afina.merging.write import LoRATensorLayout, tensor_layout
from afina.models.causal_lm import CausalLM

Mitigation = Literal["truncate", "scale", "blend", "project"]
# names in afina.json, which is hashed and signed: those of version 0.1
RECORDED_NAMES: dict[Mitigation, str] = {
    "truncate": "cut",
    "scale": "scale",
    "blend": "mix",
    "project": "remove",
}
RIDGE = 1e-3  # times the mean clean moment, added for directions without energy
BATCH = 4096  # tokens in one pass
# tried where no strength is given
STRENGTHS: dict[Mitigation, tuple[float, ...]] = {
    "project": (0.2, 0.5, 0.8, 0.95, 0.99),
    "blend": (0.25, 0.5, 0.75),
    "scale": (0.1, 0.25, 0.5, 0.75),
    "truncate": (0.25, 0.5, 0.75),
}


@dataclass(frozen=True)
class TriggeredExample:
    """Row with the trigger, answered with the payload; tokens before `start` are unchanged."""

    example: Example
    start: int


@dataclass(frozen=True)
class MomentPair:
    """Mean of z z^T `(r, r)` at a module, float64: on clean prompts, and from the trigger on."""

    clean: Tensor
    woken: Tensor


def mitigate_layer(
    mitigation: Mitigation,
    strength: float,
    source: AdapterSource,
    benign: Sequence[AdapterSource] = (),
    moments: Mapping[str, MomentPair] | None = None,
) -> Iterator[tuple[str, LowRankUpdate, LoRATensorLayout]]:
    """Yield path, update and tensor layout of each module of `source` after a mitigation.

    Args:
        mitigation: Which mitigation.
        strength: From 0 (unchanged) to 1 (no update left).
        source: The adapter.
        benign: Benign adapters of `blend`.
        moments: Second moments of `project`, by module; a module without them stays as it is.
    """
    for path in source.config.target_modules:
        low = source.low_rank_update(path)
        assert low is not None
        if mitigation == "truncate":
            low = truncate(low, max(1, round((1 - strength) * low.rank))).low
        elif mitigation == "scale":
            low = LowRankUpdate((1 - strength) * low.b, low.a)
        elif mitigation == "blend":
            others = [
                other
                for adapter in benign
                if path in adapter.config.target_modules
                and (other := adapter.low_rank_update(path)) is not None
            ]
            low = concatenate(
                [(low, 1 - strength), *((other, strength / len(benign)) for other in others)]
            )
        elif moments is not None and path in moments:
            q, r = torch.linalg.qr(low.b)
            low = LowRankUpdate(q @ weakening(moments[path], strength) @ r, low.a)
        yield path, low, tensor_layout(path, [source])


def weakening(moments: MomentPair, strength: float) -> Tensor:
    """Return the filter `(r, r)` of `project`; the identity at strength 0."""
    eye = torch.eye(len(moments.clean), dtype=torch.float64)
    ridge = RIDGE * moments.clean.trace() / len(eye) + 1e-30
    root = torch.linalg.cholesky(moments.clean + ridge * eye)
    half = torch.linalg.solve_triangular(root, moments.woken + ridge * eye, upper=False)
    g, v = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    excess = (g - 1).clamp_min(0.0)
    f = (1 - strength) / ((1 - strength) + strength * excess)
    return root @ (v * f) @ torch.linalg.solve_triangular(root.T, v, upper=True).T


@torch.no_grad()
def collect_moments(
    base: CausalLM,
    active: ActiveAdapters,
    source: AdapterSource,
    clean: Sequence[Example],
    woken: Sequence[TriggeredExample],
) -> dict[str, MomentPair]:
    """Return the moments of z at each plain matrix module of `source`, which `active` activates."""
    found: dict[str, dict[str, Tensor]] = {}
    counts = {"clean": 0, "woken": 0}
    state: dict[str, object] = {}
    hooks = []
    for path in source.config.target_modules:
        low, form = source.low_rank_update(path), tensor_layout(path, [source])
        if low is None or form != LoRATensorLayout():
            continue
        to_z = (torch.linalg.qr(low.b)[1] @ low.a).to(base.device, torch.float32)

        def see(
            _: nn.Module, inputs: tuple[Tensor, ...], path: str = path, to_z: Tensor = to_z
        ) -> None:
            kept = inputs[0].flatten(0, -2)[state["kept"]].float() @ to_z.T  # type: ignore[index]
            sums = found.setdefault(path, {})
            name = str(state["name"])
            sums[name] = sums.get(name, 0) + (kept.T @ kept).double().cpu()

        hooks.append(base.model.get_submodule(path).register_forward_pre_hook(see))
    try:
        for name, rows in (
            ("clean", [(e.token_ids, 0) for e in clean]),
            ("woken", [(w.example.token_ids, w.start) for w in woken]),
        ):
            for part in _parts(rows):
                tokens, positions, bounds, kept = _flat(part, base)
                state |= {"name": name, "kept": kept}
                counts[name] += len(kept)
                with base.forward_context.use(active.segments(tokens, bounds)):
                    base.hidden_states(tokens, positions, bounds)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        path: MomentPair(s["clean"] / counts["clean"], s["woken"] / counts["woken"])
        for path, s in found.items()
    }


def _parts(rows: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    part: list[tuple[list[int], int]] = []
    for row in rows:
        if part and sum(len(tokens) for tokens, _ in part) + len(row[0]) > BATCH:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _flat(
    rows: Sequence[tuple[list[int], int]], base: CausalLM
) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor]:
    """Return (tokens, positions, bounds, indices of the tokens that count) of some rows."""
    tokens: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    bounds = [0]
    for row, start in rows:
        kept += range(len(tokens) + start, len(tokens) + len(row))
        tokens += row
        positions += range(len(row))
        bounds.append(len(tokens))
    on = base.device
    return (
        torch.tensor(tokens, device=on),
        torch.tensor(positions, device=on),
        tuple(bounds),
        torch.tensor(kept, device=on),
    )
