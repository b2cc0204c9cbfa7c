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

from afina.engine.memory import Memory
from afina.engine.pages import PAGE
from afina.engine.sequence import Sequence
from afina.errors import AdapterError

GENERATED = 2.0  # what a generated token counts, a token of the prompt being 1
LATER = 5.0  # seconds for which a request lets merged steps go on without it
PATIENCE = 50  # steps that a client is passed over for want of room before everybody else waits for it

Acting = tuple[str, float, int]  # content hash, weight, first token
Piece = tuple[Sequence, int]  # a sequence and how many of its next tokens


class Scheduler:
    """Queues by client, and the sequences that run. Only the engine's thread calls."""

    def __init__(self, memory: Memory, step_tokens: int, most_running: int) -> None:
        self.memory, self.step_tokens, self.most_running = memory, step_tokens, most_running
        self.queues: dict[str, deque[Sequence]] = {}
        self.running: list[Sequence] = []
        self.served: dict[str, float] = {}  # the virtual token counter of each client that waits or runs
        self.failed: list[tuple[Sequence, AdapterError]] = []  # whose adapter could not be loaded
        self.preemptions = 0
        self.waits: Callable[[Many[Acting]], bool] = lambda acting: False  # who had better wait a little (merged mode)
        self._later: dict[int, float] = {}  # since when a request, by its number, lets merged steps go on without it
        self._passed: dict[str, int] = {}  # steps for which a client's next request found no room
        memory.pool.moved = self._moved

    @property
    def waiting(self) -> int:
        """Requests in the queues."""
        return sum(map(len, self.queues.values()))

    def add(self, sequence: Sequence, again: bool = False) -> None:
        """Queue a sequence; one that goes back (`again`) stands first among its client's."""
        client = sequence.client
        if client not in self.served:  # who was away cannot have saved up turns
            self.served[client] = min(self.served.values(), default=0.0)
        queue = self.queues.setdefault(client, deque())
        queue.appendleft(sequence) if again else queue.append(sequence)
        for content in sequence.needed:
            self.memory.prefetch(content)

    # ---- the step

    def plan(self) -> list[Piece]:
        """The pieces of the next forward; none where nothing can run now. Pages for them are there."""
        pieces: list[Piece] = []
        for sequence in [s for s in self.running if s.left == 1]:
            if sequence.running and self._pages_up_to(sequence, sequence.computed + 1):
                pieces.append((sequence, 1))
        alone = not pieces  # nobody waits for this step: longer pieces are computed faster
        budget = self.step_tokens * (4 if alone else 1) - len(pieces)
        for sequence in [s for s in self.running if s.left > 1]:
            budget -= self._piece(sequence, budget, pieces)
        while budget > 0 and len(self.running) < self.most_running:
            admitted = self._next()
            if admitted is None:
                break
            budget -= self._piece(admitted, budget, pieces)
        return [piece for piece in pieces if piece[0].running]  # some may have been sent back for others

    def _piece(self, sequence: Sequence, budget: int, pieces: list[Piece]) -> int:
        """Add as much of a prompt as the budget and the free pages allow; returns the tokens."""
        count = min(sequence.left, budget)
        room = (len(sequence.pages) + self.memory.available) * PAGE - sequence.computed
        if room < count:
            count = max(min(room, count), 1 if not pieces else 0)
        if count <= 0 or not sequence.running or not self._pages_up_to(sequence, sequence.computed + count):
            return 0
        pieces.append((sequence, count))
        return count

    def _pages_up_to(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence pages for its first `tokens`; False where it had to go back itself."""
        while len(sequence.pages) * PAGE < tokens:
            page = self.memory.page()
            if page is not None:
                sequence.pages.append(page)
                continue
            youngest = max(self.running, key=lambda s: s.number)
            self._send_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _send_back(self, sequence: Sequence) -> None:
        self.leave(sequence)
        self.preemptions += 1
        self.add(sequence, again=True)

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence out; its shared pages stay in the tree."""
        self.running.remove(sequence)
        sequence.running = False
        self.memory.tree.leave(sequence.nodes)
        for page in sequence.pages[len(sequence.nodes) :]:
            self.memory.pool.give_back(page)
        for content in sequence.needed:
            self.memory.release(content.hash)
        sequence.pages, sequence.nodes, sequence.computed = [], [], 0

    # ---- admission

    def _next(self) -> Sequence | None:
        """Let the next request in: of the client that has had the least, among those for which there is room."""
        for client in sorted((c for c, q in self.queues.items() if q), key=lambda c: self.served[c]):
            sequence = self.queues[client][0]
            if self._better_later(sequence):
                continue
            if self._admit(sequence):
                self.queues[client].popleft()
                self._passed.pop(client, None)
                self._later.pop(sequence.number, None)
                return sequence
            if any(sequence is failed for failed, _ in self.failed):
                self.queues[client].popleft()
                return self._next()
            self._passed[client] = self._passed.get(client, 0) + 1
            if self._passed[client] > PATIENCE and self.running:
                return None
        return None

    def _better_later(self, sequence: Sequence) -> bool:
        """Whether merged steps go on for a while without it; once one such runs, the others may too."""
        if not self.running or not self.waits(sequence.acting) or any(self.waits(s.acting) for s in self.running):
            return False
        since = self._later.setdefault(sequence.number, time.monotonic())
        return time.monotonic() - since < LATER

    def _admit(self, sequence: Sequence) -> bool:
        """Bring in its adapters, take up what the prefix tree knows of it; False where there is no room now."""
        waits = [content for content in sequence.needed if not self.memory.ready(content)]
        if waits and self.running:  # the disk is being read meanwhile
            for content in waits:
                self.memory.prefetch(content)
            return False
        brought: list[str] = []
        try:
            for content in sequence.needed:
                if not self.memory.bring(content):
                    break
                brought.append(content.hash)
        except AdapterError as error:
            self.failed.append((sequence, error))
        pages = -(-len(sequence.tokens) // PAGE)
        enough = len(brought) == len(sequence.needed) and (self.memory.available >= pages or not self.running)
        if not enough:
            for digest in brought:
                self.memory.release(digest)
            return False
        whole = (len(sequence.tokens) - 1) // PAGE  # the last token is computed anew: its logits are wanted
        sequence.nodes = self.memory.tree.longest(sequence.keys(whole))
        sequence.pages = [node.page for node in sequence.nodes]
        sequence.computed = len(sequence.nodes) * PAGE
        sequence.cached = max(sequence.cached, sequence.computed) if not sequence.answer else sequence.cached
        sequence.running = True
        self.running.append(sequence)
        return True

    # ---- after the forward

    def done(self, pieces: list[Piece]) -> None:
        """Count what was computed, and share the pages that are full now."""
        for sequence, count in pieces:
            sequence.computed += count
            whole = sequence.computed // PAGE
            for key in sequence.keys(whole):
                at = len(sequence.nodes)
                parent = sequence.nodes[-1] if sequence.nodes else self.memory.tree.root
                node = self.memory.tree.add(parent, key, sequence.pages[at])
                if node.page != sequence.pages[at]:  # somebody else computed the same meanwhile
                    self.memory.pool.give_back(sequence.pages[at])
                    sequence.pages[at] = node.page
                sequence.nodes.append(node)
            decoding = sequence.answer > 0 and count == 1
            self.served[sequence.client] = self.served.get(sequence.client, 0.0) + (GENERATED if decoding else count)

    def tidy(self) -> None:
        """Forget the counters of clients that neither wait nor run."""
        present = {sequence.client for sequence in self.running} | {client for client, queue in self.queues.items() if queue}
        for client in [client for client in self.served if client not in present]:
            del self.served[client]
            self.queues.pop(client, None)
            self._passed.pop(client, None)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        self._later.pop(sequence.number, None)
        if sequence.running:
            self.leave(sequence)
        elif sequence in self.queues.get(sequence.client, ()):  # not one whose adapter failed: it is out already
            self.queues[sequence.client].remove(sequence)

    def _moved(self, old: int, new: int) -> None:
        self.memory.tree.moved(old, new)
        for sequence in self.running:
            if old in sequence.pages:
                sequence.pages[sequence.pages.index(old)] = new
