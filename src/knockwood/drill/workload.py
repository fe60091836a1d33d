"""A small shop under load: clients that order and pay, and a witness who writes down each promise kept."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import psycopg

from knockwood.drill.witness import Witness
from knockwood.host import clock
from knockwood.postgres.connection import connect, translated

SCHEMA = """
create table products (
    id int primary key,
    name text not null,
    price numeric(10, 2) not null check (price > 0),
    stock bigint not null
);
create table orders (
    id bigint primary key,
    customer int not null,
    status text not null default 'open' check (status in ('open', 'paid')),
    total numeric(12, 2) not null,
    note text not null,
    placed_at timestamptz not null default clock_timestamp()
);
create index orders_by_customer on orders (customer, placed_at);
create table order_lines (
    order_id bigint not null references orders (id),
    line int not null,
    product_id int not null references products (id),
    quantity int not null check (quantity > 0),
    price numeric(10, 2) not null,
    primary key (order_id, line)
);
create table payments (
    id bigint primary key,
    order_id bigint not null references orders (id),
    amount numeric(12, 2) not null
);
"""

SEED = """
insert into products
select i, 'product ' || i, 1 + i % 97, 100000000 from generate_series(1, 200) i;
insert into orders (id, customer, total, note)
select -i, i % 1000, 2 * (1 + (1 + i % 200) % 97), repeat(md5(i::text), 3) from generate_series(1, %(orders)s) i;
insert into order_lines
select -i, 1, 1 + i % 200, 2, 1 + (1 + i % 200) % 97 from generate_series(1, %(orders)s) i;
"""

# Each returns the rows that break it.
INVARIANTS = {
    "order total equals its lines": (
        "select o.id, o.total, l.total as lines from public.orders o left join"
        " (select order_id, sum(quantity * price) as total from public.order_lines group by 1) l"
        " on l.order_id = o.id where o.total is distinct from l.total"
    ),
    "a paid order has its payment": (
        "select o.id from public.orders o where o.status = 'paid' and not exists"
        " (select from public.payments p where p.order_id = o.id and p.amount = o.total)"
    ),
}

# A client's transactions carry ids of their own: client * 2**40 + sequence. Seed rows are negative.
_CLIENT_SHIFT = 40

_BUG_EVERY = 29


def create_shop(dsn: str, orders: int) -> None:
    """Make the shop's tables and `orders` seed orders in the database of `dsn`."""
    with connect(dsn, autocommit=False) as connection, translated():
        connection.execute(SCHEMA)
        for statement in SEED.strip().split(";\n"):
            connection.execute(statement.rstrip(";").replace("%(orders)s", str(orders)))
        connection.commit()
        connection.autocommit = True
        connection.execute("vacuum analyze")


@dataclass
class Counters:
    """What the application saw. Seconds."""

    acknowledged: int = 0
    failed: int = 0
    in_doubt: int = 0
    longest_stall: float = 0.0
    first_failure: float | None = None
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Customer:
    """What a client remembers of its own orders: (id, total) of the unpaid, ids of those not discounted yet."""

    number: int
    chance: random.Random
    sequence: int = 0
    unpaid: list[tuple[int, str]] = field(default_factory=list)
    full_price: list[int] = field(default_factory=list)

    def token(self) -> int:
        self.sequence += 1
        return (self.number << _CLIENT_SHIFT) + self.sequence


class Workload:
    """`clients` threads, each with its own connection, ordering and paying until stopped.

    With `discounts` they also lower the prices of orders: lines and total together. A buggy release
    (`deploy(buggy=True)`) forgets the total of some orders. The witness notes those as `buggy`: they are
    no promises.
    """

    def __init__(
        self,
        dsn: str,
        witness: Witness,
        *,
        clients: int = 8,
        seed: int = 1,
        pause: float = 0.002,
        discounts: bool = False,
    ) -> None:
        self._dsn = dsn
        self._witness = witness
        self._pause = pause
        self._discounts = discounts
        self._buggy = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.counters = Counters()
        self._threads = [
            threading.Thread(
                target=self._client,
                args=(_Customer(number, random.Random(seed * 1000 + number)),),
                daemon=True,
            )
            for number in range(1, clients + 1)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every client end its transaction, and wait for it."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(30)

    def deploy(self, *, buggy: bool) -> None:
        """Put another release of the shop into service; transactions under way end as they began."""
        if buggy:
            self._buggy.set()
        else:
            self._buggy.clear()

    def _client(self, customer: _Customer) -> None:
        connection: psycopg.Connection[tuple[object, ...]] | None = None
        last_success = clock.monotonic()
        while not self._stop.is_set():
            kind = self._choose(customer)
            pending: list[int] = []
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(self._dsn, application_name="shop", connect_timeout=5)
                    connection.execute("set statement_timeout = '10s'")
                    connection.commit()
                self._transact(connection, customer, kind, pending)
                now = clock.monotonic()
                with self._lock:
                    self.counters.acknowledged += 1
                    self.counters.longest_stall = max(self.counters.longest_stall, now - last_success)
                last_success = now
                self._stop.wait(self._pause * customer.chance.random() * 2)
            except psycopg.Error as error:
                for token in pending:
                    self._witness.note("doubt", token)
                self._failed(error, committing=bool(pending))
                connection = _recover(connection)
                self._stop.wait(0.05)
        if connection is not None:
            connection.close()

    def _choose(self, customer: _Customer) -> str:
        drawn = customer.chance.random()
        if customer.unpaid and drawn < 0.3:
            return "payment"
        if self._discounts and customer.full_price and drawn < 0.45:
            return "discount"
        return "order"

    def _transact(
        self,
        connection: psycopg.Connection[tuple[object, ...]],
        customer: _Customer,
        kind: str,
        pending: list[int],
    ) -> None:
        """One transaction and its promise. While its commit is under way `pending` names the order."""
        if kind == "discount":
            self._discount(connection, customer, pending)
            return
        chance, token = customer.chance, customer.token()
        if kind == "payment":
            order, total = customer.unpaid.pop(chance.randrange(len(customer.unpaid)))
            # What has been paid is not discounted any more.
            customer.full_price = [id for id in customer.full_price if id != order]
            xid = _pay(connection, token, order, total)
        else:
            total, xid = _order(connection, token, chance)
        pending.append(token)
        connection.commit()
        pending.clear()
        self._witness.acknowledged(kind, token, xid, total if kind == "order" else None)
        if kind == "order":
            customer.unpaid = [*customer.unpaid[-50:], (token, total)]
            customer.full_price = [*customer.full_price[-50:], token]

    def _discount(
        self,
        connection: psycopg.Connection[tuple[object, ...]],
        customer: _Customer,
        pending: list[int],
    ) -> None:
        order = customer.full_price.pop(customer.chance.randrange(len(customer.full_price)))
        # The bug shows with some orders only, as bugs do.
        buggy = self._buggy.is_set() and order % _BUG_EVERY == 0
        lowered, xid = _lower(connection, order, buggy=buggy)
        pending.append(order)
        connection.commit()
        pending.clear()
        if buggy:
            self._witness.note("buggy", order, xid)
            return
        self._witness.acknowledged("discount", order, xid, lowered)
        customer.unpaid = [(id, lowered if id == order else old) for id, old in customer.unpaid]

    def _failed(self, error: psycopg.Error, committing: bool) -> None:
        text = (error.diag.message_primary or str(error)).strip().splitlines()[0][:160]
        with self._lock:
            self.counters.failed += 1
            # The commit was sent and no answer came: it may have happened. The witness stays silent.
            self.counters.in_doubt += committing
            if self.counters.first_failure is None:
                self.counters.first_failure = clock.monotonic()
            self.counters.errors[text] = self.counters.errors.get(text, 0) + 1


def _recover(
    connection: psycopg.Connection[tuple[object, ...]] | None,
) -> psycopg.Connection[tuple[object, ...]] | None:
    if connection is None:
        return None
    try:
        connection.rollback()
    except psycopg.Error:
        connection.close()
        return None
    return connection


def _order(
    connection: psycopg.Connection[tuple[object, ...]], token: int, chance: random.Random
) -> tuple[str, int]:
    # Products in order of their id: two orders never wait for each other in a circle.
    products = sorted(chance.sample(range(1, 201), chance.randint(1, 3)))
    lines = [(product, chance.randint(1, 5)) for product in products]
    priced = []
    for product, quantity in lines:
        row = connection.execute(
            "update products set stock = stock - %s where id = %s returning price", [quantity, product]
        ).fetchone()
        assert row is not None
        priced.append((product, quantity, row[0]))
    total = str(sum(quantity * Decimal(str(price)) for _, quantity, price in priced))
    note = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=60))
    row = connection.execute(
        "insert into orders (id, customer, total, note) values (%s, %s, %s, %s)"
        " returning pg_catalog.pg_current_xact_id()::text::bigint",
        [token, chance.randrange(1000), total, note],
    ).fetchone()
    for line, (product, quantity, price) in enumerate(priced, 1):
        connection.execute(
            "insert into order_lines values (%s, %s, %s, %s, %s)", [token, line, product, quantity, price]
        )
    # A customer looks at earlier orders too: reads reach old pages.
    connection.execute("select note, total from orders where id = %s", [-chance.randint(1, 20000)])
    assert row is not None
    return total, int(str(row[0]))


def _pay(connection: psycopg.Connection[tuple[object, ...]], token: int, order: int, total: str) -> int:
    connection.execute("insert into payments values (%s, %s, %s)", [token, order, total])
    row = connection.execute(
        "update orders set status = 'paid' where id = %s returning pg_catalog.pg_current_xact_id()::text::bigint",
        [order],
    ).fetchone()
    assert row is not None
    return int(str(row[0]))


def _lower(connection: psycopg.Connection[tuple[object, ...]], order: int, *, buggy: bool) -> tuple[str, int]:
    """Lower an order's prices by a tenth; its new total, which a buggy release does not write."""
    rows = connection.execute(
        "update order_lines set price = greatest(round(price * 0.9, 2), 0.01) where order_id = %s"
        " returning quantity * price, pg_catalog.pg_current_xact_id()::text::bigint",
        [order],
    ).fetchall()
    total = str(sum(Decimal(str(amount)) for amount, _ in rows))
    if not buggy:
        connection.execute("update orders set total = %s where id = %s", [total, order])
    return total, int(str(rows[0][1]))


def totals_present(dsn: str) -> dict[int, str]:
    """The totals of the clients' orders, by token, read without any index."""
    with connect(dsn) as connection, translated():
        connection.execute("set enable_indexscan = off; set enable_bitmapscan = off")
        rows = connection.execute("select id, total::text from orders where id > 0").fetchall()
    return {int(str(id)): str(total) for id, total in rows}


def tokens_present(dsn: str) -> dict[str, frozenset[int]]:
    """The tokens of the clients' transactions that a database holds, by kind; a discount has its order's."""
    found: dict[str, frozenset[int]] = {}
    queries: Sequence[tuple[str, str]] = (
        # Without any index: an index could hide rows the table holds, or the reverse.
        ("order", "select id from orders where id > 0"),
        ("payment", "select id from payments"),
    )
    with connect(dsn) as connection, translated():
        connection.execute(
            "set enable_indexscan = off; set enable_indexonlyscan = off; set enable_bitmapscan = off"
        )
        for kind, query in queries:
            found[kind] = frozenset(row[0] for row in connection.execute(query))
    found["discount"] = found["order"]
    return found
