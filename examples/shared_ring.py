"""A ring buffer in a shared memory: one process writes messages of 64 bytes, and another one reads them.

    python examples/shared_ring.py [MESSAGES]

The memory holds two words and the messages: how many messages were written, how many were read. Only the writer changes
the first word, and only the reader the second. Each sleeps (linmem.wait) only if the ring is full or empty. The ring
relies on stores that become visible in their order, as on x86-64; on other processors use linmem.Lock.
"""

import multiprocessing
import sys
import time

import linmem

MESSAGE, ROOM = 64, 1024            # bytes, messages
WRITTEN, READ, FIRST = 0, 64, 128   # offsets: the words are in cache lines of their own
WRAP = 1 << 31


class Ring:
    def __init__(self, mem):
        self.mem = mem
        self.words = mem.view("i")
        self.bytes = memoryview(mem)[FIRST:FIRST + MESSAGE * ROOM]

    @classmethod
    def create(cls):
        return cls(linmem.create(FIRST + MESSAGE * ROOM, creator=linmem.creator("shared")))

    def put(self, message):
        written = self.words[WRITTEN // 4]
        while (written - self.words[READ // 4]) % WRAP == ROOM:
            linmem.wait(self.mem, READ, (written - ROOM) % WRAP)
        place = written % ROOM * MESSAGE
        self.bytes[place:place + MESSAGE] = message
        self.words[WRITTEN // 4] = (written + 1) % WRAP
        if self.words[READ // 4] == written:            # the ring was empty, so the reader may sleep
            linmem.wake(self.mem, WRITTEN)

    def get(self):
        read = self.words[READ // 4]
        while self.words[WRITTEN // 4] == read:
            linmem.wait(self.mem, WRITTEN, read)
        place = read % ROOM * MESSAGE
        message = bytes(self.bytes[place:place + MESSAGE])
        self.words[READ // 4] = (read + 1) % WRAP
        if (self.words[WRITTEN // 4] - read) % WRAP == ROOM:    # the ring was full, so the writer may sleep
            linmem.wake(self.mem, READ)
        return message


def write(handle, messages):
    ring = Ring(linmem.attach(handle))
    for n in range(messages):
        ring.put(n.to_bytes(MESSAGE, "little"))


def main():
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    ring = Ring.create()
    writer = multiprocessing.Process(target=write, args=(ring.mem.handle(), messages))
    start = time.perf_counter()
    writer.start()
    for n in range(messages):
        if ring.get() != n.to_bytes(MESSAGE, "little"):
            sys.exit(f"message {n} is wrong")
    writer.join()
    seconds = time.perf_counter() - start
    print(f"{messages} messages in order, {seconds / messages * 1e6:.2f} microseconds each")


if __name__ == "__main__":
    main()
