"""Saves, opens and verifies images; `Image` imports this module when a file is first named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from linmem._core.process_handles import own_runs
from linmem._files.format import IMAGE, IN_PLACE, PACKED, Contents, Header, Run
from linmem._files.reader import check_holes, check_view, fill, not_mentioned, pieces
from linmem._files.sparse import NotZero, holes_are_known
from linmem._files.writer import write, write_to


def save_image(image: Any, path: str | bytes | os.PathLike[str], *, packed: bool) -> None:
    write(path, *_header_and_runs(image, PACKED if packed else IN_PLACE))


def write_image(image: Any, file: BinaryIO) -> None:
    write_to(file, *_header_and_runs(image, IN_PLACE))


def _header_and_runs(image: Any, layout: int) -> tuple[Header, Callable[[], Iterable[Run]]]:
    view = memoryview(image)
    return (Header(kind=IMAGE, size=image.size, digest=bytes.fromhex(image.digest), offset=image.offset, layout=layout),
            lambda: ((start, len(data), data) for start, data in own_runs(image, view)))


def image_in(file: BinaryIO, contents: Contents, make: Any, *, verify: bool, mapped: bool,
             host_page: int) -> tuple[Any, Contents | None]:
    """The image that a file, or a part of a file, holds; `make` is the class `Image`.

    Returns
    -------
    image : Image
    contents : Contents or None
        The argument for `verify_image` if the pages of the image are a mapping of the file, else None.
    """
    header = contents.header
    if header.layout == IN_PLACE and mapped and header.size and holes_are_known(file):
        try:
            image = make.from_fd(file.fileno(), header.size, header.offset, runs=contents.stored_runs(),
                                 position=header.position(header.offset - header.offset % host_page))
        except NotZero as error:
            raise not_mentioned(contents, error) from None
        if verify:
            verify_image(image, contents)
        return image, contents
    found = ((start, data) for start, _, data in pieces(file, contents) if data is not None)
    image = make.from_pieces(found, header.size, header.offset)

    def bytes_at(start: int, size: int) -> memoryview:
        file.seek(header.position(start))
        return fill(file, bytearray(size), contents.path)

    if verify:
        if header.layout == IN_PLACE:
            check_holes(contents, file.fileno(), bytes_at)
        _check_digest(image, contents)
    return image, None


def verify_image(image: Any, contents: Contents) -> None:
    try:
        fd = image.fileno()
    except OSError:         # the pages are mapped, and the system had no descriptor left for them
        fd = None
    check_view(memoryview(image), contents, fd)
    _check_digest(image, contents)


def _check_digest(image: Any, contents: Contents) -> None:
    expected = contents.header.digest.hex()
    if image.digest != expected:
        raise contents.refusal("digest", expected, f"{image.digest}, that of the content")
