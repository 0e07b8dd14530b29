"""The subcommands of ``linmem``, one module for each."""
