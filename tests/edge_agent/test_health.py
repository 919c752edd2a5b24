"""What a board says of heat, voltage and current is read as its firmware means it."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_config.messages import Health
from edge_agent import health
from edge_agent.health import FIRMWARE, measure


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_that_tells_nothing_is_not_said_to_be_well(tmp_path: Path) -> None:
    assert measure(tmp_path, vcgencmd="/nonexistent") is None


def test_the_hottest_sensor_counts_and_those_that_are_off_do_not(tmp_path: Path) -> None:
    for number, text in enumerate(("45123\n", "61000\n", "-256000\n", "0\n", "nonsense", "999999999\n")):
        put(tmp_path, f"class/thermal/thermal_zone{number}/temp", text)
    assert measure(tmp_path) == Health(temperature_c=61.0)


@pytest.mark.parametrize(
    ("word", "now", "earlier"),
    [
        ("0x0", (), ()),
        ("0x50000", (), ("undervoltage", "throttled")),
        ("50005", ("undervoltage", "throttled"), ()),
        ("0xe0008", ("soft-temperature-limit",), ("frequency-capped", "throttled")),
        ("0xf000f", ("undervoltage", "frequency-capped", "throttled", "soft-temperature-limit"), ()),
    ],
)
def test_a_raspberry_pis_firmware_says_what_is_and_what_was(
    tmp_path: Path, word: str, now: tuple[str, ...], earlier: tuple[str, ...]
) -> None:
    put(tmp_path, FIRMWARE, f"{word}\n")
    assert measure(tmp_path) == Health(now=now, earlier=earlier)  # type: ignore[arg-type]
    (tmp_path / FIRMWARE).unlink()
    put(tmp_path, "firmware/devicetree/base/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    put(tmp_path, "vcgencmd", f"#!/bin/sh\necho throttled=0x{word.removeprefix('0x')}\n")
    (tmp_path / "vcgencmd").chmod(0o755)
    assert measure(tmp_path, vcgencmd=str(tmp_path / "vcgencmd")) == Health(now=now, earlier=earlier)  # type: ignore[arg-type]
    put(tmp_path, "vcgencmd", "#!/bin/sh\necho VCHI initialization failed\n")
    assert measure(tmp_path, vcgencmd=str(tmp_path / "vcgencmd")) is None


def test_a_jetson_without_thermal_zones_is_asked_by_its_own_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tegrastats"
    orin = (
        "RAM 2448/7620MB (lfb 3x4MB) CPU [5%@729,off] GR3D_FREQ 0% cpu@48.5C tj@49.25C gpu@-256C VDD_IN 4953mW/4953mW"
    )
    put(tmp_path, "tegrastats", f"#!/bin/sh\nwhile echo '{orin}'; do sleep 0.1; done\n")
    tool.chmod(0o755)
    assert measure(tmp_path, tegrastats=str(tool)) == Health(temperature_c=49.25)
    put(tmp_path, "class/thermal/thermal_zone0/temp", "41000\n")
    assert measure(tmp_path, tegrastats=str(tool)) == Health(temperature_c=41.0)
    (tmp_path / "class/thermal/thermal_zone0/temp").unlink()
    monkeypatch.setattr(health, "TEGRASTATS_S", 0.2)
    for text in ("#!/bin/sh\nexec sleep 60\n", "#!/bin/sh\necho no board of NVIDIA\n", "no program"):
        tool.write_text(text)
        assert measure(tmp_path, tegrastats=str(tool)) is None
    assert measure(tmp_path, tegrastats="/nonexistent") is None


def test_drivers_of_other_boards_are_heard(tmp_path: Path) -> None:
    put(tmp_path, "class/hwmon/hwmon0/in0_lcrit_alarm", "1\n")
    put(tmp_path, "class/hwmon/hwmon1/oc1_event_cnt", "3\n")
    put(tmp_path, "class/thermal/cooling_device0/type", "cpufreq-cpu0\n")
    put(tmp_path, "class/thermal/cooling_device0/cur_state", "2\n")
    put(tmp_path, "class/thermal/cooling_device1/type", "pwm-fan\n")
    put(tmp_path, "class/thermal/cooling_device1/cur_state", "3\n")
    put(tmp_path, "class/thermal/cooling_device2/type", "cpu-throttle-alert\n")
    put(tmp_path, "class/thermal/cooling_device2/cur_state", "0\n")
    assert measure(tmp_path) == Health(now=("undervoltage", "frequency-capped"), earlier=("over-current",))
    put(tmp_path, "class/hwmon/hwmon0/in0_lcrit_alarm", "0\n")
    put(tmp_path, "class/hwmon/hwmon1/oc1_event_cnt", "0\n")
    put(tmp_path, "class/thermal/cooling_device0/cur_state", "0\n")
    assert measure(tmp_path) == Health()
