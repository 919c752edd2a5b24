"""What of a model stands on a payload, and what a payload must say to be used with it."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.facts.fact import Fact
from edge_agent.kv.cache import Cache
from edge_agent.kv.header import Header, Kept, Shape, kept_of, pack_ids
from edge_agent.kv.reader import Expectation
from edge_agent.kv.recipe import Layout, Recipe
from edge_agent.kv.transform import Transform
from edge_agent.model.manifest import Manifest


def to_send(
    manifest: Manifest,
    context_id: str,
    ids: Sequence[int],
    cache: Cache | None,
    *,
    own_tokens: int,
    rung: Recipe,
    facts: Sequence[Fact] = (),
) -> tuple[Header, Cache | None]:
    """The header of a payload that sends the entries of all but the first own_tokens of ids at `rung`, and the cache of
    these entries (None if there are none).

    cache: the whole context's. Raises RecipeInvalid, CacheInvalid like Recipe.layout and Recipe.reduced, and
    RecipeInvalid for a rung that needs a transform, which the bundle lacks.
    """
    layout, kept, sent = Layout(()), None, None
    if own_tokens < len(ids):
        layout = rung.layout(len(manifest.layers), manifest.profile, cache)
        if cache is None:
            raise CacheInvalid("entries are to be sent, but no cache is given")
        sent = rung.reduced(cache.between(own_tokens, len(ids)))
        if rung.eviction is not None:
            kept = kept_of(sent, own_tokens=own_tokens, tokens=len(ids), layers=layout.layers)
    header = payload_header(
        manifest, context_id, ids, own_tokens=own_tokens, rung=rung, layout=layout, kept=kept, facts=facts
    )
    return header, sent


def payload_header(
    manifest: Manifest,
    context_id: str,
    ids: Sequence[int],
    *,
    own_tokens: int,
    rung: Recipe,
    layout: Layout,
    kept: Kept | None = None,
    facts: Sequence[Fact] = (),
    slice_tokens: int | None = None,
) -> Header:
    """The header of a payload whose slices have this layout, and all entries or those `kept`.

    slice_tokens: others than the rung's.

    Raises RecipeInvalid for a rung that needs a transform, which the bundle lacks.
    """
    id_bytes = manifest.info().bytes_per_token_id
    return Header(
        fingerprint=manifest.fingerprint,
        tokenizer=manifest.tokenizer_digest,
        weight_precision=manifest.weight_precision,
        context_id=context_id,
        prefix=manifest.prefix_id,
        shape=Shape(
            layers=len(manifest.layers),
            kv_heads=manifest.kv_heads,
            head_dim=manifest.head_dim,
            sent_layers=layout.layers,
        ),
        codec=rung.codec,
        widths=layout.widths,
        transform=_transform_id(manifest, rung) if rung.codec == "klt" else None,
        level=rung.level,
        rung=rung.name,
        slice_tokens=slice_tokens or rung.slice_tokens,
        tokens=len(ids),
        id_bytes=id_bytes,
        token_ids=pack_ids(list(ids), id_bytes),
        own_tokens=own_tokens,
        kept=kept,
        facts=tuple(facts),
    )


def _transform_id(manifest: Manifest, rung: Recipe) -> str:
    if manifest.transform is None:
        raise RecipeInvalid(f"{rung.name} needs a transform, which the bundle of {manifest.name} lacks")
    return manifest.transform


def expectation(manifest: Manifest, limit_bytes: int, transform: Transform | None = None) -> Expectation:
    """What payloads this model can use; limit_bytes bounds their decoded size. transform: the bundle's."""
    return Expectation(
        fingerprint=manifest.fingerprint,
        tokenizer=manifest.tokenizer_digest,
        prefix=manifest.prefix_id,
        layers=len(manifest.layers),
        kv_heads=manifest.kv_heads,
        head_dim=manifest.head_dim,
        vocabulary=manifest.vocabulary,
        window_tokens=manifest.window_tokens,
        limit_bytes=limit_bytes,
        transform=transform,
    )
