"""Signed links (``https://host/x.tar?X-Amz-Signature=…``): their queries are kept here, in memory, and nowhere else.

Everything above storage knows a signed shard by its address without the query. So indexes, manifests, logs and messages hold no
signature, and a new link to the same shard is the same shard: a run resumes with links that were signed anew.
"""

from __future__ import annotations

from pipeline.data.storage.names import REMOTE, is_remote
from pipeline.errors import DataError
from pipeline.untrusted import has_password, shown_address

_QUERIES: dict[str, str] = {}


def strip(url: str) -> str:
    """The address of a shard without query and fragment; the query is remembered for requests.

    Args:
        url: of any scheme; only those of web servers are changed.

    Raises:
        DataError: it carries a user name or a password.
    """
    if has_password(url):
        raise DataError(
            "must not carry a user name or password",
            where=shown_address(url),
            hint="They would end in files and logs. Use a signed link, or a bucket with credentials of the environment.",
        )
    if not is_remote(url) or REMOTE[url.partition("://")[0].lower()] != "https":
        return url
    bare, _, query = url.partition("#")[0].partition("?")
    if query:
        _QUERIES[bare] = query
    return bare


def query_of(url: str) -> str:
    """The query that requests for a shard carry; empty for most."""
    return _QUERIES.get(url, "")


def known() -> dict[str, str]:
    """All queries by address, for other processes of the run."""
    return dict(_QUERIES)


def learn(queries: dict[str, str]) -> None:
    """Take over the queries of another process."""
    _QUERIES.update(queries)
