"""Writes pcap and pcapng files for the tests, link by link and layer by layer.

The formats are written down once more, independently of the library that the agent reads them
with: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng, the link types of tcpdump.org, RFC 791,
8200 and 9293.
"""

from __future__ import annotations

import ipaddress
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

Address = tuple[str, int]
# A frame's time in microseconds of UNIX time, and its octets behind the link layer.
Packet = tuple[int, bytes]

UDP, TCP = 17, 6
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


# Link layers: number of the link type, and what stands in front of an IP packet.


def _ethertype(packet: bytes) -> bytes:
    return b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"


def _family(packet: bytes, six: int) -> int:
    return 2 if packet[0] >> 4 == 4 else six


MACS = bytes.fromhex("020000000002020000000001")
LINKS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "ethernet": (1, lambda p: MACS + _ethertype(p) + p),
    "vlan": (1, lambda p: MACS + b"\x81\x00\x00\x07" + _ethertype(p) + p),
    "qinq": (1, lambda p: MACS + b"\x88\xa8\x00\x07\x81\x00\x00\x08" + _ethertype(p) + p),
    "cooked": (113, lambda p: b"\0\0\0\1\0\6" + bytes(8) + _ethertype(p) + p),
    "cooked2": (276, lambda p: _ethertype(p) + b"\0\0\0\0\0\2\0\1\0\6" + bytes(8) + p),
    "raw": (101, lambda p: p),
    "null": (0, lambda p: struct.pack("<I", _family(p, 30)) + p),
    "null, other end": (0, lambda p: struct.pack(">I", _family(p, 24)) + p),
    "loop": (108, lambda p: struct.pack(">I", _family(p, 24)) + p),
}


# Files


def pcap(
    packets: Iterable[Packet],
    link: str = "ethernet",
    *,
    order: str = "<",
    nano: bool = False,
    snap: int = 262_144,
) -> bytes:
    """A pcap file of IP packets."""
    number, frame = LINKS[link]
    magic = 0xA1B23C4D if nano else 0xA1B2C3D4
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snap, number)]
    for time, packet in packets:
        octets = frame(packet)
        fraction = time % 1_000_000 * (1000 if nano else 1)
        head = (time // 1_000_000, fraction, min(len(octets), snap), len(octets))
        parts.append(struct.pack(order + "IIII", *head) + octets[:snap])
    return b"".join(parts)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """A block of pcapng."""
    body += bytes(-len(body) % 4)
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


def option(code: int, value: bytes, order: str = "<") -> bytes:
    """An option of a block."""
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<") -> bytes:
    """A section header."""
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(link: str, resolution: int | None = None, offset: int = 0, order: str = "<") -> bytes:
    """An interface description; `resolution` is if_tsresol, `offset` if_tsoffset in seconds."""
    body = struct.pack(order + "HHI", LINKS[link][0], 0, 0)
    if resolution is not None:
        body += option(9, bytes([resolution]), order)
    if offset:
        body += option(14, struct.pack(order + "q", offset), order)
    return block(1, body + (option(0, b"", order) if len(body) > 8 else b""), order)


def enhanced(
    packet: bytes, link: str, stamp: int, number: int = 0, order: str = "<", cut: int = 0
) -> bytes:
    """An enhanced packet block, without the last `cut` octets; `stamp` in the interface's units."""
    octets = LINKS[link][1](packet)
    kept = octets[: len(octets) - cut]
    head = (number, stamp >> 32, stamp & 0xFFFFFFFF, len(kept), len(octets))
    body = struct.pack(order + "IIIII", *head) + kept
    return block(6, body + bytes(-len(kept) % 4), order)


def pcapng(packets: Iterable[Packet], link: str = "ethernet", order: str = "<") -> bytes:
    """A pcapng file of one section and one interface, in microseconds."""
    blocks = [enhanced(packet, link, time, 0, order) for time, packet in packets]
    return section(order) + interface(link, order=order) + b"".join(blocks)


# IP


def ip(
    protocol: int,
    source: str,
    destination: str,
    content: bytes,
    *,
    mtu: int = 0,
    number: int = 1,
    extension: bool = False,
) -> list[bytes]:
    """An IPv4 or IPv6 packet, or its fragments of `mtu` octets of content (a multiple of 8).

    With `extension` IPv6 gets hop-by-hop and destination options.
    """
    if ":" in source:
        return _ip6(protocol, source, destination, content, mtu, number, extension)
    packets = []
    for start in range(0, len(content), mtu) if mtu else (0,):
        part = content[start : start + mtu] if mtu else content
        more = 0x2000 if start + len(part) < len(content) else 0
        head = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45, 0, 20 + len(part), number & 0xFFFF, more | start // 8, 64, protocol, 0),
            ipaddress.ip_address(source).packed,
            ipaddress.ip_address(destination).packed,
        )
        packets.append(head + part)
    return packets


def _ip6(
    protocol: int,
    source: str,
    destination: str,
    content: bytes,
    mtu: int,
    number: int,
    extension: bool,
) -> list[bytes]:
    packets = []
    for start in range(0, len(content), mtu) if mtu else (0,):
        part = content[start : start + mtu] if mtu else content
        kind = protocol
        if mtu:
            more = start + len(part) < len(content)
            part = struct.pack("!BBHI", kind, 0, start | more, number) + part
            kind = 44
        if extension:
            part = struct.pack("!BB6x", kind, 0) + part
            part = struct.pack("!BB6x", 60, 0) + part
            kind = 0
        head = struct.pack(
            "!IHBB16s16s",
            *(0x60000000, len(part), kind, 64),
            ipaddress.ip_address(source).packed,
            ipaddress.ip_address(destination).packed,
        )
        packets.append(head + part)
    return packets


def udp(source: Address, destination: Address, payload: bytes, **options: int) -> list[bytes]:
    """A datagram as IP packets; `options` are those of `ip`."""
    head = struct.pack("!HHHH", source[1], destination[1], 8 + len(payload), 0)
    return ip(UDP, source[0], destination[0], head + payload, **options)


def segment(
    source: Address,
    destination: Address,
    sequence: int,
    acknowledgment: int,
    flags: int,
    data: bytes,
) -> bytes:
    """A TCP segment as an IP packet, with an option that has no meaning."""
    head = struct.pack(
        "!HHIIBBHHH",
        *(source[1], destination[1], sequence & 0xFFFFFFFF, acknowledgment & 0xFFFFFFFF),
        *(6 << 4, flags, 65_535, 0, 0),
    )
    return ip(TCP, source[0], destination[0], head + b"\1\1\1\1" + data)[0]


@dataclass
class Connection:
    """A TCP connection that is written segment by segment, each acknowledged at once.

    `sent` counts the octets of both sides. `start` is where the sequence numbers begin: near the
    end of their range, they wrap.
    """

    client: Address
    server: Address
    start: int = 0xFFFFFF00
    mss: int = 1_460
    sent: dict[Address, int] = field(default_factory=dict)

    def open(self, time: int) -> Iterator[Packet]:
        """The handshake."""
        self.sent = {self.client: 1, self.server: 1}
        a, b, s = self.client, self.server, self.start
        yield time, segment(a, b, s, 0, SYN, b"")
        yield time, segment(b, a, s, s + 1, SYN | ACK, b"")
        yield time, segment(a, b, s + 1, s + 1, ACK, b"")

    def send(self, time: int, source: Address, data: bytes) -> Iterator[Packet]:
        """Octets of one side, each segment followed by its acknowledgment."""
        other = self.server if source == self.client else self.client
        for at in range(0, len(data), self.mss):
            part = data[at : at + self.mss]
            ours, theirs = self.start + self.sent[source], self.start + self.sent[other]
            yield time, segment(source, other, ours, theirs, PSH | ACK, part)
            self.sent[source] += len(part)
            yield time, segment(other, source, theirs, ours + len(part), ACK, b"")

    def close(self, time: int) -> Iterator[Packet]:
        """The client has no more to say, then the server."""
        for source, other in ((self.client, self.server), (self.server, self.client)):
            ours, theirs = self.start + self.sent[source], self.start + self.sent[other]
            yield time, segment(source, other, ours, theirs, FIN | ACK, b"")
            yield time, segment(other, source, theirs, ours + 1, ACK, b"")


def out_of_order(packets: Iterable[Packet], seed: int, within: int = 20_000) -> list[Packet]:
    """Packets that overtake each other, none by more than `within` microseconds."""
    chance = random.Random(seed)
    moved = [(time + chance.randrange(within), packet) for time, packet in packets]
    return sorted(moved, key=lambda packet: packet[0])
