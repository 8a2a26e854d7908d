"""Workers as threads, with a network between them that counts and never waits for ever."""

import queue
import threading

import numpy as np

PATIENCE_S = 5.0


class Network:
    """Point-to-point messages between `world_size` workers of this process."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.messages = {
            (source, to): queue.SimpleQueue()
            for source in range(world_size)
            for to in range(world_size)
        }
        self.sent = []  # (source, to, elements, dtype)

    def sender(self, rank):
        def send(to, array):
            copied = np.array(array)
            self.sent.append((rank, to, copied.size, str(copied.dtype)))
            self.messages[rank, to].put(copied)

        return send

    def receiver(self, rank):
        def receive(source):
            try:
                return self.messages[source, rank].get(timeout=PATIENCE_S)
            except queue.Empty:
                raise AssertionError(
                    f"worker {rank} of {self.world_size} waits for a message from worker "
                    f"{source}, which sent it none"
                ) from None

        return receive

    def waiting(self):
        """(source, to) of the messages that nobody has received."""
        return [pair for pair, messages in self.messages.items() if not messages.empty()]


def run_workers(world_size, work):
    """`work(rank)` in a thread for each worker; their results, or the first one's error."""
    results, errors = [None] * world_size, []

    def body(rank):
        try:
            results[rank] = work(rank)
        except BaseException as error:  # a student's SystemExit is an error of this worker too
            errors.append(error)

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S + 5)
        assert not thread.is_alive(), "a worker has not come to an end"
    if errors:
        raise errors[0]
    return results
