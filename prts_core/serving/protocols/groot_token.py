"""Read the key of a request of GR00T's protocol, and nothing else of it."""

from __future__ import annotations

import msgpack


def token_of(data: bytes) -> bytes:
    """The `api_token` of a request, without building anything else of it; b"" where it has none that is a text. What
    stands before the token is stepped over, so that who has no key costs no decoding."""
    plain = {"max_array_len": 0, "max_map_len": 0, "max_ext_len": 0}  # of what is read; what is stepped over may be any
    reader = msgpack.Unpacker(max_buffer_size=len(data) or 1, **plain)
    reader.feed(data)
    try:
        for _ in range(reader.read_map_header()):
            if reader.unpack() == "api_token":
                token = reader.unpack()
                return token.encode() if isinstance(token, str) else b""
            reader.skip()
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        pass  # no readable request: nobody's
    return b""
