"""How an image gets to another process: as a pickle of the bytes that are not zero, or as a descriptor of the pages."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


def own_runs(image: Any, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The start and the bytes of each run that is not zero, without the parts of runs that are outside of the image."""
    offset, end = image.offset, image.offset + image.size
    for start, size in image.runs():
        low, high = max(start, offset), min(start + size, end)
        yield low, view[low - offset:high - offset]


class Handle:
    """An image that `multiprocessing` sends to another process as a descriptor of its pages, without the bytes.

    Made by `Image.handle`. While this process runs, one process with the same ``multiprocessing`` authkey can load a
    pickle of it, once.

    Attributes
    ----------
    image : Image
        In this process, the image that the handle was made from. In the other process, an image of the same pages.
    """

    __slots__ = ("_parts_of", "_rebuild", "image")
    image: Any

    def __init__(self, image: Any, parts_of: Callable[[Any], tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
        """``rebuild(descriptor, *parts_of(image))`` makes the image in the other process."""
        self.image = image
        self._parts_of = parts_of
        self._rebuild = rebuild

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing import reduction

        duplicate = getattr(reduction, "DupFd", None)
        if duplicate is None:
            raise TypeError("this system's multiprocessing passes no descriptors: pickle the image itself, or save it")
        return _arrived, (self._parts_of, self._rebuild, duplicate(self.image.fileno()), *self._parts_of(self.image))


def _arrived(parts_of: Callable[[Any], tuple[Any, ...]], rebuild: Callable[..., Any], *parts: Any) -> Handle:
    return Handle(rebuild(*parts), parts_of, rebuild)
