"""What tests of pictures share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written in the pictures that are saved."""
    from matplotlib.figure import Figure  # noqa: PLC0415  heavy, and only for these
    from matplotlib.text import Text  # noqa: PLC0415

    found: list[str] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        found.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found
