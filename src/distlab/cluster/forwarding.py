"""A switch in user space, which holds each packet for a while before it hands it on, or loses it.

Run by `distlab.cluster.delays` where the kernel has no netem; the standard library only. A line of
JSON on standard input maps each port to the seconds that what leaves by it is held, and the share
of it that is lost. What comes as one packet is a burst of TCP segments where the sender's kernel
made one, so that few system calls move many bytes; it is lost as one, too.
"""

import ctypes
import errno
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from contextlib import suppress
from itertools import count

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
ETH_P_ALL = 3
VNET_HEADER = 10  # tells of a burst how it is to be cut into segments
BUFFER = 64 << 20
LARGEST_PACKET = 1 << 17
PR_SET_TIMERSLACK = 29
PACKETS_AT_ONCE = 32  # read from one port before what is due is sent
# Nothing to read; a cut or unplugged link; a full queue, which loses packets as a real one does.
PASSING = (errno.EAGAIN, errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.ENOBUFS, errno.EMSGSIZE)


class Switch:
    """Ports by number, which is the last byte of the hardware address of the node behind."""

    def __init__(self) -> None:
        self.links: dict[int, socket.socket] = {}
        self.devices: dict[int, int] = {}  # by port: the number that the kernel gave its device
        self.delays: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.held: list[tuple[float, int, int, bytes]] = []  # a heap: due, arrival, port, packet
        self.arrivals = count()

    def configure(self, ports: dict[str, tuple[float, float]]) -> None:
        """Open what ports are new, or new again after a node's power cut; set delay and loss."""
        for name, (delay, loss) in ports.items():
            port, device = int(name.removeprefix("sw")), socket.if_nametoindex(name)
            if self.devices.get(port) != device:
                if port in self.links:
                    self.links[port].close()
                self.links[port], self.devices[port] = open_link(name), device
            self.delays[port], self.losses[port] = delay, loss

    def receive(self, port: int) -> None:
        """Read what has come by a port, and hold it for those whom it is for."""
        for _ in range(PACKETS_AT_ONCE):
            try:
                packet = self.links[port].recv(LARGEST_PACKET)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                return
            now = time.monotonic()
            for target in self.targets(port, packet):
                if random.random() < self.losses[target]:
                    continue
                due = now + self.delays[target]
                heapq.heappush(self.held, (due, next(self.arrivals), target, packet))

    def targets(self, port: int, packet: bytes) -> list[int]:
        everyone = packet[VNET_HEADER] & 1  # the bit of a broadcast or multicast address
        if everyone:
            return [other for other in self.links if other != port]
        to = packet[VNET_HEADER + 5]
        return [to] if to in self.links else []

    def send_due(self) -> float | None:
        """Hand on what has been held long enough; the seconds until more is due."""
        while self.held:
            wait = self.held[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, _, port, packet = heapq.heappop(self.held)
            try:
                self.links[port].send(packet)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
        return None


def open_link(name: str) -> socket.socket:
    """All that comes in by a device, as bursts, with the header that tells of them."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.setblocking(False)
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for forced, polite in (
        (SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            link.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except PermissionError:  # older kernels keep it for root of the whole machine
            link.setsockopt(socket.SOL_SOCKET, polite, BUFFER)
    link.bind((name, ETH_P_ALL))
    return link


def go_first() -> None:
    """Wake up on time, and before the nodes' programs, whose cores this switch must share.

    A real network does not slow down when a node computes. Only root may ask for that.
    """
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    go_first()
    switch = Switch()
    while True:
        wait = switch.send_due()
        sources = {link.fileno(): port for port, link in switch.links.items()}
        ready, _, _ = select.select([0, *sources], [], [], wait)
        for source in ready:
            if source != 0:
                switch.receive(sources[source])
        if 0 in ready:
            if not (line := sys.stdin.readline()):
                return
            switch.configure(json.loads(line))
            os.write(1, b"done\n")


if __name__ == "__main__":
    main()
