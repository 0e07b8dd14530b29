# The Python class Image, which memories start from and are restored to; a part of memory.pyx.

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory

from linmem._files.delta import bytes_after as _bytes_after


@cython.final
cdef class Image:
    """Image()\n--\n
    Bytes at an offset of a memory, and zeros everywhere else; immutable.

    Made by `Memory.snapshot` and `Image.from_bytes`. Memories that start from an image share its pages until they write
    them, if the OS can do that (see `linmem info`); otherwise the bytes are copied. Zeros take no space. An image is a
    read-only buffer of `size` bytes, and equals every image of the same bytes at the same offset. An image exists as
    long as anything uses it, and any thread may use it.

    Attributes
    ----------
    offset, size : int
        Where its bytes lie in a memory.
    """

    def __cinit__(self):
        self.img = &no_image
        self.known = {}

    def __dealloc__(self):
        if self.img != &no_image:
            with nogil:
                image_forget(self.img)

    def __init__(self, *args, **kwargs):
        raise TypeError("an Image is made by mem.snapshot() or Image.from_bytes(data, offset)")

    cdef Image adopt(self, image* img, size_t offset):
        """Take over a reference on an image whose own bytes begin at `offset`."""
        self.img = img
        self.offset = offset
        self.size = img.end - offset
        return self

    # -- making one

    @staticmethod
    def from_bytes(data, offset=0):
        """Copy a buffer into a new image.

        Parameters
        ----------
        data : buffer
            Contiguous; the image's bytes.
        offset : int
            Where they lie in a memory; any byte.

        Raises
        ------
        PageError
            The OS has no room for the image.
        """
        cdef Py_buffer given
        cdef size_t start
        check_extent(offset, "offset", &start)
        take_bytes(data, "data", &given)    # while the buffer is held, its length cannot change
        try:
            return build_image(start, <size_t>given.len, [(start, data)])
        finally:
            PyBuffer_Release(&given)

    @staticmethod
    def from_pieces(pieces, size, offset=0):
        """An image of `size` bytes at `offset` that consists of buffers with zeros between them.

        Parameters
        ----------
        pieces : iterable of (int, buffer)
            Each buffer with its offset in a memory, in ascending order and without overlap.
        size, offset : int
            In bytes; all pieces lie within.
        """
        cdef size_t start, n
        check_extent(offset, "offset", &start)
        check_extent(size, "size", &n)
        return build_image(start, n, pieces)

    @staticmethod
    def from_fd(fd, size, offset=0, *, position=0, runs=None, digest=None):
        """An image whose pages are the pages of a file. A page is read when it is first needed.

        The file holds whole host pages, from the page of `offset` on; the bytes around the image's own must be zero.
        The descriptor is duplicated and may be closed. If a program later writes to the file, or cuts it short, bytes
        change and accesses fault. No program can change memory that was sealed (memfd_create(2)).

        Parameters
        ----------
        fd : int
            A descriptor of a file that is open for reading only, or of sealed memory.
        size, offset : int
            As of any image.
        position : int
            Where the pages begin in the file, a multiple of the host page.
        runs : iterable of (int, int), optional
            What `runs()` of the image returns, if it is known. Outside of the runs the file must have holes or zeros,
            which is checked.
        digest : str, optional
            What `digest` must be. The whole file is read to compare it.

        Raises
        ------
        ValueError
            The file is too short or can still be written to, cannot be read, is not a regular file, or does not hold
            what the arguments claim.
        PageError
            The OS refused.
        """
        cdef size_t start, n, end = 0, first, stored = 0, page = host_page()
        cdef int code, descriptor
        cdef image* img
        cdef failure why
        cdef Image made
        check_extent(offset, "offset", &start)
        check_extent(_check_count(size, "size", "an integer number of bytes", 1), "size", &n)
        check_bounded(position, "position", _BELOW_63_BITS, &first)
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
        if first > SIZE_MAX >> 1:
            raise ValueError(f"position must be below 2**63, got {position}")
        if first & (page - 1):
            raise ValueError(f"position must be a multiple of the host page ({page}), got {position}")
        if add_up(start, n, &end) or end > (SIZE_MAX >> 1) - page:
            raise ValueError(f"offset + size must fit an address, in whole host pages (together below 2**63 bytes), got"
                             f" {start} + {n}")
        img = image_alloc(start, n, &stored, &why)
        if img == NULL:
            raise_failure(&why)
        with nogil:
            code = pages.image_open(descriptor, <long long>first, stored, &img.content)
        if code:
            free(img)
            if code == pages.IMAGE_SHORT:
                raise ValueError(f"the file must have {stored} bytes from position {position} on, whole host"
                                 f" pages around the image's {size}")
            if code == pages.IMAGE_OPEN:
                raise ValueError("fd must be sealed memory, or a file that is open for reading only: this one can"
                                 " be written to")
            _check_descriptor(descriptor, "fd", "the descriptor of a regular file that can be read", fd)
            fail_page_call(&why, code, "image_open", stored)
            raise_failure(&why)
        made = (<Image>Image.__new__(Image)).adopt(img, start)
        from linmem._files.sparse import runs_of_file
        if runs is not None:
            take_runs(made, runs)
        found = runs_of_file(descriptor, first, img.offset, img.offset + img.content.size, runs)
        if runs is None:
            take_runs(made, found)
        img.runs_unknown = runs is None
        if digest is not None and made.digest != digest:
            raise ValueError(f"digest must be that of the file's content, {made.digest}, got {digest}")
        return made

    # -- properties

    @property
    def digest(self):
        """A hash of the image, as hexadecimal digits; the same on every machine.

        BLAKE2b of 32 bytes over the offset and the size, and then over the offset, the size and the bytes of each run
        of blocks that are not all zero. Blocks have 4096 bytes and begin at a multiple of 4096 in a memory; numbers
        have 8 bytes, least significant first. The first read of this property computes the hash.
        """
        digest = self.known.get("digest")
        if digest is None:
            from hashlib import blake2b
            state = blake2b(self.offset.to_bytes(8, "little") + self.size.to_bytes(8, "little"), digest_size=32)
            for offset, size in find_runs(self):        # self.runs() may list zeros
                state.update(offset.to_bytes(8, "little") + size.to_bytes(8, "little"))
                state.update(bytes_at(self, offset, size))
            digest = self.known.setdefault("digest", state.hexdigest())
        return digest

    def runs(self):
        """Where the image is not zero, as a list of (offset, size) in a memory.

        In ascending order, with a gap between two runs, in multiples of 4096 bytes. The first and the last run may
        reach beyond the image's own bytes (where it is zero).
        """
        cdef size_t i
        cdef image* img = self.img
        found = self.known.get("runs")
        if found is None:
            if img.runs_unknown:
                found = find_runs(self)
            else:
                found = [(img.offset + img.runs[i].offset, img.runs[i].size) for i in range(img.n_runs)]
            found = self.known.setdefault("runs", found)
        return list(found)

    def __len__(self):
        return self.size

    def __bool__(self):
        return True         # even if the image has no bytes

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, bytes_from(self.img, self.offset), <Py_ssize_t>self.size, 1, flags)

    def fileno(self):
        """The descriptor (a handle on Windows) that shows the image's whole host pages to another process.

        The image owns the descriptor: duplicate it to keep it. The other process opens it with
        ``Image.from_fd(fd, img.size, img.offset)``. OSError if there is no descriptor.
        """
        if self.img.content.handle == -1:
            raise OSError("the pages of this image are private: no descriptor shows them")
        return self.img.content.handle

    def info(self):
        """How the image is kept, as an `ImageInfo`."""
        from linmem.records import ImageInfo
        return ImageInfo(
            offset=self.offset, size=self.size,
            stored=None if self.img.runs_unknown else sum([size for _, size in self.runs()]),
            kind=_pages.IMAGE_KINDS[self.img.content.kind] if self.img.content.size else "none",
            shares_pages=bool(self.img.content.maps), memories=load(&self.img.memories))

    # -- memories and deltas

    def new_memory(self, maximum=None, *, minimum=None, creator=None, reserve=None, guard=None, may_move=False,
                   domain=None):
        """A memory that starts with the image's bytes, and shares the image's pages until it writes them.

        Parameters
        ----------
        maximum, reserve, guard, may_move, domain
            As of `linmem.create`.
        minimum : int, optional
            In bytes, at least the end of the image (offset + size), which is the default.
        creator : NativeCreator, optional
            It makes the memory; the default is an `MmapCreator`. Pass a creator in Python as a `PythonCreator`; its
            memories get a copy of the bytes.

        Raises
        ------
        ValueError
            The minimum is below the end of the image.
        PageError, GrowError
            As of `linmem.create`.
        """
        cdef NativeCreator native = default_creator if creator is None else check_native(creator, "creator")
        return native.create(self.offset + self.size if minimum is None else minimum, maximum, reserve, guard,
                             image=self, may_move=may_move, domain=domain)

    def diff(self, other not None):
        """The changes from this image to a memory or to another image, as a `Delta`.

        Parameters
        ----------
        other : Memory or Image

        Raises
        ------
        TypeError
            The memory has an inaccessible page (`Memory.protect`).
        """
        cdef changes found
        cdef change* each
        cdef failure why
        cdef int code
        cdef size_t i
        cdef Image image_ = <Image>other if isinstance(other, Image) else None
        cdef list ranges = [], zeros = []
        if image_ is not None:
            with nogil:
                code = image_changes(image_.img, self.img, &found, &why)
            if code:
                raise_failure(&why)
        elif isinstance(other, Memory):
            find_changes(<Memory>other, self, True, &found)
        else:
            raise TypeError(f"other must be a Memory or an Image, got {type(other).__name__}")
        try:
            for i in range(found.n):
                each = &found.list[i]
                (zeros if each.zero else ranges).append((each.offset, each.size))
        finally:
            free(found.list)
        if image_ is None:
            target, begin = None, 0
            data = b"".join([other.read(offset, n) for offset, n in ranges])
        else:
            target, begin = image_.digest, image_.offset
            data = b"".join([bytes_at(image_, offset, n) for offset, n in ranges])
        return _Delta(self.digest, self.offset + self.size, found.size, ranges, zeros, data, target, begin)

    def apply(self, delta not None):
        """The image that the delta leads to from this one.

        Raises
        ------
        ValueError
            The delta's base is another image, or the result is not the delta's target.
        """
        from linmem._core.process_handles import own_runs
        check_type(delta, _Delta, "delta")
        if delta.base != self.digest:
            raise ValueError(f"the delta is for the image {delta.base}, and this one is {self.digest}")
        pieces = _bytes_after(delta, own_runs(self, memoryview(self)))
        made = Image.from_pieces(pieces, delta.size - delta.offset, delta.offset)
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
        return f"<linmem.Image: {_show_size(self.size)} at offset {self.offset}>"

    # -- to files and to other processes

    def save(self, path, *, packed=False):
        """Write the image to a file. Whenever the process is killed, the whole file is there, or the old one is.

        An image that was opened from the old file keeps the old file. The new file gets the owner and the rights of the
        old one. Into a pipe or a character device, the packed format is written.

        Parameters
        ----------
        path : path-like
        packed : bool
            True: the file has no holes and is as long as the bytes that are not zero, for an upload or an archive; it
            is read into memory when it is opened. False: the file can be mapped, is as long as the image, and has holes
            for zeros.

        Raises
        ------
        OSError
            The exception names `path`. The old file is still there.
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
            True: call `verify()` at once. False: check the header, the table, each byte that is read instead of mapped,
            and that the file holds zeros where the table says zeros.
        map : bool
            True: if the file is not packed, a page is read from the file when the page is first needed. A program that
            changes the file later changes the image, so open only files that no other user can write. False: read the
            whole file now.
        max_size : int, optional
            Bytes; a larger image is refused.

        Raises
        ------
        FileFormatError
            The file is not an image, or is damaged.
        OSError, PageError
            The file cannot be read, or the OS has no room for the image.
        """
        from linmem._files import format, reader
        check_flag(verify, "verify")
        check_flag(map, "map")
        if max_size is not None:
            max_size = _check_size(max_size, "max_size")
        path = _check_path(path)
        with reader.open_file(path) as file:
            return image_in_file(file, reader.read(file, path, format.IMAGE, max_size), verify, map)

    def verify(self):
        """Compare every byte with the checksums of the file that the image is a mapping of.

        Another image has nothing to compare: bytes that were read from a file were checked then.

        Raises
        ------
        FileFormatError
            The file is damaged.
        """
        from linmem._files import image_file as _files
        contents = self.known.get("contents")
        if contents is not None:
            _files.verify_image(self, contents)

    def handle(self):
        """An object that `multiprocessing` can send to another process of this machine without a copy of the bytes.

        Pass it as an argument of a Process, or through a Queue or a Pipe. In the other process, ``handle.image`` is an
        image of the same pages.

        Raises
        ------
        OSError
            No descriptor shows the pages; see `fileno`.
        """
        from linmem._core.process_handles import Handle
        self.fileno()
        return Handle(self, _parts, _of_parts)

    def __reduce_ex__(self, protocol):
        # Each run is a part. From protocol 5 on, a pickler may send a part without a copy. But receiving a part costs
        # as much time as copying about 1 MiB. So if there are many runs, the small ones are joined into one part.
        from pickle import PickleBuffer

        from linmem._core.process_handles import own_runs
        wrap_part = PickleBuffer if protocol >= 5 else bytes
        runs = list(own_runs(self, memoryview(self)))
        least = SMALL_PART if len(runs) > MOST_PARTS else 0
        large = [run for run in runs if len(run[1]) >= least]
        small = [run for run in runs if len(run[1]) < least]
        places = [start for start, _ in large]
        parts = [wrap_part(data) for _, data in large]
        if small:
            places.append([(start, len(data)) for start, data in small])
            parts.append(wrap_part(b"".join([data for _, data in small])))
        return _unpickled, (self.size, self.offset, places, *parts)


cdef enum:
    MOST_PARTS = 64
    SMALL_PART = 1 << 20


cdef char* bytes_from(image* img, size_t offset) noexcept nogil:
    """The image's bytes from an offset of a memory on."""
    return img.content.bytes + (offset - img.offset) if img.content.size else zeros


cdef object bytes_at(Image img, size_t offset, size_t size):
    """Bytes of the image's host pages at an offset of a memory. The caller keeps the image as long as it uses the
    result."""
    return PyMemoryView_FromMemory(bytes_from(img.img, offset), <Py_ssize_t>size, PyBUF_READ)


def image_in_file(file, contents, verify, map):
    """The image in an open file whose header and table were read; `contents` may be a part of the file."""
    from linmem._files import image_file as _files
    image_, known = _files.image_in(file, contents, Image, verify=verify, mapped=map, host_page=host_page())
    (<Image>image_).known["contents"] = known
    return image_


def fetch_pages(Image image_ not None, runs):
    """Have the OS read runs (offset, size) of a memory from the file that the image is a mapping of, in few calls.

    The runs ascend. The holes of the file are not read, and the call does not wait. PageError if the OS refuses.
    """
    cdef image* img = image_.img
    cdef size_t start, end, page = host_page()
    cdef failure why
    cdef int code
    if img.content.kind != pages.IMAGE_FILE or img.content.handle == -1:     # the bytes are in physical memory
        return
    from linmem._files.sparse import parts_of_file
    for start, end in parts_of_file(img.content.handle, img.content.position, img.offset,
                                    img.offset + img.content.size, runs):
        start = round_down(start, page)
        round_up(end, page, &end)
        with nogil:
            code = pages.image_fetch(img.content.bytes + start, end - start)
        if fail_page_call(&why, code, "image_fetch", end - start):
            raise_failure(&why)


def forget_touched(Memory mem not None, Image image_ not None):
    """Begin to watch which pages of an image are touched in a memory, which has exactly the image's bytes.

    Returns
    -------
    bool
        False: the memory holds a copy of the image, and no page of it is mapped from the image.
    """
    cdef image* img = image_.img
    cdef failure why
    cdef int code = 0
    cdef memory* m = mem.enter_locked()
    cdef bint mapped = image_is_attached(m, img) and image_maps_pages(m)
    with nogil:
        if mapped:
            code = fail_page_call(&why, image_renew_pages(m), "image_renew", img.high - img.low)
        unlock(&m.lock)
    mem.finish(code, &why)
    return mapped


def touched_pages(Memory mem not None, Image image_ not None):
    """The pages of an image's runs that a memory which maps the image has in its page tables, as runs (offset, size).

    The kernel also maps pages beside a page that is read (up to the next multiple of 64 KiB, by default), if they are
    in the page cache.
    """
    cdef image* img = image_.img
    cdef changes found
    cdef size_t i
    cdef failure why
    cdef int code
    cdef memory* m = mem.enter_locked()
    with nogil:
        code = add_present(m, img, &found, &why)
        unlock(&m.lock)
    try:
        mem.finish(code, &why)
        return [(found.list[i].offset, found.list[i].size) for i in range(found.n)]
    finally:
        free(found.list)


cdef int add_present(memory* m, const image* img, changes* found, failure* why) noexcept nogil:
    cdef size_t start, n, i, end = 0, last = 0
    cdef pages.span runs[RUNS]
    cdef char* next
    cdef int code = 0
    memset(found, 0, sizeof(changes))
    if not image_is_attached(m, img) or not image_maps_pages(m):
        return 0        # the memory was restored to another image, or discarded
    round_up(img.end, GRANULE, &last)
    for i in range(img.n_runs):
        start = round_down(img.offset + img.runs[i].offset, host_page())
        round_up(img.offset + img.runs[i].offset + img.runs[i].size, host_page(), &end)
        next = m.base + start
        while next < m.base + end and code == 0:
            n = RUNS
            code = fail_page_call(why, pages.present(next, <size_t>(m.base + end - next), runs, &n, &next), "present",
                                  end - start)
            if code == 0:
                code = add_spans(m, runs, n, last, found, why)
    return code


cdef int add_spans(memory* m, const pages.span* runs, size_t n, size_t last, changes* found,
                   failure* why) noexcept nogil:
    """Add runs of pages up to the offset `last`, where the image ends in a host page."""
    cdef size_t i, offset
    cdef int code = 0
    for i in range(n):
        offset = <size_t>(runs[i].addr - m.base)
        if code == 0 and offset < last:
            code = add_range(found, offset, min(runs[i].size, last - offset), False, why)
    return code


def _unpickled(size, offset, places, *parts):
    """places: for each part, the offset of its run; or the offsets and sizes of the runs that are joined in it."""
    pieces = []
    for place, part in zip(places, parts, strict=True):
        if isinstance(place, int):
            pieces.append((place, part))
            continue
        used = 0
        view = memoryview(part)
        for start, n in place:
            pieces.append((start, view[used:used + n]))
            used += n
        if used != len(view):
            raise ValueError(f"a part of {len(view)} bytes must be all of its runs, which have {used}")
    pieces.sort(key=lambda piece: piece[0])
    return Image.from_pieces(pieces, size, offset)


def _parts(Image image_ not None):
    """The arguments of `Image.from_fd` behind the descriptor."""
    return image_.size, image_.offset, image_.img.content.position, image_.runs()


def _of_parts(descriptor, size, offset, position, runs):
    with open(descriptor.detach(), "rb") as file:
        return Image.from_fd(file.fileno(), size, offset, position=position, runs=runs)


cdef Image build_image(size_t offset, size_t size, object pieces):
    cdef Image made = Image.__new__(Image)
    cdef failure why
    cdef Py_buffer given
    cdef size_t start, reached = offset
    cdef int code
    cdef builder b
    b.filled = 0
    with nogil:
        b.img = image_new(offset, size, &why)
    if b.img == NULL:
        raise_failure(&why)
    made.adopt(b.img, offset)
    try:
        pairs = iter(pieces)
    except TypeError as error:
        raise TypeError(f"pieces must be pairs of an offset and a buffer, got {_shown(pieces)}: {error}") from None
    for pair in pairs:
        try:
            where, data = pair
        except (TypeError, ValueError) as error:
            raise TypeError(f"pieces must be pairs of an offset and a buffer, got {_shown(pair)}: {error}") from None
        check_bounded(where, "offset", "within the image", &start)
        take_bytes(data, "data", &given)
        try:
            if start < reached or start > offset + size or <size_t>given.len > offset + size - start:
                raise ValueError(f"pieces must be in order, apart and within {offset} .. {offset + size}, got"
                                 f" {given.len} bytes at {start}")
            reached = start + <size_t>given.len
            with nogil:
                code = put_piece(&b, start - b.img.offset, <const char*>given.buf, <size_t>given.len, &why)
        finally:
            PyBuffer_Release(&given)
        if code:
            raise_failure(&why)
    with nogil:
        code = put_granule(&b, &why)
        if code == 0:
            code = image_finish(b.img, &why)
    if code:
        raise_failure(&why)
    return made


cdef int take_runs(Image self, given) except -1:
    """The runs of an image of a file. None: one run, the whole content."""
    cdef image* img = self.img
    cdef failure why
    cdef size_t offset, size, first, end = 0
    cdef size_t lead = self.offset - img.offset, tail = lead + self.size
    if not is_zero(img.content.bytes, lead) or not is_zero(img.content.bytes + tail, img.content.size - tail):
        raise ValueError(f"the file must hold zeros around the image's {self.size} bytes, to whole host pages")
    for offset, size in [(img.offset, img.content.size)] if given is None else given:
        first = offset - img.offset
        if (offset < img.offset or first & (GRANULE - 1) or size & (GRANULE - 1) or size == 0 or first < end
                or first > img.content.size or size > img.content.size - first):
            raise ValueError(f"runs must be in order, apart, multiples of {GRANULE} bytes and within the image's"
                             f" host pages, got {(offset, size)}")
        end = first + size
        if add_run(img, first, size, &why):
            raise_failure(&why)
    return 0


cdef list find_runs(Image self):
    """The parts of the image's runs that are not zero. This function reads every byte of the runs."""
    cdef list found = []
    cdef image* img = self.img
    cdef size_t first, last, end, i
    for i in range(img.n_runs):
        last = img.runs[i].offset
        end = last + img.runs[i].size
        while last < end:
            with nogil:
                first = last + while_zero(img.content.bytes + last, end - last, True)
                last = first + while_zero(img.content.bytes + first, end - first, False)
            if last > first:
                found.append((img.offset + first, last - first))
    return found


cdef int check_digest(object digest) except -1:
    if not isinstance(digest, str):
        raise TypeError(f"digest must be a str of hexadecimal digits, got {type(digest).__name__}")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"digest must be 64 hexadecimal digits, got {_shown(digest)}")
    return 0


cdef NativeCreator default_creator = MmapCreator()
