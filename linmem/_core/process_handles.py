"""What crosses to another process of the same machine in place of an image's bytes. Floor 0."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Handle"]


class Handle:
    """An image on its way to another process, which gets its descriptor instead of its bytes.

    Made by `Image.handle`; only `multiprocessing` can pickle it.

    Attributes
    ----------
    image : Image
        Here the image that it was made from; there one of the same pages.
    """

    __slots__ = ("_apart", "_together", "image")

    def __init__(self, image: Any, apart: Callable[[Any], tuple[Any, ...]], together: Callable[..., Any]) -> None:
        self.image = image
        self._apart = apart
        self._together = together

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing import reduction

        duplicate = getattr(reduction, "DupFd", None)
        if duplicate is None:
            raise TypeError("this system's multiprocessing passes no descriptors: pickle the image itself, or save it")
        return _arrived, (self._apart, self._together, duplicate(self.image.fileno()), *self._apart(self.image))


def _arrived(apart: Callable[[Any], tuple[Any, ...]], together: Callable[..., Any], *parts: Any) -> Handle:
    return Handle(together(*parts), apart, together)
