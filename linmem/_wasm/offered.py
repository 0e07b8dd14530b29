"""The memories that wasmtime asks for when it makes an instance of a prepared program, what is offered, and the names.

`linmem run` imports this module without `prepared`, because a small program runs for less time than `prepared` takes
to import.
"""

from __future__ import annotations

import ast
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

from linmem._core import bridge as _bridge
from linmem._core.memory import Image, Memory

_SIZE_MAX = 2 * sys.maxsize + 1
_MAX_RUNS = 1000        # of an image in a description, which is read as a whole


class Offered:
    """A module or a component, and what is offered for the memories of an instance."""

    __slots__ = ("_complete", "_is_alone", "_names", "_offer", "_places", "module")

    module: Any                                 # a Module, or a Component
    _offer: _bridge.Offer
    _places: list[tuple[int, Image | None]]     # the minimum and the image of each memory, in wasmtime's order
    _complete: bool                             # `_places` has all memories of an instance
    _is_alone: bool                             # else code may run that lets wasmtime make more instances
    _names: tuple[str, ...] | None              # of a component's memories in `_places`; None: a module

    def __init__(self, module: Any, images: Sequence[Image | None], minima: Sequence[int],
                 names: Sequence[str] | None, *, complete: bool, is_alone: bool) -> None:
        self.module = module
        # A minimum may be more than an address space. wasmtime refuses to instantiate such a module.
        self._places = [(min(minimum, _SIZE_MAX), image) for minimum, image in zip(minima, images, strict=True)]
        self._offer = _bridge.Offer(self._places)
        self._names = None if names is None else tuple(names)
        self._complete, self._is_alone = complete, is_alone

    def _checked(self, made: tuple[Any, int, int, int | None, int]) -> Any:
        """The instance that `Offer.making` made, after a check that each memory got what was meant for it."""
        instance, missing, call, surplus, extra = made
        if missing:
            raise RuntimeError(f"{missing} memories were made without their data: the engine did not ask linmem for"
                               " them")
        if extra and self._is_alone:    # wasmtime asks for the GC heap with 0 bytes
            raise RuntimeError("a signal handler or a finalizer made an instance meanwhile, without linmem's prepare():"
                               " that instance may have got data of this one, which may lack the data")
        instance._linmem_made = call, surplus
        return instance

    def _memories(self, call: int, surplus: int | None) -> dict[str, Memory]:
        """The memories of the instance that the call of that number made. surplus: its first request, of 0 bytes, that
        took no place.

        wasmtime also asks for the GC heap of the store, once and before the memories of a module. A memory of a module
        with the minimum 0 looks the same. So if there was one request too many, the heap is the first of the requests
        of 0 bytes that end with the request without a place.
        """
        names = self._memory_names()
        heap = surplus
        if heap == len(names) and not self._complete:
            heap = None
        while heap and self._places[heap - 1][0] == 0:
            heap -= 1
        found: dict[str, Memory] = {}
        for request, memory in _bridge.made_by(call):
            place = request - (heap is not None and request > heap)
            for name in ("GC heap",) if request == heap else names[place] if place < len(names) else (
                    () if self._complete else (f"memory {request}",)):
                found[name] = memory
        return found

    def _memory_names(self) -> list[tuple[str, ...]]:
        """The names of each memory in `_places`."""
        assert self._names is not None      # `Prepared` knows those of a module
        return [(name,) for name in self._names]


class Kept(Offered):
    """A prepared program that a cache describes."""

    __slots__ = ()

    def instantiate(self, store: Any, linker: Any) -> Any:
        """Make an instance of the program, with a linker of its kind."""
        return self._checked(self._offer.making(None, None, type(linker).instantiate, linker, store, self.module))


def described(made: Offered, images: Sequence[str | None]) -> tuple[list[str], str] | None:
    """The files of the images, and a line from which `from_description` makes the object again.

    images: the file of each image in `made._places`; None for None. Returns None if a file cannot be mapped, or has too
    many runs.
    """
    from linmem._files.format import IN_PLACE
    from linmem._files.reader import open_file, read

    files = {path: number for number, path in enumerate(dict.fromkeys(filter(None, images)))}
    abouts = []
    for path in files:
        with open_file(path) as file:
            contents = read(file, path)
        header, runs = contents.header, contents.stored_runs()
        if header.layout != IN_PLACE or not header.size or len(runs) > _MAX_RUNS:
            return None
        first = header.offset - header.offset % mmap.PAGESIZE
        abouts.append((header.size, header.offset, header.position(first), runs))
    numbers = [None if path is None else files[path] for path in images]
    minima = [minimum for minimum, _ in made._places]
    return list(files), repr((abouts, numbers, minima, made._names, made._complete, made._is_alone))


def from_description(module: Any, files: Sequence[str], description: str) -> Kept:
    """The object that `described` described, with the compiled module.

    Raises
    ------
    ValueError
        If the description is not valid, or a file does not hold what it says.
    OSError
        If a file cannot be read or mapped.
    """
    try:
        abouts, numbers, minima, names, complete, is_alone = ast.literal_eval(description)
        images = [_mapped(path, *about) for path, about in zip(files, abouts, strict=True)]
        return Kept(module, [None if number is None else images[number] for number in numbers], minima, names,
                    complete=complete, is_alone=is_alone)
    except (SyntaxError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"not a description: {error}") from None


def _mapped(path: str, size: int, offset: int, position: int, runs: list[tuple[int, int]]) -> Image:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Image.from_fd(fd, size, offset, position=position, runs=runs)
    finally:
        os.close(fd)
