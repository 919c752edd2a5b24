"""The names a graph's inputs and outputs have: what `prepare_model` writes and the session feeds.

Inputs
    input_ids                  int64 (1, tokens)
    logit_rows                 int64 (rows,): for which of the tokens logits are wanted; at least one
    filled                     int32 (layers,): entries of each layer after this run, less one
    total_entries              int32 (): the largest number of entries of any layer after this run
    rotary.E.cos, rotary.E.sin float32 (tokens, head_dim/2): of each rotary embedding, at the tokens' positions
    window_bias.I              float32 (1, 1 or query_heads, tokens, total_entries): added to scores where windows slide
    past.I.key, past.I.value   float32 (1, kv_heads, capacity, head_dim): a buffer, entries in front
Outputs
    logits                     float32 (1, rows, vocabulary)
    present.I.key, .value      the same buffers
    keys.I                     float32 (1, tokens, kv_heads · head_dim): keys of this run's tokens before rotation
    queries.I                  float32 (1, at most 32, query_heads · head_dim): rotated queries of the last tokens
"""

from __future__ import annotations

INPUT_IDS, LOGIT_ROWS, FILLED, TOTAL, LOGITS = "input_ids", "logit_rows", "filled", "total_entries", "logits"

LAST_QUERIES = 32
"""For so many of the last tokens a graph gives its queries (w of methods.md 1)."""

QUERY_ROWS = "query_rows"

ROTATION_FILE = "rotate.onnx"
"""The rotation of keys by itself, so that moved keys are rotated by the same operator as computed ones, bit for bit.

Inputs keys, float32 (1, kv_heads, entries, head_dim), cos and sin, float32 (entries, head_dim/2); output rotated.
"""


def past_name(layer: int, kind: str) -> str:
    """The input for a layer's keys or values."""
    return f"past_key_values.{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """The output of a layer's keys or values."""
    return f"present.{layer}.{kind}"


def queries_name(layer: int) -> str:
    """The output of a layer's last queries."""
    return f"queries.{layer}"


def keys_name(layer: int) -> str:
    """The output of a layer's new keys without phase."""
    return f"keys.{layer}"


def window_bias_name(layer: int) -> str:
    """The input that masks what a layer's window does not reach."""
    return f"window_bias.{layer}"


def cosine_name(embedding: int) -> str:
    """The input for the cosines of a rotary embedding."""
    return f"rotary.{embedding}.cos"


def sine_name(embedding: int) -> str:
    """The input for the sines of a rotary embedding."""
    return f"rotary.{embedding}.sin"
