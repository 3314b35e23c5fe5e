"""The file system behind `s3://` wherever storage.py is imported: s3fs, with a limit to each request."""

import asyncio
from typing import Any

import s3fs
from fsspec.asyn import sync_wrapper

from pipeline.storage import NoAnswer

ANSWER_S = 120.0
"""Limit of a request with its retries, which take about a minute where a connection is refused."""
UPLOAD_RATE = 2**20
"""A request has another second for so many bytes that it sends."""


class S3FileSystem(s3fs.S3FileSystem):
    """Without the limit an upload waits for ever for a store that takes connections and does not answer.

    botocore has it ask for leave to send (`Expect: 100-continue`), aiohttp waits for that without any timeout, and TCP
    keeps a connection whose other end has stopped to read.
    """

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:
        limit = ANSWER_S + len(named.get("Body", b"")) / UPLOAD_RATE
        try:
            return await asyncio.wait_for(super()._call_s3(method, *arguments, **named), limit)
        except TimeoutError:
            what = f"{method} of {named.get('Key', named.get('Bucket', ''))}"
            raise NoAnswer(f"no answer to {what} in {limit:.0f} s") from None

    call_s3 = sync_wrapper(_call_s3)  # for open files; s3fs has bound it to its own
