"""Which tokens go into the next forward.

    running   decoding: one token each, always          then, as far as the step's tokens reach,
              the next piece of a long prompt
    waiting   from the client that has had the least    (virtual token counter, arXiv 2401.00588)

Nothing that runs waits for somebody's long prompt, nobody who floods the queue delays the others, and where pages run out
the youngest goes back to wait: its tokens are kept, its keys and values computed again.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many

from afina.engine.block_pool import BLOCK_SIZE
from afina.engine.memory import MemoryManager
from afina.engine.sequence import SequenceState
from afina.errors import AdapterError

DECODE_TOKEN_WEIGHT = 2.0  # what a generated token counts, a token of the prompt being 1
MAX_DEFER_SECONDS = 5.0  # seconds for which a request lets merged steps go on without it
MAX_SKIPPED_STEPS = (
    50  # steps that a client is passed over for want of room before everybody else waits for it
)

AdapterSpan = tuple[str, float, int]  # content hash, weight, first token
ScheduledChunk = tuple[SequenceState, int]  # a sequence and how many of its next tokens


class Scheduler:
    """Queues by client, and the sequences that run. Only the engine's thread calls."""

    def __init__(self, memory: MemoryManager, step_tokens: int, most_running: int) -> None:
        self.memory, self.max_num_batched_tokens, self.max_num_seqs = (
            memory,
            step_tokens,
            most_running,
        )
        self.waiting: dict[str, deque[SequenceState]] = {}
        self.running: list[SequenceState] = []
        self.virtual_tokens: dict[
            str, float
        ] = {}  # the virtual token counter of each client that waits or runs
        self.load_failures: list[
            tuple[SequenceState, AdapterError]
        ] = []  # whose adapter could not be loaded
        self.preemptions = 0
        self.should_defer: Callable[[Many[AdapterSpan]], bool] = lambda acting: (
            False
        )  # who had better wait a little (merged mode)
        self._later: dict[
            int, float
        ] = {}  # since when a request, by its number, lets merged steps go on without it
        self._passed: dict[str, int] = {}  # steps for which a client's next request found no room
        memory.pool.on_block_moved = self._moved

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return sum(map(len, self.waiting.values()))

    def add(self, sequence: SequenceState, again: bool = False) -> None:
        """Queue a sequence; one that goes back (`again`) stands first among its client's."""
        client = sequence.client_id
        if client not in self.virtual_tokens:  # who was away cannot have saved up turns
            self.virtual_tokens[client] = min(self.virtual_tokens.values(), default=0.0)
        queue = self.waiting.setdefault(client, deque())
        queue.appendleft(sequence) if again else queue.append(sequence)
        for content in sequence.required_adapters:
            self.memory.prefetch(content)

    # ---- the step

    def schedule(self) -> list[ScheduledChunk]:
        """The pieces of the next forward; none where nothing can run now. Pages for them are there."""
        pieces: list[ScheduledChunk] = []
        for sequence in [s for s in self.running if s.num_uncomputed_tokens == 1]:
            if sequence.running and self._pages_up_to(sequence, sequence.num_computed_tokens + 1):
                pieces.append((sequence, 1))
        alone = not pieces  # nobody waits for this step: longer pieces are computed faster
        budget = self.max_num_batched_tokens * (4 if alone else 1) - len(pieces)
        for sequence in [s for s in self.running if s.num_uncomputed_tokens > 1]:
            budget -= self._piece(sequence, budget, pieces)
        while budget > 0 and len(self.running) < self.max_num_seqs:
            admitted = self._next()
            if admitted is None:
                break
            budget -= self._piece(admitted, budget, pieces)
        return [
            piece for piece in pieces if piece[0].running
        ]  # some may have been sent back for others

    def _piece(self, sequence: SequenceState, budget: int, pieces: list[ScheduledChunk]) -> int:
        """Add as much of a prompt as the budget and the free pages allow; returns the tokens."""
        count = min(sequence.num_uncomputed_tokens, budget)
        room = (
            len(sequence.block_table) + self.memory.num_available_blocks
        ) * BLOCK_SIZE - sequence.num_computed_tokens
        if room < count:
            count = max(min(room, count), 1 if not pieces else 0)
        if (
            count <= 0
            or not sequence.running
            or not self._pages_up_to(sequence, sequence.num_computed_tokens + count)
        ):
            return 0
        pieces.append((sequence, count))
        return count

    def _pages_up_to(self, sequence: SequenceState, tokens: int) -> bool:
        """Give the sequence pages for its first `tokens`; False where it had to go back itself."""
        while len(sequence.block_table) * BLOCK_SIZE < tokens:
            page = self.memory.allocate_block()
            if page is not None:
                sequence.block_table.append(page)
                continue
            youngest = max(self.running, key=lambda s: s.seq_id)
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def preempt(self, sequence: SequenceState) -> None:
        """Free the blocks of a running sequence and return it to the front of its queue."""
        self.free_blocks(sequence)
        self.preemptions += 1
        self.add(sequence, again=True)

    def free_blocks(self, sequence: SequenceState) -> None:
        """Take a running sequence out; its shared pages stay in the tree."""
        self.running.remove(sequence)
        sequence.running = False
        self.memory.tree.release(sequence.prefix_nodes)
        for page in sequence.block_table[len(sequence.prefix_nodes) :]:
            self.memory.pool.free(page)
        for content in sequence.required_adapters:
            self.memory.release(content.hash)
        sequence.block_table, sequence.prefix_nodes, sequence.num_computed_tokens = [], [], 0

    # ---- admission

    def _next(self) -> SequenceState | None:
        """Let the next request in: of the client that has had the least, among those for which there is room."""
        for client in sorted(
            (c for c, q in self.waiting.items() if q), key=lambda c: self.virtual_tokens[c]
        ):
            sequence = self.waiting[client][0]
            if self._better_later(sequence):
                continue
            if self._admit(sequence):
                self.waiting[client].popleft()
                self._passed.pop(client, None)
                self._later.pop(sequence.seq_id, None)
                return sequence
            if any(sequence is failed for failed, _ in self.load_failures):
                self.waiting[client].popleft()
                return self._next()
            self._passed[client] = self._passed.get(client, 0) + 1
            if self._passed[client] > MAX_SKIPPED_STEPS and self.running:
                return None
        return None

    def _better_later(self, sequence: SequenceState) -> bool:
        """Whether merged steps go on for a while without it; once one such runs, the others may too."""
        if (
            not self.running
            or not self.should_defer(sequence.adapter_spans)
            or any(self.should_defer(s.adapter_spans) for s in self.running)
        ):
            return False
        since = self._later.setdefault(sequence.seq_id, time.monotonic())
        return time.monotonic() - since < MAX_DEFER_SECONDS

    def _admit(self, sequence: SequenceState) -> bool:
        """Bring in its adapters, take up what the prefix tree knows of it; False where there is no room now."""
        waits = [
            content for content in sequence.required_adapters if not self.memory.is_ready(content)
        ]
        if waits and self.running:  # the disk is being read meanwhile
            for content in waits:
                self.memory.prefetch(content)
            return False
        brought: list[str] = []
        try:
            for content in sequence.required_adapters:
                if not self.memory.load(content):
                    break
                brought.append(content.hash)
        except AdapterError as error:
            self.load_failures.append((sequence, error))
        pages = -(-len(sequence.token_ids) // BLOCK_SIZE)
        enough = len(brought) == len(sequence.required_adapters) and (
            self.memory.num_available_blocks >= pages or not self.running
        )
        if not enough:
            for digest in brought:
                self.memory.release(digest)
            return False
        whole = (
            len(sequence.token_ids) - 1
        ) // BLOCK_SIZE  # the last token is computed anew: its logits are wanted
        sequence.prefix_nodes = self.memory.tree.match(sequence.block_keys(whole))
        sequence.block_table = [node.page for node in sequence.prefix_nodes]
        sequence.num_computed_tokens = len(sequence.prefix_nodes) * BLOCK_SIZE
        sequence.num_cached_tokens = (
            max(sequence.num_cached_tokens, sequence.num_computed_tokens)
            if not sequence.num_completion_tokens
            else sequence.num_cached_tokens
        )
        sequence.running = True
        self.running.append(sequence)
        return True

    # ---- after the forward

    def update_after_step(self, pieces: list[ScheduledChunk]) -> None:
        """Count what was computed, and share the pages that are full now."""
        for sequence, count in pieces:
            sequence.num_computed_tokens += count
            whole = sequence.num_computed_tokens // BLOCK_SIZE
            for key in sequence.block_keys(whole):
                at = len(sequence.prefix_nodes)
                parent = (
                    sequence.prefix_nodes[-1] if sequence.prefix_nodes else self.memory.tree.root
                )
                node = self.memory.tree.insert(parent, key, sequence.block_table[at])
                if (
                    node.page != sequence.block_table[at]
                ):  # somebody else computed the same meanwhile
                    self.memory.pool.free(sequence.block_table[at])
                    sequence.block_table[at] = node.page
                sequence.prefix_nodes.append(node)
            decoding = sequence.num_completion_tokens > 0 and count == 1
            self.virtual_tokens[sequence.client_id] = self.virtual_tokens.get(
                sequence.client_id, 0.0
            ) + (DECODE_TOKEN_WEIGHT if decoding else count)

    def forget_idle_clients(self) -> None:
        """Forget the counters of clients that neither wait nor run."""
        present = {sequence.client_id for sequence in self.running} | {
            client for client, queue in self.waiting.items() if queue
        }
        for client in [client for client in self.virtual_tokens if client not in present]:
            del self.virtual_tokens[client]
            self.waiting.pop(client, None)
            self._passed.pop(client, None)

    def abort(self, sequence: SequenceState) -> None:
        """Take a sequence out, wherever it is."""
        self._later.pop(sequence.seq_id, None)
        if sequence.running:
            self.free_blocks(sequence)
        elif sequence in self.waiting.get(
            sequence.client_id, ()
        ):  # not one whose adapter failed: it is out already
            self.waiting[sequence.client_id].remove(sequence)

    def _moved(self, old: int, new: int) -> None:
        self.memory.tree.moved(old, new)
        for sequence in self.running:
            if old in sequence.block_table:
                sequence.block_table[sequence.block_table.index(old)] = new
