"""Builders of HEP packets and SIP messages for the tests.

They write the wire formats down once more, independently of the agent's decoder and of the scripts,
and let a test build what no server would send: left out or doubled chunks, wrong magic, odd order.
"""

from __future__ import annotations

import gzip
import random
import socket
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal

Address = tuple[str, int]  # IPv4 or IPv6 address as text, port

TIME_US = 1_790_000_000_123_456  # 2026-09-21T14:13:20.123456Z
SRC: Address = ("10.0.0.1", 5060)
DST: Address = ("10.0.0.2", 5060)


def _packed(src: Address, dst: Address) -> tuple[int, bytes, bytes]:
    """Family as HEP numbers it (2 or 10, Linux' values) and both addresses in network order."""
    six = ":" in src[0]
    family = socket.AF_INET6 if six else socket.AF_INET
    return 10 if six else 2, socket.inet_pton(family, src[0]), socket.inet_pton(family, dst[0])


def chunk(vendor: int, kind: int, value: bytes) -> bytes:
    """One HEP3 chunk; its length counts its own header of 6 octets."""
    return struct.pack("!HHH", vendor, kind, len(value) + 6) + value


def hep3(
    payload: bytes,
    *,
    src: Address = SRC,
    dst: Address = DST,
    time_us: int | None = TIME_US,
    capture_id: int | None = None,
    capture_name: bytes | str | None = None,
    correlation_id: bytes | str | None = None,
    auth_key: bytes | str | None = None,
    protocol: int = 17,
    protocol_type: int = 1,
    compress: Literal["zlib", "gzip"] | None = None,
    extra_chunks: Iterable[tuple[int, int, bytes]] = (),
    order: random.Random | None = None,
    magic: bytes = b"HEP3",
    omit: Iterable[int] = (),
) -> bytes:
    """One HEP3 frame (HEP3 specification rev. 37).

    `time_us` is in microseconds since 1970, None leaves chunks 0x09 and 0x0a out. `extra_chunks`
    are (vendor, type, value); `omit` names generic types to leave out; `order` shuffles the chunks.
    Source and destination must be of one family. Raises struct.error if the frame is too long.
    """
    family, source, destination = _packed(src, dst)
    chunks: list[tuple[int, int, bytes]] = [
        (0, 0x01, bytes([family])),
        (0, 0x02, bytes([protocol])),
        (0, 0x03 if family == 2 else 0x05, source),
        (0, 0x04 if family == 2 else 0x06, destination),
        (0, 0x07, struct.pack("!H", src[1])),
        (0, 0x08, struct.pack("!H", dst[1])),
    ]
    if time_us is not None:
        chunks.append((0, 0x09, struct.pack("!I", time_us // 1_000_000)))
        chunks.append((0, 0x0A, struct.pack("!I", time_us % 1_000_000)))
    chunks.append((0, 0x0B, bytes([protocol_type])))
    if capture_id is not None:
        chunks.append((0, 0x0C, struct.pack("!I", capture_id)))
    for kind, text in ((0x0E, auth_key), (0x11, correlation_id), (0x13, capture_name)):
        if text is not None:
            chunks.append((0, kind, text.encode() if isinstance(text, str) else text))
    if compress is None:
        chunks.append((0, 0x0F, payload))
    else:
        pack = zlib.compress if compress == "zlib" else gzip.compress
        chunks.append((0, 0x10, pack(payload)))
    left_out = set(omit)
    chunks = [c for c in chunks if c[1] not in left_out] + list(extra_chunks)
    if order is not None:
        order.shuffle(chunks)
    body = b"".join(chunk(*c) for c in chunks)
    return magic + struct.pack("!H", len(body) + 6) + body


def hep1(
    payload: bytes, *, src: Address = SRC, dst: Address = DST, header_length: int | None = None
) -> bytes:
    """One HEP1 datagram; `header_length` is the octet in the header, by default the right one."""
    return _hep12(1, b"", payload, src, dst, header_length)


def hep2(
    payload: bytes,
    *,
    src: Address = SRC,
    dst: Address = DST,
    time_us: int = TIME_US,
    capture_id: int = 0,
    padded: bool = True,
    byteorder: Literal["little", "big"] = "little",
    header_length: int | None = None,
) -> bytes:
    """One HEP2 datagram.

    The time header has 12 octets as Kamailio and OpenSIPS send it, or 10 where not `padded`;
    `byteorder` is that of its three numbers. `header_length`: see hep1.
    """
    layout = "<IIH" if byteorder == "little" else ">IIH"
    stamp = struct.pack(layout, time_us // 1_000_000, time_us % 1_000_000, capture_id)
    return _hep12(2, stamp + (b"\0\0" if padded else b""), payload, src, dst, header_length)


def _hep12(
    version: int, stamp: bytes, payload: bytes, src: Address, dst: Address, length: int | None
) -> bytes:
    family, source, destination = _packed(src, dst)
    if length is None:
        length = 8 + len(source) + len(destination) + len(stamp)
    head = struct.pack("!BBBBHH", version, length, family, 17, src[1], dst[1])
    return head + source + destination + stamp + payload


def sip_request(
    method: str,
    uri: str,
    *,
    call_id: str,
    from_tag: str,
    to_tag: str | None = None,
    cseq: int,
    cseq_method: str | None = None,
    branch: str,
    via_host: str = "127.0.0.20:5070",
    vias: Sequence[tuple[str, str]] | None = None,
    from_uri: str = "sip:2000@sip.canyan.io",
    to_uri: str = "sip:2001@sip.canyan.io",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
) -> bytes:
    """One SIP request (RFC 3261 section 7.1).

    `vias`, (sent-by, branch) with the top one first, override `via_host` and `branch`. `headers`
    are further (name, value) pairs, placed before Content-Length.
    """
    return _sip(
        f"{method} {uri} SIP/2.0",
        vias if vias is not None else [(via_host, branch)],
        (from_uri, from_tag),
        (to_uri, to_tag),
        call_id,
        f"{cseq} {cseq_method or method}",
        [("Max-Forwards", "70"), *headers],
        body,
    )


def sip_reply(
    status: int,
    *,
    reason: str = "OK",
    call_id: str,
    from_tag: str,
    to_tag: str | None = None,
    cseq: int,
    cseq_method: str = "INVITE",
    branch: str,
    via_host: str = "127.0.0.20:5070",
    vias: Sequence[tuple[str, str]] | None = None,
    from_uri: str = "sip:2000@sip.canyan.io",
    to_uri: str = "sip:2001@sip.canyan.io",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
) -> bytes:
    """One SIP reply (RFC 3261 section 7.2); `cseq_method` is the method it answers."""
    return _sip(
        f"SIP/2.0 {status} {reason}",
        vias if vias is not None else [(via_host, branch)],
        (from_uri, from_tag),
        (to_uri, to_tag),
        call_id,
        f"{cseq} {cseq_method}",
        list(headers),
        body,
    )


def _sip(
    start: str,
    vias: Sequence[tuple[str, str]],
    sender: tuple[str, str],
    receiver: tuple[str, str | None],
    call_id: str,
    cseq: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
) -> bytes:
    lines = [start]
    lines += [f"Via: SIP/2.0/UDP {host};branch={branch}" for host, branch in vias]
    lines.append(f"From: <{sender[0]}>;tag={sender[1]}")
    lines.append(f"To: <{receiver[0]}>" + (f";tag={receiver[1]}" if receiver[1] else ""))
    lines += [f"Call-ID: {call_id}", f"CSeq: {cseq}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
