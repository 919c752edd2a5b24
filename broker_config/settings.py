"""TOML configuration: one file, one frozen struct, one line per mistake.

A configuration struct is a msgspec Struct with forbid_unknown_fields. Each of its fields is
Annotated[type, Meta(title=..., extra={"unit": ...})]; a nested struct becomes a table and needs the title only.
`describe` writes the commented template of such a struct; loading that template gives its defaults.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec import inspect as kinds

from broker_config.errors import ConfigurationError

S = TypeVar("S", bound=Struct)


class BrokerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is, who we are there, and how patient we are. password_file holds the password, on one line."""

    host: Annotated[
        str,
        Meta(
            title="host name or address of the MQTT broker; mdns: found on the local network by the site's name",
            extra={"unit": ""},
            min_length=1,
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(title="TCP port of the broker", extra={"unit": ""}, ge=1, le=65_535)] = 1883
    username: Annotated[str | None, Meta(title="user at the broker", extra={"unit": ""})] = None
    password_file: Annotated[
        str | None, Meta(title="file that holds the password, and nothing else", extra={"unit": "path"})
    ] = None
    keepalive_s: Annotated[
        int, Meta(title="silence after which the broker takes us for gone", extra={"unit": "s"}, ge=1, le=3_600)
    ] = 20
    connect_timeout_s: Annotated[
        float, Meta(title="time one attempt to connect may take", extra={"unit": "s"}, gt=0, le=600)
    ] = 5.0
    publish_timeout_s: Annotated[
        float, Meta(title="time a message may wait for the broker", extra={"unit": "s"}, gt=0, le=600)
    ] = 8.0
    backoff_first_s: Annotated[
        float, Meta(title="wait after the first failed attempt; doubles each time", extra={"unit": "s"}, gt=0, le=600)
    ] = 0.25
    backoff_cap_s: Annotated[
        float, Meta(title="longest wait between two attempts", extra={"unit": "s"}, gt=0, le=3_600)
    ] = 10.0

    @property
    def address(self) -> str:
        """host:port, for people."""
        return f"{self.host}:{self.port}"

    def password(self) -> str | None:
        """The password out of password_file (without the line's end). Raises ConfigurationError if it can't be read."""
        if self.password_file is None:
            return None
        try:
            return Path(self.password_file).expanduser().read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"can't read password_file {self.password_file}: {_reason(error)}") from None


def load_toml(path: Path, type: type[S]) -> S:  # noqa: A002  (the field's own word: a file and its type)
    """Read a TOML file into a struct. Raises ConfigurationError: file, field, and what was wrong, on one line."""
    return convert(read_toml(path), type, path)


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file. Raises ConfigurationError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"can't read {path}: {_reason(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: no valid TOML: {error}") from None


def convert(content: Mapping[str, Any], type: type[S], path: Path) -> S:  # noqa: A002
    """Values into a struct. path: where they are from, for people. Raises ConfigurationError as load_toml does."""
    for field, nearest in _unknown(content, kinds.type_info(type), ""):
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise ConfigurationError(f"{path}: unknown field {field}{hint}")
    try:
        return msgspec.convert(content, type, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.rstrip("`").lstrip(".")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
        if missing:
            raise ConfigurationError(f"{path}: missing field {_joined(field, missing[1])}") from None
        raise ConfigurationError(f"{path}: {f'{field}: ' if field else ''}{what[:1].lower()}{what[1:]}") from None


def describe(type: type[Struct]) -> str:  # noqa: A002
    """The commented TOML template of a configuration struct: title, unit and default of every field.

    Every value stands commented out, so that a file says no more than what somebody has chosen, and the defaults of a
    later version, or of a device, are taken for the rest. Raises TypeError for a field that has no title, or no unit
    though it is a value.
    """
    information = kinds.type_info(type)
    assert isinstance(information, kinds.StructType)  # noqa: S101  (what type_info gives for a Struct)
    return "\n".join(_template(information, None, "")).strip("\n") + "\n"


def write_toml(values: Mapping[str, Any]) -> str:
    """Values as TOML, tables after what stands beside them. What is None is left out."""
    return "\n".join(_tables(values, "")).strip("\n") + "\n"


def _tables(values: Mapping[str, Any], table: str) -> Iterator[str]:
    if table:
        yield f"\n[{table}]"
    for name, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{name} = {_toml(value)}"
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _tables(value, _joined(table, name))


def _template(struct: kinds.StructType, values: Struct | None, table: str) -> Iterator[str]:
    """Lines of one table: its values first, since TOML gives everything below a table's header to that table."""
    tables: list[tuple[kinds.Field, kinds.StructType]] = []
    for field in struct.fields:
        inner = _structs(field.type)
        if isinstance(_bare(field.type), kinds.StructType):
            tables.append((field, inner[0]))
            continue
        title, unit = _words(struct, field, needs_unit=not inner)
        yield f"# {title} [{unit}]" if unit else f"# {title}"
        yield _assignment(field, _default(field, values))
        yield ""
    for field, inner_struct in tables:
        title, _ = _words(struct, field, needs_unit=False)
        name = _joined(table, field.name)
        value = _default(field, values)
        lines = list(_template(inner_struct, value if isinstance(value, Struct) else None, name))
        absent = value is None and not field.required
        yield f"# {title}"
        for line in (f"[{name}]", *lines):
            yield f"#{line}" if absent and line.startswith("[") else line


def _assignment(field: kinds.Field, value: object) -> str:
    if value is msgspec.NODEFAULT:
        return f"#{field.name} =   (required)"
    plain = msgspec.to_builtins(value)
    return f"#{field.name} =" if plain is None else f"#{field.name} = {_toml(plain)}"


def _toml(value: object) -> str:
    """A plain value as TOML. JSON's strings, numbers and booleans are TOML's; tables are written inline."""
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        inside = ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
        return "{" + inside + "}"
    if isinstance(value, float):
        return repr(value)
    # JSON leaves DEL as it is, TOML wants it escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _words(struct: kinds.StructType, field: kinds.Field, *, needs_unit: bool) -> tuple[str, str]:
    schema, extra = {}, {}
    if isinstance(field.type, kinds.Metadata):
        schema, extra = field.type.extra_json_schema or {}, field.type.extra or {}
    if "title" not in schema or (needs_unit and "unit" not in extra):
        raise TypeError(f"{struct.cls.__name__}.{field.name} needs Meta(title=..., extra={{'unit': ...}})")
    return str(schema["title"]), str(extra.get("unit", ""))


def _default(field: kinds.Field, values: Struct | None) -> Any:
    if values is not None:
        return getattr(values, field.name)
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _bare(kind: kinds.Type) -> kinds.Type:
    """The type under its metadata, and under `| None`."""
    while isinstance(kind, kinds.Metadata):
        kind = kind.type
    if isinstance(kind, kinds.UnionType):
        others = [member for member in kind.types if not isinstance(member, kinds.NoneType)]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind


def _structs(kind: kinds.Type) -> list[kinds.StructType]:
    """The structs of a field: itself, or the items of its list or table."""
    bare = _bare(kind)
    if isinstance(bare, kinds.StructType):
        return [bare]
    if isinstance(bare, kinds.DictType):
        return _structs(bare.value_type)
    if isinstance(bare, kinds.ListType | kinds.VarTupleType):
        return _structs(bare.item_type)
    return []


def _unknown(value: object, kind: kinds.Type, path: str) -> Iterator[tuple[str, str]]:
    """Every field that no struct has, as (its path, the path of the nearest name or "")."""
    bare = _bare(kind)
    if isinstance(bare, kinds.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field for field in bare.fields}
        for name, inner in value.items():
            if name in fields:
                yield from _unknown(inner, fields[name].type, _joined(path, name))
            else:
                nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
                yield _joined(path, name), _joined(path, nearest[0]) if nearest else ""
    elif isinstance(bare, kinds.DictType) and isinstance(value, dict):
        for name, inner in value.items():
            yield from _unknown(inner, bare.value_type, _joined(path, name))
    elif isinstance(bare, kinds.ListType | kinds.VarTupleType) and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unknown(inner, bare.item_type, f"{path}[{index}]")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"
