"""The fault report: one line that names the memory, and a death that is the same as without the report.

Every fault is in a child process. `scene` compares two children: one with the report, and one without.
"""

import re
import signal
import struct
import sys
import textwrap

import pytest
from support import FORKING, HAS_KERNEL32, PAGE, TOUCH, died_of_a_fault, file_requires, requires, run_child

import linmem

file_requires("fault_reports")

HEAD = FORKING + TOUCH + f"""
import pathlib, signal, time
import linmem
P = {PAGE}
how = dict(maximum=4 * P, reserve=4 * P, guard=P)
on = lambda **more: linmem.enable_fault_report(**more) if REPORT else None
if hasattr(os, "fork"):
    libc = ctypes.CDLL(None, use_errno=True)
else:
    libc = ctypes.CDLL("ucrtbase")
    kernel32 = ctypes.WinDLL("kernel32")
"""
LINE = re.compile(r"^linmem: .*\n", re.MULTILINE)


def children(code, **how):
    """The results of the child without the report, and with it."""
    return [run_child(f"REPORT = {report}\n{HEAD}{textwrap.dedent(code)}", timeout=60, **how)
            for report in (False, True)]


def lines_of(code, status=None, **how):
    """The lines of the report. Apart from them, both children have the same status and the same output.

    status: None means that both die of a memory fault.
    """
    without, with_report = children(code, **how)
    assert died_of_a_fault(without) if status is None else without.returncode == status, without
    assert LINE.findall(without.stderr) == []
    assert with_report.returncode == without.returncode, with_report
    assert with_report.stdout == without.stdout
    # CPython 3.14 prints the C stack, in which linmem's handler stands.
    hide = re.compile(r"0x[0-9a-f]+|  Binary file .*pages\..*\n")
    assert hide.sub("", LINE.sub("", with_report.stderr)) == hide.sub("", without.stderr)
    return [re.sub("0x[0-9a-f]+", "BASE", line.rstrip()) for line in LINE.findall(with_report.stderr)]


# -- the line ---------------------------------------------------------------------------------------------

MEMORY = "mem = linmem.create(2 * P + 5, **how)\nbase = mem.as_ptr()\n"
NUMBER = "{:,}".format
MADE = f"at BASE ({NUMBER(2 * PAGE + 5)} bytes), made at <string>:"
FAULTS = {
    "poke(base + 3 * P)": f"write at byte {NUMBER(3 * PAGE)} ({NUMBER(PAGE - 5)} bytes past byte_size, reserved) of the"
                          " memory",
    "peek(base + 4 * P - 1)": f"read at byte {NUMBER(4 * PAGE - 1)} ({NUMBER(2 * PAGE - 6)} bytes past byte_size,"
                              " reserved) of the memory",
    "poke(base + 4 * P)": f"write at byte {NUMBER(4 * PAGE)} ({NUMBER(2 * PAGE - 5)} bytes past byte_size, guard after)"
                          " of the memory",
    "peek(base - 1)": "read at byte -1 (guard before) of the memory",
    "mem.protect(P, P, 'none'); peek(base + P)": f"read at byte {NUMBER(PAGE)} (accessible) of the memory",
    "mem.close(); poke(base + 7)": "write at byte 7 (accessible) of a dropped memory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_line_names_the_access_the_byte_the_region_and_the_memory(fault):
    (line,) = lines_of(f"on(quarantine=1 << 20)\n{MEMORY}{fault}")
    if sys.platform == "linux" and "x86_64" not in sys.version and not line.startswith(f"linmem: {FAULTS[fault]}"):
        line = re.sub("linmem: access", f"linmem: {FAULTS[fault].split()[0]}", line)     # no access on other processors
    assert line.startswith(f"linmem: {FAULTS[fault]} {MADE}"), line


def test_the_line_has_the_name_of_the_creator():
    name = "frames" if HAS_KERNEL32 else "frames \xe4"       # the line is UTF-8, and subprocess decodes it otherwise
    (line,) = lines_of(f"""
        mem = linmem.creator("mmap", name={name!r}).create(P, **how)
        on()
        poke(mem.as_ptr() - 1)
    """)
    assert line.endswith(f"of the memory {name!r} at BASE ({PAGE:,} bytes)")
    (line,) = lines_of("""
        on(quarantine=1 << 20)
        mem = linmem.creator("mmap", name="n" * 100).create(P, **how)
        base = mem.as_ptr()
        mem.close()
        poke(base)
    """)
    assert f"of a dropped memory '{'n' * 100}' at BASE ({PAGE:,} bytes), made at <string>:" in line


def test_the_line_names_a_pools_slot_and_a_memory_made_before_the_report():
    (line,) = lines_of("""
        pool = linmem.PoolingCreator()
        mem = pool.create(P, **how)
        base = mem.as_ptr()
        mem.close()
        on()
        poke(base - 5)
    """)
    assert line.endswith(f" at byte -5 (guard before) of an idle slot of a pool at BASE ({PAGE:,} bytes)")
    (line,) = lines_of(f"{MEMORY}on()\npoke(base - 5)")
    assert line.endswith(f"of the memory at BASE ({NUMBER(2 * PAGE + 5)} bytes)")


@pytest.mark.parametrize("fault", ["poke(0)", "poke(id(mem) ^ 1 << 46)", "peek(1 << 62)"])
def test_a_fault_outside_of_linmems_memories_is_not_reported(fault):
    assert lines_of(f"on()\n{MEMORY}{fault}") == []


def test_after_disable_nothing_is_reported():
    assert lines_of(f"""
        on()
        on(quarantine=5)
        linmem.disable_fault_report()
        linmem.disable_fault_report()
        {MEMORY.splitlines()[0]}
        poke(mem.as_ptr() - 1)
    """) == []


def test_a_report_that_was_disabled_can_be_enabled_again():
    (line,) = lines_of(f"on()\nlinmem.disable_fault_report()\non()\n{MEMORY}poke(base - 1)")
    assert "guard before" in line


@requires("sigaction")
def test_after_disable_the_handlers_are_those_of_before():
    assert lines_of("""
        def handlers():
            found = []
            for number in (signal.SIGSEGV, signal.SIGBUS):
                action = ctypes.create_string_buffer(256)
                assert libc.sigaction(number, None, action) == 0
                flags = ctypes.c_uint.from_buffer(action, 136).value & ~0x04000000      # the C library's SA_RESTORER
                found.append((action.raw[:16], flags))
            return found
        before = handlers()
        on()
        on(quarantine=5)
        assert (handlers() != before) == REPORT
        linmem.disable_fault_report()
        assert handlers() == before
    """, status=0) == []


@requires("sigaction")
@pytest.mark.parametrize("between", ["linmem.disable_fault_report()", ""])
def test_a_handler_that_was_installed_later_and_is_gone_again_does_not_prevent_a_new_report(between):
    (line,) = lines_of(f"""
        on()
        signal.signal(signal.SIGSEGV, lambda *args: None)
        {between}
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        on()
        {MEMORY.splitlines()[0]}
        poke(mem.as_ptr() - 1)
    """)
    assert "guard before" in line


# -- the death ---------------------------------------------------------------------------------------------

# A handler that is there before (or after) the report. It ends the process with what the kernel said about the fault.
WITNESS = """
handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

@handler_type
def witness(number, info, context):
    address = ctypes.c_size_t.from_address(info + 16).value
    print(number, ctypes.c_int.from_address(info + 8).value, address - base, flush=True)
    os._exit(9)

def install_witness(handler=witness):
    action = (ctypes.c_size_t * 19)(ctypes.cast(handler, ctypes.c_void_p).value)
    ctypes.c_int.from_buffer(action, 8 + 128).value = 4     # SA_SIGINFO
    assert libc.sigaction(signal.SIGSEGV, action, None) == 0
"""


@requires("sigaction")
def test_the_handler_of_before_gets_the_same_signal_code_and_address():
    (line,) = lines_of(f"{WITNESS}\ninstall_witness()\non()\n{MEMORY}poke(base + 3 * P + 2)", status=9)
    assert "reserved" in line
    assert lines_of(f"{WITNESS}\non()\ninstall_witness()\n{MEMORY}poke(base + 3 * P + 2)", status=9) == []


# Windows: vectored handlers, and the filter that the system calls after all handlers. EXCEPTION_POINTERS begins with a
# pointer to an EXCEPTION_RECORD: code, flags, the next record, instruction, number of parameters, access, address.
EXCEPTIONS = """
handler_type = ctypes.WINFUNCTYPE(ctypes.c_long, ctypes.c_void_p)
kernel32.AddVectoredExceptionHandler.restype = ctypes.c_void_p

def fields(about):
    record = ctypes.c_size_t.from_address(about).value
    code, flags = (ctypes.c_uint32 * 2).from_address(record)
    number, access, address = (ctypes.c_size_t * 3).from_address(record + 24)
    return hex(code), flags, number & 0xffffffff, access, address - base

@handler_type
def witness(about):
    print(*fields(about), kernel32.GetLastError(), flush=True)
    os._exit(9)

@handler_type
def repair(about):
    address = (ctypes.c_size_t * 3).from_address(ctypes.c_size_t.from_address(about).value + 24)[2]
    commit = kernel32.VirtualAlloc(ctypes.c_void_p(address), ctypes.c_size_t(1), 0x1000, 4)     # MEM_COMMIT, "rw"
    return -1 if commit else 0      # EXCEPTION_CONTINUE_EXECUTION
"""


@requires("kernel32")
@pytest.mark.parametrize(("install", "reported"), [
    ("kernel32.SetUnhandledExceptionFilter(witness); on()", True),
    ("on(); kernel32.SetUnhandledExceptionFilter(witness)", True),
    ("on(); kernel32.AddVectoredExceptionHandler(0, witness)", True),
    ("kernel32.AddVectoredExceptionHandler(0, witness); on()", False),
    ("on(); kernel32.AddVectoredExceptionHandler(1, witness)", False)])
def test_handlers_get_the_same_exception_and_those_of_before_get_it_first(install, reported):
    lines = lines_of(f"{EXCEPTIONS}\n{MEMORY}\n{install}\nkernel32.SetLastError(77)\npoke(base + 3 * P + 2)", status=9)
    assert len(lines) == reported


@requires("kernel32")
def test_a_fault_that_a_vectored_handler_repairs_is_not_reported():
    assert lines_of(f"""{EXCEPTIONS}
{MEMORY}
on()
kernel32.AddVectoredExceptionHandler(1, repair)
poke(base + 3 * P + 2)
print(peek(base + 3 * P + 2))
""", status=0) == []


@requires("kernel32")
def test_a_fault_that_ctypes_turns_into_an_exception_is_reported():
    (line,) = lines_of(f"""
        on()
        {MEMORY.splitlines()[0]}
        for _ in range(2):
            try:
                ctypes.string_at(mem.as_ptr() + 3 * P, 1)
            except OSError:
                print("alive")
    """, status=0)
    assert "read at byte" in line


@requires("sigaction")
def test_the_handler_of_before_runs_on_the_same_stack():
    (line,) = lines_of(f"""{WITNESS}
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

@handler_type
def show_stack(number, info, context):
    now = Stack()
    assert libc.sigaltstack(None, ctypes.byref(now)) == 0
    print("on the alternate stack:", now.flags & 1, flush=True)
    os._exit(9)

install_witness(show_stack)
room = ctypes.create_string_buffer(1 << 18)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, len(room))), None) == 0
on()
{MEMORY}poke(base - 1)""", status=9)
    assert "guard before" in line


@requires("sigaction")
@pytest.mark.parametrize("end", ["a pipe that is full", "a pipe without a reader"])
def test_a_standard_error_that_cannot_be_written_does_not_keep_the_process_alive(end):
    assert lines_of(f"""
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(1 << 16))
        except BlockingIOError:
            pass
        os.set_blocking(writer, True)
        {"os.close(reader)" if "without" in end else ""}
        on()
        {MEMORY.splitlines()[0]}
        signal.alarm(30)
        os.dup2(writer, 2)
        poke(mem.as_ptr() - 1)
    """) == []


@requires("sigaction")
@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
def test_a_memory_error_that_the_kernel_tells_later_ends_the_process_as_before(before):
    status = -signal.SIGBUS if before == "SIG_DFL" else 0
    assert lines_of(f"""
        signal.signal(signal.SIGBUS, signal.{before})
        on()
        info = (ctypes.c_int * 32)(signal.SIGBUS, 0, 5)         # BUS_MCEERR_AO: no instruction touched the page
        call = {{"x86_64": 297, "aarch64": 240}}[os.uname().machine]           # rt_tgsigqueueinfo
        for _ in range(2):
            assert libc.syscall(call, os.getpid(), threading.get_native_id(), signal.SIGBUS, info) == 0
    """, status=status) == []


def fault_in(core):
    """Signal, code and address in the NT_SIGINFO note of a core file of a 64-bit process."""
    data = core.read_bytes()
    headers, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    for n in range(count):
        kind, _, start, _, _, size = struct.unpack_from("<IIQQQQ", data, headers + 56 * n)
        at = start
        while kind == 4 and at < start + size:          # PT_NOTE
            name_size, note_size, note = struct.unpack_from("<III", data, at)
            at += 12 + -(-name_size // 4) * 4
            if note == 0x53494749:
                return *struct.unpack_from("<i4xi", data, at), struct.unpack_from("<Q", data, at + 16)[0]
            at += -(-note_size // 4) * 4
    raise AssertionError("the core file has no NT_SIGINFO")


@requires("sigaction", "core_files")
def test_the_core_file_has_the_signal_the_code_and_the_address_of_the_fault(tmp_path):
    code = f"REPORT = True\n{HEAD}on()\n{MEMORY}print(base - 1, flush=True)\npoke(base - 1)"
    done = run_child(code, limits={"RLIMIT_CORE": 8 << 30}, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    (core,) = tmp_path.glob("core*")
    assert fault_in(core) == (signal.SIGSEGV, 2, int(done.stdout))      # 2: SEGV_ACCERR


SENT = {"signal.raise_signal(signal.SIGSEGV)": 3, "os.kill(os.getpid(), signal.SIGSEGV)": 11} if HAS_KERNEL32 else {
    "signal.raise_signal(signal.SIGSEGV)": -11, "os.kill(os.getpid(), signal.SIGSEGV)": -11,
    "signal.raise_signal(signal.SIGBUS)": -signal.SIGBUS, "os.abort()": -6}


@pytest.mark.parametrize("send", SENT)
def test_a_signal_that_a_process_sends_is_not_reported(send):
    assert lines_of(f"on()\n{MEMORY}{send}\ntime.sleep(30)", status=SENT[send]) == []


@requires("sigaction")
@pytest.mark.parametrize("before", ["signal.SIG_IGN", "lambda *args: print('called')"])
def test_a_handler_of_python_and_an_ignored_signal_work_as_before(before):
    assert lines_of(f"""
        signal.signal(signal.SIGSEGV, {before})
        on()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGSEGV)
        print("alive")
    """, status=0) == []


@requires("sigaction")
def test_an_ignored_signal_does_not_stop_a_fault():
    (line,) = lines_of(f"signal.signal(signal.SIGSEGV, signal.SIG_IGN)\non()\n{MEMORY}poke(base - 1)")
    assert "guard before" in line


@requires("sigaction")
def test_a_fault_that_a_handler_of_python_repeats_for_ever_is_reported_once():
    (line,) = lines_of(f"""
        signal.signal(signal.SIGSEGV, lambda *args: None)
        on()
        {MEMORY.splitlines()[0]}
        signal.alarm(1)
        poke(mem.as_ptr() - 1)
    """, status=-signal.SIGALRM)
    assert "guard before" in line


@requires("stack_overflow")
@pytest.mark.parametrize("thread", ["first", "second"])
def test_a_stack_overflow_is_not_reported(thread):
    if sys.version_info >= {"first": (3, 12), "second": (3, 14)}[thread]:
        # CPython bounds the recursion of the first thread since 3.12. Since 3.14 it knows the size of a small stack.
        pytest.skip("CPython bounds its recursion in C")
    run = "again(0, 0)" if thread == "first" else """threading.stack_size(1 << 17)
        other = threading.Thread(target=again, args=(0, 0))
        other.start()
        other.join()"""
    assert lines_of(f"""
        on()
        sys.setrecursionlimit(10**7)
        libc.qsort.argtypes = None
        compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        array = (ctypes.c_int * 2)(1, 2)

        @compare
        def again(a, b):
            libc.qsort(array, ctypes.c_size_t(2), ctypes.c_size_t(4), again)
            return 0
        {run}
    """, status=0xC00000FD if HAS_KERNEL32 else None) == []


@pytest.mark.parametrize("order", ["first", "last"])
def test_faulthandler_prints_its_traceback(order):
    enable = ["import faulthandler; faulthandler.enable()", "on()"]
    lines = lines_of("\n".join([*enable[::1 if order == "first" else -1], MEMORY, "poke(base - 1)"]))
    # A faulthandler that was enabled later raises the signal again, without the address. Windows raises no signal.
    assert len(lines) == (order == "first" or HAS_KERNEL32)


@requires("sigaction")
def test_a_call_of_an_address_in_a_memory_is_reported_before_faulthandler_ends_the_process():
    (line,) = lines_of(f"import faulthandler; faulthandler.enable()\non()\n{MEMORY}ctypes.CFUNCTYPE(None)(base + 8)()")
    assert re.match(r"linmem: (call|access) at byte 8 \(accessible\) of the memory ", line), line


def test_faulthandler_may_be_disabled_again():
    (line,) = lines_of(f"import faulthandler as f\non()\nf.enable()\nf.disable()\n{MEMORY}poke(base - 1)")
    assert "guard before" in line


@requires("fork")
def test_a_forked_child_reports_its_own_fault():
    (line,) = lines_of(f"""
        on()
        {MEMORY.splitlines()[0]}
        pid = os.fork()
        if pid == 0:
            poke(mem.as_ptr() - 1)
        print(os.waitpid(pid, 0)[1] & 127)
    """, status=0)
    assert "guard before" in line


def test_threads_that_make_and_drop_memories_do_not_hinder_the_report():
    (line,) = lines_of(f"""
        on(quarantine=1 << 20)
        def work():
            while True:
                linmem.create(P, maximum=64 * P, reserve=0, guard=P, may_move=True).grow_to(20 * P)
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        {MEMORY.splitlines()[0]}
        time.sleep(0.2)
        poke(mem.as_ptr() - 1)
    """)
    assert "guard before" in line


@requires("fork")
def test_forks_of_another_thread_which_hold_all_locks_do_not_hinder_the_report():
    (line,) = lines_of(f"""
        on()
        {MEMORY.splitlines()[0]}
        def work():
            while True:
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        poke(mem.as_ptr() - 1)
    """)
    assert "guard before" in line


@pytest.mark.parametrize("call", ["mem.read(0, 1)", "mem.write(0, bytes(1 << 16))", "mem.snapshot()",
                                  "mem.restore(linmem.Image.from_bytes(bytes(16 * P + 5)))", "mem.grow_to(17 * P)"])
def test_a_fault_inside_of_linmem_is_reported_while_the_memory_is_locked(call):
    (line,) = lines_of(f"""
        on()
        mem = linmem.create(P * 16 + 5, maximum=1 << 22)
        mem.write(0, b"x" * (16 * P + 5))
        hidden = ctypes.c_void_p(mem.as_ptr()), ctypes.c_size_t(17 * P)     # behind linmem's back
        if hasattr(os, "fork"):
            assert libc.mprotect(*hidden, 0) == 0
        else:
            assert kernel32.VirtualProtect(*hidden, 1, ctypes.byref(ctypes.c_uint32()))     # PAGE_NOACCESS
        {call}
    """)
    assert re.search(r" at byte [\d,]+ \(.*accessible\) of the memory at BASE \(", line), line


# -- wasmtime ---------------------------------------------------------------------------------------------

WASM = """
import wasmtime

def engine():
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())
    return wasmtime.Engine(config)

def trap(engine):
    store = wasmtime.Store(engine)
    text = '(module (memory (export "memory") 1 2) (func (export "f") (result i32) (i32.load (i32.const 100000))))'
    exports = wasmtime.Instance(store, wasmtime.Module(engine, text), []).exports(store)
    for _ in range(3):
        try:
            exports["f"](store)
        except wasmtime.Trap as error:
            print(error.trap_code)
    return store, exports["memory"]
"""


@pytest.mark.parametrize("order", ["e = engine(); on()", "on(); e = engine()", "e = engine(); trap(e); on()",
                                   "import faulthandler; faulthandler.enable(); on(); e = engine()",
                                   "import faulthandler; faulthandler.enable(); e = engine(); on()"])
def test_a_trap_of_webassembly_is_not_reported_and_a_native_fault_is(order):
    pytest.importorskip("wasmtime")
    (line,) = lines_of(f"""{WASM}
store = None
{order}
store, memory = trap(e)
base = ctypes.addressof(memory.data_ptr(store).contents)
poke(base + 65536)
""")
    assert re.fullmatch(r"linmem: \w+ at byte 65,536 \(0 bytes past byte_size, reserved\) of the memory at BASE"
                        r" \(65,536 bytes\), of a wasmtime store", line)


@requires("module_files")
def test_a_trap_in_a_module_from_a_file_is_not_reported(tmp_path):
    pytest.importorskip("wasmtime")
    assert lines_of(f"""{WASM}
e = engine()
on()
text = '(module (memory 1) (func (export "f") (result i32) (i32.load (i32.const 100000))))'
REPORT or pathlib.Path("compiled").write_bytes(wasmtime.Module(e, text).serialize())
module = wasmtime.Module.deserialize_file(e, "compiled")
store = wasmtime.Store(e)
try:
    wasmtime.Instance(store, module, []).exports(store)["f"](store)
except wasmtime.Trap as error:
    print(error.trap_code)
""", status=0, cwd=tmp_path) == []


# -- the quarantine ------------------------------------------------------------------------------------------

# Elsewhere than on Linux the reservations of other code cannot be told from those of linmem.
COUNTING = """
from support import NEEDS, live_bytes, mappings, pages, whole
held_bytes = live_bytes if NEEDS["maps"][0] else lambda: pages.describe()["reserved"]
"""


def in_quarantine(code):
    done = run_child(f"REPORT = True\n{HEAD}{COUNTING}" + textwrap.dedent(code), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_quarantine_keeps_addresses_inaccessible_up_to_its_bytes_the_oldest_go_first():
    in_quarantine("""
        before = held_bytes()
        on(quarantine=3 * 7 * P)
        memories = [linmem.create(P, **{**how, "guard": P}) for _ in range(5)]
        spans = [whole(mem) for mem in memories]
        total = spans[0][1] - spans[0][0]
        on(quarantine=3 * total)
        for mem in memories:
            mem.write(0, b"gone")
            mem.close()
        kept = [all(m.access == "---p" for m in mappings(*span)) and sum(m.size for m in mappings(*span)) == total
                for span in spans]
        assert kept == [False, False, True, True, True], kept
        assert held_bytes() - before == 3 * total
        assert [linmem.find(span[0]).region for span in spans[2:]] == ["guard before"] * 3
        on(quarantine=total)
        assert held_bytes() - before == total
        on(quarantine=0)
        assert held_bytes() == before
        on(quarantine=total)
        linmem.create(P, **how).close()
        assert held_bytes() == before + total
        linmem.create(9 * P, **{**how, "maximum": 9 * P}).close()      # larger than the quarantine
        assert held_bytes() == before + total
        linmem.disable_fault_report()
        assert held_bytes() == before
    """)


def test_a_memory_that_the_os_does_not_make_inaccessible_is_released():
    in_quarantine("""
        from support import failing
        before = held_bytes()
        on(quarantine=1 << 30)
        mem = linmem.create(P, **how)
        with failing(1, 12) as refused:
            mem.close()
        assert refused.happened and held_bytes() == before
    """)


def test_the_quarantine_has_at_most_256_memories():
    in_quarantine("""
        before = held_bytes()
        on(quarantine=1 << 40)
        for _ in range(600):
            mem = linmem.create(P, **how)
            start, end = whole(mem)
            mem.close()
        assert held_bytes() - before == 256 * (end - start)
        linmem.disable_fault_report()
        assert held_bytes() == before
    """)


@requires("rlimits", "large_space")
def test_the_quarantine_gives_way_to_a_reservation_that_the_os_refuses():
    in_quarantine("""
        import resource
        on(quarantine=1 << 40)
        linmem.create(P, reserve=1 << 36).close()
        resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
        linmem.create(P, reserve=1 << 34)
    """)


@pytest.mark.parametrize("bad", [-1, 1.5, "1", None, 2**63, 2**64])
def test_an_invalid_quarantine_is_refused_by_its_name(bad):
    with pytest.raises((ValueError, TypeError, OverflowError), match=r"^quarantine must be "):
        linmem.enable_fault_report(bad)
