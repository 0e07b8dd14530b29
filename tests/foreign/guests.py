"""The guests: how each is initialised, and the ten requests that its instances answer."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import wasmtime

import linmem.wasmtime

WASI = "wasi_snapshot_preview1"


class Guest:
    """The module of a guest, prepared in an engine of its own."""

    def __init__(self, kind: type[Instance], folder: Path) -> None:
        config = wasmtime.Config()
        linmem.wasmtime.install(config)
        self.kind, self.folder, self.engine = kind, folder, wasmtime.Engine(config)
        self.prepared = linmem.wasmtime.prepare(
            self.engine, self.file("wasm").read_bytes(), cache=folder / "cache", expose=True)

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.kind.module}.{suffix}"


class Instance:
    """An instance of a guest, in a store of its own. The classes below say how a guest is called.

    Attributes
    ----------
    module : str
        The name of the guest's module in the folder of the guests, without ".wasm".
    preparation : str
        The request that ends the initialisation.
    requests : tuple of str
        Requests in the guest's language. Each can be the first of an instance.
    remembered : list of int
        The numbers that the host got from the guest during the initialisation, for use in later calls. They are not
        part of a snapshot, and are valid in each instance that starts from it.
    seconds : float
        How long it took to get the instance ready.
    """

    module: str
    preparation: str
    requests: tuple[str, ...]

    def __init__(self, guest: Guest, start: linmem.wasmtime.Snapshot | None = None,
                 remembered: Sequence[int] = ()) -> None:
        self.remembered = list(remembered)
        self.store = wasmtime.Store(guest.engine)
        self.printed = guest.file("printed")
        self.printed.write_bytes(b"")
        wasi = wasmtime.WasiConfig()
        wasi.stdout_file = str(self.printed)
        self.store.set_wasi(wasi)
        imports = self.imports(guest)
        begin = time.perf_counter()
        self.wasm = guest.prepared.instantiate(self.store, imports, start=start)
        self.exports = self.wasm.exports(self.store)
        if start is None:
            self.initialise()
            self.answer(self.preparation)
        self.seconds = time.perf_counter() - begin

    def imports(self, guest: Guest) -> wasmtime.Linker:
        linker = wasmtime.Linker(guest.engine)
        linker.define_wasi()
        for each in guest.prepared.module.imports:
            if each.module != WASI and isinstance(each.type, wasmtime.FuncType):
                linker.define_func(each.module, each.name, each.type, self.host_function(each.module, each.name))
        return linker

    def host_function(self, module: str, name: str) -> Callable[..., Any]:
        def refuse(*arguments: Any) -> None:
            raise AssertionError(f"the guest called {module} {name} {arguments}")
        return refuse

    def memory(self) -> wasmtime.Memory:
        memory = self.exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        return memory

    def call(self, name: str, *arguments: Any) -> Any:
        function = self.exports[name]
        assert isinstance(function, wasmtime.Func)
        return function(self.store, *arguments)

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.memory().read(self.store, address, address + size))

    def write(self, allocate: Callable[[int], int], content: bytes) -> int:
        """Copy the content into a block of the guest's allocator, and return its address."""
        address = allocate(len(content))
        self.memory().write(self.store, content, address)
        return address

    def initialise(self) -> None:
        raise NotImplementedError

    def reply(self, request: str) -> bytes:
        raise NotImplementedError

    def answer(self, request: str) -> str:
        """The guest's reply and what the guest printed."""
        seen = self.printed.stat().st_size
        reply = self.reply(request)
        return (reply + b"\n" + self.printed.read_bytes()[seen:]).decode()


class CGuest(Instance):
    """A library in C that was compiled with a file beside this one."""

    def initialise(self) -> None:
        self.call("_initialize")
        self.call("start")

    def reply(self, request: str) -> bytes:
        text = request.encode()
        self.write(lambda size: self.call("buffer", size), text)
        size = self.call("run", len(text))
        return self.read(self.call("reply"), size)


class Lua(CGuest):
    module = "lua"
    preparation = """
        words = {}
        for i = 1, 5000 do words[i] = string.format("word %d", i * i % 4999) end
        account = setmetatable({balance = 100}, {__index = {pay = function(self, sum)
            if sum > self.balance then error("not enough") end
            self.balance = self.balance - sum
            return self.balance
        end}})
        counter = coroutine.wrap(function() for i = 1, 1000 do coroutine.yield(i) end end)
        counter()
    """
    requests = (
        "return #words .. words[77]",
        "return account:pay(30)",
        "return account:pay(1000)",
        "return counter() + counter()",
        "table.sort(words) return table.concat(words, ',', 1, 20)",
        "print(_VERSION, math.type(3), ('x'):rep(3)) return select('#', pcall(error, {}))",
        "local sum = 0 for i = 1, 200000 do sum = sum + i % 7 end return sum",
        "local t = {} for i = 1, 100000 do t[i] = {i} end return #t + t[500][1]",
        "return (('linear memory'):gsub('%w+', string.upper))",
        "collectgarbage() return load('return 2 ^ 10 // 3')()",
    )


class SQLite(CGuest):
    module = "sqlite"
    preparation = """
        create table item (id integer primary key, name text, price real);
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000)
        insert into item select i, 'item ' || (i * 7919 % 20011), i % 97 / 4.0 from n;
        create index by_name on item (name);
    """
    requests = (
        "select count(*), sum(price), sqlite_version() from item",
        "select * from item where name = 'item 5'",
        "insert into item (name, price) values ('new', 1.5); select max(id), changes() from item",
        "select name from item order by name desc limit 10",
        "begin; delete from item where id % 2; select count(*) from item; rollback; select count(*) from item",
        "create table copy as select * from item; select total(price) from copy",
        "select price, count(*) from item group by price having price > 23 order by 1",
        "select missing from item",
        "explain query plan select * from item where name > 'x'",
        "pragma integrity_check",
    )


class Ruby(Instance):
    """CRuby. The host keeps no table of handles: a handle of a Ruby value is Ruby's own number of the value."""

    module = "ruby"
    preparation = """
        require "json"
        require "set"
        Point = Struct.new(:x, :y) { def +(other) = Point.new(x + other.x, y + other.y) }
        $squares = (1..2000).to_h { |i| ["key #{i}", i * i] }
        $numbers = Enumerator.new { |to| i = 0; loop { to << (i += 1) } }
        def fibonacci(n) = n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2)
        nil
    """
    requests = (
        "[RUBY_ENGINE, RUBY_VERSION, $squares.size, $squares['key 1999']]",
        "JSON.generate(Point.new(1, 2).to_h.merge(list: [nil, 1.5, 'x']))",
        "JSON.parse('{\"a\": [1, 2, {\"b\": null}]}')",
        "fibonacci(20)",
        "$numbers.lazy.select(&:even?).map { _1 ** 2 }.first(5)",
        "[1, 2].fetch(9)",
        "puts 'printed'; $stdout.flush; ($calls = ($calls || 0) + 1)",
        "'Linear memory'.scan(/\\w+/).map { |word| word.sub(/(.)(.*)/, '\\2\\1') }",
        "list = Array.new(200_000) { |i| \"#{i}\" }; GC.start; list.sum(&:size)",
        "define_method(:late) { Set[3, 1, 2].sort.sum + 2 ** 100 } rescue late = $!.class; eval('1.then { it + 1 }')",
    )

    def host_function(self, module: str, name: str) -> Callable[..., Any]:
        if module == "canonical_abi" and name.endswith("_rb-abi-value"):
            return lambda handle: handle
        return super().host_function(module, name)

    def call_by_name(self, name: str, *arguments: Any) -> Any:
        """Call the function whose export has this name before its type."""
        return self.call(next(export for export in self.exports if export.split(":")[0] == name), *arguments)

    def allocate(self, size: int) -> int:
        address: int = self.call("cabi_realloc", 0, 0, 4, size)
        return address

    def initialise(self) -> None:
        self.call("_initialize")
        arguments = [text.encode() + b"\0" for text in ("ruby.wasm", "-EUTF-8", "-e_=0")]
        strings = b"".join(struct.pack("<II", self.write(self.allocate, each), len(each)) for each in arguments)
        self.call_by_name("ruby-init", self.write(self.allocate, strings), len(arguments))

    def reply(self, request: str) -> bytes:
        program = f"begin\n({request}).inspect\nrescue => error\nerror.full_message(highlight: false)\nend".encode()
        result = self.call_by_name("rb-eval-string-protect", self.write(self.allocate, program), len(program))
        value, error = struct.unpack("<II", self.read(result, 8))
        assert not error, f"Ruby refused {request}"
        string = self.call_by_name("rstring-ptr", value)
        reply = self.read(*struct.unpack("<II", self.read(string, 8)))
        self.call("cabi_post_rstring-ptr", string)
        self.call("canonical_abi_drop_rb-abi-value", value)
        return reply


class QuickJS(Instance):
    """QuickJS, compiled by Emscripten, which names imports and exports by letters. Its memory is an import."""

    module = "quickjs"
    preparation = """
        globalThis.primes = [...Array(3000).keys()].filter(n => n > 1 && ![2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37,
            41, 43, 47, 53].some(p => p < n && n % p === 0));
        globalThis.inventory = new Map(primes.map((p, i) => [`item ${i}`, {p, tags: [i % 3, i % 5]}]));
        class Account { #balance = 100; pay(sum) { if (sum > this.#balance) throw RangeError(`only ${this.#balance}`);
            return this.#balance -= sum; } }
        globalThis.account = new Account();
        globalThis.ids = (function* () { for (let i = 1; ; i++) yield i; })();
        globalThis.rows = Array.from({length: 250000}, (_, i) => [i, i % 1000]);        // for which the memory grows
        0
    """
    requests = (
        "primes.length + ':' + primes.at(-1)",
        "JSON.stringify([...inventory].slice(7, 9))",
        "account.pay(30)",
        "account.pay(1000)",
        "ids.next().value + ids.next().value",
        "'linear memory'.replace(/(\\w)(\\w*)/g, (_, a, b) => a.toUpperCase() + b)",
        "let big = 1n; for (let i = 1n; i < 60n; i++) big *= i; String(big)",
        "Array.from({length: 400000}, (_, i) => ({i})).reduce((sum, {i}) => sum + i, rows.length + rows[5432][1])",
        "new Function('a', 'b', 'return a ** b')(2, 40)",
        "this.calls = (this.calls ?? 0) + 1; [0.1 + 0.2, [3, 1, 2].sort(), typeof Symbol(), null].join()",
    )

    def imports(self, guest: Guest) -> wasmtime.Linker:
        # The names of the C functions, as the JavaScript that belongs to the module has them.
        script = guest.file("js").read_text()
        self.names = {"__wasm_call_ctors": "u", **dict(re.findall(r"\bd\._(\w+)=b\.([\w$]+);", script))}
        linker = super().imports(guest)
        kind = next(each.type for each in guest.prepared.module.imports if isinstance(each.type, wasmtime.MemoryType))
        self.imported = linmem.wasmtime.new_memory(self.store, kind)
        linker.define(self.store, "a", "a", self.imported)
        return linker

    def host_function(self, module: str, name: str) -> Callable[..., Any]:
        known: dict[str, Callable[..., Any]] = {
            "p": lambda: 1.7e12,        # the time
            "k": self.grow, "f": self.no_environment, "e": lambda *places: 0}
        return known.get(name) or super().host_function(module, name)

    def no_environment(self, count: int, size: int) -> int:
        for address in (count, size):
            self.memory().write(self.store, bytes(4), address)
        return 0

    def grow(self, size: int) -> int:
        memory = self.memory()
        memory.grow(self.store, -(-size // 65536) - memory.size(self.store))
        return 1

    def memory(self) -> wasmtime.Memory:
        assert isinstance(self.imported, wasmtime.Memory)
        return self.imported

    def call(self, name: str, *arguments: Any) -> Any:
        return super().call(self.names[name], *arguments)

    def initialise(self) -> None:
        self.call("__wasm_call_ctors")
        self.remembered = [self.call("QTS_NewContext", self.call("QTS_NewRuntime"), 0)]

    def reply(self, request: str) -> bytes:
        context, program = self.remembered[0], request.encode()
        text, name = (self.write(lambda size: self.call("malloc", size), each + b"\0")
                      for each in (program, b"request"))
        value = self.call("QTS_Eval", context, text, len(program), name, 0, 0)
        value = self.call("QTS_ResolveException", context, value) or value
        string = self.call("QTS_GetString", context, value)
        rest = self.memory().read(self.store, string, self.memory().data_len(self.store))
        self.call("QTS_FreeCString", context, string)
        self.call("QTS_FreeValuePointer", context, value)
        self.call("free", text)
        self.call("free", name)
        return bytes(rest[:rest.index(0)])


KINDS = {kind.module: kind for kind in (Lua, SQLite, QuickJS, Ruby)}
