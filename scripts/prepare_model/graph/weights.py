"""Weights in fewer bits: int8 rows, int8 blocks, int4 blocks, for each product of activations and weights.

Two forms of int8, both weight-only in the file and both with 8-bit activations at run time:

rows    one scale for each column of the weights and each row (token) of the activations. The product is one integer
        GEMM, several times as fast in prefill as the other form. Rows do not influence one another, so a token's
        result does not depend on which others are read in the same run.
blocks  MatMulNBits: a scale for each block of 32 inputs, in weights and activations. Slower in prefill, faster in
        decode, and unharmed by activations with few large values among small ones.

One scale for all tokens, fixed by calibration text, would save six nodes a product. On texts it looked harmless (KL
0.007 nats), but answers to questions then left those of float32 weights at the third token 24 times of 100, not 13-16.

Before rows are quantized, what large channels of activations have of their size is moved into the weights
(SmoothQuant, arXiv 2211.10438), where the factor can be folded into the norm before, so that it costs nothing at run
time. A product takes the rows form if its output is then close enough to the exact one on calibration text.

Small products of one activation (keys and values beside queries) are computed as one: in a decode step a node costs
about as much as their arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge_agent.kv.cache import Float32
from edge_agent.model.signature import INPUT_IDS, LOGIT_ROWS, LOGITS
from scripts.prepare_model.graph.editing import CONTRIB, Array, Graph, Node
from scripts.prepare_model.graph.norms import NORM, SKIP_NORM
from scripts.prepare_model.graph.tail import downstream

BLOCK = 32
SMALL_OUTPUTS = 512
"""Products with fewer outputs are joined with the others of their activation. Parting them again afterwards is a copy,
which for wide ones costs more in prefill than a node less saves in decode."""

ROWS_LIMIT = 4e-4
"""Largest share of an output row's power that may be error, on average, for a product to take the rows form. Shares are
averaged, not powers: attention sinks would outweigh all other rows."""

SMOOTHING = (0.3, 0.5, 0.65, 0.8)
_SPANS = tuple((below, above) for below in (0.85, 0.95, 1.0, 1.05, 1.12) for above in (0.85, 0.95, 1.0, 1.05, 1.12))
_SMALLEST = np.float32(1e-8)
_ZERO_POINT = 128


class Site(Struct, frozen=True, kw_only=True):
    """Products of one activation with constant weights: query, key and value projections, say."""

    activation: str
    nodes: tuple[Node, ...]


class Chosen(Struct, frozen=True, kw_only=True):
    """How one site was quantized: its first product, the form, the smoothing, and the error that decided."""

    name: str
    form: str
    smoothing: float | None
    error: float


def sites(graph: Graph) -> list[Site]:
    """All products with constant weights but the last, which gives the logits, in order."""
    found: dict[str, list[Node]] = {}
    head = _head(graph)
    for node in graph.nodes:
        if node.op_type == "MatMul" and node is not head and node.input[1] in graph.weights:
            found.setdefault(node.input[0], []).append(node)
    return [Site(activation=name, nodes=tuple(nodes)) for name, nodes in found.items()]


def to_int8(graph: Graph, samples: Mapping[str, Float32]) -> list[Chosen]:
    """Quantize all weights to 8 bits. samples: rows of each site's activation, float32 (rows, channels)."""
    chosen = []
    zero_points: dict[str, str] = {}
    for found in sites(graph):
        site = _joined(graph, found)
        rows = samples[site.activation]
        smoothing, error = _smoothing(graph, site, rows)
        name = found.nodes[0].name
        if error <= ROWS_LIMIT:
            if smoothing is not None:
                _smooth(graph, site, rows, smoothing)
            _as_rows(graph, site, _zero_points(graph, site, zero_points))
            chosen.append(Chosen(name=name, form="rows", smoothing=smoothing, error=error))
        else:
            for node in site.nodes:
                _as_blocks(graph, node, bits=8)
            chosen.append(Chosen(name=name, form="blocks", smoothing=None, error=error))
    _embedding_and_head(graph)
    return chosen


def to_int4(graph: Graph) -> None:
    """Quantize all weights to 4 bits in blocks, the embedding and the head to 8."""
    for site in sites(graph):
        for node in _joined(graph, site).nodes:
            _as_blocks(graph, node, bits=4)
    _embedding_and_head(graph)


def to_fp32(graph: Graph) -> None:
    """Leave weights as they are, but let a head that is the embedding transposed use the embedding itself."""
    head, table = _head(graph), _embedding(graph)
    if head is None or table is None:
        return
    weights = graph.constant(head.input[1])
    if weights is not None and np.array_equal(weights.T, graph.weights[table.input[0]]):
        inputs = [head.input[0], table.input[0]]
        graph.replace(head, [graph.node("FusedMatMul", inputs, head.output[0], domain=CONTRIB, transB=1)])


def quantize_blocks(weights: Float32, bits: int) -> tuple[NDArray[np.uint8], Float32, NDArray[np.uint8] | None]:
    """Weights (inputs, outputs) as MatMulNBits wants them: blocks of BLOCK inputs.

    Returns values uint8 (outputs, blocks, BLOCK · bits/8), scales float32 (outputs, blocks), and at 4 bits zero points
    uint8 (outputs, blocks/2 rounded up), two to a byte. 8 bits are symmetric around 128.
    """
    inputs, outputs = weights.shape
    count = -(-inputs // BLOCK)
    padded = np.zeros((outputs, count * BLOCK), dtype=np.float32)
    padded[:, :inputs] = weights.T
    blocks = padded.reshape(outputs, count, BLOCK)
    if bits == 8:
        scales = np.maximum(np.abs(blocks).max(-1) / 127, _SMALLEST)
        return (np.rint(blocks / scales[..., None]) + _ZERO_POINT).astype(np.uint8), scales, None
    values, scales, zeros = _four_bits(blocks)
    packed_zeros = np.zeros((outputs, count + count % 2), dtype=np.uint8)
    packed_zeros[:, :count] = zeros
    return _packed(values), scales, _packed(packed_zeros)


def _packed(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit values to a byte, the first in its lower half."""
    return np.asarray(values[..., ::2] | (values[..., 1::2] << 4), dtype=np.uint8)


def _four_bits(blocks: Float32) -> tuple[NDArray[np.uint8], Float32, NDArray[np.uint8]]:
    """Blocks (outputs, blocks, BLOCK) as 4-bit values, scales and zero points.

    Of several spans around the one from least to largest, the one with the least squared error.
    """
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = zeros = least = np.zeros(low.shape, dtype=np.float32)
    for number, (below, above) in enumerate(_SPANS):
        scale = np.maximum((high * above - low * below) / 15, _SMALLEST)
        zero = np.clip(np.rint(-low * below / scale), 0, 15)
        made = (np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, 15) - zero[..., None]) * scale[
            ..., None
        ]
        error = np.square(made - blocks).sum(-1)
        better = np.ones(low.shape, dtype=bool) if number == 0 else error < least
        least = np.where(better, error, least)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    values = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return values, np.asarray(scales, dtype=np.float32), zeros.astype(np.uint8)


def quantize_rows(activations: Float32) -> Float32:
    """What is left of activations (rows, channels) at 8 bits with one scale a row. For choosing, in float32."""
    scales = np.maximum(np.abs(activations).max(-1, keepdims=True) / 127, _SMALLEST)
    rounded: Float32 = np.rint(activations / scales) * scales
    return rounded


def quantize_columns(weights: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Weights (inputs, outputs) as int8 with one scale for each output."""
    scales = np.maximum(np.abs(weights).max(0) / 127, _SMALLEST)
    return np.rint(weights / scales).astype(np.int8), scales


def _smoothing(graph: Graph, site: Site, rows: Float32) -> tuple[float | None, float]:
    """The strength that makes the rows form's output closest to the exact one (None: no smoothing), and its error."""
    weights = _weights(graph, site)
    exact = rows @ weights
    best: tuple[float | None, float] = (None, float("inf"))
    for strength in (None, *SMOOTHING) if _foldable(graph, site) else (None,):
        factors = _factors(rows, weights, strength)
        values, scales = quantize_columns(weights * factors[:, None])
        error = _error(quantize_rows(rows / factors) @ (values * scales), exact)
        if error < best[1]:
            best = (strength, error)
    return best


def _error(made: Float32, exact: Float32) -> float:
    """The share of a row's power that is error, the mean over rows."""
    shares = np.square(made - exact).mean(-1) / np.maximum(np.square(exact).mean(-1), _SMALLEST**2)
    return float(shares.mean())


def _factors(rows: Float32, weights: Float32, strength: float | None) -> Float32:
    """By what each channel of the activation is divided: float32 (channels,), geometric mean 1."""
    if strength is None:
        return np.ones(rows.shape[1], dtype=np.float32)
    largest = np.maximum(np.abs(rows).max(0), 1e-5)
    factors = largest**strength / np.maximum(np.abs(weights).max(1), 1e-5) ** (1 - strength)
    return np.asarray(factors / np.exp(np.log(factors).mean()), dtype=np.float32)


def _foldable(graph: Graph, site: Site) -> bool:
    """Whether the activation comes from a norm that nobody else uses."""
    maker = graph.maker(site.activation)
    return (
        maker is not None
        and maker.op_type in {NORM, SKIP_NORM}
        and maker.output[0] == site.activation
        and len(graph.users(site.activation)) == len(site.nodes)
    )


def _smooth(graph: Graph, site: Site, rows: Float32, strength: float) -> None:
    """Divide channels of the activation in the norm before, multiply them in the weights after."""
    factors = _factors(rows, _weights(graph, site), strength)
    norm = graph.maker(site.activation)
    if norm is None:
        raise ValueError(f"nothing makes {site.activation}")
    place = 1 if norm.op_type == NORM else 2
    norm.input[place] = graph.weight("norm", (graph.weights[norm.input[place]] / factors).astype(np.float32))
    for node in site.nodes:
        node.input[1] = graph.weight("smoothed", graph.weights[node.input[1]] * factors[:, None])


def _weights(graph: Graph, site: Site) -> Float32:
    return np.concatenate([graph.weights[node.input[1]] for node in site.nodes], axis=1)


def _zero_points(graph: Graph, site: Site, made: dict[str, str]) -> str:
    """A vector of zero points, one for each row of a site's activation."""
    source = LOGIT_ROWS if site.activation in downstream(graph, LOGIT_ROWS) else INPUT_IDS
    if source not in made:
        count, made[source] = graph.fresh("count"), graph.fresh("zero_points")
        axis = 0 if source == LOGIT_ROWS else 1
        graph.nodes[:0] = [
            graph.node("Shape", [source], count, start=axis, end=axis + 1),
            graph.fill(count, np.array([_ZERO_POINT], dtype=np.uint8), made[source]),
        ]
        graph.reindex()
    return made[source]


def _integer_product(graph: Graph, node: Node, activation: Sequence[str], output: str) -> Node:
    """The product of quantized activations (values, scale, zero point) with the weights of a node, in columns."""
    values, scale, zero_point = activation
    columns, scales = quantize_columns(graph.weights[node.input[1]])
    inputs = [values, graph.weight("int8", columns), scale, graph.weight("scales", scales), zero_point]
    return graph.node("MatMulIntegerToFloat", inputs, output, domain=CONTRIB)


def _as_rows(graph: Graph, site: Site, zero_points: str) -> None:
    """|x| → largest of a row / 127 → uint8 rows → integer product → times the row's scale."""
    magnitude, largest, scale, flat, quantized = (
        graph.fresh(stem) for stem in ("magnitude", "largest", "scale", "scales", "quantized")
    )
    shared: dict[str, Array] = {
        "last_axis": np.array([-1], dtype=np.int64),
        "step": np.array(1 / 127, dtype=np.float32),
        "one": np.array(1, dtype=np.float32),
        "zero_point": np.array(_ZERO_POINT, dtype=np.uint8),
    }
    names = {key: graph.shared(key, value) for key, value in shared.items()}
    new = [
        graph.node("Abs", [site.activation], magnitude),
        graph.node("ReduceMax", [magnitude, names["last_axis"]], largest, keepdims=1),
        graph.node("Mul", [largest, names["step"]], scale),
        graph.node("Reshape", [scale, names["last_axis"]], flat),
        graph.node("QuantizeLinear", [site.activation, flat, zero_points], quantized, axis=1),
    ]
    for node in site.nodes:
        product = graph.fresh("product")
        integer = _integer_product(graph, node, [quantized, names["one"], names["zero_point"]], product)
        graph.replace(node, [*new, integer, graph.node("Mul", [product, scale], node.output[0])])
        new = []


def _joined(graph: Graph, site: Site) -> Site:
    """The site with its products computed as one that is parted afterwards, if some of them are small."""
    sizes = [graph.weights[node.input[1]].shape[1] for node in site.nodes]
    if len(sizes) == 1 or min(sizes) >= SMALL_OUTPUTS:
        return site
    together, made = graph.fresh("together"), [node.output[0] for node in site.nodes]
    product = graph.node("MatMul", [site.activation, graph.weight("joined", _weights(graph, site))], together)
    parted = graph.node("Split", [together, graph.weight("sizes", np.array(sizes, dtype=np.int64))], made, axis=-1)
    first, *others = site.nodes
    for node in others:
        graph.replace(node, [])
    graph.replace(first, [product, parted])
    return Site(activation=site.activation, nodes=(product,))


def _as_blocks(graph: Graph, node: Node, *, bits: int) -> None:
    graph.replace(node, [_blocks(graph, node.input[0], graph.weights[node.input[1]], node.output[0], bits)])


def _blocks(graph: Graph, activation: str, weights: Array, output: str, bits: int) -> Node:
    values, scales, zeros = quantize_blocks(weights, bits)
    inputs = [activation, graph.weight("blocks", values), graph.weight("scales", scales)]
    return graph.node(
        "MatMulNBits",
        inputs if zeros is None else [*inputs, graph.weight("zeros", zeros)],
        output,
        domain=CONTRIB,
        K=weights.shape[0],
        N=weights.shape[1],
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,  # 8-bit activations: without it the kernels dequantize to float32
    )


def _embedding_and_head(graph: Graph) -> None:
    """The embedding as a table of int8 blocks, of which a run touches the rows it needs, and the head in int8 blocks.

    Tied tensors part here: a head that shares the table would keep all of the table in memory beside its own packing.
    """
    head = _head(graph)
    if head is not None and (weights := graph.constant(head.input[1])) is not None:
        graph.replace(head, [_blocks(graph, head.input[0], weights, head.output[0], 8)])
    table = _embedding(graph)
    if table is None:
        return
    weights = graph.weights[table.input[0]]
    values, scales, _ = quantize_blocks(weights.T, 8)
    rows = values.reshape(len(weights), -1)[:, : weights.shape[1]]
    whole = graph.node(
        "GatherBlockQuantized",
        [graph.weight("table", rows), INPUT_IDS, graph.weight("table_scales", scales)],
        table.output[0],
        domain=CONTRIB,
        bits=8,
        block_size=BLOCK,
        quantize_axis=1,
        gather_axis=0,
    )
    graph.replace(table, [whole])


def _head(graph: Graph) -> Node | None:
    """The product with constant weights that gives the logits, which may still be scaled or capped behind it."""
    node = graph.maker(LOGITS)
    while node is not None and node.op_type in {"Mul", "Div", "Tanh"}:
        node = graph.maker(node.input[0])
    return node if node is not None and node.op_type == "MatMul" and graph.constant(node.input[1]) is not None else None


def _embedding(graph: Graph) -> Node | None:
    """The lookup of the tokens' embeddings."""
    lookups = (node for node in graph.nodes if node.op_type == "Gather" and list(node.input[1:]) == [INPUT_IDS])
    return next((node for node in lookups if node.input[0] in graph.weights), None)


def forms(chosen: Sequence[Chosen]) -> str:
    """How many sites took which form, for a person."""
    rows = sum(each.form == "rows" for each in chosen)
    return f"{rows} of {len(chosen)} groups of products as int8 rows, the others in blocks of {BLOCK}"
