# cython: language_level=3
"""Images: what a memory held, to start others from and to come back to. Floor 3."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from linmem._core.atomic cimport load
from linmem._core.memory cimport (
    GRANULE, ImageHandle, Memory, NativeCreator, changes, check_bounded, check_extent, check_flag, check_native,
    compare, failure, image, image_finish, image_new, image_put, is_zero, memory_changes, raise_failure, run,
    take_bytes,
)
from linmem._os cimport pages
from linmem._core.units cimport add_up, round_down, round_up

from linmem._core import memory as _memory
from linmem import errors as _errors
from linmem._core.arguments import check_count as _check_count, check_pairs as _check_pairs, \
    check_path as _check_path, check_size as _check_size, shown as _shown
from linmem._files.delta import Delta as _Delta, bytes_after as _bytes_after
from linmem._os import pages as _pages

cdef NativeCreator default_creator = _memory.MmapCreator()


@cython.final
cdef class Image(ImageHandle):
    """Bytes at an offset of a memory, and zeros everywhere else; immutable.

    Made by `Memory.snapshot` and `Image.from_bytes`. Memories of an image share its pages until they write
    them, where the OS can do that (`linmem info` says); elsewhere they copy. Zeros take no space. It is a
    read-only buffer of `size` bytes, equal to every image of the same bytes at the same offset, lives as
    long as anything uses it, and may be used by any thread.

    Attributes
    ----------
    offset, size : int
        Where its bytes lie in a memory.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("an Image is made by mem.snapshot() or Image.from_bytes(data, offset)")

    # -- making one

    @staticmethod
    def from_bytes(data, offset=0):
        """Copy a buffer into a new image.

        Parameters
        ----------
        data : buffer
            Contiguous; its bytes.
        offset : int
            Where they lie in a memory; any byte.

        Raises
        ------
        PageError
            The OS has no room for it.
        """
        cdef Py_buffer given
        cdef size_t start
        check_extent(offset, "offset", &start)
        take_bytes(data, "data", &given)
        try:
            return from_pieces(start, <size_t>given.len, [(start, data)])
        finally:
            PyBuffer_Release(&given)

    @staticmethod
    def from_pieces(pieces, size, offset=0):
        """An image of `size` bytes at `offset`, of buffers with zeros between them.

        Parameters
        ----------
        pieces : iterable of (int, buffer)
            Each with its offset in a memory, in order and apart.
        size, offset : int
            In bytes; all pieces lie within.
        """
        cdef size_t start, n
        check_extent(offset, "offset", &start)
        check_extent(size, "size", &n)
        return from_pieces(start, n, pieces)

    @staticmethod
    def from_fd(fd, size, offset=0, *, position=0, runs=None, digest=None):
        """An image whose pages are those of a file, read when they are first needed.

        The bytes from `position` on are those of whole host pages, from the one of `offset` on; around the
        image's own they must be zero. The descriptor is duplicated and may be closed. Nothing protects
        from somebody who later writes to a file, or cuts it short: then bytes change, and accesses
        fault. Memory that was sealed (memfd_create(2)) nobody can change.

        Parameters
        ----------
        fd : int
            A descriptor of a file, open for reading only, or of sealed memory.
        size, offset : int
            As of any image.
        position : int
            In the file, a multiple of the host page.
        runs : iterable of (int, int), optional
            As `runs()` returns them, where they are known. Outside of them the file must have holes or zeros, which is
            checked.
        digest : str, optional
            What `digest` must be. All of the file is read to compare it.

        Raises
        ------
        ValueError
            The file is too short or can still be written to, or what is given for it is not so.
        PageError
            The OS refused.
        """
        cdef size_t start, n, first, end = 0, at, page = pages.capabilities().page_size
        cdef long long where
        cdef int code, descriptor
        cdef image* it
        cdef ImageHandle handle = ImageHandle.__new__(ImageHandle)
        check_extent(offset, "offset", &start)
        check_extent(_check_count(size, "size", "an integer number of bytes", 1), "size", &n)
        check_bounded(position, "position", "be below 2**63", &at)
        try:
            descriptor = fd if isinstance(fd, int) else fd.__index__()
        except (AttributeError, TypeError):
            raise TypeError(f"fd must be a file descriptor, got {type(fd).__name__}") from None
        except OverflowError:
            raise ValueError(f"fd must be a file descriptor, got {_shown(fd)}") from None
        if runs is not None:
            runs = _check_pairs(runs, "runs", "within the image's host pages")
        if digest is not None:
            check_digest(digest)
        if at > SIZE_MAX >> 1:
            raise ValueError(f"position must be below 2**63, got {position}")
        if at & (page - 1):
            raise ValueError(f"position must be a multiple of the host page ({page}), got {position}")
        if add_up(start, n, &end) or round_up(end, page, &end) or end > SIZE_MAX >> 1:
            raise ValueError(f"offset + size must fit an address, in whole host pages (together below 2**63 bytes), got"
                             f" {start} + {n}")
        where = <long long>at
        first = round_down(start, page)
        it = <image*>malloc(sizeof(image))
        if it == NULL:
            raise MemoryError("no memory for an image's bookkeeping")
        memset(it, 0, sizeof(image))
        it.refs = 1
        it.offset = first
        it.end = start + n
        with nogil:
            code = pages.image_open(descriptor, where, end - first, &it.content)
        if code:
            free(it)
            if code == pages.IMAGE_SHORT:
                raise ValueError(f"the file must have {end - first} bytes from position {position} on, whole host"
                                 f" pages around the image's {size}")
            if code == pages.IMAGE_OPEN:
                raise ValueError("fd must be sealed memory, or a file that is open for reading only: this one can"
                                 " be written to")
            text = f"image_open of {end - first} bytes failed with code {code}"
            raise _errors.from_failure("os", text, os_error_args=_pages.os_error_args(code, text), call="image_open",
                                       size=end - first, used=0, limit=0)
        handle.it = it
        from linmem._files.sparse import runs_of_file
        known = runs is not None
        if known:
            take_runs(it, runs, start, n)
            runs_of_file(descriptor, where, first, first + it.content.size, runs)
        else:
            take_runs(it, runs_of_file(descriptor, where, first, first + it.content.size, None), start, n)
        it.runs_known = known
        made = wrap_image(handle, start, n)
        if digest is not None and made.digest != digest:
            raise ValueError(f"digest must be that of the file's content, {made.digest}, got {digest}")
        return made

    # -- what it is

    @property
    def digest(self):
        """What tells images apart, as hexadecimal digits; the same on every machine.

        BLAKE2b of 32 bytes over the offset and the size, and then for each run of blocks of 4096 bytes
        (counted from a memory's first byte) with anything but zeros in them its offset, its size and
        its bytes; numbers in 8 bytes, least significant first. Computed when first asked for.
        """
        with cython.critical_section(self):
            digest = self._digest
        if digest is None:
            from hashlib import blake2b
            state = blake2b(self.offset.to_bytes(8, "little") + self.size.to_bytes(8, "little"), digest_size=32)
            content = memoryview(Content(self))
            # What a file claims to be stored may be zero.
            for offset, size in find_runs(self.it):
                state.update(offset.to_bytes(8, "little") + size.to_bytes(8, "little"))
                start = offset - self.it.offset
                state.update(content[start:start + size])
            digest = state.hexdigest()
            with cython.critical_section(self):
                self._digest = digest
        return digest

    def runs(self):
        """Where the image is not zero, as a list of (offset, size) in a memory.

        In order and apart, in multiples of 4096 bytes, which may reach beyond the image's own on both sides
        (where it is zero).
        """
        cdef size_t i
        cdef list found
        with cython.critical_section(self):
            found = self._runs
        if found is None:
            if self.it.runs_known:
                found = [(self.it.offset + self.it.runs[i].offset, self.it.runs[i].size)
                         for i in range(self.it.n_runs)]
            else:
                found = find_runs(self.it)
            with cython.critical_section(self):
                self._runs = found
        return list(found)

    def __len__(self):
        return self.size

    def __bool__(self):
        return True         # also one of no bytes: it is there

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, start_of(self.it, self.offset), <Py_ssize_t>self.size, 1, flags)

    def fileno(self):
        """The descriptor (a handle on Windows) that shows the image's whole host pages to another process.

        It stays the image's: duplicate it to keep it. ``Image.from_fd(fd, img.size, img.offset)`` is how it
        is opened there. OSError where there is none.
        """
        if self.it.content.handle == -1:
            raise OSError("the pages of this image are private: no descriptor shows them")
        return self.it.content.handle

    def info(self):
        """How the image is kept, as an `ImageInfo`."""
        from linmem.records import ImageInfo
        return ImageInfo(
            offset=self.offset, size=self.size,
            stored=stored_in(self.it) if self.it.runs_known else None,
            kind=_pages.IMAGE_KINDS[self.it.content.kind] if self.it.content.size else "none",
            shares_pages=bool(self.it.content.maps), memories=load(&self.it.memories))

    # -- what it is for

    def new_memory(self, maximum=None, *, minimum=None, creator=None, reserve=None, guard=None, may_move=False,
                   domain=None):
        """A memory that starts with the image's bytes, and shares its pages until it writes them.

        Parameters
        ----------
        maximum, reserve, guard, may_move, domain
            As of `linmem.create`.
        minimum : int, optional
            In bytes; the end of the image (offset + size) by default and at least.
        creator : NativeCreator, optional
            Who makes it; an `MmapCreator` by default. A creator in Python is given as a `PythonCreator`; its
            memories get a copy.

        Raises
        ------
        ValueError
            For a minimum below the end of the image.
        PageError, GrowError
            As of `linmem.create`.
        """
        cdef NativeCreator by = default_creator
        if creator is not None:
            by = check_native(creator, "creator")
        return by.create(self.offset + self.size if minimum is None else minimum, maximum, reserve, guard, image=self,
                         may_move=may_move, domain=domain)

    def diff(self, other not None):
        """What changed from this image to a memory or to another image, as a `Delta`.

        Parameters
        ----------
        other : Memory or Image

        Raises
        ------
        TypeError
            For a memory with a page that is inaccessible (`Memory.protect`).
        """
        cdef changes found
        cdef failure why
        cdef int code
        cdef Image image_
        target = None
        begin = 0
        if isinstance(other, Memory):
            memory_changes(<Memory>other, self, "base", True, &found)
            size = len(other)
        elif isinstance(other, Image):
            image_ = <Image>other
            memset(&found, 0, sizeof(changes))
            with nogil:
                code = compare(NULL, image_.it, self.it, True, &found, &why)
            if code:
                free(found.list)
                raise_failure(&why)
            size = image_.offset + image_.size
            target = image_.digest
            begin = image_.offset
        else:
            raise TypeError(f"other must be a Memory or an Image, got {type(other).__name__}")
        cdef size_t i
        try:
            ranges = [(found.list[i].offset, found.list[i].size) for i in range(found.n) if not found.list[i].zero]
            zeros = [(found.list[i].offset, found.list[i].size) for i in range(found.n) if found.list[i].zero]
        finally:
            free(found.list)
        if isinstance(other, Memory):
            parts = [other.read(offset, n) for offset, n in ranges]
            data = parts[0] if len(parts) == 1 else b"".join(parts)
        else:
            content = memoryview(Content(image_))
            data = b"".join(content[offset - image_.it.offset:offset - image_.it.offset + n] for offset, n in ranges)
        return _Delta(self.digest, self.offset + self.size, size, ranges, zeros, data, target, begin)

    def apply(self, delta not None):
        """The image that the delta leads to from this one.

        Raises
        ------
        ValueError
            The delta's base is another image, or what comes out is not the delta's target.
        """
        if not isinstance(delta, _Delta):
            raise TypeError(f"delta must be a Delta, got {type(delta).__name__}")
        if delta.base != self.digest:
            raise ValueError(f"the delta is for the image {delta.base}, and this one is {self.digest}")
        from linmem._core.process_handles import own_runs
        made = Image.from_pieces(_bytes_after(delta, own_runs(self, memoryview(self))), delta.size - delta.offset,
                                 delta.offset)
        if delta.target is not None and made.digest != delta.target:
            raise ValueError(f"the delta led to the image {made.digest}, and was to lead to {delta.target}")
        return made

    def __eq__(self, other):
        if not isinstance(other, Image):
            return NotImplemented
        return self is other or (self.offset == (<Image>other).offset and self.size == (<Image>other).size
                                 and self.digest == other.digest)

    def __hash__(self):
        return hash(self.digest)

    def __repr__(self):
        return f"<linmem.Image: {self.size} bytes at offset {self.offset}>"

    # -- to other days and other processes

    def save(self, path, *, packed=False):
        """Write the image to a file, which is there whole or not at all, whenever the process is killed.

        An image that was opened from the file before keeps the old one. A file that is replaced keeps its owner and
        its rights. A pipe or a character device is written to, packed.

        Parameters
        ----------
        path : path-like
        packed : bool
            As long as what it holds, without holes, for an upload or an archive; read into memory when it
            is opened. By default the file can be mapped, is as long as the image, and has holes for zeros.

        Raises
        ------
        OSError
            It names `path`. The old file, if there is one, is still there.
        """
        from linmem._files import image_file as _files
        check_flag(packed, "packed")
        _files.save_image(self, _check_path(path), packed=packed)

    @staticmethod
    def open(path, verify=False, *, map=True, max_size=None):
        """The image that a file holds.

        Parameters
        ----------
        path : path-like
            Written by `save`, on any machine.
        verify : bool
            As `verify()` at once. Without it the header and the table are checked, each byte that is read instead of
            mapped, and that nothing stands where the table says zeros.
        map : bool
            Pages come from the file when they are first needed, if it is not packed. A foreign program that changes
            the file later changes the image, so this is for files that no stranger can write. False: everything is
            read now.
        max_size : int, optional
            Bytes; a larger image is refused.

        Raises
        ------
        FileFormatError
            It is no such file, or damaged.
        OSError, PageError
            It cannot be read, or there is no room for it.
        """
        from linmem._files import image_file as _files
        check_flag(verify, "verify")
        check_flag(map, "map")
        if max_size is not None:
            max_size = _check_size(max_size, "max_size")
        image_, contents = _files.open_image(Image, _check_path(path), verify=verify, mapped=map, max_size=max_size,
                                             host_page=pages.capabilities().page_size)
        (<Image>image_)._contents = contents
        return image_

    def verify(self):
        """Compare every byte with the checksums of the file that the image is a mapping of.

        An image that is none has nothing to compare: what was read from a file was checked then.

        Raises
        ------
        FileFormatError
            The file is damaged.
        """
        from linmem._files import image_file as _files
        if self._contents is not None:
            _files.verify_image(self, self._contents)

    def handle(self):
        """What `multiprocessing` can send to another process of this machine without a copy of the bytes.

        As an argument of a Process or through a Queue or a Pipe; there, ``handle.image`` is the image, of
        the same pages.

        Raises
        ------
        OSError
            No descriptor shows the pages, as `fileno`.
        """
        from linmem._core.process_handles import Handle
        self.fileno()
        return Handle(self, _parts, _of_parts)

    def __reduce_ex__(self, protocol):
        # The pages that are not zero, where they lie: from protocol 5 on whoever pickles may leave them there.
        from pickle import PickleBuffer

        # Each part costs its receiver about as much as a MiB of it: many small ones are copied into one.
        from linmem._core.process_handles import own_runs
        wrap_part = PickleBuffer if protocol >= 5 else bytes
        runs = list(own_runs(self, memoryview(self)))
        small = [] if len(runs) <= MOST_PARTS else [(start, data) for start, data in runs if len(data) < SMALL_PART]
        large = [(start, data) for start, data in runs if not small or len(data) >= SMALL_PART]
        places = tuple([start for start, _ in large])
        parts = [wrap_part(data) for _, data in large]
        if small:
            places += tuple([(start, len(data)) for start, data in small]),
            parts.append(wrap_part(b"".join([data for _, data in small])))
        return _unpickled, (self.size, self.offset, places, *parts)


cdef enum:
    MOST_PARTS = 64
    SMALL_PART = 1 << 20


cdef char[1] nothing


cdef char* start_of(image* it, size_t offset) noexcept nogil:
    return it.content.bytes + (offset - it.offset) if it.content.size else nothing


@cython.final
cdef class Content:
    """All of an image's host pages, as a read-only buffer."""

    cdef Image of

    def __cinit__(self, Image of not None):
        self.of = of

    def __reduce__(self):
        raise TypeError("the content of an image cannot be pickled or copied: its Image can")

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, start_of(self.of.it, self.of.it.offset),
                          <Py_ssize_t>self.of.it.content.size, 1, flags)


cdef Image wrap_image(ImageHandle handle, size_t offset, size_t size):
    cdef Image made = Image.__new__(Image)
    made.it = handle.it
    handle.it = NULL
    made.offset = offset
    made.size = size
    return made


def _unpickled(size, offset, places, *parts):
    """places: for each part where it begins; or where each run in it begins, and its size."""
    pieces = []
    for place, part in zip(places, parts, strict=True):
        if isinstance(place, int):
            pieces.append((place, part))
            continue
        at = 0
        view = memoryview(part)
        for start, n in place:
            pieces.append((start, view[at:at + n]))
            at += n
        if at != len(view):
            raise ValueError(f"a part of {len(view)} bytes must be all of its runs, which have {at}")
    pieces.sort(key=lambda piece: piece[0])
    return Image.from_pieces(pieces, size, offset)


def _parts(Image image_ not None):
    """What `Image.from_fd` takes, but for the descriptor."""
    return image_.size, image_.offset, image_.it.content.position, image_.runs()


def _of_parts(descriptor, size, offset, position, runs):
    from os import close
    fd = descriptor.detach()
    try:
        return Image.from_fd(fd, size, offset, position=position, runs=runs)
    finally:
        close(fd)


def _of_snapshot(ImageHandle handle not None):
    return wrap_image(handle, 0, handle.it.end)


cdef Image from_pieces(size_t offset, size_t size, object pieces):
    cdef ImageHandle handle = ImageHandle.__new__(ImageHandle)
    cdef image* it
    cdef failure why
    cdef Py_buffer given
    cdef size_t start, reached
    cdef int code
    cdef builder b
    with nogil:
        it = image_new(offset, size, &why)
    if it == NULL:
        raise_failure(&why)
    handle.it = it
    b.it = it
    b.filled = 0
    b.block = 0
    reached = offset
    try:
        pairs = iter(pieces)
    except TypeError as error:
        raise TypeError(f"pieces must be pairs of an offset and a buffer, got {_shown(pieces)}: {error}") from None
    for pair in pairs:
        try:
            where, data = pair
        except (TypeError, ValueError) as error:
            raise TypeError(f"pieces must be pairs of an offset and a buffer, got {_shown(pair)}: {error}") from None
        check_bounded(where, "offset", "be within the image", &start)
        take_bytes(data, "data", &given)
        try:
            if start < reached or start > offset + size or <size_t>given.len > offset + size - start:
                raise ValueError(f"pieces must be in order, apart and within {offset} .. {offset + size}, got"
                                 f" {given.len} bytes at {start}")
            reached = start + <size_t>given.len
            with nogil:
                code = add_piece(&b, start - it.offset, <const char*>given.buf, <size_t>given.len, &why)
        finally:
            PyBuffer_Release(&given)
        if code:
            raise_failure(&why)
    with nogil:
        code = end_block(&b, &why)
        if code == 0:
            code = image_finish(it, &why)
    if code:
        raise_failure(&why)
    return wrap_image(handle, offset, size)


# image_put() wants whole blocks from a block's beginning on; what pieces begin and end within is put together here.
cdef struct builder:
    image* it
    size_t block            # the one that is being filled begins here
    size_t filled           # bytes of it; 0: none is
    char bytes[GRANULE]


cdef int end_block(builder* b, failure* why) noexcept nogil:
    cdef size_t n = b.filled
    b.filled = 0
    return image_put(b.it, b.block, b.bytes, n, why) if n else 0


cdef int add_piece(builder* b, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    cdef size_t block, lead, step
    cdef int code = 0
    while size and code == 0:
        block = round_down(at, GRANULE)
        lead = at - block
        if b.filled and b.block != block:
            code = end_block(b, why)
            continue
        if lead == 0 and b.filled == 0 and size >= GRANULE:
            step = round_down(size, GRANULE)
            code = image_put(b.it, at, bytes, step, why)
        else:
            if b.filled == 0:
                memset(b.bytes, 0, GRANULE)
                b.block = block
            step = GRANULE - lead if size > GRANULE - lead else size
            memcpy(b.bytes + lead, bytes, step)
            b.filled = lead + step
        at += step
        bytes += step
        size -= step
    return code


cdef int check_digest(object digest) except -1:
    if not isinstance(digest, str):
        raise TypeError(f"digest must be a str of hexadecimal digits, got {type(digest).__name__}")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"digest must be 64 hexadecimal digits, got {_shown(digest)}")
    return 0


cdef list find_runs(image* it):
    """Those parts of its runs that are not zero; looks at each byte of them."""
    cdef list found = []
    cdef size_t at, first, end, i, joined = 0, begun = 0
    cdef const char* bytes_ = it.content.bytes
    for i in range(it.n_runs):
        at = it.runs[i].offset
        end = at + it.runs[i].size
        while at < end:
            with nogil:
                while at < end and is_zero_block(bytes_ + at):
                    at += GRANULE
                first = at
                while at < end and not is_zero_block(bytes_ + at):
                    at += GRANULE
            if at == first:
                continue
            if found and joined == first:       # the run before ends where this one begins
                found.pop()
                first = begun
            found.append((it.offset + first, at - first))
            begun = first
            joined = at
    return found


cdef size_t stored_in(const image* it):
    cdef size_t i, total = 0
    for i in range(it.n_runs):
        total += it.runs[i].size
    return total


cdef inline bint is_zero_block(const char* at) noexcept nogil:
    return is_zero(at, GRANULE)


cdef int take_runs(image* it, object given, size_t start, size_t size) except -1:
    """Of an opened file: those that are said, or one that is all of it."""
    cdef size_t n, i, offset, length, end = 0, page = pages.capabilities().page_size
    cdef size_t lead = start - it.offset, tail = lead + size
    if not is_zero(it.content.bytes, lead) or not is_zero(it.content.bytes + tail, it.content.size - tail):
        raise ValueError(f"the file must hold zeros around the image's {size} bytes, to whole host pages")
    cdef list pairs = [(it.offset, it.content.size)] if given is None else given
    n = <size_t>len(pairs)
    it.runs_known = given is not None
    if n == 0:
        return 0
    it.runs = <run*>malloc(n * sizeof(run))
    if it.runs == NULL:
        raise MemoryError("no memory for the runs of an image")
    it.room = n
    for i in range(n):
        offset, length = pairs[i]
        if (offset < it.offset or (offset - it.offset) & (GRANULE - 1) or length & (GRANULE - 1) or length == 0
                or offset - it.offset < end or offset - it.offset > it.content.size
                or length > it.content.size - (offset - it.offset)):
            raise ValueError(f"runs must be in order, apart, multiples of {GRANULE} bytes and within the image's host"
                             f" pages, got {pairs[i]!r}")
        end = offset - it.offset + length
        it.runs[i].offset = offset - it.offset
        it.runs[i].size = length
    it.n_runs = n
    it.low = round_down(it.runs[0].offset, page)
    round_up(end, page, &it.high)
    return 0


_memory.image_class_is(_of_snapshot)
