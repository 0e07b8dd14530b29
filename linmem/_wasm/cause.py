"""`cause`: the exceptions of linmem and of creators behind the errors that wasmtime raises."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import wasmtime

_KEPT = 256         # refusals; `cause` finds no older ones
_DEEPEST = 16       # of nested calls into wasmtime, a refusal knows so many of the innermost and of the outermost ones
_UNREACHABLE = "wasm trap: wasm `unreachable` instruction executed"
_NOT_GROWN = "failed to grow memory"
_NO_OBJECT = "GC heap out of memory"
_WASMTIME = os.path.dirname(wasmtime.__file__) + os.sep
# A guest cannot guess the number of another guest's refusal.
_TOKEN = re.compile(r" ?\[refusal ([0-9a-f]{16})\]")


class _Refusal(NamedTuple):
    token: str
    thread: int
    time: int       # of time.perf_counter_ns
    calls: tuple[weakref.ref[Any], ...]     # each to an object of its own call into wasmtime
    error: Exception


_refusals: list[_Refusal] = []      # the newest at the end. Read as a copy: other threads change the list.


def note(error: Exception) -> str:
    """Keep the exception of a refusal. Returns the text by which `cause` finds it in an error of wasmtime."""
    token = secrets.token_hex(8)
    _forget_frames(error, sys.exc_info()[1])
    calls = [weakref.ref(mark) for frame in _stack(sys._getframe(1)) for mark in itertools.islice(_marks(frame), 1)]
    calls = [*calls[:_DEEPEST], *calls[_DEEPEST:][-_DEEPEST:]]
    thread = threading.get_ident()
    before = next((refusal for refusal in _refusals[::-1] if refusal.thread == thread), None)
    _refusals.append(_Refusal(token, thread, time.perf_counter_ns(), tuple(calls), error))
    # Only the last refusal of a call is needed, so that a guest that tries in a loop does not push out all others.
    if before is not None and before.calls and calls and before.calls[0]() is calls[0]():
        with contextlib.suppress(ValueError):       # another thread has pushed it out
            _refusals.remove(before)
    del _refusals[:-_KEPT]
    return f"[refusal {token}]"


def without_tokens(text: str) -> str:
    """The text of an error of wasmtime, as people should see it."""
    return _TOKEN.sub("", text).rstrip()


def _forget_frames(error: BaseException, handled: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of those that led to it: a traceback keeps the variables of all callers.

    The caller of wasm may be in an ``except`` block, for the exception `handled`. Python made `handled` the context of
    the new exceptions; they lose this reference, and `handled` keeps its traceback.
    """
    left, seen = [error], {id(error)}
    while left:
        link = left.pop()
        link.__traceback__ = None
        if link.__context__ is handled:
            link.__context__ = None
        for other in (link.__cause__, link.__context__):
            if other is not None and other is not handled and id(other) not in seen:
                seen.add(id(other))
                left.append(other)


def refused_since(start: int) -> Exception | None:
    """The exception of the last refusal on this thread that came after a time of ``time.perf_counter_ns``."""
    thread = threading.get_ident()
    return next((each.error for each in _refusals[::-1] if each.thread == thread and each.time > start), None)


def cause(error: BaseException) -> Exception | None:
    """The exception because of which linmem, or a creator, refused a memory or a growth.

    wasmtime turns such an exception into a `wasmtime.WasmtimeError` with its text, or into a `memory.grow` that
    returns -1. `cause` returns the exception itself: a `LimitError`, a `PageError`, or what a creator in Python raised.

    Parameters
    ----------
    error : BaseException
        - A ``wasmtime.WasmtimeError``: a memory could not be made, ``wasmtime.Memory.grow`` was refused, or the GC heap
          was too small for an object of the guest.
        - A ``wasmtime.Trap`` that the guest raised itself ("unreachable"; in a component it is a `WasmtimeError`), or a
          ``wasmtime.ExitTrap`` with another code than 0: the last refusal inside of the same call. A refused growth is
          such a trap in a module that was prepared with ``trap_on_refused=True``.
        - An exception that was raised from one of these (``raise ... from``), or while one of these was handled.

    Returns
    -------
    Exception or None
        None if linmem refused nothing, if wasmtime itself names the reason of the trap (for example, an access out of
        bounds), or if 256 refusals in other calls came since.

    Notes
    -----
    May be called later, and on another thread. A trap is found by the frames of its traceback, so
    ``traceback.clear_frames``, which `unittest` calls, makes its cause unknown. The result, and the exceptions that led
    to it, have no traceback: it would keep the variables of all callers.
    """
    if not isinstance(error, BaseException):
        raise TypeError(f"error must be an exception, got {type(error).__name__}")
    return next((found for found in map(_behind, _chain(error)) if found is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those because of which or during which it was raised."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ if link.__suppress_context__ else link.__context__


def _behind(error: BaseException) -> Exception | None:
    kept = _refusals[:]
    for refusal in kept:
        if refusal.error is error:
            return refusal.error
    if not isinstance(error, (wasmtime.Trap, wasmtime.WasmtimeError)):
        return None
    try:
        text, code = str(error), getattr(error, "trap_code", None)
    except Exception:       # the error was closed, or a subclass did not initialise it
        return None
    tokens = set(_TOKEN.findall(text))
    for refusal in kept:
        if refusal.token in tokens:
            return refusal.error
    if isinstance(error, wasmtime.ExitTrap):
        by_guest = error.code != 0
    elif isinstance(error, wasmtime.Trap):
        by_guest = code == wasmtime.TrapCode.UNREACHABLE
    else:                   # of a component, of Memory.grow(), or of an allocation of a GC object
        by_guest = _UNREACHABLE in text or text.startswith(_NOT_GROWN) or _NO_OBJECT in text
    if tokens or not by_guest:
        return None
    marks: set[int] = set()
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_WASMTIME):
            marks |= {id(mark) for mark in _marks(trace.tb_frame)}      # the traceback keeps these objects
        trace = trace.tb_next
    for refusal in kept[::-1]:
        if any(id(mark) in marks for mark in (call() for call in refusal.calls) if mark is not None):
            return refusal.error
    return None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of wasmtime-py's functions, the innermost one first."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_WASMTIME):
            yield frame
        frame = frame.f_back


def _marks(frame: FrameType) -> Iterator[Any]:
    """The objects that only this call has: C values and arrays that its function made. A frame itself takes no weak
    reference, and its address may be that of a later call."""
    code, values = frame.f_code, frame.f_locals
    arguments = code.co_varnames[:code.co_argcount]
    for name in (*code.co_varnames, *code.co_cellvars):
        value = values.get(name)
        if name not in arguments and isinstance(
                value, (ctypes.Array, ctypes.Structure, ctypes._SimpleCData, ctypes._Pointer)):
            yield value
