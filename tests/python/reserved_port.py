"""A port for a program that wants to be told one."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that the kernel gives to nobody else while the block lasts.

    Bound to it is a socket that does not listen: with SO_REUSEADDR on both, another may, and all servers of
    these tests set that (socket(7)).
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
