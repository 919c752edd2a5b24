"""The store keeps its budget: the longest unused tighten, then go to disk, then leave, and never what is pinned."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import AgentError, BudgetExceeded, ContextUnknown
from edge_agent.kv.cache import Cache, Layer
from edge_agent.kv.recipe import recipe
from edge_agent.kv.shelved import Shelved
from edge_agent.memory import Budget, ContextStore, Form, Spill
from edge_agent.memory.budget import System
from tests.edge_agent.caches import equal
from tests.edge_agent.memory.shelves import ONE, TOKENS, cache_of, context_id, rungs, store

KLT2, KLT6 = 2_300, 1_150
"""A little more than a made-up cache takes at these rungs."""


async def put(kept: ContextStore, *names: str) -> None:
    for name in names:
        await kept.put(context_id(name), cache_of(seed=ord(name)))


async def test_floats_are_kept_while_there_is_room_and_come_back_as_they_were() -> None:
    kept = store(3 * ONE.nbytes)
    await kept.put(context_id("a"), ONE)
    assert await kept.fetch(context_id("a")) is ONE
    assert (rungs(kept), kept.cache_bytes) == ({"a": "float32"}, ONE.nbytes)
    assert await kept.fetch(context_id("b")) is None


async def test_the_longest_unused_tightens_first_rung_by_rung() -> None:
    kept = store(2 * ONE.nbytes + KLT6)
    await put(kept, "a", "b")
    await kept.fetch(context_id("a"))
    await put(kept, "c")
    assert rungs(kept) == {"a": "float32", "b": "klt6", "c": "float32"}
    await put(kept, "d")
    assert rungs(kept) == {"a": "klt6", "b": "klt6", "c": "klt2", "d": "float32"}


async def test_no_cache_tightens_further_than_need_be() -> None:
    kept = store(2 * ONE.nbytes + KLT2)
    await put(kept, "a", "b", "c")
    assert rungs(kept) == {"a": "klt2", "b": "float32", "c": "float32"}


async def test_all_are_tightened_before_any_leaves() -> None:
    kept = store(ONE.nbytes + 4 * KLT6)
    await put(kept, *"abcde")
    assert rungs(kept) == dict.fromkeys("abcd", "klt6") | {"e": "float32"}
    await put(kept, "f")
    assert rungs(kept) == dict.fromkeys("abcde", "klt6") | {"f": "klt2"}
    tight = store(4 * KLT6)
    await put(tight, *"abcdef")
    assert rungs(tight) == dict.fromkeys("cdef", "klt6")


async def test_what_tightened_is_what_its_rung_makes_of_it() -> None:
    kept = store(2 * ONE.nbytes + KLT2)
    await put(kept, "a", "b", "c")
    form = await kept.fetch(context_id("a"))
    assert form is not None
    direct = kept.shelf.put(cache_of(seed=ord("a")), "klt2", context_id("a"), tuple(range(TOKENS)))
    assert equal(kept.shelf.take(form), kept.shelf.take(direct))


async def test_above_the_high_watermark_caches_are_made_smaller_until_below_the_low_one() -> None:
    kept = store(4 * ONE.nbytes, high=0.8, low=0.3)
    await put(kept, "a", "b", "c")
    assert set(rungs(kept).values()) == {"float32"}  # 3 of 4 is below the mark
    await kept.relieve()
    assert set(rungs(kept).values()) == {"float32"}
    await put(kept, "d")
    assert kept.cache_bytes <= 0.3 * kept.budget_bytes + ONE.nbytes
    between = kept.cache_bytes
    await kept.relieve()
    assert kept.cache_bytes == between  # between the marks nothing moves


async def test_a_budget_that_falls_is_followed() -> None:
    kept = store(4 * ONE.nbytes)
    await put(kept, "a", "b", "c")
    kept._budget = type(kept._budget)(limit_bytes=ONE.nbytes, high=0.8, low=0.6, system=kept._budget.system)
    await kept.relieve()
    assert kept.cache_bytes <= 0.6 * ONE.nbytes
    assert rungs(kept) == {"a": "klt6", "b": "klt6", "c": "klt2"}


@pytest.mark.parametrize("disk", [True, False])
async def test_what_is_pinned_stays_as_it_is(tmp_path: Path, disk: bool) -> None:
    kept = store(1.2 * ONE.nbytes, folder=tmp_path if disk else None)
    await put(kept, "a")
    with kept.pinned(context_id("a")):
        before = await kept.fetch(context_id("a"))
        kept.add("g", context_id("g"), tuple(range(500)))
        with pytest.raises(BudgetExceeded, match="in use"):
            await kept.put(context_id("g"), cache_of(entries=500))
        await put(kept, "b")
        assert await kept.fetch(context_id("a")) is before
        assert rungs(kept)["b"] != "float32"
    await put(kept, "c")
    assert rungs(kept)["a"] != "float32"


async def test_a_pin_does_not_outlive_its_block() -> None:
    kept = store(ONE.nbytes + KLT6)
    await put(kept, "a")
    with pytest.raises(RuntimeError, match="fault"), kept.pinned(context_id("a")):
        raise RuntimeError("fault")
    assert not kept._pins
    await put(kept, "b")
    assert rungs(kept)["b"] == "float32"


async def test_what_is_pinned_while_it_is_being_tightened_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(2 * ONE.nbytes)
    await put(kept, "a", "b")
    before = await kept.fetch(context_id("a"))
    await kept.fetch(context_id("b"))
    began, go = asyncio.Event(), asyncio.Event()
    loop, real = asyncio.get_running_loop(), kept.shelf.put

    def slow(form: Form, rung: str, *rest: object) -> object:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
        return real(form, rung, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kept.shelf, "put", slow)
    putting = asyncio.create_task(put(kept, "c"))
    await began.wait()
    with kept.pinned(context_id("a")):
        go.set()
        await putting
        assert await kept.fetch(context_id("a")) is before


async def test_a_cache_that_fits_only_coded_is_kept_coded() -> None:
    kept = store(0.5 * ONE.nbytes)
    form = await kept.put(context_id("a"), ONE)
    assert rungs(kept) == {"a": form.rung} if not isinstance(form, Cache) else False
    assert kept.cache_bytes <= kept.budget_bytes


async def test_a_cache_that_cannot_fit_changes_nothing() -> None:
    kept = store(ONE.nbytes)
    await put(kept, "a")
    kept.add("g", context_id("g"), tuple(range(2_000)))
    with pytest.raises(BudgetExceeded, match="does not fit the budget"):
        await kept.put(context_id("g"), cache_of(entries=2_000))
    assert rungs(kept) == {"a": "float32"}


async def test_a_cache_that_cannot_be_coded_leaves(caplog: pytest.LogCaptureFixture) -> None:
    layers = list(ONE.layers)
    keys = layers[1].keys.copy()
    keys[0, 0, 0] = np.nan
    layers[1] = Layer(keys, layers[1].values, layers[1].positions)
    kept = store(2 * ONE.nbytes)
    await kept.put(context_id("a"), Cache(tuple(layers)))
    with caplog.at_level(logging.WARNING):
        await put(kept, "b", "c")
    assert rungs(kept) == {"b": "float32", "c": "float32"}
    assert "the cache of a can't be kept: layer 1" in caplog.text


async def test_text_stays_when_a_cache_goes_and_goes_when_removed(tmp_path: Path) -> None:
    kept = store(2 * KLT6, folder=tmp_path)
    await put(kept, "a", "b")
    assert kept.get(context_id("a")).ids == tuple(range(TOKENS))
    for name in "abcdef":
        kept.remove(name)
    await kept.settled()
    assert (kept.cache_bytes, os.listdir(tmp_path)) == (0, [])
    with pytest.raises(ContextUnknown, match="no context named b"):
        kept.remove("b")
    with pytest.raises(ContextUnknown):
        kept.get(context_id("b"))


async def test_two_names_of_one_text_share_a_cache() -> None:
    kept = store(2 * ONE.nbytes)
    kept.add("again", context_id("a"), tuple(range(TOKENS)))
    await put(kept, "a")
    kept.remove("a")
    assert rungs(kept) == {"again": "float32"}
    kept.remove("again")
    assert kept.cache_bytes == 0


async def test_a_context_removed_while_its_cache_is_made_leaves_nothing() -> None:
    kept = store(2 * ONE.nbytes)
    with kept.pinned(context_id("a")):
        kept.remove("a")
        await put(kept, "a")
    assert kept.cache_bytes == 0


async def test_tightened_caches_go_to_disk_and_come_back(tmp_path: Path) -> None:
    kept = store(2 * KLT6, folder=tmp_path)
    await put(kept, *"abcd")
    held = rungs(kept)
    assert set(held) == set("abcd")
    assert "klt6*" in held.values()
    away = next(name for name, rung in held.items() if rung == "klt6*")
    form = await kept.fetch(context_id(away))
    assert form is not None
    direct = kept.shelf.put(cache_of(seed=ord(away)), "klt6", context_id(away), tuple(range(TOKENS)))
    assert equal(kept.shelf.take(form), kept.shelf.take(direct))
    assert rungs(kept)[away] == "klt6"
    assert kept.cache_bytes <= kept.budget_bytes


async def test_what_is_on_disk_survives_a_restart(tmp_path: Path) -> None:
    first = store(2 * KLT6, folder=tmp_path)
    await put(first, *"abcd")
    away = {name: rung for name, rung in rungs(first).items() if rung and rung.endswith("*")}
    second = store(2 * KLT6, folder=tmp_path)
    assert away
    assert rungs(second) == away
    form = await second.fetch(context_id(next(iter(away))))
    assert form is not None
    assert second.shelf.take(form).entries == TOKENS


async def test_where_the_disk_fails_caches_leave_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(2 * KLT6, folder=tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_agent.memory.spill.write_whole", full)
    with caplog.at_level(logging.WARNING):
        await put(kept, *"abcd")
    assert not any(rung and rung.endswith("*") for rung in rungs(kept).values())
    assert kept.cache_bytes <= kept.budget_bytes
    assert "can't be written: No space left on device" in caplog.text


async def test_a_damaged_file_is_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = store(2 * KLT6, folder=tmp_path)
    await put(kept, *"abcd")
    away = next(name for name, rung in rungs(kept).items() if rung and rung.endswith("*"))
    path = tmp_path / f"{context_id(away)}.kvb"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert await kept.fetch(context_id(away)) is None
    assert away not in rungs(kept)
    assert not path.exists()
    assert "is dropped" in caplog.text


async def test_a_low_mark_that_pinned_caches_alone_exceed_drives_none_out() -> None:
    kept = store(ONE.nbytes + 2 * KLT2)
    await put(kept, "a")
    with kept.pinned(context_id("a")):
        await put(kept, "b", "c")
        limit = int(kept.cache_bytes / 0.81)
        kept._budget = Budget(limit_bytes=limit, high=0.8, low=0.6, system=kept._budget.system)
        assert ONE.nbytes > 0.6 * limit
        await kept.relieve()
        assert rungs(kept) == {"a": "float32", "b": "klt6", "c": "klt6"}


async def test_floats_that_may_not_be_tightened_go_to_disk_as_floats(tmp_path: Path) -> None:
    kept = store(1.5 * ONE.nbytes, folder=tmp_path, tightest_kl=0.0)
    await put(kept, "a", "b")
    assert rungs(kept) == {"a": "float32*", "b": "float32"}
    form = await kept.fetch(context_id("a"))
    assert form is not None
    assert equal(kept.shelf.take(form), cache_of(seed=ord("a")))
    assert kept.shelf.fits(form, recipe("fp16"))
    assert not kept.shelf.fits(form, recipe("qkvcomm-6"))  # its attention was not written


async def test_a_fetch_from_disk_never_replaces_what_was_put_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(4 * KLT6, folder=tmp_path)
    await put(kept, *"abcdef")
    away = next(name for name, rung in rungs(kept).items() if rung.endswith("*"))
    kept._budget = Budget(limit_bytes=1 << 40, system=kept._budget.system)
    began, go = asyncio.Event(), asyncio.Event()
    loop, real = asyncio.get_running_loop(), Spill.read

    def slow(spill: Spill, key: str) -> object:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
        return real(spill, key)

    monkeypatch.setattr(Spill, "read", slow)
    fetching = asyncio.create_task(kept.fetch(context_id(away)))
    await began.wait()
    await put(kept, away)
    go.set()
    assert isinstance(await fetching, Cache)
    assert rungs(kept)[away] == "float32"


async def test_a_fetch_from_disk_does_not_wait_for_others_to_tighten(tmp_path: Path) -> None:
    kept = store(4 * KLT6, folder=tmp_path)
    await put(kept, *"abcdef")
    away = next(name for name, rung in rungs(kept).items() if rung.endswith("*"))
    async with kept._relieving:
        async with asyncio.timeout(5):
            form = await kept.fetch(context_id(away))
    assert form is not None
    assert kept.shelf.take(form).entries == TOKENS


async def test_a_context_removed_while_its_cache_is_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(1.2 * ONE.nbytes, folder=tmp_path, tightest_kl=0.0)
    await put(kept, "a")
    began, go = asyncio.Event(), asyncio.Event()
    loop, real = asyncio.get_running_loop(), Spill.write

    def slow(spill: Spill, shelved: Shelved) -> None:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
        real(spill, shelved)

    monkeypatch.setattr(Spill, "write", slow)
    putting = asyncio.create_task(put(kept, "b"))
    await began.wait()
    kept.remove("a")
    go.set()
    await putting
    await kept.settled()
    assert os.listdir(tmp_path) == []


async def test_what_is_kept_in_the_background_is_there_once_settled_and_failures_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = store(ONE.nbytes)
    held = kept.get(context_id("a"))
    kept.keep(held, ONE)
    await kept.settled()
    assert rungs(kept) == {"a": "float32"}
    kept.add("g", context_id("g"), tuple(range(2_000)))
    with caplog.at_level(logging.WARNING):
        kept.keep(kept.get(context_id("g")), cache_of(entries=2_000))
        await kept.settled()
    assert "g: a cache of" in caplog.text
    kept.keep(held, ONE)
    await kept.close()
    assert not kept._background
    assert not kept._pins


async def test_freed_memory_is_given_back_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose available memory grows only once what was freed is given back."""
    kept = store(1 << 40)
    await put(kept, "a", "b", "c")
    whole = kept.cache_bytes
    seen = whole

    def given_back() -> None:
        nonlocal seen
        seen = kept.cache_bytes

    monkeypatch.setattr("edge_agent.memory.store.trim", given_back)
    kept._budget = Budget(limit_bytes=1 << 50, share=0.9, low=0.7, system=lambda: System(whole - seen))
    await kept.relieve()
    assert rungs(kept) == {"a": "klt2", "b": "klt2", "c": "float32"} or rungs(kept)["c"] == "float32"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["put", "fetch", "pin", "unpin"])), max_size=25),
    st.floats(0.3, 4),
    st.booleans(),
)
def test_the_budget_is_never_exceeded_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str]], room: float, disk: bool
) -> None:
    async def run() -> None:
        kept = store(room * ONE.nbytes, folder=tmp_path_factory.mktemp("spill") if disk else None, high=0.9, low=0.5)
        pins: dict[str, object] = {}
        for name, what in actions:
            key = context_id(name)
            if what == "put":
                try:
                    await kept.put(key, cache_of(seed=ord(name)))
                except AgentError as error:
                    assert isinstance(error, BudgetExceeded)  # noqa: PT017
            elif what == "fetch":
                form = await kept.fetch(key)
                assert form is None or kept.shelf.take(form).entries == TOKENS
            elif what == "pin" and name not in pins:
                pins[name] = kept.pinned(key)
                pins[name].__enter__()  # type: ignore[attr-defined]
            elif what == "unpin" and name in pins:
                pins.pop(name).__exit__(None, None, None)  # type: ignore[attr-defined]
            assert kept.cache_bytes <= kept.budget_bytes
            assert kept._pending_bytes == 0
        for pin in pins.values():
            pin.__exit__(None, None, None)  # type: ignore[attr-defined]
        assert not kept._pins
        await kept.relieve()
        assert kept.cache_bytes <= 0.9 * kept.budget_bytes

    asyncio.run(run())
