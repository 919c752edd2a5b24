"""Patterns of technical text: endpoints, HTTP methods, rate limits, versions, identifiers."""

from __future__ import annotations

import re

from edge_agent.facts.fact import Fact
from edge_agent.facts.pattern import Pattern, find_all

_METHOD = r"(?:GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS)"
_BEFORE_METHOD = r"\b(?:(?<![A-Z][ ])|(?<=HTTP[ ]))"  # "PUT" in a sentence in capitals is none
_SEGMENT = r"(?:\{\w{1,40}\}|<\w{1,40}>|:?[\w~%@-]{1,64}+(?:\.[\w~%@-]{1,64}+){0,4}+)"
_PATH = rf"/(?:(?=[A-Za-z{{<:_]){_SEGMENT})(?:/{_SEGMENT}){{0,11}}+/?(?:\?[\w=&%.{{}}-]{{0,80}}[\w=}}])?(?![\w/])"
_NOT_INSIDE = r"(?<![\w./:<~)\]-])"  # "and/or", "./a", "</b>"
# Longer than a fact may be, so that a longer one is dropped, not cut in two.
_URL = r"(?:https?|wss?|ftp|mqtts?|coaps?)://[^\s<>\"'`]{0,400}[\w/}]"

_RATE_OF = (
    r"(?:requests?|reqs?|calls?|queries|query|messages?|msgs?|connections?|transactions?|hits?|uploads?|downloads?|"
    r"attempts?|tokens?|events?|operations?|ops|publishes|reads|writes|jobs?|e-?mails?|logins?)"
)
_RATE_PER = (
    r"(?:seconds?|secs?|s|minutes?|mins?|hours?|hrs?|h|days?|d|weeks?|months?|users?|clients?|keys?|IP|devices?|"
    r"tenants?)"
)
_RATE = (
    rf"(?<![\w.,-])\d{{1,9}}+(?:[.,]\d{{1,9}}+){{0,3}}+[kKM]?\s{{0,3}}(?:[A-Za-z]{{2,12}}\s{{1,3}})?{_RATE_OF}"
    rf"(?:\s?/\s?|\s{{1,3}}(?:per|an?|every|each)\s{{1,3}})(?:\d{{1,5}}\s{{1,3}})?{_RATE_PER}(?!\w)"
)

_NUMBERS = r"\d{1,5}(?:\.\d{1,5}){%s}"
_STAGE = r"(?:-?(?:alpha|beta|rc|dev|post|a|b)\.?\d{0,4})?"
_AFTER_VERSION = r"(?![\w-]|\.\d)"

PATTERNS = (
    Pattern("endpoint", "URL", 0.9, re.compile(rf"\b{_URL}")),
    Pattern("endpoint", "path", 0.9, re.compile(rf"(?:{_BEFORE_METHOD}{_METHOD}[ ]{{1,3}}|{_NOT_INSIDE}){_PATH}")),
    Pattern("endpoint", "method and URL", 0.9, re.compile(rf"{_BEFORE_METHOD}{_METHOD}[ ]{{1,3}}{_URL}")),
    Pattern(
        "http_method",
        "",
        0.45,
        re.compile(rf"{_BEFORE_METHOD}{_METHOD}\b(?![ ]{{1,3}}(?:/|https?:|(?!{_METHOD})[A-Z]{{2}}))(?![-_'’])"),
    ),
    Pattern("rate_limit", "", 0.9, re.compile(_RATE, re.IGNORECASE)),
    Pattern(
        "version",
        "named",
        0.8,
        re.compile(
            rf"\b(?:[Vv]ersions?|[Ff]irmware(?:\s[Vv]ersion)?)\s{{1,3}}v?{_NUMBERS % '0,3'}{_STAGE}{_AFTER_VERSION}"
            rf"|\b(?:[Rr]elease|[Rr]evision|[Rr]ev\.?|[Bb]uild|[Uu]pdate|[Pp]atch)\s{{1,3}}v?"
            rf"{_NUMBERS % '1,3'}{_STAGE}{_AFTER_VERSION}"
        ),
    ),
    Pattern(
        "version",
        "v",
        0.8,
        re.compile(rf"(?<![\w./-])v\d{{1,4}}(?:\.\d{{1,5}}){{0,3}}{_STAGE}{_AFTER_VERSION}"),
    ),
    Pattern(
        "version",
        "numbers",
        0.8,
        re.compile(rf"(?<![\w./:-])\d{{1,3}}\.\d{{1,3}}\.\d{{1,3}}{_STAGE}{_AFTER_VERSION}(?![:/])"),
    ),
    Pattern(
        "identifier",
        "UUID",
        0.75,
        re.compile(r"(?<![\w-])[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}(?![\w-])"),
    ),
    Pattern(
        "identifier",
        "hash",
        0.75,
        re.compile(
            r"(?<!\w)(?:(?:sha\d{1,3}|md5):)?(?=[0-9a-f]{0,63}\d)(?=\d{0,63}[a-f])"
            r"(?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32}|0x[0-9a-f]{4,64})(?!\w)",
            re.IGNORECASE,
        ),
    ),
    Pattern("identifier", "hexadecimal", 0.75, re.compile(r"(?<!\w)0x[0-9a-fA-F]{1,64}(?!\w)")),
    Pattern(
        "identifier",
        "e-mail",
        0.75,
        re.compile(r"(?<![\w.+@-])[\w.+-]{1,64}+@[A-Za-z0-9-]{1,63}+(?:\.[A-Za-z0-9-]{1,63}+){1,5}(?<!-)(?![\w@])"),
    ),
    Pattern(
        "identifier",
        "IPv4",
        0.75,
        re.compile(
            r"(?<![\w.-])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
            r"(?:[:/]\d{1,5})?(?![\w-]|\.\d)"
        ),
    ),
    Pattern("identifier", "MAC", 0.75, re.compile(r"(?<![\w:-])(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}(?![\w:-])")),
    Pattern(
        "identifier",
        "standard",
        0.75,
        re.compile(
            r"(?<![\w-])(?:RFC|ISO|IEC|IEEE|DIN|EN|ANSI|BS|NIST|FIPS|CVE|PEP)(?:/IEC)?[ -]"
            r"\d{1,6}(?:[.-]\d{1,6}){0,3}[a-z]{0,2}(?![\w-])"
        ),
    ),
    Pattern(
        "identifier",
        "snake case",
        0.75,
        re.compile(
            r"(?<![\w./-])_{0,2}[A-Za-z][A-Za-z0-9]{0,40}+(?:_[A-Za-z0-9]{1,40}+){1,8}+_{0,2}(?:\(\))?(?![\w/-])"
        ),
    ),
    Pattern(
        "identifier",
        "camel case",
        0.75,
        re.compile(r"(?<![\w./-])[a-z]{2,20}+(?:[A-Z][a-z0-9]{1,20}+){1,6}+(?:\(\))?(?![\w/-])"),
    ),
    Pattern(
        "identifier",
        "option",
        0.75,
        re.compile(r"(?<![\w-])--[a-z][a-z0-9]{0,20}+(?:-[a-z0-9]{1,20}+){0,4}+(?![\w-])"),
    ),
    Pattern(
        "identifier",
        "code",
        0.75,
        # Letters and digits, such as AX-4410 or E3; one that starts with a digit must be long (not 3D, 12V).
        re.compile(
            r"(?<![\w./:-])(?=[A-Z]|[A-Z0-9-]{5})(?=[A-Z-]{0,20}\d|\d{1,20}-?[A-Z])"
            r"(?=[A-Z0-9-]{0,30}[A-Z])[A-Z0-9]{1,20}+(?:-[A-Z0-9]{1,20}+){0,4}+(?![\w-])"
        ),
    ),
    Pattern(
        "identifier",
        "file",
        0.75,
        re.compile(
            r"(?<![\w./-])[\w-]{1,60}+\.(?:py|json|ya?ml|toml|md|txt|csv|log|conf|cfg|ini|sh|js|ts|html|xml|onnx|gguf|"
            r"bin|whl|zip)(?![\w-])"
        ),
    ),
)


def technical(text: str) -> list[Fact]:
    """Endpoints, methods, rate limits, versions and identifiers of a text; they may overlap."""
    return find_all(PATTERNS, text)
