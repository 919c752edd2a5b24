"""`python -m scripts.replay`: what was recorded, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from coordinator.errors import CoordinatorError
from coordinator.recording import Recorded
from scripts.replay.again import plans_again

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)


@app.callback()
def replay() -> None:
    """Replay recorded sessions."""


@app.command()
def plans(
    file: Annotated[Path, typer.Argument(help="A session, as `coordinator run --record` writes it.")],
) -> None:
    """Compute the plans of a recorded session again, from what its coordinator had heard.

    The same code on the same messages gives the same plans; another version, or other code, may not: this shows where
    they part. Ends with 1 if any differs.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    try:
        recorded = Recorded(file)
        with console.status("") as status:
            found = plans_again(recorded, lambda at_s: status.update(f"{at_s:.0f} s of the session"))
    except CoordinatorError as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(1) from None
    titles = ("to", "policy", "E2E, s", "again", "media", "same")
    table = Table(
        Column("question", no_wrap=True, ratio=1),
        *(Column(title, no_wrap=title != "same", min_width=len(title)) for title in titles),
        expand=True,
        caption="E2E as it was predicted",
        caption_justify="left",
    )
    for each in found:
        told = each.recorded or each.again
        media = ", ".join(dict.fromkeys(link.medium for link in told.links)) if told else ""
        table.add_row(
            Text(told.question if told else each.request),
            told.receiver if told else "",
            told.policy if told else "",
            f"{each.recorded.predicted_e2e_s:.3f}" if each.recorded else "-",
            f"{each.again.predicted_e2e_s:.3f}" if each.again else "-",
            media,
            Text(each.difference or "yes"),
        )
    console.print(table)
    differ = sum(bool(each.difference) for each in found)
    console.print(f"{len(found) - differ} of {len(found)} plans are the same", markup=False)
    if recorded.cut:
        console.print(f"{file}: {recorded.cut}; replayed up to there", markup=False)
    if differ:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m scripts.replay")
