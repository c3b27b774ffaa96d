"""Reading what other processes say. It may come from another version, or from nobody of this run."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from vllm_efa_ep.errors import ConfigurationError

Meaning = TypeVar("Meaning")


def read_json(text: bytes | str, sender: str, interpret: Callable[[Any], Meaning]) -> Meaning:
    """Decode a JSON message and interpret it.

    Args:
        text: The message.
        sender: Who said it, for the error.
        interpret: Returns what it means; raises ``ValueError``, ``TypeError`` or ``LookupError`` if that is
            nothing, as unpacking and conversions do by themselves.

    Raises:
        ConfigurationError: It is not what this version says.

    """
    try:
        return interpret(json.loads(text))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigurationError(
            f"{sender} says something that is not understood here ({type(error).__name__}: {error}); run the "
            "same version of vllm-efa-ep on every rank"
        ) from error


def integer(value: object, bound: int) -> int:
    """Return ``value`` if it is an integer from 0 to ``bound - 1``; raises ``ValueError`` otherwise."""
    if type(value) is not int or not 0 <= value < bound:
        raise ValueError(f"{value!r:.40} is not an integer from 0 to {bound - 1}")
    return value


def number(text: str, sender: str, bound: int) -> int:
    """Return the integer from 0 to ``bound - 1`` that a message consists of.

    Raises:
        ConfigurationError: It is none.

    """
    return read_json(text, sender, lambda said: integer(said, bound))
