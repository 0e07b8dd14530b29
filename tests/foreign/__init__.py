"""Guests that others wrote: CRuby, QuickJS, Lua and SQLite, started from snapshots.

``python tests/foreign FOLDER`` takes a folder with ``ruby.wasm``, ``quickjs.wasm``, ``quickjs.js``, ``lua.wasm`` and
``sqlite.wasm``. `.ci/stages/foreign.sh` shows where they come from. For each guest, one process initialises an
instance and saves a snapshot, and a second process starts instances from the file. Their answers must be equal, byte
for byte, to the answers of instances that were initialised.

=================  =================================================================
``__main__.py``    the two processes of a guest, and the comparison
``guests.py``      how each guest is called and initialised, and its requests
``lua.c``          the functions that the reactor of Lua exports
``memory_use.py``  what the kernel says about the memories of instances
``sqlite.c``       the functions that the reactor of SQLite exports
=================  =================================================================
"""
