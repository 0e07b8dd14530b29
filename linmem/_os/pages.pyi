from typing import Any

IMAGE_KINDS: dict[int, str]

def os_error_args(code: int, text: str) -> tuple[Any, ...]: ...
def count_calls_to_failure(nth: int, code: int, times: int = 1) -> int: ...
def choose_scan(way: str | None) -> str | None: ...
def choose_image(kind: str) -> str: ...
def describe() -> dict[str, Any]:
    """What the operating system gives linmem on this machine, as a dict; ``linmem info`` prints it.

    Returns
    -------
    dict
        Sizes are in bytes. "page_size" (the host page), "granularity" (of reservations), "huge_page" (0: none),
        "address_bits", "address_space", "address_space_left", "reserved" (address space that linmem holds now),
        "memory" (physical memory that this process may use; 0: unknown), "mappings" (the most that a process may have;
        0: no limit), "images" (the kind of pages that images have), "capabilities" (a dict of bools), "limits" (a
        dict of the limits that are set, by their names).
    """
def die_quietly() -> None: ...
