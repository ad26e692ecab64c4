"""The frames of a message, written and read in one step: what a busy connection does all day.

pika makes half a dozen objects for every message, each way; at full load that was a quarter of the
service's processor time. Only the two cases that matter are here, a mandatory publication through
the default exchange and a delivery that has arrived whole. Everything else is left to pika.

Pure: bytes in, bytes out. Layout: AMQP 0-9-1, sections 2.3.5 and 4.2.
"""

import struct
from functools import lru_cache

_METHOD, _HEADER, _BODY = 1, 2, 3
_BASIC = 60
_PUBLISH = 40
_MANDATORY = 1
_REDELIVERED = 1
_END = b"\xce"
_END_BYTE = 0xCE

_FRAME = struct.Struct(">BHI")  # type, channel, size of what follows; then comes the end byte
_PUBLISH_START = struct.Struct(">HHHB")  # class, method, reserved, length of the exchange's name
_CONTENT_HEADER = struct.Struct(">BHIHHQ")  # a frame's start, then class, weight, body size
_TAG = struct.Struct(">QB")  # delivery tag, redelivered

_DELIVER = b"\x00\x3c\x00\x3c"  # class 60, method 60
_FRAME_EXTRA = _FRAME.size + len(_END)
_CONTENT_FIXED = _CONTENT_HEADER.size - _FRAME.size

SHORT_STRING_MAX_BYTES = 255

# (delivery tag, redelivered, encoded properties, body, where the next frame begins)
Delivered = tuple[int, bool, bytes, bytes, int]


def message_frames(channel: int, queue: str, properties: bytes, body: bytes, max_body: int) -> list[bytes]:
    """Return the frames of a mandatory message for `queue`, to be sent through the default exchange.

    properties: encoded, flags included. max_body: bytes of body that fit into one frame.
    Raises ValueError if the queue's name is longer than AMQP can say.
    """
    frames = [
        _publish_frame(channel, queue),
        _CONTENT_HEADER.pack(_HEADER, channel, _CONTENT_FIXED + len(properties), _BASIC, 0, len(body)),
        properties,
        _END,
    ]
    for start in range(0, len(body), max_body):
        piece = body[start : start + max_body]
        frames += (_FRAME.pack(_BODY, channel, len(piece)), piece, _END)
    return frames


def whole_delivery(buffer: bytes, offset: int) -> Delivered | None:
    """Return the delivery whose frames begin at `offset`, if they are all there and it has one body frame.

    None: something else, not yet complete, in more pieces, or wrong. Never raises.
    """
    end = len(buffer)
    arguments = offset + _FRAME.size
    if buffer[offset] != _METHOD or buffer[arguments : arguments + 4] != _DELIVER or end - offset < 32:
        return None
    header = offset + int.from_bytes(buffer[offset + 3 : arguments], "big") + _FRAME_EXTRA
    tag_at = arguments + 5 + buffer[arguments + 4]  # behind the consumer's name
    properties_at = header + _CONTENT_HEADER.size
    if properties_at > end or tag_at + _TAG.size >= header:
        return None
    tag, bits = _TAG.unpack_from(buffer, tag_at)
    kind, _, size, _, _, body_size = _CONTENT_HEADER.unpack_from(buffer, header)
    after_header = header + size + _FRAME_EXTRA
    if kind != _HEADER or after_header > end or size < _CONTENT_FIXED:
        return None
    if buffer[header - 1] != _END_BYTE or buffer[after_header - 1] != _END_BYTE:
        return None
    properties = buffer[properties_at : after_header - 1]
    if body_size == 0:
        return tag, bool(bits & _REDELIVERED), properties, b"", after_header
    body_at = after_header + _FRAME.size
    after_body = body_at + body_size + 1
    if after_body > end:
        return None
    kind, _, size = _FRAME.unpack_from(buffer, after_header)
    if kind != _BODY or size != body_size or buffer[after_body - 1] != _END_BYTE:
        return None
    return tag, bool(bits & _REDELIVERED), properties, buffer[body_at : after_body - 1], after_body


@lru_cache(maxsize=1024)
def _publish_frame(channel: int, queue: str) -> bytes:
    name = queue.encode()
    if len(name) > SHORT_STRING_MAX_BYTES:
        raise ValueError(f"over {SHORT_STRING_MAX_BYTES} bytes: {queue[:40]}...")
    arguments = b"".join(
        (_PUBLISH_START.pack(_BASIC, _PUBLISH, 0, 0), bytes((len(name),)), name, bytes((_MANDATORY,)))
    )
    return _FRAME.pack(_METHOD, channel, len(arguments)) + arguments + _END
