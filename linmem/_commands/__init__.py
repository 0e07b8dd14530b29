"""The subcommands of ``linmem``, a room each."""
