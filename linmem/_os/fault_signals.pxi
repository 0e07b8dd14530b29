# Linux: a handler of SIGSEGV and SIGBUS, which reports a fault before the process dies of it; a part of posix.pyx.
#
# The handler calls the handler that was installed before. A fault in native code is reported first, because the earlier
# handler may end the process. A fault in other code (compiled WebAssembly) is reported only if the earlier handler
# returns and the thread would run into the same fault again: wasmtime turns such a fault into a trap, and the process
# goes on.
#
# All code here is async-signal-safe: no lock, no malloc(), no Python.

cdef extern from "<signal.h>" nogil:
    enum: SIGSEGV, SIGBUS, SA_SIGINFO, SA_ONSTACK
    ctypedef struct siginfo_t:
        int si_code
        void* si_addr
    ctypedef void (*plain_handler)(int signum) noexcept nogil
    ctypedef void (*info_handler)(int signum, siginfo_t* info, void* context) noexcept nogil
    plain_handler SIG_DFL, SIG_IGN
    cdef struct sigaction_t "sigaction":
        plain_handler sa_handler
        info_handler sa_sigaction
        int sa_flags
    int sigaction(int signum, const sigaction_t* new, sigaction_t* old)
    int raise_ "raise"(int signum)

cdef extern from "<poll.h>" nogil:
    enum: POLLOUT
    cdef struct pollfd:
        int fd
        short events, revents
    int poll(pollfd* fds, unsigned long n, int timeout)

cdef extern from "linmem/_os/compat.h" nogil:
    bint CAN_REPORT_FAULTS "LINMEM_CAN_REPORT_FAULTS"
    size_t fault_pc "linmem_fault_pc"(void* context)
    int fault_access "linmem_fault_access"(void* context)
    int send_again "linmem_send_again"(int signum, siginfo_t* info)
    long long thread_id "linmem_thread_id"()

cdef enum:
    FAULT_SIGNALS = 2
    ELFOSABI_WASMTIME = 200         # in the ELF header of a file of compiled WebAssembly
    ASYNC_SIGBUS = 5                # BUS_MCEERR_AO, which not all headers have
    ASYNC_SIGSEGV = 8               # SEGV_MTEAERR
    WRITE_MS = 1000                 # how long the report waits for a standard error whose pipe is full

cdef int[FAULT_SIGNALS] fault_signals = [SIGSEGV, SIGBUS]
cdef sigaction_t[FAULT_SIGNALS] handlers_before
cdef bint[FAULT_SIGNALS] has_handler        # the handlers that are installed include on_fault()
# A mapping with code that is not native, so that not each trap of WebAssembly reads /proc/self/maps.
cdef size_t other_code_start = 0
cdef size_t other_code_end = 0


cdef void on_fault(int signum, siginfo_t* info, void* context) noexcept nogil:
    cdef int saved = errno
    cdef size_t pc = fault_pc(context)
    cdef bint is_fault = is_synchronous(signum, info.si_code)
    # A call of an address that is not executable is no trap of WebAssembly.
    cdef bint is_native = is_fault and report_of_faults != NULL and (pc == <size_t>info.si_addr or is_native_code(pc))
    if is_native:
        report_once(<char*>info.si_addr, pc, fault_access(context), thread_id())
    call_handler_before(&handlers_before[signum == SIGBUS], signum, info, context)
    if is_fault and not is_native and fault_pc(context) == pc:
        report_once(<char*>info.si_addr, pc, fault_access(context), thread_id())
    libc_errno.errno = saved


cdef inline bint is_synchronous(int signum, int code) noexcept nogil:
    """Whether the interrupted instruction caused the signal, so that it causes the signal again if it is repeated.
    Otherwise a process sent the signal, or the kernel sends it later or because of something else."""
    return code > 0 and code != (ASYNC_SIGBUS if signum == SIGBUS else ASYNC_SIGSEGV)


cdef void call_handler_before(const sigaction_t* before, int signum, siginfo_t* info, void* context) noexcept nogil:
    if before.sa_flags & SA_SIGINFO:
        before.sa_sigaction(signum, info, context)
    elif before.sa_handler != SIG_DFL and before.sa_handler != SIG_IGN:
        before.sa_handler(signum)
    elif is_synchronous(signum, info.si_code):
        # The thread runs into the same fault again, and the kernel ends the process with the right address.
        sigaction(signum, before, NULL)
    elif before.sa_handler == SIG_DFL:
        sigaction(signum, before, NULL)
        if send_again(signum, info):
            raise_(signum)


cdef bint is_native_code(size_t pc) noexcept nogil:
    """Whether the instruction lies in a program or a shared library. False also if /proc/self/maps does not say so."""
    cdef char text[1024]
    cdef size_t[6] fields           # start, end, access, offset, device, inode; of the line
    cdef size_t file_start = 0, file = 0, end = 0
    cdef int field = 0, fd
    cdef bint readable = False, found = False, answer = False
    cdef ssize_t n = 1, i
    cdef char c
    if load_size(&other_code_start) <= pc < load_size(&other_code_end):
        return False
    fd = open_file("/proc/self/maps", O_RDONLY | O_CLOEXEC)
    fields[0] = 0
    while fd >= 0 and n > 0 and not found:
        n = read(fd, text, sizeof(text))
        i = 0
        while i < n and not found:
            c = text[i]
            i += 1
            if c == c"\n":
                if fields[3] == 0 and readable:
                    file_start, file = fields[0], fields[5]
                found = fields[0] <= pc < fields[1]
                answer = found and fields[5] != 0 and fields[5] == file and is_shared_object(<char*>file_start)
                end = fields[1]
                field = 0
                if not found:
                    fields[0] = 0
            elif field < 6 and (c == c" " or (field == 0 and c == c"-")):
                field += 1
                if field < 6:
                    fields[field] = 0
            elif field == 2:
                readable = c == c"r" or (readable and fields[2] != 0)
                fields[2] += 1
            elif field == 5:
                fields[5] = fields[5] * 10 + <size_t>(c - c"0")
            elif field < 4:
                fields[field] = fields[field] << 4 | <size_t>(c - c"0" if c <= c"9" else c - c"a" + 10)
    close_if_open(fd)
    if found and not answer:
        store_size(&other_code_end, 0)
        store_size(&other_code_start, fields[0])
        store_size(&other_code_end, end)
    return answer


cdef bint is_shared_object(const char* header) noexcept nogil:
    return (header[0] == 0x7f and header[1] == c"E" and header[2] == c"L" and header[3] == c"F"
            and <unsigned char>header[7] != ELFOSABI_WASMTIME)


cdef inline bint is_default(const sigaction_t* action) noexcept nogil:
    """No handler is installed, so the kernel ends the process or ignores the signal."""
    return not action.sa_flags & SA_SIGINFO and (action.sa_handler == SIG_DFL or action.sa_handler == SIG_IGN)


cdef int watch_faults(fault_report report) noexcept nogil:
    global report_of_faults
    cdef sigaction_t action
    cdef int i
    if not CAN_REPORT_FAULTS:
        return ENOSYS
    report_of_faults = report
    for i in range(FAULT_SIGNALS):
        if sigaction(fault_signals[i], NULL, &action):
            return errno
        # A handler that was installed after on_fault() may call on_fault(), so on_fault() must not call that handler.
        if has_handler[i] and not is_default(&action):
            continue
        handlers_before[i] = action
        # The mask and the flags of the earlier handler: it may leave by a jump, and relies on them then. It runs on the
        # stack on which it would run without on_fault().
        if is_default(&action):
            action.sa_flags |= SA_ONSTACK
        action.sa_flags |= SA_SIGINFO
        action.sa_sigaction = on_fault
        has_handler[i] = True
        if sigaction(fault_signals[i], &action, NULL):
            has_handler[i] = False
            return errno
    return 0


cdef void unwatch_faults() noexcept nogil:
    global report_of_faults
    cdef sigaction_t now
    cdef int i
    report_of_faults = NULL
    for i in range(FAULT_SIGNALS):
        # A handler that was installed later may call on_fault(), which then only calls the handler before.
        if has_handler[i] and sigaction(fault_signals[i], NULL, &now) == 0 and now.sa_sigaction == on_fault:
            sigaction(fault_signals[i], &handlers_before[i], NULL)
            has_handler[i] = False


cdef void write_error(const char* text, size_t size) noexcept nogil:
    """Nothing is written to a pipe that stays full, because the process would wait instead of dying, and nothing to a
    pipe without a reader, because the process would die of SIGPIPE."""
    cdef pollfd standard_error
    standard_error.fd = 2
    standard_error.events = POLLOUT
    if poll(&standard_error, 1, WRITE_MS) == 1 and standard_error.revents == POLLOUT:
        write(2, text, size)
