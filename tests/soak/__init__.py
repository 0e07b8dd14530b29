"""All features at the same time, for minutes, against a model of every byte:  ``python tests/soak --minutes N``

Threads make, grow, view, protect, discard, image, save and close memories of every creator and adaptor, and run
WebAssembly in such memories. Meanwhile page calls are made to fail and children are forked. Each thread has a
model of every byte of its memories. Between two phases of a run all threads rest. At each rest the process must hold as
much as at the first rest.

These are findings: a wrong byte, an exception that is not documented, a leak, a hang, a crash. A finding ends the run
with a status other than 0, with the seed, and with the current step of each thread.

===================  ===================================================================================
``command.py``       the options, and the report at the end
``run.py``           a run: its threads, its phases, the search for leaks
``worker.py``        a thread, which takes one step after the other
``*_steps.py``       the steps: with memories, images, creators, files, guests, forked children
``memories.py``      a memory together with the bytes that it must have
``creators.py``      the creators of the memories
``process.py``       the memory, mappings and descriptors of the process, according to the operating system
``checks.py``        the comparisons, and the facts of this machine
``output.py``        tables and a progress bar
===================  ===================================================================================
"""
