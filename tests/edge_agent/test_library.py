"""The library: a folder that is followed, texts that are published, and everything that can be wrong with them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_agent import library as module
from edge_agent.engine import Engine
from edge_agent.errors import AgentError, ContextEmpty, ContextTooLong, ContextUnknown
from edge_agent.kv.cache import Cache
from edge_agent.library import MAX_TEXT_BYTES, Library
from edge_agent.memory import Budget, ContextStore, Form, Shelf
from tests.edge_agent.agents import kept
from tests.edge_agent.sessions import started_engine

ROOM = 10_000_000


class Place:
    """A library over a folder."""

    def __init__(self, engine: Engine, folder: Path | None, budget_bytes: int = ROOM) -> None:
        self.engine, self.folder = engine, folder
        model = engine.model
        shelf = Shelf(model.manifest, model.transform, tightest_kl=0.02)
        self.store = ContextStore(shelf, Budget(limit_bytes=budget_bytes))
        self.library = Library(engine=engine, store=self.store, folder=folder)

    def write(self, name: str, content: str | bytes) -> Path:
        assert self.folder is not None
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def held(self) -> dict[str, str]:
        """Name and text of all that is held."""
        return {name: self.text(name) for name in self.store.names()}

    def text(self, name: str) -> str:
        held = self.store.by_name(name)
        assert held is not None
        return self.engine.text.decode(list(held.ids)).removeprefix("\nPassage: ").rstrip("\n")


@pytest.fixture
async def engine(tiny_bundle: Path) -> AsyncIterator[Engine]:
    async with started_engine(tiny_bundle) as made:
        yield made


@pytest.fixture
def place(engine: Engine, tmp_path: Path) -> Place:
    folder = tmp_path / "contexts"
    folder.mkdir()
    return Place(engine, folder)


@asynccontextmanager
async def prefilling(library: Library) -> AsyncIterator[None]:
    task = asyncio.create_task(library.prefill())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_files_that_come_change_and_go_are_followed(place: Place) -> None:
    place.write("north.txt", "The pump stopped.")
    place.write("south.md", "The valve leaked.")
    place.write("picture.png", b"\x89PNG")
    await place.library.scan()
    assert place.held() == {"north": "The pump stopped.", "south": "The valve leaked."}
    changed = place.write("north.txt", "The pump runs.")
    os.utime(changed, ns=(1, 1))
    (place.folder or Path()).joinpath("south.md").unlink()
    await place.library.scan()
    assert place.held() == {"north": "The pump runs."}


async def test_a_file_that_did_not_change_is_not_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("north.txt", "The pump stopped.")
    await place.library.scan()
    monkeypatch.setattr(module, "_read", lambda path: pytest.fail(f"{path} was read again"))
    await place.library.scan()


async def test_of_two_files_of_one_name_the_other_stays_when_one_goes(place: Place) -> None:
    place.write("north.md", "From the md file.")
    gone = place.write("north.txt", "From the txt file.")
    await place.library.scan()
    gone.unlink()
    await place.library.scan()
    assert place.held() == {"north": "From the md file."}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("bad name.txt", "text", "'bad name' can't be a context's name"),
        ("-dash.txt", "text", "'-dash' can't be a context's name"),
        ("x" * 65 + ".txt", "text", "at most 64"),
        ("large.txt", "x" * (MAX_TEXT_BYTES + 1), "262,145 bytes, more than a context may have"),
        ("long.txt", "valve " * 1_000, "do not fit the model's window of 1024"),
        ("bytes.txt", b"\xff\xfe\x00", "can't decode byte 0xff"),
        ("blank.txt", " \n", "the context is empty"),
    ],
)
async def test_a_file_that_cannot_be_taken_is_logged_once_and_harms_no_other(
    place: Place, caplog: pytest.LogCaptureFixture, name: str, content: str | bytes, line: str
) -> None:
    place.write(name, content)
    place.write("good.txt", "The pump stopped.")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await place.library.scan()
    assert [line in message and name in message for message in caplog.messages] == [True]
    assert place.held() == {"good": "The pump stopped."}


async def test_a_link_to_nowhere_and_a_folder_are_logged_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    assert place.folder is not None
    (place.folder / "nowhere.txt").symlink_to(place.folder / "gone")
    (place.folder / "folder.txt").mkdir()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await place.library.scan()
    assert len(caplog.messages) == 2
    assert place.held() == {}


async def test_a_file_that_was_bad_is_taken_in_once_it_is_good(place: Place) -> None:
    place.write("north.txt", b"\xff")
    await place.library.scan()
    place.write("north.txt", "The pump stopped.")
    await place.library.scan()
    assert place.held() == {"north": "The pump stopped."}


async def test_a_published_text_is_kept_in_the_folder_and_not_read_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.library.add("north", "Die Pumpe läuft.")
    assert place.folder is not None
    assert [path.name for path in place.folder.iterdir()] == ["north.txt"]
    assert (place.folder / "north.txt").read_text(encoding="utf-8") == "Die Pumpe läuft."
    monkeypatch.setattr(module, "_read", lambda path: pytest.fail(f"{path} was read again"))
    await place.library.scan()
    assert place.held() == {"north": "Die Pumpe läuft."}


async def test_a_published_text_replaces_the_file_of_its_name(place: Place) -> None:
    path = place.write("north.md", "Old.")
    await place.library.scan()
    await place.library.add("north", "New.")
    assert path.read_text() == "New."
    assert place.held() == {"north": "New."}
    await place.library.scan()
    assert place.held() == {"north": "New."}


async def test_a_published_text_makes_its_folder(engine: Engine, tmp_path: Path) -> None:
    place = Place(engine, tmp_path / "a" / "b")
    await place.library.scan()
    await place.library.add("north", "The pump stopped.")
    assert (tmp_path / "a" / "b" / "north.txt").read_text() == "The pump stopped."


async def test_without_a_folder_texts_are_held_in_memory(engine: Engine) -> None:
    place = Place(engine, None)
    await place.library.add("north", "The pump stopped.")
    await place.library.scan()
    assert place.held() == {"north": "The pump stopped."}
    await place.library.remove("north")
    assert place.held() == {}


@pytest.mark.parametrize("fault", ["os.fsync", "pathlib.Path.replace"])
async def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    await place.library.add("north", "Old.")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fault, full)
    with pytest.raises(AgentError, match=r"north\.txt can't be written: No space left on device") as caught:
        await place.library.add("north", "New.")
    with pytest.raises(AgentError, match="can't be written"):
        await place.library.add("south", "New.")
    assert "\n" not in str(caught.value)
    assert place.folder is not None
    assert [path.name for path in place.folder.iterdir()] == ["north.txt"]
    assert (place.folder / "north.txt").read_text() == "Old."
    assert place.held() == {"north": "Old."}


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("../north", "text", AgentError),
        (".hidden", "text", AgentError),
        ("north", "  ", ContextEmpty),
        ("north", "valve " * 1_000, ContextTooLong),
    ],
)
async def test_a_text_that_cannot_be_held_is_refused_and_not_written(
    place: Place, name: str, text: str, error: type[AgentError]
) -> None:
    with pytest.raises(error):
        await place.library.add(name, text)
    assert place.held() == {}
    assert place.folder is not None
    assert list(place.folder.parent.rglob("*.txt")) == []


async def test_a_removed_context_takes_its_file_with_it(place: Place) -> None:
    place.write("north.md", "The pump stopped.")
    await place.library.scan()
    await place.library.remove("north")
    assert place.folder is not None
    assert list(place.folder.iterdir()) == []
    await place.library.scan()
    assert place.held() == {}
    with pytest.raises(ContextUnknown, match="no context named north"):
        await place.library.remove("north")


async def test_a_file_that_cannot_be_removed_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.library.add("north", "The pump stopped.")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(AgentError, match="can't be removed: Read-only file system"):
        await place.library.remove("north")


async def test_what_is_taken_in_is_prefilled_in_the_background(place: Place) -> None:
    put = asyncio.Event()
    real = place.store.put

    async def watched(context_id: str, cache: Cache) -> Form:
        kept_as = await real(context_id, cache)
        put.set()
        return kept_as

    place.store.put = watched  # type: ignore[method-assign]
    async with prefilling(place.library):
        held = await place.library.add("north", "The pump stopped.")
        await put.wait()
    cache = kept(place.store, held.context_id)
    assert cache is not None
    assert cache.entries == len(held.ids)
    assert [info.cached for info in place.store.infos()] == [True]


async def test_a_context_that_does_not_fit_the_budget_is_held_as_text_and_the_next_is_tried(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(engine, tmp_path, budget_bytes=5_000)
    warned = asyncio.Event()
    real = place.store.put

    async def watched(context_id: str, cache: Cache) -> Form:
        try:
            return await real(context_id, cache)
        finally:
            if len(place.store.names()) == 2 and context_id == held.context_id:
                warned.set()

    place.store.put = watched  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        await place.library.add("large", "The pump of the north tank stopped. " * 20)
        held = await place.library.add("small", "The pump stopped.")
        async with prefilling(place.library):
            await warned.wait()
    assert {info.name: info.cached for info in place.store.infos()} == {"large": False, "small": True}
    assert "large is held as text only" in caplog.text


async def test_a_scan_and_a_publish_at_once_lose_nothing(place: Place) -> None:
    for index in range(20):
        place.write(f"file-{index}.txt", f"Pump {index} stopped.")
    adding = [place.library.add(f"sent-{index}", f"Valve {index} leaked.") for index in range(20)]
    await asyncio.gather(place.library.scan(), *adding, place.library.scan())
    assert len(place.held()) == 40
    assert place.text("sent-7") == "Valve 7 leaked."
