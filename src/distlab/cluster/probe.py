"""How fast a link is: the time until a node has some bytes and says so.

On one node `probe.py serve`, which prints `ready`; on another `probe.py send NODE BYTES REPEATS`,
which prints the seconds of each transfer as a JSON list. The standard library only, so that it
starts at once.
"""

import json
import socket
import sys
import time

PORT = 5000
PATIENCE_S = 60.0


def serve() -> None:
    """Answer each message, which begins with its size, by one byte."""
    server = socket.create_server(("", PORT))
    print("ready", flush=True)
    room = memoryview(bytearray(1 << 20))
    while True:
        link, _ = server.accept()
        with link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while left := int.from_bytes(link.recv(8, socket.MSG_WAITALL), "little"):
                while left and (count := link.recv_into(room, min(left, len(room)))):
                    left -= count
                link.sendall(b"!")


def send(node: str, size: int, repeats: int) -> list[float]:
    """Send `size` bytes to a node that serves, again and again; the seconds of each."""
    seconds = []
    message = size.to_bytes(8, "little") + bytes(size)
    with socket.create_connection((node, PORT), timeout=PATIENCE_S) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(repeats):
            began = time.perf_counter()
            link.sendall(message)
            if link.recv(1) != b"!":
                raise ConnectionError(f"{node} hung up")
            seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
