"""Lists in pages, as OpenAI's API gives them: newest first, so many, after the one that was last."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import and_, or_

from afina.server.auth import Principal
from afina.server.errors import not_found
from afina.server.store import FileRow, JobRow, Store


def paginate(
    store: Store,
    caller: Principal,
    table: type[FileRow] | type[JobRow],
    tell: Callable[[Any], dict[str, Any]],
    limit: int,
    after: str | None = None,
    *where: Any,
    newest_first: bool = True,
) -> dict[str, Any]:
    """A page of the files or jobs that the caller may see; raises 404 for an `after` that is none of them."""
    conditions = list(where)
    if not caller.admin:
        conditions.append(or_(table.owner == caller.name, table.owner.is_(None)))
    if after is not None:
        last = store.get(table, after)
        if last is None or not caller.can_see(last.owner):
            raise not_found("object", after)
        earlier = table.created < last.created if newest_first else table.created > last.created
        beside = table.id < last.id if newest_first else table.id > last.id
        conditions.append(or_(earlier, and_(table.created == last.created, beside)))
    columns = (table.created, table.id)
    order = [column.desc() for column in columns] if newest_first else list(columns)
    return list_page(
        [tell(row) for row in store.query(table, *conditions, order=order, limit=limit + 1)], limit
    )


def list_page(rows: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The first `limit` of `rows` as a page; of one more is told that it is there."""
    data = list(rows[:limit])
    ends = (
        {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        if data
        else {"first_id": "", "last_id": ""}
    )
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ends}
