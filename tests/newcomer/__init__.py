"""A newcomer follows pages of the docs word by word in an empty root:  ``python tests/newcomer --wheel linmem-*.whl``

The newcomer has Python and a shell, a folder without a file, and no settings. There is no compiler, except for a page
that asks for one at its top. There is no network. The wheels that the pages name are in a folder, and pip installs them
from there. The newcomer types the commands, writes the files and runs the examples in the order of the page, and sees
what the page shows. At the end, a check from outside of the root looks for what the page promised.

==============  ========================================================================
``tasks.py``    the tasks: a page, and what must be there at its end
``page.py``     what a page says: commands, files, examples, and what the reader shall see
``root.py``     the empty root, and a shell in it
``command.py``  the options, the wheels, and the times
==============  ========================================================================
"""
