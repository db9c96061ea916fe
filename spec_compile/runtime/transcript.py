"""From rows that advance at their own pace to the output, streamer calls and stopping checks of plain ``generate()``.

transformers' loop sees one token of every row at a time: streamers are handed a column, stopping criteria the text so far.
Rounds emit ragged runs of tokens, so columns are replayed here, each when its slowest live row has reached it. What a
criterion cuts off was computed for nothing, never shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList

from spec_compile.hf_integration.generate import GenerateCall


class Transcript:
    """Collects a call's tokens.

    Args:
        compiling: seconds that this call has spent on making graphs, which ``max_time`` does not count: it limits generating.
        away: what code of the caller's runs in: criteria, streamer, logits processors.

    Attributes:
        rows: per row, its new tokens so far.
        counts: per row, how many of its tokens the caller gets: no padding, nothing that a criterion cut off.
    """

    def __init__(
        self,
        call: GenerateCall,
        compiling: Callable[[], float] = lambda: 0.0,
        away: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.call, self._compiling, self.away = call, compiling, away
        self._criteria, self._clocks = _own_clocks(call.stopping_criteria)
        batch, self.prompt_len = call.input_ids.shape
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.counts = [0] * batch
        self.finished = [False] * batch  # by end-of-sequence or length, as the device reports it
        self.dead_ends: dict[int, Exception] = {}  # rows that cannot go on, and what plain generate() would raise there
        self.shown = 0  # columns replayed
        self.text = call.input_ids  # [B, P + shown]
        self.unfinished = torch.ones(batch, dtype=torch.long, device=call.input_ids.device)
        self.ended = [False] * batch  # the same on the host

    def extend(self, tokens: list[list[int]], finished: list[bool], dead_ends: dict[int, Exception] | None = None) -> bool:
        """Add a round's tokens, row by row; True when the call is complete.

        Args:
            dead_ends: rows whose next token cannot be made, and why. The reason is raised when plain ``generate()`` would come
                to that token: rows that lag behind get as far first, and a criterion may end the call before.
        """
        for row, new in zip(self.rows, tokens, strict=True):
            row += new
        self.dead_ends |= dead_ends or {}
        self.finished = [done and row not in self.dead_ends for row, done in enumerate(finished)]
        complete = self._show()
        if self.dead_ends and not complete:
            self._raise_dead_end()
        return complete

    def _show(self) -> bool:
        """Replay the columns that are complete; True when the call is."""
        if not self.call.per_token:
            self.counts = [len(row) for row in self.rows]
            if all(self.finished):
                self._ask_length()
            return all(self.finished)
        while self._column_ready():
            column = torch.tensor([self._token(i) for i in range(len(self.rows))], device=self.text.device)
            if self.append(column, None):
                return True
        return False

    def _raise_dead_end(self) -> None:
        first = min(self.dead_ends, key=lambda row: len(self.rows[row]))
        if all(done or len(row) >= len(self.rows[first]) for row, done in zip(self.rows, self.finished, strict=True)):
            raise self.dead_ends[first]

    def _ask_length(self) -> None:
        """Ask the length criteria of a call whose end the device found: they log transformers' reminder about texts that are
        longer than the model's ``max_position_embeddings``."""
        length = self.prompt_len + max(self.counts)
        for criterion in self.call.stopping_criteria:
            if type(criterion) is MaxLengthCriteria:  # it says nothing at its own end
                criterion(self.text.new_empty(1, max(min(length, math.ceil(criterion.max_length) - 1), 0)), None)

    def _column_ready(self) -> bool:
        live = [len(row) for row, done in zip(self.rows, self.finished, strict=True) if not done]
        return self.shown < (min(live) if live else max(len(row) for row in self.rows))

    def _token(self, row: int) -> int:
        if (self.call.has_eos and self.ended[row]) or self.shown >= len(self.rows[row]):
            return self.call.pad_id if self.call.pad_id is not None else 0
        return self.rows[row][self.shown]

    def append(self, column: Tensor, scores: tuple | None) -> bool:
        """Show one token of every row (int64 [B]) to criteria and then to the streamer, as transformers' loop does; True at the
        end."""
        self.text = torch.cat([self.text, column[:, None]], 1)
        self.shown += 1
        self.counts = [n + (not (end and self.call.has_eos)) for n, end in zip(self.counts, self.ended, strict=True)]
        for clock, started in self._clocks:
            clock.initial_timestamp = started + self._compiling()
        with self.away():
            self.unfinished = self.unfinished & ~self._criteria(self.text, scores)
            if self.call.streamer is not None:
                self.call.streamer.put(column.cpu())
        self.ended = [not live for live in self.unfinished.tolist()]
        return all(self.ended)

    def sequences(self) -> Tensor:
        """int64 [B, P + longest row], as ``generate()`` returns it; complete even after an error mid-way."""
        if self.call.per_token or self.call.exact_order:
            return self.text
        longest = max(len(row) for row in self.rows)
        pad = self.call.pad_id if self.call.pad_id is not None else 0
        new = torch.tensor(
            [row + [pad] * (longest - len(row)) for row in self.rows], dtype=torch.int64, device=self.text.device
        )
        return torch.cat([self.call.input_ids, new.view(len(self.rows), longest)], 1)


def _own_clocks(criteria: StoppingCriteriaList) -> tuple[StoppingCriteriaList, list[tuple[MaxTimeCriteria, float]]]:
    """``criteria`` with copies of those that limit the time, and these with their starts: they can be put forward."""
    own = [copy.copy(c) if type(c) is MaxTimeCriteria else c for c in criteria]
    return StoppingCriteriaList(own), [(c, c.initial_timestamp) for c in own if type(c) is MaxTimeCriteria]
