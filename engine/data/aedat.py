"""Readers of AEDAT 2.0 (CIFAR10-DVS) and AEDAT 3.1 (DVS128 Gesture), with the events of spikingjelly 0.0.0.0.14."""

import re
import struct
from typing import NamedTuple

import numpy as np

SIDE = 128  # pixels of the DVS128 sensor, in height and in width
_PACKET = struct.Struct("<HHIIIIII")  # header: type, source, size, offset, overflow, capacity, number, valid
_EVENTS = 1  # type of a packet


class DamagedRecording(ValueError):
    """Violation of a recording's format, named by the message."""


class Events(NamedTuple):
    """Events in the order of the recording, four arrays of one length."""

    t: np.ndarray  # time in microseconds
    x: np.ndarray  # column
    y: np.ndarray  # row
    p: np.ndarray  # polarity: 0 or 1


def read_aedat(content: bytes) -> Events:
    """Return the events of a recording in either format."""
    return read_aedat31(content) if content.startswith(b"#!AER-DAT3.1") else read_aedat2(content)


def read_aedat2(content: bytes) -> Events:
    """Return the events of a CIFAR10-DVS recording, upright as in spikingjelly."""
    if not content.startswith(b"#!AER-DAT2.0"):
        raise DamagedRecording("neither AEDAT 2.0 nor 3.1" if content else "empty")
    data = memoryview(content)[re.match(rb"(#[^\n]*\n)*", content).end() :]  # after comments
    if len(data) % 8:
        raise DamagedRecording(f"last event cut to {len(data) % 8} of 8 bytes")
    address, t = np.frombuffer(data, ">u4").astype(np.uint32).reshape(-1, 2).T
    if (address >> 15).any():
        raise DamagedRecording("not from a DVS128 sensor; convert it to .npz")
    return Events(t, x=127 - (address >> 8 & 127), y=127 - (address >> 1 & 127), p=1 - (address & 1))


def read_aedat31(content: bytes) -> Events:
    """Return the events of a DVS128 Gesture recording that the camera marked as valid."""
    header = re.match(rb"#!AER-DAT3\.1.*?#!END-HEADER\r\n", content, re.DOTALL)
    if not header:
        raise DamagedRecording("not AEDAT 3.1, or its header has no end")
    encoding = re.search(rb"#Format: *(\S*)", header[0])
    if encoding and encoding[1] != b"RAW":
        raise DamagedRecording(f"encoding {encoding[1].decode(errors='replace')}; save it as RAW")
    at, address, t = header.end(), [], []
    while at + _PACKET.size <= len(content):
        kind, _, size, _, overflow, capacity, number, _ = _PACKET.unpack_from(content, at)
        body = at + _PACKET.size
        at = body + capacity * size
        if kind == _EVENTS and at <= len(content):
            if (size, number) != (8, capacity):
                raise DamagedRecording(f"packet with {number} events of {size} bytes instead of {capacity} of 8 bytes")
            words = np.frombuffer(content, "<u4", 2 * capacity, body).reshape(-1, 2)
            address.append(words[:, 0])
            t.append(words[:, 1] | np.int64(overflow) << 31)
    if at != len(content):
        raise DamagedRecording("last packet cut")
    if not address:
        raise DamagedRecording("no events")
    address, t = np.concatenate(address), np.concatenate(t)
    is_valid = address & 1 == 1
    t, address = t[is_valid], address[is_valid]
    return Events(t, x=address >> 17 & 0x7FFF, y=address >> 2 & 0x7FFF, p=address >> 1 & 1)
