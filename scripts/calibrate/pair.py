"""The calibration of two bundles, over the same texts in both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edge_agent.errors import CalibrationInvalid
from edge_agent.kv.cache import Cache
from edge_agent.kv.calibration import Calibration, Kind, Side, kind_for, moments, pair
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from scripts import relay


def calibrate(
    sender: Path,
    receiver: Path,
    texts: Sequence[str],
    *,
    kind: Kind | None = None,
    threads: int = 0,
    on_passage: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """The calibration for caches of the bundle `sender` at the bundle `receiver`.

    Both models read every text as a context behind their prompt's prefix, one model after the other; on_passage is
    called with the number of texts read so far, at last twice as many as there are. kind: None is per dimension where
    the shapes agree, scalar otherwise. threads: 0 is one per core.
    Raises BundleInvalid, CalibrationInvalid for the same model twice or a kind that does not fit, CacheInvalid for no
    texts, ContextEmpty for a blank one.
    """
    theirs, ours = read_manifest(sender), read_manifest(receiver)
    if theirs.fingerprint == ours.fingerprint:
        raise CalibrationInvalid(
            f"{sender} and {receiver} hold the same model, {ours.name}: its caches need no calibration"
        )
    kind = kind_for(_side(theirs), _side(ours), kind)
    return pair(
        moments(_caches(sender, texts, threads, on_passage)),
        moments(_caches(receiver, texts, threads, lambda done: on_passage(len(texts) + done))),
        sender_fingerprint=theirs.fingerprint,
        receiver_fingerprint=ours.fingerprint,
        kind=kind,
    )


def _side(manifest: Manifest) -> Side:
    return Side(
        fingerprint=manifest.fingerprint,
        layers=len(manifest.layers),
        kv_heads=manifest.kv_heads,
        head_dim=manifest.head_dim,
    )


def _caches(bundle: Path, texts: Sequence[str], threads: int, on_passage: Callable[[int], None]) -> Iterator[Cache]:
    """The cache of each text, as far as it fits the model's window."""
    model = Model(bundle, Runtime(threads=threads or os.cpu_count() or 1))
    text = Text(bundle, model.manifest)
    prefix = relay.after_prefix(model)
    room = model.manifest.window_tokens - prefix.next_position
    for index, passage in enumerate(texts):
        yield relay.read_context(prefix, text.context_ids(passage)[:room])
        on_passage(index + 1)
