"""Keeps the queries of signed links (``https://host/x.tar?X-Amz-Signature=…``) in memory only.

All other modules identify a signed shard by its address without the query. Indexes, manifests, logs and messages therefore
contain no signature, and a renewed link names the same shard: a run can resume with new signatures.
"""

from __future__ import annotations

from pipeline.data.storage.names import REMOTE, is_remote
from pipeline.errors import DataError
from pipeline.untrusted import has_password, shown_address

_QUERIES: dict[str, str] = {}


def strip(url: str) -> str:
    """Returns a shard's address without query and fragment; the query is stored for requests.

    Args:
        url: of any scheme; only those of web servers are changed.

    Raises:
        DataError: the URL contains a user name or a password.
    """
    if has_password(url):
        raise DataError(
            "must not carry a user name or password",
            where=shown_address(url),
            hint="Use a signed link, or a bucket with credentials from the environment: passwords would end up in files and logs",
        )
    if not is_remote(url) or REMOTE[url.partition("://")[0].lower()] != "https":
        return url
    bare, _, query = url.partition("#")[0].partition("?")
    if query:
        _QUERIES[bare] = query
    return bare


def query_of(url: str) -> str:
    """Returns the query for requests of a shard; empty for most."""
    return _QUERIES.get(url, "")


def known() -> dict[str, str]:
    """Returns all queries by address, for other processes of the run."""
    return dict(_QUERIES)


def learn(queries: dict[str, str]) -> None:
    """Adds the queries of another process."""
    _QUERIES.update(queries)
