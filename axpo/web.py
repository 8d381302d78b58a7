"""One POST to a web service, over within its time whatever the service does."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx


def post(url: str, body: Any, headers: Mapping[str, str], timeout_s: float) -> httpx.Response:
    """The whole response to `body` as JSON. Redirects are not followed.

    timeout_s is of all of it: httpx's own limits are of single reads, so that a service which sends a byte now and then
    would hold its caller for ever.

    Raises:
        httpx.TransportError: no whole response; httpx.TimeoutException where time was over.
    """

    async def send() -> httpx.Response:
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(timeout=timeout_s, headers=headers) as client:
            return await client.post(url, json=body)

    try:
        return asyncio.run(send())
    except TimeoutError:
        raise httpx.ReadTimeout(f"no whole response within {timeout_s:g} s") from None
