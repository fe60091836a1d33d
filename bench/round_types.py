"""Every type of a server's own catalog, and random values of it as the text that its input function reads."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from knockwood.postgres.connection import Connection

_LISTED: Final = """
select t.oid::bigint, n.nspname || '.' || t.typname, pg_catalog.format_type(t.oid, -1), t.typname,
       t.typtype::text, t.typelem::bigint, t.typcategory::text, t.typbasetype::bigint, t.typdelim::text,
       coalesce((select rngsubtype from pg_catalog.pg_range where rngtypid = t.oid), 0)::bigint,
       coalesce((select rngtypid from pg_catalog.pg_range where rngmultitypid = t.oid), 0)::bigint,
       coalesce((select pg_catalog.array_agg(a.atttypid::bigint order by a.attnum) from pg_catalog.pg_attribute a
                 where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped), '{}'),
       (select pg_catalog.array_agg(e.enumlabel::text order by e.enumsortorder) from pg_catalog.pg_enum e
        where e.enumtypid = t.oid),
       t.typarray::bigint
from pg_catalog.pg_type t join pg_catalog.pg_namespace n on n.oid = t.typnamespace
where n.nspname !~ '^pg_(toast|temp)' and n.nspname <> all(%s)
order by t.oid
"""

_ALPHABET: Final = (
    string.ascii_letters
    + string.digits
    + " \t\n\r\x01\x08\x1b\x7f\\\"'{}()[],;:%$äßñ中文𝄞\u200b\u202e\u00a0é"
)


@dataclass(frozen=True, slots=True)
class Type:
    """A row of pg_type. `sql` is how SQL writes it, `kind` typtype, with `a` for true arrays."""

    oid: int
    name: str
    sql: str
    short: str
    kind: str
    element: int
    base: int
    delimiter: str
    subtype: int
    range_of: int
    parts: tuple[int, ...]
    labels: tuple[str, ...]


def all_types(connection: Connection, without: Sequence[str] = ()) -> dict[int, Type]:
    """The types of the connection's database but those of some schemas, by number."""
    rows = connection.execute(_LISTED, [list(without)]).fetchall()
    arrays = {row[13] for row in rows if row[13]}
    found = {}
    for oid, name, sql, short, kind, element, _, base, delimiter, subtype, range_of, parts, labels, _ in rows:
        kind = "a" if oid in arrays else kind
        found[oid] = Type(
            oid,
            name,
            sql,
            short,
            kind,
            element,
            base,
            delimiter,
            subtype,
            range_of,
            tuple(parts),
            tuple(labels or ()),
        )
    return found


def storable(connection: Connection, types: dict[int, Type]) -> tuple[list[Type], dict[str, str]]:
    """The types that a column can have, and why the others cannot, in the server's own words."""
    good, reasons = [], {}
    for each in types.values():
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(f"create temp table column_of_it (c {each.sql})".encode())
        except psycopg.Error as error:
            reasons[each.name] = error.diag.message_primary or str(error)
        else:
            good.append(each)
    return good, reasons


# --- values ------------------------------------------------------------------------------------------

Rng = random.Random
Make = Callable[[Rng], str]


def _of(*texts: str) -> Make:
    return lambda rng: rng.choice(texts)


def _either(texts: Sequence[str], make: Make, share: float = 0.5) -> Make:
    return lambda rng: rng.choice(texts) if rng.random() < share else make(rng)


def words(rng: Rng, most: int = 40) -> str:
    """Text with control characters, quotes, backslashes and characters of one to four bytes."""
    return "".join(rng.choice(_ALPHABET) for _ in range(rng.randint(0, most)))


def _text(rng: Rng) -> str:
    kind = rng.random()
    if kind < 0.06:  # out of line: does not compress below the threshold
        return rng.randbytes(rng.randint(1500, 12_000)).hex()
    if kind < 0.10:  # compressed
        return words(rng) * rng.randint(50, 400)
    return (
        rng.choice(("", " ", "NULL", "null", "\\N", "\\.", "{}", "a ", "\n", "1e3"))
        if kind < 0.3
        else words(rng)
    )


def _bytes(rng: Rng) -> str:
    size = rng.choice((0, 1, 7, 40)) if rng.random() < 0.9 else rng.randint(2000, 9000)
    return "\\x" + rng.randbytes(size).hex()


def _json(rng: Rng, depth: int = 3) -> object:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [_json(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if kind == 7:
        return {words(rng, 8): _json(rng, depth - 1) for _ in range(rng.randint(0, 4))}
    return (None, True, rng.randint(-(10**18), 10**18), rng.random(), words(rng), "x" * rng.randint(0, 30))[
        kind
    ]


def _json_text(rng: Rng) -> str:
    if rng.random() < 0.1:
        return json.dumps([rng.randbytes(40).hex() for _ in range(rng.randint(40, 120))])
    special = (
        '{"b":1,"a":2,"a":3}',
        "1.0",
        "1.00",
        "-0",
        "-0.0",
        "1E400",
        '"\\u0001"',
        "{}",
        "[]",
        " null ",
        '""',
    )
    return (
        rng.choice(special) if rng.random() < 0.3 else json.dumps(_json(rng), ensure_ascii=rng.random() < 0.5)
    )


def _integer(bits: int) -> Make:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    edges = [str(each) for each in (low, high, 0, -1, 1)]
    return _either(edges, lambda rng: str(rng.randint(low, high)), 0.3)


def _unsigned(bits: int) -> Make:
    return _either(["0", "1", str((1 << bits) - 1)], lambda rng: str(rng.getrandbits(bits)), 0.3)


def _numeric(rng: Rng) -> str:
    special = (
        "NaN",
        "Infinity",
        "-Infinity",
        "0",
        "-0",
        "0.00",
        "1.0",
        "1.00",
        "1e-16000",
        "1e1000",
        "-1e130",
    )
    if rng.random() < 0.35:
        return rng.choice(special)
    if rng.random() < 0.05:
        return "".join(rng.choice(string.digits) for _ in range(4000)) + ".5"
    return f"{rng.randint(-(10**30), 10**30)}.{rng.randint(0, 10**12)}"


def _float(tiny: str, huge: str) -> Make:
    edges = ("NaN", "Infinity", "-Infinity", "0", "-0", tiny, "-" + huge, huge, "0.1")
    return _either(edges, lambda rng: repr(rng.uniform(-1e9, 1e9)), 0.4)


def _point(rng: Rng) -> str:
    special = ("NaN", "Infinity", "-Infinity", "-0", "1e-300", "1e300")
    part = [rng.choice(special) if rng.random() < 0.15 else repr(rng.uniform(-99, 99)) for _ in "xy"]
    return f"({part[0]},{part[1]})"


def _points(least: int, most: int, shape: str) -> Make:
    return lambda rng: shape.format(",".join(_point(rng) for _ in range(rng.randint(least, most))))


def _path(rng: Rng) -> str:
    return _points(1, 90 if rng.random() < 0.1 else 6, rng.choice(("[{}]", "({})")))(rng)


def _line(rng: Rng) -> str:
    return f"{{{rng.randint(-9, 9)},{rng.randint(1, 9)},{rng.choice(('-0', 'NaN', 'Infinity', '2.5'))}}}"


def _date(rng: Rng) -> str:
    return f"{rng.randint(1, 9999):04}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: Rng) -> str:
    return (
        f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}.{rng.randint(0, 999999):06}"
    )


def _stamp(zone: str) -> Make:
    # With .999999 a timestamp(0) is rounded past the last one, and PostgreSQL does not read that back.
    edges = ("infinity", "-infinity", "4714-11-24 00:00:00 BC", "294276-12-31 23:59:59.489999", "epoch")
    return _either(edges, lambda rng: f"{_date(rng)} {_time(rng)}{zone}", 0.35)


def _interval(rng: Rng) -> str:
    special = (
        "1 day",
        "24:00:00",
        "1 mon",
        "30 days",
        "-1 mon +1 day -00:00:00.000001",
        "178000000 years",
        "0",
    )
    if rng.random() < 0.5:
        return rng.choice(special)
    return f"{rng.randint(-999, 999)} mons {rng.randint(-999, 999)} days {rng.randint(-(10**9), 10**9)} us"


def _inet(rng: Rng) -> str:
    if rng.random() < 0.5:
        return ".".join(str(rng.randrange(256)) for _ in range(4)) + rng.choice(("", "/8", "/0", "/31"))
    return ":".join(f"{rng.getrandbits(16):x}" for _ in range(8)) + rng.choice(("", "/64", "/0"))


def _cidr(rng: Rng) -> str:
    return rng.choice(
        (f"10.{rng.randrange(256)}.0.0/16", "0.0.0.0/0", f"2001:db8:{rng.getrandbits(16):x}::/48", "::/0")
    )


def _mac(size: int) -> Make:
    return lambda rng: ":".join(f"{each:02x}" for each in rng.randbytes(size))


def _bits(rng: Rng) -> str:
    return "".join(rng.choice("01") for _ in range(rng.choice((0, 1, 7, 8, 9, 300))))


def _tsvector(rng: Rng) -> str:
    lexemes = ("'a b':1A,2", "cat:3B", "dog", "'it''s':16383", "'\\\\':7")
    many = " ".join(f"{rng.getrandbits(60):x}:{n + 1}" for n in range(300)) if rng.random() < 0.1 else ""
    return " ".join(rng.sample(lexemes, rng.randint(0, 5))) + " " + many


def _snapshot(rng: Rng) -> str:
    low = rng.randint(3, 1 << 40)
    return f"{low}:{low + 20}:" + ",".join(
        str(low + n) for n in sorted(rng.sample(range(20), rng.randint(0, 5)))
    )


def _uuid(rng: Rng) -> str:
    raw = rng.randbytes(16).hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"


def _lsn(rng: Rng) -> str:
    return f"{rng.getrandbits(32):X}/{rng.getrandbits(32):X}"


def _money(rng: Rng) -> str:
    return f"{rng.randint(-(10**15), 10**15)}.{rng.randint(0, 99):02}"


def _vector(make: Make) -> Make:
    return lambda rng: " ".join(make(rng) for _ in range(rng.randint(0, 6)))


SEEDS: Final[dict[str, Make]] = {
    "bool": _of("t", "f"),
    "bytea": _bytes,
    "char": _of("a", "", "\\001", "\\377", "'", "\x7f", " "),
    "name": lambda rng: words(rng, 12),
    "int2": _integer(16), "int4": _integer(32), "int8": _integer(64),
    "oid": _unsigned(32), "xid": _unsigned(32), "cid": _unsigned(32), "xid8": _unsigned(64),
    "int2vector": _vector(_integer(16)), "oidvector": _vector(_unsigned(32)),
    "tid": lambda rng: f"({rng.getrandbits(32)},{rng.getrandbits(16)})",
    "text": _text, "varchar": _text, "bpchar": _text, "refcursor": _text,
    "json": _json_text, "jsonb": _json_text,
    "jsonpath": _of("$", "$.a[*] ? (@ > 1)", 'strict $."x y".**{2 to last}', "lax $.t.datetime()", "-1.0"),
    "xml": _of("<a/>", "plain", "<a b='1'>é&amp;</a>", "<?xml version='1.0'?><r><x/></r>", ""),
    "point": _point,
    "lseg": _points(2, 2, "[{}]"), "box": _points(2, 2, "{}"), "polygon": _points(1, 8, "({})"),
    "path": _path, "line": _line,
    "circle": lambda rng: f"<{_point(rng)},{rng.choice(('0', '1.5', 'NaN', 'Infinity'))}>",
    "float4": _float("1e-45", "3.4028235e38"), "float8": _float("5e-324", "1.7976931348623157e308"),
    "numeric": _numeric,
    "money": _either(["-92233720368547758.08", "92233720368547758.07", "0"], _money, 0.2),
    "macaddr": _mac(6), "macaddr8": _mac(8), "inet": _inet, "cidr": _cidr,
    "aclitem": _of("=r/{role}", "{role}=arwdDxt/{role}", "{role}=r*w/{role}", "=/{role}"),
    "date": _either(["infinity", "-infinity", "4714-11-24 BC", "5874897-12-31", "epoch"], _date, 0.35),
    "time": _either(["00:00", "24:00:00", "23:59:59.999999"], _time, 0.3),
    "timetz": _either(["00:00+15:59:59", "24:00:00-15:59:59", "12:00-03:30"], lambda rng: _time(rng) + "+02", 0.4),
    "timestamp": _stamp(""), "timestamptz": _stamp("-07:30"), "interval": _interval,
    "bit": _bits, "varbit": _bits,
    "uuid": _uuid, "pg_lsn": _either(["0/0", "FFFFFFFF/FFFFFFFF"], _lsn, 0.2),
    "tsvector": _tsvector,
    "tsquery": _of("a & b", "!'x y':*AB <-> c", "a <3> b | !c", ""),
    "txid_snapshot": _snapshot, "pg_snapshot": _snapshot,
    "regproc": _of("now", "-", "4294967295", "array_in"),
    "regprocedure": _of("abs(integer)", "-", "now()", "4294967294"),
    "regoper": _of("0", "4294967293", "pg_catalog.|/"),
    "regoperator": _of("+(integer,integer)", "0", "!!(NONE,tsquery)"),
    "regclass": _of("pg_class", "-", "pg_toast.pg_toast_1255", "4294967292"),
    "regcollation": _of('"C"', "-", '"POSIX"', "4294967291"),
    "regtype": _of("integer", "-", "timestamp with time zone", "4294967290", "text[]"),
    "regconfig": _of("simple", "-", "english"), "regdictionary": _of("simple", "-", "english_stem"),
    "regnamespace": _of("pg_catalog", "-", "public", "4294967289"),
    "regrole": _of("pg_monitor", "-", "4294967288"),
    "regdatabase": _of("template1", "-", "4294967287"),
}  # fmt: skip
"""Values of base types by name. `{role}` is the role that runs."""


def quoted(text: str | None) -> str:
    """An element of an array literal."""
    return "NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Values:
    """Random values of any type, made of those of its parts."""

    def __init__(self, connection: Connection, types: dict[int, Type], role: str) -> None:
        self.types = types
        self._connection = connection
        self._role = role
        self.empty: dict[str, str] = {}

    def fill(self, good: Sequence[Type], rng: Rng) -> None:
        """Find the types that no value could be made for: their columns hold NULL; `empty` says why."""
        for each in good:
            said = ""
            for _ in range(12):
                text = self.text(rng, each.oid, nulls=0)
                said = self.refusal(each.sql, text) if text is not None else said or "nothing seeds it"
                if text is not None and not said:
                    break
            else:
                self.empty[each.name] = said

    def refusal(self, sql: str, text: str) -> str:
        """Why the server's input function does not take it; empty if it does."""
        try:
            self._connection.execute(f"select %s::{sql}".encode(), [text])
        except psycopg.Error as error:
            return error.diag.message_primary or str(error)
        return ""

    def taken(self, rng: Rng, type_: Type, nulls: float = 0.25) -> str | None:
        """A value that the server takes; NULL where there is none (bounds in the wrong order, say)."""
        if type_.name in self.empty:
            return None
        for _ in range(4):
            text = self.text(rng, type_.oid, nulls)
            if text is None or not self.refusal(type_.sql, text):
                return text
        return None

    def text(self, rng: Rng, oid: int, nulls: float = 0.25, depth: int = 0) -> str | None:
        """A value as text, None for NULL; not yet one that the server must take."""
        each = self.types.get(oid)
        if each is None or rng.random() < nulls:
            return None
        if each.kind == "a":
            return self._array(rng, each, depth)
        if each.kind == "d":
            seed = _DOMAINS.get(each.short)
            return seed(rng) if seed else self.text(rng, each.base, 0, depth)
        if each.kind == "e":
            return rng.choice(each.labels)
        if each.kind == "r":
            return self._range(rng, each.subtype)
        if each.kind == "m":
            subtype = self.types[each.range_of].subtype
            return "{" + ",".join(self._range(rng, subtype) for _ in range(rng.choice((0, 1, 2, 5)))) + "}"
        if each.kind == "c":
            return self._composite(rng, each, depth)
        make = SEEDS.get(each.short)
        return make(rng).replace("{role}", self._role) if make and each.kind == "b" else None

    def _array(self, rng: Rng, each: Type, depth: int) -> str:
        counts = [rng.choice((0, 1, 2, 3)) for _ in range(rng.choice((1, 1, 1, 2)))]
        if 0 in counts:
            return "{}"
        if depth == 0 and rng.random() < 0.03 and len(counts) == 1:
            counts = [200]
        nested = 0.25 if depth < 2 else 1.0

        def level(rest: list[int]) -> str:
            if not rest:
                return quoted(self.text(rng, each.element, nested, depth + 1))
            return "{" + each.delimiter.join(level(rest[1:]) for _ in range(rest[0])) + "}"

        lows = [rng.choice((1, 1, 0, -5, 7)) for _ in counts]
        bounds = "".join(f"[{low}:{low + count - 1}]" for low, count in zip(lows, counts, strict=True))
        return (bounds + "=" if any(low != 1 for low in lows) else "") + level(counts)

    def _range(self, rng: Rng, subtype: int) -> str:
        if rng.random() < 0.15:
            return "empty"
        ends = [self.text(rng, subtype, 0.2, 1) for _ in "lu"]
        if None not in ends and not self._in_order(subtype, ends):
            ends.reverse()
        low, high = ("" if each is None else quoted(each) for each in ends)
        return f"{rng.choice('[(')}{low},{high}{rng.choice('])')}"

    def _in_order(self, subtype: int, ends: list[str | None]) -> bool:
        sql = self.types[subtype].sql
        try:
            row = self._connection.execute(f"select %s::{sql} <= %s::{sql}".encode(), ends).fetchone()
        except psycopg.Error:
            return True
        return bool(row and row[0])

    def _composite(self, rng: Rng, each: Type, depth: int) -> str:
        nested = 0.5 if depth < 2 else 1.0
        texts = [self.text(rng, part, nested, depth + 1) for part in each.parts]
        return "(" + ",".join("" if text is None else quoted(text) for text in texts) + ")"


_DOMAINS: Final[dict[str, Make]] = {
    "yes_or_no": _of("YES", "NO"),
    "cardinal_number": _unsigned(31),
    "positive": _unsigned(30),
    "lower_text": lambda rng: words(rng).lower(),
}
