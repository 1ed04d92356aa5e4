"""Files and batches by the official OpenAI library for Python, as drive.py tells it."""

from __future__ import annotations

from typing import Any

import drive
import openai

ENDS = ("completed", "failed", "cancelled", "expired")


def client(url: str) -> openai.OpenAI:
    """No attempt is repeated, so that a failure is seen."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=drive.TIMEOUT)


def plain(answer: Any) -> Any:
    """What the library has read, as JSON."""
    return answer.model_dump(mode="json")


def upload(url: str, name: str, text: str, **_: Any) -> Any:
    there = client(url).files
    return plain(there.create(file=(name, text.encode()), purpose="batch"))


def create(url: str, file: str, metadata: Any, **_: Any) -> Any:
    return plain(
        client(url).batches.create(
            input_file_id=file,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata=metadata,
        )
    )


def poll(url: str, batch: str, **_: Any) -> Any:
    """The batch once it has ended."""
    there = client(url).batches
    found = there.retrieve(batch)
    while found.status not in ENDS:  # the test's deadline ends it
        found = there.retrieve(batch)
    return plain(found)


def retrieve(url: str, batch: str, **_: Any) -> Any:
    return plain(client(url).batches.retrieve(batch))


def cancel(url: str, batch: str, **_: Any) -> Any:
    return plain(client(url).batches.cancel(batch))


def file(url: str, ident: str, **_: Any) -> Any:
    return plain(client(url).files.retrieve(ident))


def content(url: str, ident: str, **_: Any) -> str:
    return client(url).files.content(ident).text


def delete(url: str, ident: str, **_: Any) -> Any:
    return plain(client(url).files.delete(ident))


def listed(url: str, what: str, query: Any, **_: Any) -> list[str]:
    """The ids of all of them: the library asks for page after page by itself."""
    return [one.id for one in getattr(client(url), what).list(**query)]


if __name__ == "__main__":
    drive.serve(upload, create, poll, retrieve, cancel, file, content, delete, listed)
