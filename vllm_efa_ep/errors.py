"""Every error this package raises; catch ``EfaEpError`` for all of them.

The classes of ``csrc/errors.h`` arrive in Python as the classes of the same name here.
"""


class EfaEpError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(EfaEpError, ValueError):
    """Something was asked for that cannot work; nothing was sent.

    The message names the value, the limit and the remedy.
    """


class MembershipError(EfaEpError, PermissionError):
    """A process that cannot show the run's token wanted to take part in it."""


class StoreLostError(EfaEpError, ConnectionError):
    """The store over which the ranks agree does not answer; without it there is no mask and no rejoin.

    The process that hosts it has ended or is stuck. All ranks have to be restarted.
    """


class FabricUnavailableError(EfaEpError, RuntimeError):
    """No usable libfabric, provider or network interface on this machine."""


class DeviceUnavailableError(EfaEpError, RuntimeError):
    """No usable GPU, or its driver lacks something; the message names it and the remedy."""


class CudaError(EfaEpError, RuntimeError):
    """The CUDA driver or runtime refused a call; the message has its reason."""


class TransportError(EfaEpError, ConnectionError):
    """The network reported a failed operation.

    Attributes:
        peer: Rank at the other end of the operation, or -1 if unknown.

    """

    def __init__(self, message: str, peer: int = -1) -> None:
        """Keep the peer beside the message."""
        super().__init__(message)
        self.peer = peer


class RankTimeoutError(EfaEpError, TimeoutError):
    """Other ranks did not answer before the deadline (``EFA_EP_TIMEOUT_S``).

    Attributes:
        half: What waited: ``dispatch_send``, ``dispatch_recv``, ``combine_send``, ``combine_recv``,
            ``drain``, ``close``, ``start`` (of a generation), ``rejoin``, ``pull_experts``, ``link`` or
            ``barrier`` (of measurements), or empty: ranks that meet before all of these.
        round: The round that could not finish.
        missing: Ranks that this rank was waiting for.

    """

    def __init__(self, message: str, half: str = "", round: int = 0, missing: tuple[int, ...] = ()) -> None:
        """Keep what was waited for beside the message."""
        super().__init__(message)
        self.half = half
        self.round = round
        self.missing = missing


class RankLostError(EfaEpError, ConnectionError):
    """A rank is gone while this one waits, so the round cannot finish: its process has ended or failed.

    Attributes:
        half: What waited: one of the four halves, ``drain``, ``close``, or empty: ranks that meet before.
        round: The round that could not finish.
        rank: The rank that is gone, or -1 if others noticed and have called ``mask`` already.

    """

    def __init__(self, message: str, half: str = "", round: int = 0, rank: int = -1) -> None:
        """Keep what was waited for beside the message."""
        super().__init__(message)
        self.half = half
        self.round = round
        self.rank = rank


class RankExcludedError(EfaEpError, ConnectionError):
    """The other ranks have agreed to go on without this one; ``AllToAll.rejoin`` is the way back.

    Attributes:
        generation: The first generation without this rank.

    """

    def __init__(self, message: str, generation: int = 0) -> None:
        """Keep the generation beside the message."""
        super().__init__(message)
        self.generation = generation


class ProtocolError(EfaEpError, RuntimeError):
    """A peer sent something the protocol does not allow: a foreign or stale writer, or a bug."""


class ExpertTransferError(EfaEpError, RuntimeError):
    """Weights of experts could not be fetched; what they were to be written over is undefined.

    Attributes:
        rank: The rank they were to come from, or -1 if there is none.
        experts: The experts that are missing.

    """

    def __init__(self, message: str, rank: int = -1, experts: tuple[int, ...] = ()) -> None:
        """Keep what is missing beside the message."""
        super().__init__(message)
        self.rank = rank
        self.experts = experts


class VllmSeamError(EfaEpError, RuntimeError):
    """This vLLM lacks a seam the backend needs; the message names the versions found and supported."""
