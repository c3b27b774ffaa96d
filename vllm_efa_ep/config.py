"""Every setting of the package, once: name, type, default, unit, meaning.

``docs/settings.md`` and ``vllm-efa-ep settings`` are generated from ``SETTINGS``, and ``Settings`` reads and
checks them all. Besides, vLLM's plugin asks for ``EFA_EP_BACKEND`` and sets ``EFA_EP_STATS_DIR``, and the
benchmark sets ``EFA_EP_TOKEN_FILE``, for processes that are still to start. Variables of other programs are
read where they matter; ``LIBRARY_VARIABLES`` are those that this package sets or goes by.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_efa_ep.errors import ConfigurationError

Kind = Literal["string", "integer", "number"]
_TYPES: dict[Kind, Any] = {"string": str, "integer": int, "number": int | float}
# TCP's keep-alive takes at most 32767 s, four of which are the longest time a host may be silent.
_MOST_SECONDS = 4 * 32767 + 3


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    Attributes:
        variable: Its name.
        field: The attribute of ``Settings`` it fills.
        kind: How its text is read.
        default: The value when it is unset or empty.
        unit: Unit of the value, empty for names.
        meaning: One or two sentences for the documentation.
        choices: The accepted texts, if they can be listed.
        minimum: Smallest accepted number.
        maximum: Largest accepted number.
        of_one_host: Whether it names something of one host, so that hosts may differ.

    """

    variable: str
    field: str
    kind: Kind
    default: str | int | float
    unit: str
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    of_one_host: bool = False

    def parse(self, text: str) -> str | int | float:
        """Return the value of ``text``, or raise ``ConfigurationError`` with the remedy."""
        value: str | int | float = text
        if self.kind != "string":
            try:
                value = int(text) if self.kind == "integer" else float(text)
            except ValueError:
                raise ConfigurationError(f"{self.variable}={text!r} is no {self.kind}") from None
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """Raise ``ConfigurationError``, with the remedy, for a value that is not accepted."""
        if not isinstance(value, _TYPES[self.kind]):
            raise ConfigurationError(f"{self.variable}={value!r} is no {self.kind}")
        if self.choices and value not in self.choices:
            raise ConfigurationError(
                f"{self.variable}={value!r} is not a choice; use one of {', '.join(self.choices)}"
            )
        if isinstance(value, str):
            return
        if self.minimum is not None and not value >= self.minimum:  # nor is NaN
            raise ConfigurationError(
                f"{self.variable}={value} is too small; use at least {self.minimum:.12g} {self.unit}".rstrip()
            )
        if self.maximum is not None and not value <= self.maximum:
            raise ConfigurationError(
                f"{self.variable}={value} is too large; use at most {self.maximum:.12g} {self.unit}".rstrip()
            )


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "EFA_EP_BACKEND",
        "backend",
        "string",
        "",
        "",
        "Selects the vLLM backend without `--all2all-backend`: `high_throughput` (Standard format) or "
        "`low_latency` (batched format, asynchronous). Unset: vLLM stays as it is unless the flag asks.",
        choices=("", "high_throughput", "low_latency"),
    ),
    Setting(
        "EFA_EP_TIMEOUT_S",
        "timeout_s",
        "number",
        120.0,
        "seconds",
        "How long a half waits for other ranks before it raises an error that names them.",
        minimum=0.1,
        maximum=_MOST_SECONDS,
    ),
    Setting(
        "EFA_EP_HOST_TIMEOUT_S",
        "host_timeout_s",
        "integer",
        20,
        "seconds",
        "After how long without a sign of life (TCP keep-alive) a rank's host counts as gone: longer than "
        "networks pause, shorter than `EFA_EP_TIMEOUT_S`.",
        minimum=4,
        maximum=_MOST_SECONDS,
    ),
    Setting(
        "EFA_EP_BOOTSTRAP",
        "bootstrap",
        "string",
        "auto",
        "",
        "How the ranks of vLLM find each other. `torch`: over vLLM's process group. `ray`: over an actor of "
        "Ray's. `auto`: `ray` if all ranks are Ray workers, else `torch`.",
        choices=("auto", "torch", "ray"),
    ),
    Setting(
        "EFA_EP_TOKEN_FILE",
        "token_file",
        "string",
        "",
        "path",
        "File with a random secret of at least 32 bytes, the same on all hosts. A process that is in torch's "
        "process group without it is no member of the run. Unset: everybody in the group is.",
        of_one_host=True,
    ),
    Setting(
        "EFA_EP_MASK_WINDOW_S",
        "mask_window_s",
        "number",
        10.0,
        "seconds",
        "How long `mask()` and `rejoin()` wait for ranks that are not known to be gone before the others go "
        "on without them. More than the longest time a healthy rank computes between two calls.",
        minimum=0.1,
        maximum=_MOST_SECONDS,
    ),
    Setting(
        "EFA_EP_RANKS_PER_NODE",
        "ranks_per_node",
        "integer",
        0,
        "ranks",
        "Ranks that share memory with each other. 0: the greatest common divisor of the hosts' rank counts. "
        "1 on one machine makes every rank its own node, so that all traffic crosses libfabric.",
        minimum=0,
        maximum=1024,
    ),
    Setting(
        "EFA_EP_PROVIDER",
        "provider",
        "string",
        "auto",
        "",
        "libfabric provider. `auto`: `efa-direct`, `efa`, then `tcp` (named `net` in libfabric before 1.18); "
        "falling back to TCP on a machine with EFA devices is an error unless `tcp` is asked for by name.",
    ),
    Setting(
        "EFA_EP_LIBFABRIC",
        "libfabric",
        "string",
        "",
        "path",
        "The libfabric.so.1 to open. Unset: AWS's /opt/amazon/efa, then the system's.",
        of_one_host=True,
    ),
    Setting(
        "EFA_EP_INTERFACE",
        "interface",
        "string",
        "",
        "",
        "Network interface of the tcp and net providers. Unset: `lo` if all ranks run on one host, else the "
        "provider's first choice.",
        of_one_host=True,
    ),
    Setting(
        "EFA_EP_NICS_PER_RANK",
        "nics_per_rank",
        "integer",
        0,
        "NICs",
        "NICs (libfabric domains) a rank drives. 0: the host's EFA devices divided by its ranks; 1 on TCP.",
        minimum=0,
        maximum=1024,
    ),
    Setting(
        "EFA_EP_SIGNAL_POLICY",
        "signal_policy",
        "string",
        "counted",
        "",
        "How a write's signal is ordered behind its bytes. `counted`: immediate data, which every fabric "
        "here carries, and no fence. For comparison: `coupled` (wait for each write, then signal), "
        "`decoupled` (one wait per destination group), `nic_ordered` (FI_FENCE; refused where the provider "
        "grants none, as on EFA).",
        choices=("counted", "coupled", "decoupled", "nic_ordered"),
    ),
    Setting(
        "EFA_EP_CHUNK_BYTES",
        "chunk_bytes",
        "integer",
        256 * 1024,
        "bytes",
        "Size of a write. The rows of a pair are cut into as many equal chunks as come nearest to it, the "
        "longest less than a row above one and a half of it. Doubled as often as the completion queues need "
        "to hold all that can arrive.",
        minimum=1,
        maximum=2**25,
    ),
    Setting(
        "EFA_EP_RING_COMMANDS",
        "ring_commands",
        "integer",
        4096,
        "commands",
        "Capacity of the ring between device and proxy, rounded up to a power of two.",
        minimum=16,
        maximum=2**20,
    ),
    Setting(
        "EFA_EP_NIXL_BACKEND",
        "nixl_backend",
        "string",
        "auto",
        "",
        "NIXL plug-in that moves expert weights. `auto`: `LIBFABRIC` on hosts with EFA devices, else `UCX` "
        "(shared memory, TCP, InfiniBand).",
        choices=("auto", "UCX", "LIBFABRIC"),
    ),
    Setting(
        "EFA_EP_GPU_SIGNALS",
        "gpu_signals",
        "string",
        "auto",
        "",
        "Where GPU kernels poll for arrivals. `gdrcopy`: in GPU memory, written through GDRCopy. `pinned`: "
        "in host memory, over PCIe. `auto`: `gdrcopy` where library and driver are there, which is logged.",
        choices=("auto", "gdrcopy", "pinned"),
    ),
    Setting(
        "EFA_EP_GPU_HANDLES",
        "gpu_handles",
        "string",
        "descriptor",
        "",
        "How the ranks of a node share GPU memory. `descriptor`: file descriptors, inside a host. `fabric`: "
        "handles that other hosts of the same NVLink domain (GB200 NVL72) can map, too; needs an IMEX "
        "channel, and EFA_EP_RANKS_PER_NODE: how many ranks of the domain make up a node.",
        choices=("descriptor", "fabric"),
    ),
    Setting(
        "EFA_EP_NUM_SMS",
        "num_sms",
        "integer",
        16,
        "SMs",
        "Most blocks of a GPU kernel of a half, at most one of which per SM works.",
        minimum=1,
        maximum=1024,
    ),
    Setting(
        "EFA_EP_STATS_DIR",
        "stats_dir",
        "string",
        "",
        "path",
        "Directory into which the vLLM plugin writes the counters of each rank, `rank<r>.json`, four times a "
        "second; /metrics shows them. Unset: a temporary one.",
        of_one_host=True,
    ),
    Setting(
        "EFA_EP_TRACE",
        "trace",
        "string",
        "",
        "path",
        "Directory, created at the start, into which each rank writes when its halves, waits, writes and "
        "arrivals were, at its end; `vllm-efa-ep trace merge` makes one timeline of them. Unset: no trace.",
    ),
    Setting(
        "EFA_EP_TRACE_SPANS",
        "trace_spans",
        "integer",
        65536,
        "spans",
        "How many of the newest spans a trace keeps per rank, of its network and of each channel.",
        minimum=1,
        maximum=2**24,
    ),
    Setting(
        "EFA_EP_NVTX",
        "nvtx",
        "string",
        "off",
        "",
        "`on`: the halves open NVTX ranges with their names, for Nsight Systems. Needs torch with CUDA.",
        choices=("off", "on"),
    ),
)


LIBRARY_VARIABLES: tuple[tuple[str, str], ...] = (
    (
        "IPATH_NO_BACKTRACE",
        "Set to `1` before libfabric is opened: some builds pull in libinfinipath, whose signal handlers "
        "break Python's and can deadlock the process.",
    ),
    (
        "UCX_MODULES",
        "Set to `^ib` before NIXL is loaded on a host without InfiniBand devices: the libnl in NIXL's UCX "
        "crashes when the process ends.",
    ),
    (
        "NIXL_LOG_LEVEL",
        "Unset: NIXL's Python logger, which prints to stdout, starts at WARNING.",
    ),
)
"""Variables of libraries that this package sets, or goes by: name and what for. One that is set stays."""


@dataclass(frozen=True)
class Settings:
    """The values of ``SETTINGS``; see there for each one's meaning, unit and bounds.

    Raises:
        ConfigurationError: A value is of another kind, outside its bounds, or not one of its choices.

    """

    backend: str = ""
    timeout_s: float = 120.0
    host_timeout_s: int = 20
    bootstrap: str = "auto"
    token_file: str = ""
    mask_window_s: float = 10.0
    ranks_per_node: int = 0
    provider: str = "auto"
    libfabric: str = ""
    interface: str = ""
    nics_per_rank: int = 0
    signal_policy: str = "counted"
    chunk_bytes: int = 256 * 1024
    ring_commands: int = 4096
    nixl_backend: str = "auto"
    gpu_signals: str = "auto"
    gpu_handles: str = "descriptor"
    num_sms: int = 16
    stats_dir: str = ""
    trace: str = ""
    trace_spans: int = 65536
    nvtx: str = "off"

    def __post_init__(self) -> None:
        """Check every value."""
        for setting in SETTINGS:
            setting.check(getattr(self, setting.field))

    @property
    def traced_spans(self) -> int:
        """Spans to keep, 0 without a trace."""
        return self.trace_spans if self.trace else 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Read ``environment`` (default: ``os.environ``).

        Raises:
            ConfigurationError: A value is malformed or outside its range, or a variable starts with
                ``EFA_EP_`` but is no setting (a misspelt name must not pass in silence).

        """
        environment = os.environ if environment is None else environment
        known = {setting.variable for setting in SETTINGS}
        unknown = sorted(name for name in environment if name.startswith("EFA_EP_") and name not in known)
        if unknown:
            raise ConfigurationError(
                f"unknown setting {unknown[0]}; the settings are {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = {
            setting.field: setting.parse(environment[setting.variable])
            for setting in SETTINGS
            if environment.get(setting.variable)
        }
        return cls(**values)


def settings_markdown() -> str:
    """Return the text of ``docs/settings.md``."""
    lines = [
        "# Settings",
        "",
        "Generated from `vllm_efa_ep/config.py` by `vllm-efa-ep settings --markdown`; do not edit.",
        "Each setting is an environment variable, read once when a process builds its `AllToAll`.",
        "",
        "| variable | type | default | unit | meaning |",
        "|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        default = f"`{setting.default}`" if setting.default != "" else "unset"
        lines.append(
            f"| `{setting.variable}` | {setting.kind} | {default} | {setting.unit} | {setting.meaning} |"
        )
    lines += [
        "",
        "## Variables of libraries",
        "",
        "Those that are set in the environment stay as they are.",
        "",
        "| variable | what happens |",
        "|---|---|",
        *(f"| `{variable}` | {meaning} |" for variable, meaning in LIBRARY_VARIABLES),
    ]
    return "\n".join(lines) + "\n"
