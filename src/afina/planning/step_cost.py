"""Peak memory and time of a training step, counted from the shape of a model and the code that runs on it.

With T tokens in a pass, L labels, d the width, f the feed-forward width, h the width of all heads, e bytes a number:

    kept by a fast block, a token    2 d      inputs of the two norms
                                     2 f      gate and up (swiglu makes their product again)
                                     h + 2 g  queries; keys and values, g the width of all their heads
                                     1        log-sums of attention, a head
                                     2 (h - g) + h + 1 more where it is PyTorch's: heads repeated, its output
                                     inputs   of adapted layers, once for those that read the same (q, k, v; gate, up)
                                     D        what each delta keeps besides (`Delta.cost`)
    kept where a block is recomputed d, until its turn comes, and then all the above of this one

Blocks below the first adapted one keep nothing. At its largest a step holds, besides libraries, weights and what is
learned (numbers, their copies in e bytes, float32 masters of 16-bit ones, moments), the most of:

    loss        what is kept + hidden states with a label and their gradients, 2 L d e + one chunk of logits
    backward    at each block: what it and those below it keep, gradients of those above it, what lives within it
    optimizer   gradients, those of masters in float32
    the end     the best adapter, read back and attached beside the last one; on a CPU over what the heap has come to

or what loading needs. A CPU's allocator leaves holes: SLACK is the share that they add to what is kept, HOLES to what
lives within a block, `Rates.heap` what the probe found over both.

Time is operations over the rates of this machine (`Rates`): products with the base forwards and, above the first adapted
layer, backwards (again for the weights' gradients where they are trained, again forwards with checkpointing); attention;
thin products of the deltas; NF4 written out at each product; passes over activations; the optimizer's; and what Python
and PyTorch take for a block, however little there is to compute.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from afina.adapters.base import AdapterLayer
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.adapters.target_selection import layer_index
from afina.kernels.cross_entropy import BLOCK_ROWS, CHUNK_ELEMENTS
from afina.kernels.dispatch import kernels
from afina.kernels.varlen_attention import WIDE
from afina.models.causal_lm import HEAD_CHUNK, SCORE
from afina.models.fast_llama import MLPS, NORMS
from afina.models.nf4 import quantizable_modules
from afina.planning.estimates import THIN, MachineRates, MemoryEstimate, TimeEstimate, Workload
from afina.planning.model_shape import AdapterSize, ModelShape
from afina.settings import TrainSettings
from afina.training.setup.adamw_8bit import SMALLEST

# C's malloc on Linux puts tensors of less than 32 MB side by side in one heap, and a hole is not always filled again;
# set by benchmarks/plan_fit.py
HEAP_SLACK, BACKWARD_FRAGMENTATION = 0.05, 3.25
PIECE = 1 << 20  # weights
STEP8, STEP8_PLAIN = 90.0, 2000.0  # 2.7 ns and 64 ns a number where a copy reads and writes 32 GB/s
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass
class _Block:
    """One block. Numbers a token, unless it is said otherwise."""

    matrices: float = 0.0  # weights in products
    largest: int = 0  # weights of the largest matrix
    norms: int = 0
    inner: int = 0  # width of the feed-forward
    inputs: int = 0  # kept for deltas
    keeps: int = 0
    thin: float = 0.0
    edges: int = 0  # inputs and outputs of adapted layers
    once: float = 0.0  # a pass
    trained: int = 0  # weights with gradients of their own
    passes: int = 0  # outputs of adapted layers
    learned: int = 0  # numbers with a gradient of the adapter, in all
    nf4: int = 0  # weights written out at each product
    works: float = 0.0  # of its deltas, while they work
    kept: float = 0.0  # for the backward pass
    flows: bool = False  # whether gradients flow through it


@dataclass(frozen=True)
class StepCost:
    """A training step on `shape`: what `settings` and an adapter of `count` numbers make of it, on a kind of device."""

    shape: ModelShape
    count: AdapterSize
    settings: TrainSettings
    quantization: str  # "none" or "nf4"
    device: str = "cpu"
    every: int = (
        0  # activations of each `every`-th block are made again in the backward pass; 0: of none
    )
    besides: float = 0.0  # bytes of what is there besides: frozen adapters, keys and values

    def with_checkpointing(self, every: int) -> "StepCost":
        """The same step with the activations of each `every`-th block made again."""
        other = replace(self, every=every)
        other.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name.startswith("_")}
        )  # what is known
        return other

    # ---- the model

    @property
    def _width(self) -> int:
        return int(self.shape.config.hidden_size)

    @property
    def _heads(self) -> tuple[int, int]:
        """(heads, width of all of them)."""
        config = self.shape.config
        heads = int(config.num_attention_heads)
        return heads, heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    @cached_property
    def _kind(self) -> type[AdapterLayer]:
        return get_method(self.count.config.method)

    @cached_property
    def _weights(self) -> tuple[float, float]:
        """Bytes of all weights as they are held, and of the largest tensor."""
        return float(self.shape.weight_bytes(self.quantization)), float(
            self.shape.largest(self.quantization)
        )

    @cached_property
    def _codes(self) -> set[str]:
        return set(quantizable_modules(self.shape.model)) if self.quantization == "nf4" else set()

    @cached_property
    def _blocks(self) -> list[_Block]:
        """The blocks, from the modules that they hold."""
        blocks = [_Block() for _ in range(self.shape.num_layers)]
        shared: set[tuple[str, int]] = set()
        for path, module in self.shape.model.named_modules():
            if (number := layer_index(path)) is None:
                continue
            block, layer, name = blocks[number], TargetModule(path, module), type(module).__name__
            if layer.is_matrix and not isinstance(module, nn.Embedding):
                self._add_matrix(block, layer, shared)
            elif "norm" in name.lower():
                block.norms += self._norm(path, module) * (
                    1 if name in NORMS else 1 + 12 // self.shape.dtype.itemsize
                )
            elif name in MLPS or name.endswith("MLP"):
                widest = max(
                    (
                        TargetModule("", m).out_features
                        for m in module.modules()
                        if TargetModule("", m).is_matrix
                    ),
                    default=0,
                )
                block.inner += widest if name in MLPS else 3 * widest
            else:  # experts in one tensor: each token passes some of them
                config = self.shape.config
                some = getattr(config, "num_experts_per_tok", 1) / (
                    getattr(config, "num_local_experts", None) or 1
                )
                block.matrices += min(1.0, some) * sum(
                    p.numel() for p in module.parameters(recurse=False) if p.ndim == 3
                )
        embedded = any(
            layer_index(path) is None and path not in self._output for path in self.count.layers
        )
        flows = embedded or bool(self.count.config.trainable_tokens)
        for number, block in enumerate(blocks):
            flows = flows or any(layer_index(path) == number for path in self.count.layers)
            block.flows = flows
        for path, numbers in self.count.layers.items():
            if (at := layer_index(path)) is not None:
                blocks[at].learned += numbers
        return blocks

    def _add_matrix(self, block: _Block, layer: TargetModule, shared: set[tuple[str, int]]) -> None:
        weights = layer.in_features * layer.out_features
        block.matrices += weights
        block.largest = max(block.largest, weights)
        block.nf4 += weights if layer.path in self._codes else 0
        if layer.path not in self.count.layers:
            return
        kind, (parent, _, leaf) = self._kind, layer.path.rpartition(".")
        cost = kind.layer_cost(layer, self.count.config, self.device)
        group = next((n for n, leaves in enumerate(SAME_INPUT) if leaf in leaves), None)
        if cost.saves_input and (group is None or (parent, group) not in shared):
            block.inputs += layer.in_features
            if group is not None:
                shared.add((parent, group))
        block.keeps += cost.saved_numel
        block.works = max(block.works, cost.workspace_numel)
        block.thin += cost.macs_per_token
        block.edges += layer.in_features + layer.out_features
        block.once += cost.macs_per_pass
        block.trained += weights if kind.replaces_base else 0
        block.passes += 0 if kind.replaces_base else layer.out_features

    def _norm(self, path: str, module: nn.Module) -> int:
        """Numbers a token that a norm reads: those of the heads are one norm for all."""
        own = sum(p.numel() for n, p in module.named_parameters(recurse=False) if n == "weight")
        return self._heads[1] if path.endswith(("q_norm", "k_norm")) and own < self._width else own

    @cached_property
    def _output(self) -> set[str]:
        """Paths above the blocks: the last norm, the output layer, a head of rewards."""
        head = self.shape.model.get_output_embeddings()
        above = {
            p
            for p, _ in self.shape.model.named_modules()
            if p == SCORE or ("norm" in p and layer_index(p) is None)
        }
        return above | {p for p, m in self.shape.model.named_modules() if m is head}

    @property
    def _head_adapted(self) -> bool:
        head = self.shape.model.get_output_embeddings()
        return bool(self.count.config.trainable_tokens) or any(
            self.shape.model.get_submodule(p) is head for p in self._listed
        )

    @property
    def _listed(self) -> list[str]:
        return [path for path in self.count.layers if path in self._output]

    # ---- memory

    def memory(
        self,
        load: Workload,
        libraries: float,
        heap: float = 1.0,
        gaps: tuple[float, float] = (HEAP_SLACK, BACKWARD_FRAGMENTATION),
    ) -> MemoryEstimate:
        """Bytes at the largest moment, in a process whose libraries take `libraries`; never less than it will be.

        `heap` is what this machine's allocator takes over what is counted here, as the probe found it; `gaps` are the
        shares of holes in what is kept and in what lives within a block (benchmarks/plan_fit.py sets them).
        """
        e, n, width = self.shape.dtype.itemsize, self.count.trainable, self.count.width
        cpu, masters = self.device == "cpu", self.count.width < 4
        learned = n * width + (4 * n if masters else 0) + (e * n if width > e else 0)
        slack, holes = (heap * (1.0 + share) if cpu else 1.0 for share in gaps)
        each = [load.tokens * e * slack * numbers for numbers in self._kept(load)]
        kept = sum(each)
        loss = slack * (
            e * self._width * (2 * load.labels + 3 * load.tokens) + self._chunk(load.labels)
        )
        within = (
            load.tokens * e * self._within(load) + self._packed
        ) * holes + 2 * slack * load.labels * self._width * e
        step = (
            n * max(width, 4) + self._optimizer_work
        )  # one gradient at a time goes over into float32
        moments = [
            kept + loss,
            step,
            2.0 * n * width,
            *self._backward(each, load.tokens * e * slack, within),
        ]
        weights, largest = self._weights
        end = (
            float(n * width) if cpu else 0.0
        )  # the best adapter is read when a heap is as large as it was
        made = MemoryEstimate(
            libraries,
            weights,
            learned,
            self._moments,
            kept,
            max(moments) - kept + end + self.besides,
        )
        missing = libraries + weights + largest - made.peak  # while it is loaded
        return replace(made, other=made.other + missing) if cpu and missing > 0 else made

    def _backward(self, each: list[float], unit: float, within: float) -> list[float]:
        """Bytes at the turn of each block in the backward pass: `each` kept by the blocks, `unit` a number of all tokens."""
        moments, kept, gradients = [], sum(each), float(self.count.width * self.count.trainable)
        gradients -= self.count.width * sum(
            block.learned for block in self._blocks
        )  # those above the blocks
        for number, block in reversed(list(enumerate(self._blocks))):
            if block.flows:
                again = unit * (block.kept - self._width) if self._recomputes(number) else 0.0
                gradients += self.count.width * block.learned
                moments.append(kept + again + gradients + within)
                kept -= each[number]
        return moments

    def _recomputes(self, number: int) -> bool:
        return bool(self.every) and number % self.every == 0

    def _kept(self, load: Workload) -> list[float]:
        """Numbers a token that each block keeps for the backward pass; `block.kept` are those without recomputation."""
        heads, width = self._heads
        logs = heads * 4 / self.shape.dtype.itemsize
        attention = 4.0 * width + 2 * logs
        if self.device == "cpu" and kernels.isa in WIDE:
            shared = int(getattr(self.shape.config, "num_key_value_heads", None) or heads)
            attention = width * (1 + 2 * shared / heads) + logs
        for block in self._blocks:
            own = block.norms + 2 * block.inner + block.inputs + block.keeps
            block.kept = own + load.attention_ratio * attention if block.flows else 0.0
        return [
            float(self._width) if block.flows and self._recomputes(number) else block.kept
            for number, block in enumerate(self._blocks)
        ]

    def _within(self, load: Workload) -> float:
        """Numbers a token that live within a block while its backward pass runs."""
        _, width = self._heads
        inner = max((b.inner for b in self._blocks if b.flows), default=0)
        works = max((b.works for b in self._blocks), default=0.0)
        return 3 * self._width + max(4 * inner + works, load.attention_ratio * 9 * width)

    @property
    def _packed(self) -> float:
        """Bytes of a weight written out for one product: dequantised, and put into blocks by the CPU's 16-bit products."""
        largest, e = max(b.largest for b in self._blocks), self.shape.dtype.itemsize
        once = any(
            b.once for b in self._blocks
        )  # deltas that read the weight themselves, a piece of it in float32
        copies = (self.quantization == "nf4") * (1 + once) + (self.device == "cpu" and e == 2)
        return largest * e * copies + once * 8.0 * min(largest, PIECE)

    def _chunk(self, labels: int) -> float:
        """Bytes of the logits that exist at a time."""
        vocabulary, e = int(self.shape.config.vocab_size), self.shape.dtype.itemsize
        if self._head_adapted:  # logits, in float32, their log-probabilities, both gradients
            return min(labels, HEAD_CHUNK) * vocabulary * (2 * e + 12.0)
        return vocabulary * (
            min(labels, max(16, CHUNK_ELEMENTS // vocabulary)) * e + min(labels, BLOCK_ROWS) * 12.0
        )

    @property
    def _moments(self) -> float:
        """Bytes of AdamW's two moments, on the device."""
        if self.settings.optimizer == "adamw":
            return 8.0 * self.count.trainable
        small = sum(n for n in self.count.layers.values() if n < SMALLEST)
        on_device = (
            0.0 if self.settings.optimizer.endswith("offloaded") and self.device != "cpu" else 1.0
        )
        return on_device * (8.0 * small + 2.04 * (self.count.trainable - small))

    @property
    def _optimizer_work(self) -> float:
        """Bytes of one tensor's step in 8 bits: float32 moments, gradient, value and what is between."""
        plain = self.settings.optimizer == "adamw" or self._steps_in_cache
        return 0.0 if plain else 24.0 * max(self.count.layers.values(), default=0)

    @property
    def _steps_in_cache(self) -> bool:
        """Whether moments of 8 bits are stepped in C++, a block at a time."""
        return self.device == "cpu" and kernels.library is not None

    # ---- time

    def time(self, load: Workload, rates: MachineRates) -> TimeEstimate:
        """Seconds of an optimizer step."""
        dtype = "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"
        tokens, e = load.mean_tokens, self.shape.dtype.itemsize
        rate = rates.rate(dtype, tokens)
        flowing = [b for b in self._blocks if b.flows]
        below = len(self._blocks) - len(flowing)
        # blocks are alike: each counts as recomputed for the share that is
        again = sum(self._recomputes(n) and b.flows for n, b in enumerate(self._blocks)) / max(
            1, len(flowing)
        )
        weights = sum(b.matrices for b in self._blocks) + sum(
            (1 + again) * b.matrices + b.trained for b in flowing
        )
        head = (
            self._width
            * int(self.shape.config.vocab_size)
            * load.mean_labels
            * (2 + 2 * self._head_adapted)
        )
        heads = (
            4
            * load.attention_ratio
            * tokens
            * load.mean_length
            * self._heads[1]
            * (below + (3.5 + again) * len(flowing))
        )
        thin = sum(b.thin for b in flowing) * tokens * (3 + again)
        once = sum(b.once for b in flowing) * (1 + again)
        passes = sum((3 + again) * self._passes(b) for b in flowing) + sum(
            self._passes(b) for b in self._blocks if not b.flows
        )
        codes = sum((2 + again) * b.nf4 for b in flowing) + sum(
            b.nf4 for b in self._blocks if not b.flows
        )
        optimizer = self.count.trainable * (self._moved + 14 * (self.count.width < 4))
        columns = sum(b.thin for b in flowing) / max(
            1, sum(b.edges for b in flowing)
        )  # of a thin product: the rank
        thin_rate = min(rate, rates.skinny_matmul_rates[dtype] * max(1.0, columns) / THIN)
        factor, many = rates.time_factor, load.num_micro_batches
        return TimeEstimate(
            products=factor
            * many
            * 2
            * (weights * tokens / rate + head / rates.rate(dtype, load.mean_labels)),
            attention=factor * many * heads / rates.attention_rate(dtype, load.mean_length),
            adapters=factor
            * many
            * 2
            * (thin / thin_rate + once / rates.skinny_matmul_rates["float32"]),
            dequantisation=many * codes / rates.dequantise,
            activations=factor * many * tokens * e * passes / rates.copy_bandwidth,
            optimizer=optimizer / rates.copy_bandwidth,
            overhead=many * rates.seconds_per_layer * (below / 3 + (1 + again / 3) * len(flowing)),
            overlaps=rates.overlaps,
        )

    @property
    def _moved(self) -> float:
        """Bytes that a number's step reads and writes, or could have in that time: codes take arithmetic too."""
        if self.settings.optimizer == "adamw":
            return 28.0
        return STEP8 if self._steps_in_cache else STEP8_PLAIN if self.device == "cpu" else 60.0

    def forward(self, load: Workload, rates: MachineRates) -> float:
        """Seconds of one pass without gradients, with the base's work alone: adapters' thin products are little beside it."""
        dtype = "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"
        tokens, blocks = load.mean_tokens, self._blocks
        head = self._width * int(self.shape.config.vocab_size) * load.mean_labels
        heads = 4 * load.attention_ratio * tokens * load.mean_length * self._heads[1] * len(blocks)
        products, factor = (
            sum(b.matrices for b in blocks) * tokens / rates.rate(dtype, tokens),
            rates.time_factor,
        )
        work = (
            factor * 2 * (products + head / rates.rate(dtype, load.mean_labels))
            + factor * heads / rates.attention_rate(dtype, load.mean_length)
            + sum(b.nf4 for b in blocks) / rates.dequantise
            + factor
            * tokens
            * self.shape.dtype.itemsize
            * sum(self._passes(b) for b in blocks)
            / rates.copy_bandwidth
        )
        python = rates.seconds_per_layer / 3 * len(blocks)
        return max(work, python) if rates.overlaps else work + python

    @property
    def cached(self) -> float:
        """Bytes of a token's keys and values in all blocks."""
        heads, width = self._heads
        groups = heads / int(getattr(self.shape.config, "num_key_value_heads", None) or heads)
        return 2.0 * width / groups * self.shape.dtype.itemsize * len(self._blocks)

    def _passes(self, block: _Block) -> float:
        """Numbers a token that the parts of a block besides its products read and write, forwards."""
        return 12 * self._width + 3 * block.inner + 6 * self._heads[1] + 2 * block.passes
