"""What holds a device back: heat, too little voltage, too much current. Read where the system tells of it.

Raspberry Pi: the firmware's word, from sysfs or by vcgencmd, which says what is so and what was so since the start.
Jetson: counters of over-current events and cooling devices at work, in sysfs; tegrastats, which tells of heat alone,
where there are no thermal zones. Any other Linux: thermal zones.
A plain file each; what is not there is not known.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from broker_config.messages import Health
from broker_config.messages.agents import Strain

SYS = Path("/sys")
FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"
VCGENCMD_S = TEGRASTATS_S = 2.0
HOTTEST_C = 150.0
"""What a sensor says beyond is no temperature."""

_BITS: tuple[tuple[int, Strain], ...] = (
    (0, "undervoltage"),
    (1, "frequency-capped"),
    (2, "throttled"),
    (3, "soft-temperature-limit"),
)
_SINCE_START = 16


def measure(root: Path = SYS, *, vcgencmd: str = "vcgencmd", tegrastats: str = "tegrastats") -> Health | None:
    """Now; None where nothing is known."""
    temperature_c = max([*_temperatures(root)] or _tegrastats(tegrastats), default=None)
    word = _firmware_word(root, vcgencmd)
    now = dict.fromkeys(_strains(word, 0)) if word is not None else {}
    earlier = dict.fromkeys(_strains(word, _SINCE_START)) if word is not None else {}
    known = word is not None
    for present, strain in _elsewhere(root):
        known = True
        if present:
            now[strain] = None
    counts = [count for path in (root / "class" / "hwmon").glob("hwmon*/oc*_event_cnt") if (count := _number(path))]
    if counts:
        known, earlier["over-current"] = True, None
    if temperature_c is None and not known:
        return None
    return Health(
        temperature_c=temperature_c,
        now=tuple(now),
        earlier=tuple(strain for strain in earlier if strain not in now),
    )


def _temperatures(root: Path) -> Iterator[float]:
    for zone in sorted((root / "class" / "thermal").glob("thermal_zone*/temp")):
        value = _number(zone)
        if value is not None and 0 < value / 1000 < HOTTEST_C:  # thousandths; a sensor that is off says 0 or less
            yield value / 1000


def _tegrastats(program: str) -> list[float]:
    """Of one of the lines that it prints as long as it runs: `... cpu@48.5C soc0@47C VDD_IN 4953mW/4953mW`."""
    found = shutil.which(program)
    if found is None:
        return []
    try:
        with subprocess.Popen(
            [found, "--interval", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as running:
            given_up = threading.Timer(TEGRASTATS_S, running.kill)
            given_up.start()
            line = running.stdout.readline() if running.stdout else ""
            given_up.cancel()
            running.kill()
    except OSError:
        return []
    return [value for text in re.findall(r"@(-?\d+(?:\.\d+)?)C\b", line) if 0 < (value := float(text)) < HOTTEST_C]


def _firmware_word(root: Path, vcgencmd: str) -> int | None:
    """Of a Raspberry Pi: bits 0-3 now, 16-19 since the start."""
    try:
        return int((root / FIRMWARE).read_text(encoding="ascii").strip(), 16)
    except (OSError, ValueError):
        pass
    if not (root / "firmware/devicetree/base/model").exists():
        return None  # no board of this kind: no need to start a program every time
    try:
        done = subprocess.run(
            [vcgencmd, "get_throttled"], capture_output=True, text=True, timeout=VCGENCMD_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.fullmatch(r"throttled=(0x[0-9a-fA-F]+)\s*", done.stdout)
    return int(found[1], 16) if found else None


def _strains(word: int, shift: int) -> Iterator[Strain]:
    for bit, strain in _BITS:
        if word >> (bit + shift) & 1:
            yield strain


def _elsewhere(root: Path) -> Iterator[tuple[bool, Strain]]:
    """Whether drivers tell of a strain: the Pi's voltage sensor, Jetson's over-current and thermal throttling."""
    for monitor in sorted((root / "class" / "hwmon").glob("hwmon*")):
        alarm = _number(monitor / "in0_lcrit_alarm")
        if alarm is not None:
            yield bool(alarm), "undervoltage"
    for cooling in sorted((root / "class" / "thermal").glob("cooling_device*")):
        try:
            kind = (cooling / "type").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        state = _number(cooling / "cur_state")
        if state is not None and "throttle-alert" in kind:
            yield bool(state), "throttled"
        elif state is not None and kind.startswith(("cpufreq", "cpu-freq", "thermal-cpufreq")):
            yield bool(state), "frequency-capped"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
