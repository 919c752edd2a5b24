"""The codec's tables, as Markdown."""

from __future__ import annotations

from scripts.bench.codec.measured import CodecBench, CodecRow, StageRow


def sections(found: CodecBench) -> list[str]:
    """Lines: what each method costs and loses, MB/s by stage, and what is not there."""
    return [
        *_methods(found),
        *_stages(found),
        *(f"- not measured: {absent}" for absent in found.absent),
        *([""] if found.absent else []),
    ]


def _methods(found: CodecBench) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in found.versions.items())
    return [
        (
            f"Codec, {found.tokens} tokens ({found.cache_mb:.1f} MB as float32), {found.threads} thread(s) of matrix "
            f"products and of the model; prefill takes {found.prefill.median_s:.2f} s. KL and agreement are over "
            f"{found.answer_positions} positions of {found.questions} answers from this one context, for orientation. "
            "Peers, too, are given keys without rotary phase; groups are in numpy, with fp16 scales and minima"
            f"{f' ({versions})' if versions else ''}\n"
        ),
        (
            "| method | bits/element | KL, nats | same argmax | encode, ms (least-most) | decode, ms | "
            "encode + decode, share of prefill |"
        ),
        "|---|" + "--:|" * 6,
        *map(_method, found.rows),
        "",
    ]


def _method(row: CodecRow) -> str:
    encode = f"{row.encode.median_s * 1e3:.0f} ({row.encode.least_s * 1e3:.0f}-{row.encode.most_s * 1e3:.0f})"
    return (
        f"| {row.name} | {row.bits_per_element:.2f} | {row.loss.kl:.4f} | {row.loss.agreement:.3f} | {encode} | "
        f"{row.decode.median_s * 1e3:.0f} | {row.share_of_prefill:.1%} |"
    )


def _stages(found: CodecBench) -> list[str]:
    return [
        (
            "Codec by stage, MB/s of the float32 cache: transform (klt) and quantization, entropy coding (klt) or bit "
            "packing (q), and the whole with header and digests; then the way back\n"
        ),
        "| rung | quantize | pack | encode | unpack | dequantize | decode |",
        "|---|" + "--:|" * 6,
        *(f"| {row.name} | {' | '.join(_speeds(found, row))} |" for row in found.stages),
        "",
    ]


def _speeds(found: CodecBench, row: StageRow) -> list[str]:
    times = (row.quantize, row.pack, row.encode, row.unpack, row.dequantize, row.decode)
    return [f"{found.mb_per_s(timed):.0f}" for timed in times]
