"""Masked language modeling: predict masked tokens, the way to pretrain an encoder.

    loss = - sum over masked positions of log p(token | the other tokens)   /   masked positions

15% of the tokens are masked: 80% of these by the mask token, 10% by a random one, 10% unchanged.
References: Devlin et al. 2018, arXiv 1810.04805.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import IGNORE_INDEX
from afina.data.schemas import SFT
from afina.data.several_files import mix_rows
from afina.data.table import read_table
from afina.models.classifier import Classifier, load_masked
from afina.objectives.base import Units, perplexity
from afina.objectives.labeled_data import (
    TokenizedText,
    check_encoder_settings,
    chunk_texts,
)
from afina.objectives.language_data import infer_objective
from afina.objectives.padded import EVAL_BATCH_TOKENS, PaddedBatch, PaddedObjective
from afina.objectives.prepared import (
    PreparedData,
    ShownExample,
    count_rows,
    describe_data,
    eval_source,
)
from afina.objectives.registry import register_objective
from afina.objectives.run_rows import hold_out_every_nth, read_files
from afina.settings import EvalSettings, TrainSettings

MASKED_RATIO = 0.15


@register_objective("mlm")
class MaskedLMObjective(PaddedObjective):
    """Prediction of masked tokens; eval rows are masked the same way each time."""

    units = Units("masked token")
    chunks_texts = True

    def next_command(self, folder: Path) -> str:
        """Return the command that merges the adapter into its encoder."""
        return f"afina merge {folder} --output-dir encoder"

    @classmethod
    def prepare(cls, settings: TrainSettings, base: Any = None) -> PreparedData:
        """Read, tokenize, check and split the texts; load the base."""
        check_encoder_settings(settings)
        table = read_files(settings, SFT)
        infer_objective("pretrain", table.rows)
        base = load_masked(
            settings.base,
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
        )
        length = settings.max_length or min(base.max_positions, 128)
        pieces = chunk_texts(base, table.rows, length)
        train, eval_rows = hold_out_every_nth(pieces, settings.eval_size, table)
        train = mix_rows(train, table.files, settings.seed)
        assert base.tokenizer is not None
        decode = base.tokenizer.decode
        tokens, accumulation = settings.max_tokens_per_batch, settings.gradient_accumulation_steps
        task = cls(base, train, eval_rows, tokens, accumulation, settings.seed)
        return PreparedData(
            task=task,
            data_info=describe_data(table, task),
            skipped=list(table.skipped),
            show=lambda row: ShownExample(
                row.where, len(row.token_ids), None, str(decode(row.token_ids))
            ),
            eval_records=[
                {"text": str(decode(t.token_ids, skip_special_tokens=True))} for t in eval_rows
            ],
            modules_to_save=base.new_modules,
            max_length=length,
            counts=count_rows(train, eval_rows),
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "MaskedLMObjective":
        """Return the objective with the texts that `afina eval` evaluates."""
        base: Classifier = opened.base  # type: ignore[assignment]
        file, columns = eval_source(settings)
        rows = read_table(file, SFT, columns).rows
        length = opened.run["settings"]["max_length"] or min(base.max_positions, 128)
        texts = chunk_texts(base, rows, length)
        objective = cls(base, texts, texts, EVAL_BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval rows (nats per masked token) and its perplexity."""
        loss = self.eval_loss(active)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def length(self, row: TokenizedText) -> int:
        """Return the tokens of a row."""
        return len(row.token_ids)

    def loss(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the cross-entropy over the masked tokens of a batch, in nats."""
        with self.base.forward_context.use(active.row_segments()):
            logits = self.base.token_logits(batch.inputs)
        targets = batch.targets[batch.inputs["attention_mask"].bool()]
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    def collate(self, rows: Sequence[TokenizedText], seed: int) -> PaddedBatch:
        """Return tokens, some of them masked, and the masked ones as targets `(rows, longest)`."""
        inputs = self.base.batch([row.token_ids for row in rows])
        tokenizer = self.base.tokenizer
        assert tokenizer is not None
        tokens, generator = inputs["input_ids"], torch.Generator().manual_seed(seed % (1 << 62))
        special = torch.isin(tokens.cpu(), torch.tensor(tokenizer.all_special_ids))
        masked = (torch.rand(tokens.shape, generator=generator) < MASKED_RATIO) & ~special
        if not masked.any():
            masked[0, 1] = True
        kind = torch.rand(tokens.shape, generator=generator)
        random_tokens = torch.randint(len(tokenizer), tokens.shape, generator=generator)
        shown = torch.where(
            kind < 0.8,
            tokenizer.mask_token_id,
            torch.where(kind < 0.9, random_tokens, tokens.cpu()),
        )
        targets = torch.where(masked, tokens.cpu(), IGNORE_INDEX).to(tokens.device)
        return PaddedBatch(
            inputs | {"input_ids": torch.where(masked, shown, tokens.cpu()).to(tokens.device)},
            targets,
        )
