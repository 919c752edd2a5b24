"""What errors in a tiny model's cache cost, beside what its gradients say. In a process of its own, for torch.

`python -m tests.scripts.followed MODEL` perturbs keys (or values) of every entry of one layer along one direction of
the row without phase, measures the KL divergence along the answer in float64, and prints it beside ½ s² uᵀ F u.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

_ROOT = Path(__file__).resolve().parents[2]


class Cost(Struct, frozen=True):
    """Of errors of one size in one layer along one direction: KL in nats a position."""

    layer: int
    kind: str
    predicted: float
    measured: float


def costs(model: Path) -> list[Cost]:
    """Run it in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.scripts.followed", str(model)],
        cwd=_ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[Cost])


def _measure(model: Path) -> list[Cost]:
    import tokenizers  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from scripts.prepare_model import export, sensitivity  # noqa: PLC0415
    from scripts.prepare_model.answered import Asked  # noqa: PLC0415
    from scripts.prepare_model.architecture import describe  # noqa: PLC0415
    from scripts.prepare_model.fitting import Moments  # noqa: PLC0415

    sensitivity.DRAWS = 400
    net = export.load(model).double()
    for parameter in net.parameters():
        parameter.requires_grad_(requires_grad=False)
    shape = describe(net, tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")))
    rng = np.random.default_rng(5)
    prefix, context, question = (tuple(int(i) for i in rng.integers(1, 500, n)) for n in (12, 40, 6))
    followed = sensitivity.Followed(model=net, architecture=shape, prefix=prefix, ends=frozenset(shape.eos_ids))
    width = 2 * shape.kv_heads * shape.head_dim
    moments = Moments(len(shape.layers), width)
    followed._add(moments, Asked(context=context, question=question), torch.Generator().manual_seed(1))
    read = sensitivity._read(net, [*prefix, *context], sensitivity._cache([])).past_key_values
    whole = [(read[layer][0], read[layer][1]) for layer in range(len(shape.layers))]
    asked = torch.tensor([[*question, *followed._greedy(whole, question)]])

    def log_p(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        with torch.no_grad():
            logits = net(asked, past_key_values=sensitivity._cache(layers)).logits[0, len(question) - 1 :]
        return torch.log_softmax(logits, -1)

    base, found = log_p(whole), []
    for layer, spec in enumerate(shape.layers):
        for kind in (0, 1):
            direction = np.zeros(width)
            half = slice(kind * width // 2, (kind + 1) * width // 2)
            direction[half] = rng.standard_normal(width // 2)
            direction /= np.linalg.norm(direction)
            size = 0.02 * float(np.sqrt(np.mean(moments._squares[layer].diagonal()[half] / len(context))))
            angles = np.outer(np.arange(12, 12 + len(context)), np.array(shape.rotary[spec.rotary]))
            kl, tries = 0.0, 60
            for _ in range(tries):
                noise = size * rng.standard_normal((len(context), 1)) * direction[half]
                noise = noise.reshape(len(context), shape.kv_heads, shape.head_dim).transpose(1, 0, 2)
                if kind == 0:
                    first, second = np.split(noise, 2, axis=-1)
                    cosine, sine = np.cos(angles), np.sin(angles)
                    noise = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
                layers = [(keys.clone(), values.clone()) for keys, values in whole]
                layers[layer][kind][0, :, 12:] += torch.tensor(noise)
                kl += float((base.exp() * (base - log_p(layers))).sum(-1).mean()) / tries
            predicted = 0.5 * size**2 * direction @ (moments._costs[layer] / moments.samples) @ direction
            found.append(Cost(layer, ("keys", "values")[kind], float(predicted), kl))
    return found


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(_measure(Path(sys.argv[1]))).decode() + "\n")
