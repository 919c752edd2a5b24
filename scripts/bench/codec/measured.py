"""What the codec's bench has found."""

from __future__ import annotations

from msgspec import Struct

from scripts.bench.measure import Timed
from scripts.bench.runtime.measured import Absent


class Loss(Struct, frozen=True, kw_only=True):
    """kl: nats, mean over the answers' positions; agreement: share of them with the uncompressed run's argmax."""

    kl: float
    agreement: float


class CodecRow(Struct, frozen=True, kw_only=True):
    """One rung or peer. share_of_prefill: encode plus decode over the prefill of the same tokens, in the same run."""

    name: str
    bits_per_element: float
    loss: Loss
    encode: Timed
    decode: Timed
    share_of_prefill: float


class StageRow(Struct, frozen=True, kw_only=True):
    """One rung's stages, and encode and decode as a whole, with header, digests and joined slices."""

    name: str
    quantize: Timed
    pack: Timed
    encode: Timed
    unpack: Timed
    dequantize: Timed
    decode: Timed


class CodecBench(Struct, frozen=True, kw_only=True):
    """threads: of a model run and of matrix products. cache_mb: its elements as float32, 10^6 bytes.

    questions, answer_positions: what losses rest on. versions: of the packages of peers.
    """

    tokens: int
    threads: int
    cache_mb: float
    questions: int
    answer_positions: int
    prefill: Timed
    rows: tuple[CodecRow, ...]
    stages: tuple[StageRow, ...]
    absent: tuple[Absent, ...]
    versions: dict[str, str]

    def mb_per_s(self, timed: Timed) -> float:
        """The cache's float32 size over the median."""
        return self.cache_mb / timed.median_s
