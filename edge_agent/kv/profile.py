"""What each layer of a model bears, measured on calibration text when its bundle was made (methods.md 1.2)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Figures = Annotated[tuple[Annotated[float, Meta(ge=0)], ...], Meta(max_length=512)]


class Profile(Struct, frozen=True, kw_only=True):
    """One figure for each layer, means over passages of so many tokens, measured with float32 weights.

    error: E_l of eq. 4, ‖K - K̂‖² + ‖V - V̂‖² of a context with whole tensors at 4 bits.
    divergence: KL in nats along the uncompressed answers (of so many positions) when this layer alone is at 4 bits.
    attention: the share of attention on the context (see `selection.attention_on_context`).
    """

    passages: Annotated[int, Meta(ge=1)]
    tokens: Annotated[int, Meta(ge=1)]
    answer_positions: Annotated[int, Meta(ge=1)]
    error: Figures
    divergence: Figures
    attention: Figures
