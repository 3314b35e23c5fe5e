"""A real S3 over HTTP, for all tests of what lies on object stores."""

import uuid
from collections.abc import Iterator

import pytest
from object_store import ObjectStore, object_store
from upath import UPath


@pytest.fixture(scope="session")
def running_store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server that this process, and those that it starts, find by their environment."""
    for name, value in running_store.environment.items():
        monkeypatch.setenv(name, value)
    yield running_store
    running_store.resume()
    running_store.heal()


@pytest.fixture
def bucket(store: ObjectStore) -> UPath:
    """An empty bucket of its own."""
    name = uuid.uuid4().hex
    store.create_bucket(name)
    return UPath(f"s3://{name}")
