"""The end of a host shows on no connection by itself: TCP has to ask for signs of life."""

import socket

# Into this many parts TCP's keep-alive divides the time that a host may be silent: one before it asks for a
# sign of life, then one per question.
_PARTS = 4


def expect_signs_of_life(connection: socket.socket, host_timeout_s: int) -> None:
    """Let a connection end when the other host has been silent for ``host_timeout_s`` seconds, at least 4."""
    part = host_timeout_s // _PARTS
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, part)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, part)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PARTS - 1)
    # News on its way to a silent host is repeated for many minutes otherwise, and keep-alive waits for that.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, host_timeout_s * 1000)
