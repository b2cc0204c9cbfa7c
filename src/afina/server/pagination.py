"""Pagination as in OpenAI's API: newest first, `limit` items, after the id `after`."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import and_, or_

from afina.server.auth import Principal
from afina.server.errors import not_found
from afina.server.store import BatchRow, FileRow, JobRow, Store


def paginate(
    store: Store,
    caller: Principal,
    table: type[FileRow] | type[JobRow] | type[BatchRow],
    to_response: Callable[[Any], dict[str, Any]],
    limit: int,
    after: str | None = None,
    *where: Any,
    newest_first: bool = True,
) -> dict[str, Any]:
    """Return a page of the files, jobs or batches that the caller can see.

    Raises:
        APIError: 404 where `after` is not one of them.
    """
    conditions = list(where)
    if not caller.admin:
        conditions.append(or_(table.owner == caller.name, table.owner.is_(None)))
    if after is not None:
        last = store.get(table, after)
        if last is None or not caller.can_see(last.owner):
            raise not_found("object", after)
        earlier = table.created < last.created if newest_first else table.created > last.created
        same_time = table.id < last.id if newest_first else table.id > last.id
        conditions.append(or_(earlier, and_(table.created == last.created, same_time)))
    columns = (table.created, table.id)
    order = [column.desc() for column in columns] if newest_first else list(columns)
    return list_page(
        [to_response(row) for row in store.query(table, *conditions, order=order, limit=limit + 1)],
        limit,
    )


def list_page(rows: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return the first `limit` of `rows` as a page; `has_more` where there are more rows."""
    data = list(rows[:limit])
    ends = (
        {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        if data
        else {"first_id": "", "last_id": ""}
    )
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ends}
