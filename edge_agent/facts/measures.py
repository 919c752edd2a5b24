"""Patterns of any text: quantities, counts, dates and times. They are what questions most often ask for."""

from __future__ import annotations

import re

from edge_agent.facts.fact import VALUED, Fact
from edge_agent.facts.pattern import Pattern, find_all

_NUMBER = r"\d{1,15}+(?:,\d{3})*+(?:\.\d{1,9}+)?+"
_SIGNED = rf"(?<![\w.,$€£¥/-])[-−+±~≈<>≤≥]?{_NUMBER}"
_RANGE = rf"{_SIGNED}(?:\s?[-–]\s?{_NUMBER}|\s(?:to|and|±)\s{_NUMBER})?"
_MAGNITUDE = r"(?:hundred|thousand|million|billion|trillion)"
_ONES = (
    r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    r"eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozens?|half)"
)
_WORDS = rf"(?<![\w-])(?:(?:one|an?)\s(?={_MAGNITUDE}))?{_ONES}(?:[ -](?:and\s)?(?:one|{_ONES})){{0,4}}"

# Symbols, with their prefixes; case counts.
_SYMBOL = (
    r"(?:[kMGTmµμn]?(?:Hz|W|Wh|V|VA|Pa|J|eV|Ah|Ω|F|g|L|l|m|s|mol|bar|cd|lm|lx|Bq|Sv|Gy)|[mµμk]A|[kMGT]i?B|[kMGT]bit|"
    r"[KMGT]?bps|[kMGT]b|Mt|Gt|ha|cm|dm|cl|dl|hPa|°\s?[CFK]|°|K|min|h|hrs?|yrs?|ft|lbs?|oz|mi|mph|kph|km/h|rpm|dBm?|"
    r"dB[iA]|ppm|ppb|px|fps|dpi|psi|kcal|cal|Nm|kN|mmHg|kt|kn|kVA|kWp|m[²³23]|km[²³2]|cm[²³23]|mm[²³2]?|sq\s(?:ft|mi))"
)
_WORD_UNIT = (
    r"(?:(?:square|cubic|nautical|light|metric|short|long)[\s-])?"
    r"(?:(?:kilo|mega|giga|tera|centi|milli|micro|nano|deci|hecto)?(?:watt[\s-]hours?|met(?:re|er)s?|lit(?:re|er)s?|"
    r"grams?|grammes?|watts?|volts?|amperes?|hertz|joules?|pascals?|bytes?|bits?|seconds?|tonn?es?|calories?|tons?)|"
    r"amps?|ohms?|minutes?|hours?|days?|weeks?|months?|years?|decades?|centuries|inch(?:es)?|feet|foot|yards?|miles?|"
    r"acres?|hectares?|pounds?|ounces?|stones?|gallons?|pints?|barrels?|knots?|"
    r"degrees?(?:\s(?:Celsius|Fahrenheit|C|F))?|dollars?|euros?|cents?|pence|francs?|yen|rupees?|"
    r"percent(?:age\spoints?)?|per\scent|points?|times|pixels?|tokens?|decibels?)"
)
_PER = rf"(?:(?:\s?/\s?(?:{_SYMBOL}|year|day)|\s(?:per|an?)\s(?:{_WORD_UNIT}|capita|person)))?(?:[-−][12])?"
_END = r"(?![\w°])"
# What follows a number in a count: a plural, with up to two plain words before it that are not grammar.
_GRAMMAR = (
    r"(?:and|or|of|to|in|on|at|by|for|from|with|as|is|are|was|were|be|been|has|have|had|the|that|this|these|those|it|"
    r"its|they|he|she|who|which|when|while|where|but|if|so|than|then|not|no|an?|after|before|until|since|during|"
    r"between|into|over|under|about|can|could|may|might|must|will|would|shall|should|do|does|did|there|their|his|her|"
    r"our|more|less|other|others|also|only|both|each|all|up|out|off|because|per|times|such)"
)
_PLURAL = r"(?:[a-zà-ÿ-]{2,20}(?<![usi])s|people|men|women|children|fish|sheep|percent|aircraft|species|series)"
_COUNTED = rf"(?:\s(?!{_GRAMMAR}\b)[a-zà-ÿ-]{{3,20}}){{0,2}}?\s(?!{_GRAMMAR}\b){_PLURAL}(?![\w-])"

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"Jan\.?|Feb\.?|Mar\.?|Apr\.?|Jun\.?|Jul\.?|Aug\.?|Sept?\.?|Oct\.?|Nov\.?|Dec\.?)"
)
_DAY = r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d{2})"
_ERA = r"\s?(?:BC|AD|BCE|CE|B\.C\.|A\.D\.)"
_CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6})?)?"
_ORDINAL_CENTURY = (
    r"(?:\d{1,2}(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|"
    r"thirteenth|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth|twenty-first)"
)
_WEEKDAY = r"(?:Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)"


def _compiled(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives))


PATTERNS = (
    Pattern(
        "quantity", "unit", VALUED, _compiled(rf"(?!{_YEAR}s){_RANGE}(?:\s|-)?(?:{_MAGNITUDE}\s)?{_SYMBOL}{_PER}{_END}")
    ),
    Pattern("quantity", "unit", VALUED, _compiled(rf"{_RANGE}(?:\s|-)(?:{_MAGNITUDE}\s)?{_WORD_UNIT}{_PER}{_END}")),
    Pattern("quantity", "unit", VALUED, _compiled(rf"{_WORDS}[\s-]{_WORD_UNIT}{_PER}{_END}")),
    Pattern("quantity", "percent", VALUED, _compiled(rf"{_RANGE}\s?[%‰]")),
    Pattern(
        "quantity",
        "money",
        VALUED,
        _compiled(
            rf"(?<!\w)(?:US|A|C|NZ|HK)?[$€£¥]\s?{_NUMBER}(?:\s?[-–]\s?{_NUMBER})?(?:\s?(?:{_MAGNITUDE}|bn|[kmMB])\b)?",
            rf"{_SIGNED}(?:\s{_MAGNITUDE})?\s?(?:€|USD|EUR|GBP|CHF|JPY)(?!\w)",
        ),
    ),
    Pattern("quantity", "count", VALUED, _compiled(rf"{_RANGE}\s{_MAGNITUDE}(?:{_COUNTED})?{_END}")),
    Pattern("quantity", "count", VALUED, _compiled(rf"(?!{_YEAR}\b){_RANGE}{_COUNTED}")),
    Pattern("quantity", "count", 0.5, _compiled(rf"{_WORDS}{_COUNTED}")),
    Pattern(
        "date",
        "ISO",
        VALUED,
        _compiled(rf"(?<![\w.-]){_YEAR}-[01]\d-[0-3]\d(?:[T ]{_CLOCK}(?:Z|[+-]\d\d:?\d\d)?)?(?![\w-])"),
    ),
    Pattern(
        "date",
        "day",
        VALUED,
        _compiled(
            rf"(?<![\w.:-]){_DAY}(?:\s?[-–]\s?{_DAY})?\s(?:of\s)?{_MONTH}(?:,?\s{_YEAR})?(?!\w)",
            rf"(?<!\w){_MONTH}\s{_DAY}(?:\s?[-–]\s?(?:{_MONTH}\s)?{_DAY})?(?!\w)(?:,?\s{_YEAR})?(?![\w%]|[.:]\d)",
        ),
    ),
    Pattern("date", "month", VALUED, _compiled(rf"(?<!\w){_MONTH}(?:\sof|,)?\s{_YEAR}(?!\w)")),
    Pattern("date", "numbers", VALUED, _compiled(rf"(?<![\w./-])\d{{1,2}}([./-])\d{{1,2}}\1{_YEAR}(?![\w/-])")),
    Pattern(
        "date",
        "year",
        VALUED,
        _compiled(rf"(?<![\w.,$€£/:#-]){_YEAR}(?:[-–/](?:{_YEAR}|\d\d))?(?:{_ERA})?(?![\w%°$€-]|[.,:]\d|\s?[%°€])"),
    ),
    Pattern(
        "date",
        "era",
        VALUED,
        _compiled(
            rf"(?<![\w.,-])(?:c\.\s?)?\d{{1,5}}(?:\s?[-–]\s?\d{{1,5}})?{_ERA}(?!\w)",
            r"(?<!\w)AD\s\d{1,4}(?!\w)",
            rf"(?<![\w-])(?:(?:early|mid|late)[\s-])?{_ORDINAL_CENTURY}[\s-]centur(?:y|ies)(?:{_ERA})?(?!\w)",
            r"(?<!\w)(?:(?:early|mid|late)[\s-])?(?:1\d|20)\d0s(?!\w)",
        ),
    ),
    Pattern(
        "date",
        "time",
        VALUED,
        _compiled(
            rf"(?<![\w.:/-]){_CLOCK}(?:\s?(?:[ap]\.?m\b\.?|[AP]M\b|UTC|GMT|CET|h\b))?(?![\w:])",
            r"(?<![\w.:-])(?:1[0-2]|[1-9])\s?(?:[ap]\.m\.|[ap]m\b|[AP]M\b)",
        ),
    ),
    Pattern("date", "weekday", 0.55, _compiled(rf"(?<!\w){_WEEKDAY}(?:\s(?:morning|afternoon|evening|night))?(?!\w)")),
)


def measures(text: str) -> list[Fact]:
    """Quantities, counts, dates and times of a text; they may overlap."""
    return find_all(PATTERNS, text)
