"""How a bundle's graph compares with the export it was made from, and its weights with float32 ones."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.kv.cache import Float32
from edge_agent.model.manifest import Precision
from edge_agent.model.session import Model, Runtime
from scripts.prepare_model.errors import ExportFailed
from scripts.prepare_model.export_graph import ExportGraph
from scripts.relay import log_softmax

LARGEST_LOGIT_DIFFERENCE = 2e-2
"""Between logits of the export and of the rewritten graph in float32, whose spread is 3 to 10."""

CHECKED_TOKENS = 640
"""Past 512, where sliding windows begin to hide what came first."""


def compare(export: ExportGraph, bundle: Path, ids: Sequence[int]) -> tuple[float, int]:
    """Largest difference of the logits of a text between an export and the graph rewritten from it, and its tokens.

    Raises ExportFailed if it is larger than rounding explains.
    """
    model = _model(bundle)
    ids = list(ids[: min(CHECKED_TOKENS, model.manifest.window_tokens)])
    export.restart()
    live, worst = model.new_context(), 0.0
    theirs = export.run(np.array([ids], dtype=np.int64))[0]
    for last, chunk in live.chunks(ids):
        ours = live.step(chunk, logits="all")
        worst = float(np.maximum(worst, np.abs(ours - theirs[last - len(chunk) : last]).max()))  # keeps a NaN
    if not worst <= LARGEST_LOGIT_DIFFERENCE:
        raise ExportFailed(
            f"the rewritten graph differs from the export: largest logit difference {worst:.3g} over {len(ids)} "
            f"tokens, at most {LARGEST_LOGIT_DIFFERENCE:g} is accepted"
        )
    return worst, len(ids)


def report(weights: str, bundle: Path, reference: Path, texts: Sequence[Sequence[int]], *, given: int) -> Precision:
    """Perplexity of texts (token ids) under a bundle's graph, beside the float32 one at `reference`.

    The first `given` tokens of each (the prompt's prefix) are read, but not counted.
    """
    start = time.perf_counter()
    model = _model(bundle)
    load_s = time.perf_counter() - start
    exact = _model(reference) if bundle != reference else model
    nll = kl = agreeing = 0.0
    tokens = 0
    for ids in texts:
        ours = _log_likelihoods(model, ids)[given - 1 :]
        theirs = ours if exact is model else _log_likelihoods(exact, ids)[given - 1 :]
        following = np.asarray(ids[given:])
        nll -= float(ours[np.arange(len(following)), following].sum())
        kl += float((np.exp(theirs) * (theirs - ours)).sum())
        agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(following)
    return Precision(
        weights=weights,
        size_bytes=sum(path.stat().st_size for path in bundle.glob("model.onnx*")),
        load_s=round(load_s, 3),
        tokens=tokens,
        nll_nats=round(nll / tokens, 6),
        kl_nats=round(max(0.0, kl / tokens), 9),
        agreement=round(agreeing / tokens, 6),
    )


def _model(bundle: Path) -> Model:
    return Model(bundle, Runtime(threads=os.cpu_count() or 1))


def _log_likelihoods(model: Model, ids: Sequence[int]) -> NDArray[np.float64]:
    """Log likelihoods (tokens - 1, vocabulary) of what follows each token but the last."""
    rows: Float32 = model.new_context().prefill(ids[:-1], all_logits=True)
    return log_softmax(rows)
