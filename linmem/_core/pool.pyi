from typing import Any, SupportsIndex, final

from linmem._core.memory import Image, NativeCreator
from linmem.records import MemoryType

@final
class PoolingCreator(NativeCreator):
    # reset: "adaptive", "scan", "zero" or "discard"; when_full: "fallback", "error" or "wait".
    def __init__(
        self,
        upstream: NativeCreator | None = None,
        *,
        slots: SupportsIndex | None = None,
        keep_resident: SupportsIndex = ...,
        max_unused_warm: SupportsIndex = 100,
        max_resident: SupportsIndex | None = None,
        max_reserved: SupportsIndex | None = None,
        idle_seconds: float | None = 5,
        max_reset_seconds: float | None = None,
        reset: str = "adaptive",
        when_full: str = "fallback",
        timeout: float | None = None,
        check: bool = False,
        image: Image | None = None,
    ) -> None: ...
    @property
    def upstream(self) -> NativeCreator: ...
    @property
    def image(self) -> Image | None: ...
    def warm(
        self,
        n: SupportsIndex,
        ty: MemoryType,
        *,
        reserved_size_in_bytes: SupportsIndex | None = ...,
        guard_size_in_bytes: SupportsIndex = ...,
        domain: str | None = None,
    ) -> int: ...
    def trim(self, target: SupportsIndex = 0) -> int: ...
    def purge(self, target: SupportsIndex = 0, *, older_than: float = 0) -> int: ...
    def stats(self) -> dict[str, Any]: ...

def set_pool_limits(
    max_resident: SupportsIndex | None = None, max_reserved: SupportsIndex | None = None
) -> None: ...
def read_metrics(pool: PoolingCreator) -> dict[str, Any]: ...
def pool_totals() -> dict[str, int | None]: ...
