from typing import Any, SupportsIndex, final

from linmem._memory import ImageHandle, NativeCreator
from linmem.records import MemoryType

@final
class PoolingCreator(NativeCreator):
    # reset: "adaptive", "scan", "zero" or "discard"; when_full: "fallback" or "error".
    def __init__(
        self,
        upstream: NativeCreator | None = None,
        *,
        slots: SupportsIndex | None = None,
        keep_resident: SupportsIndex = ...,
        max_unused_warm: SupportsIndex = 100,
        reset: str = "adaptive",
        when_full: str = "fallback",
        check: bool = False,
        image: ImageHandle | None = None,
    ) -> None: ...
    @property
    def upstream(self) -> NativeCreator: ...
    @property
    def image(self) -> ImageHandle | None: ...
    def warm(
        self,
        n: SupportsIndex,
        ty: MemoryType,
        *,
        reserved_size_in_bytes: SupportsIndex | None = ...,
        guard_size_in_bytes: SupportsIndex = ...,
    ) -> int: ...
    def trim(self, target: SupportsIndex = 0) -> int: ...
    def stats(self) -> dict[str, Any]: ...
