"""Everything at once, for minutes, against a model of every byte:  ``python tests/soak --minutes N``

Threads make, grow, view, protect, discard, image, save and close memories of every creator and adaptor, and run
WebAssembly in such memories. Meanwhile page calls are made to fail and children are forked. Each thread knows what
every byte of its memories must be. Between two phases of a run all threads rest, and the process must then hold what it
held before.

These are findings: a wrong byte, an exception that is not documented, a leak, a hang, a crash. A finding ends the run
with a status other than 0, with the seed, and with what each thread was doing.

===================  ===================================================================================
``command.py``       the options, and the report at the end
``run.py``           a run: its threads, its phases, the search for leaks
``worker.py``        a thread, which takes one step after the other
``*_steps.py``       the steps: with memories, images, creators, guests, forked children
``memories.py``      a memory together with the bytes that it must have
``creators.py``      the creators that the memories come from
``process.py``       what the process holds, as the operating system says
``checks.py``        the comparisons, and the facts of this machine
``output.py``        tables and a progress bar
===================  ===================================================================================
"""
