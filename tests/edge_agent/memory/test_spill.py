"""Caches on disk are bounded, whole or not there, checked when they are read, and taken over by the next run."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import SpillFailed
from edge_agent.kv.shelved import Shelved
from edge_agent.memory import spill
from edge_agent.memory.spill import Spill
from tests.edge_agent.caches import transform_for
from tests.edge_agent.memory.shelves import ONE, TOKENS, cache_of, context_id, expected, shelf


def kept(name: str, rung: str = "klt4") -> Shelved:
    return shelf().put(cache_of(seed=ord(name)), rung, context_id(name), tuple(range(TOKENS)))


def opened(folder: Path, limit_bytes: int = 1 << 30) -> Spill:
    return Spill(folder, limit_bytes, expected(), "fp32")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    disk = opened(tmp_path / "deep" / "down")
    disk.write(kept("a"))
    back = disk.read(context_id("a"))
    assert back is not None
    assert (back.header, back.bodies) == (kept("a").header, kept("a").bodies)
    assert (disk.rung(context_id("a")), disk.rung(context_id("b"))) == ("klt4", None)
    assert disk.read(context_id("b")) is None
    disk.write(kept("a", "klt6"))
    assert disk.rung(context_id("a")) == "klt6"
    assert disk.nbytes == sum(path.stat().st_size for path in (tmp_path / "deep" / "down").iterdir())


def test_the_longest_unused_makes_room(tmp_path: Path) -> None:
    disk = opened(tmp_path, 6_000)
    for name in "ab":
        disk.write(kept(name))
    disk.read(context_id("a"))
    disk.write(kept("c"))
    assert [disk.rung(context_id(name)) for name in "abc"] == ["klt4", None, "klt4"]
    assert disk.nbytes <= 6_000
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_larger_than_the_limit_changes_nothing(tmp_path: Path) -> None:
    disk = opened(tmp_path, 2_500)
    disk.write(kept("a"))
    with pytest.raises(SpillFailed, match="beyond the 2,500"):
        disk.write(kept("b", "fp16"))
    assert disk.read(context_id("a")) is not None


def test_a_full_disk_is_one_line_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(tmp_path)
    disk.write(kept("a"))
    monkeypatch.setattr(spill, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(SpillFailed, match="has no room for a cache of"):
        disk.write(kept("b"))
    assert disk.read(context_id("a")) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_the_next_run_takes_over_in_order_of_use_and_clears_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = opened(tmp_path)
    for name in "abc":
        disk.write(kept(name))
        os.utime(tmp_path / f"{context_id(name)}.kvb", ns=(ord(name), ord(name)))
    (tmp_path / f"{context_id('d')}.kvb").write_bytes(b"KVB1 but no more")
    (tmp_path / f".{context_id('e')}.kvb.x1").write_bytes(b"cut off")
    (tmp_path / "notes.txt").write_text("somebody's", encoding="utf-8")
    again = opened(tmp_path, 6_000)
    assert [again.rung(context_id(name)) for name in "abcd"] == [None, "klt4", "klt4", None]
    assert f"{context_id('d')}.kvb is dropped" in caplog.text
    again.write(kept("f"))
    assert [again.rung(context_id(name)) for name in "abcf"] == [None, None, "klt4", "klt4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{context_id('c')}.kvb", f"{context_id('f')}.kvb", "notes.txt"]
    )


def test_another_models_caches_are_cleared_away(tmp_path: Path) -> None:
    opened(tmp_path).write(kept("a"))
    other = Spill(tmp_path, 1 << 30, expected(transform_for(ONE, seed=1)), "fp32")
    assert other.rung(context_id("a")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 5, 300, -40, -1])
def test_a_flipped_bit_is_found_and_the_file_dropped(tmp_path: Path, at: int) -> None:
    disk = opened(tmp_path)
    disk.write(kept("a"))
    path = tmp_path / f"{context_id('a')}.kvb"
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    assert disk.read(context_id("a")) is None
    assert not path.exists()
    assert disk.rung(context_id("a")) is None


def test_a_file_under_anothers_name_is_dropped(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    disk.write(kept("a"))
    (tmp_path / f"{context_id('a')}.kvb").rename(tmp_path / f"{context_id('b')}.kvb")
    again = opened(tmp_path)
    assert again.read(context_id("b")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_took_away_is_no_cache(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    disk.write(kept("a"))
    (tmp_path / f"{context_id('a')}.kvb").unlink()
    assert disk.read(context_id("a")) is None
    assert disk.rung(context_id("a")) is None


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SpillFailed, match="can't be used for caches"):
        opened(tmp_path / "file")


def test_a_rung_of_another_version_or_other_weights_is_not_taken_over(tmp_path: Path) -> None:
    opened(tmp_path).write(kept("a"))
    assert Spill(tmp_path, 1 << 30, expected(), "int8").rung(context_id("a")) is None
    for strange in ("klx6", "klt6"):
        shelved = kept("b")
        opened(tmp_path).write(Shelved(msgspec.structs.replace(shelved.header, rung=strange), shelved.bodies))
        assert opened(tmp_path).rung(context_id("b")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_limit_holds_from_the_start(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    for name in "abc":
        disk.write(kept(name))
    assert opened(tmp_path, 4_000).nbytes <= 4_000


def test_a_disk_that_can_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(tmp_path)
    disk.write(kept("a"))

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert disk.read(context_id("a")) is not None
