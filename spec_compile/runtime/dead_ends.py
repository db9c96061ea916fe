"""Rows that cannot go on, and what is raised when plain ``generate()`` would come to the token that cannot be made."""

from __future__ import annotations

from spec_compile.errors import PositionError, SamplingError
from spec_compile.hf_integration.generate import GenerateCall
from spec_compile.runtime.decode import RoundResult
from spec_compile.runtime.engine import Request

_KEPT = "What was generated until here is in model.spec.partial_sequences()."


def dead_ends(result: RoundResult, request: Request, call: GenerateCall, num_positions: int | None) -> dict[int, Exception]:
    """Rows that a round has brought to such a token, and why.

    Args:
        num_positions: of the model, None for any number; ``request.end_len`` ends rows behind them.
    """
    ends: dict[int, Exception] = {row: _no_distribution(row, call) for row in result.no_distribution}
    if num_positions is None:
        return ends
    padded = call.input_ids.shape[1]
    for row, new in enumerate(result.tokens):
        asked = call.prompt_lens[row] + call.max_length - padded
        cut = result.finished[row] and request.end_len[row] < asked and row not in ends
        if new and cut and new[-1] not in call.eos_ids:
            ends[row] = PositionError(f"row {row} has {request.end_len[row]} tokens, and {_too_few(num_positions)} {_KEPT}")
    return ends


def check_prompts(call: GenerateCall, num_positions: int | None) -> None:
    """Raise before anything is computed where a prompt is longer than the model has positions.

    Raises:
        PositionError: as plain ``generate()`` raises an IndexError.
    """
    longest = max(call.prompt_lens)
    if num_positions is not None and longest > num_positions:
        raise PositionError(f"a prompt has {longest} tokens, and {_too_few(num_positions)} Cut it, or use a model with more.")


def _too_few(num_positions: int) -> str:
    return (
        f"the model has position embeddings for {num_positions}: it cannot read more (plain generate() raises an IndexError). "
        f"Set max_length={num_positions + 1}, which is the longest text it can make."
    )


def _no_distribution(row: int, call: GenerateCall) -> SamplingError:
    return SamplingError(
        f"row {row} cannot be sampled any further: the probabilities of its next token are not finite, because the model's "
        f"logits are NaN or infinite, or become so when they are divided by temperature={call.temperature:g}. Plain generate() "
        "raises here too. Look for NaN in the weights and for overflow in the model's dtype, or raise the temperature; "
        f"remove_invalid_values=True samples regardless. {_KEPT}"
    )
