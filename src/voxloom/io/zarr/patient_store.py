"""A store of zarr-python that asks again where there is no answer, though not for ever."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from ...errors import ImageFileError, VoxloomError

__all__ = ["PatientStore"]

# A URL is asked so many times, with pauses in between of which each is twice as long, before it is given up.
ATTEMPTS = 3
PAUSE_SECONDS = 0.5

T = TypeVar("T")


class PatientStore(WrapperStore[Store]):
    """Reads from another store, for metadata and chunks alike.

    Args:
        store: the other one.
        name: what messages call it.
        timeout: seconds to wait for each answer.
    """

    def __init__(self, store: Store, name: str, timeout: float) -> None:
        super().__init__(store)
        self.name, self._timeout = name, timeout

    def _with_store(self, store: Store) -> "PatientStore":
        return PatientStore(store, self.name, self._timeout)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See `Store`.

        Raises:
            ImageFileError: names the URL.
        """
        return await self._patiently(key, lambda: self._store.get(key, prototype, byte_range))

    async def exists(self, key: str) -> bool:
        """See `Store`."""
        return await self._patiently(key, lambda: self._store.exists(key))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for request in requests:
            yield request[0], await self.get(*request)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """See `Store`."""

        async def listed() -> list[str]:
            return [each async for each in self._store.list_dir(prefix)]

        for each in await self._patiently(prefix, listed):
            yield each

    async def _patiently(self, key: str, ask: Callable[[], Awaitable[T]]) -> T:
        failure: Any = None
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                return await asyncio.wait_for(ask(), self._timeout)
            except VoxloomError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a way of access raises
                failure = error
        is_late = isinstance(failure, TimeoutError | asyncio.TimeoutError)
        what = (
            f"gave no answer within {self._timeout:g} s" if is_late else f"could not be read: {type(failure).__name__}: {failure}"
        )
        raise ImageFileError(f"{self.name}/{key} {what}, {ATTEMPTS} times: check the address and the network") from failure
