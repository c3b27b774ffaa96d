"""How ``EFA_EP_BACKEND``, ``--all2all-backend`` and failures decide, in a vLLM process of its own.

python check_selection.py SCENARIO
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config.parallel import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_efa_ep.errors import ConfigurationError, VllmSeamError
from vllm_efa_ep.vllm_plugin import register
from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

VLLM_DEFAULT = "allgather_reducescatter"


class Messages(logging.Handler):
    """Keeps the plugin's log messages."""

    def __init__(self) -> None:
        """Listen."""
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("vllm.efa_ep").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


messages = Messages()


def chosen(engine_args: EngineArgs) -> str:
    """Return the backend that an engine built from these arguments would use."""
    backend: str = engine_args.create_engine_config()
    return backend


def from_command_line(*flags: str) -> str:
    """Return the backend of an engine started with these flags."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return chosen(AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", ".", *flags])))


def nothing_set() -> None:
    """VLLM's own default; our names are choices."""
    register()
    assert from_command_line() == VLLM_DEFAULT
    assert from_command_line("--all2all-backend", HIGH_THROUGHPUT) == HIGH_THROUGHPUT
    assert chosen(EngineArgs(model=".")) == VLLM_DEFAULT
    assert not messages.texts


def environment_selects() -> None:
    """The variable is the default, in programs too, whether they build their arguments before or after."""
    os.environ["EFA_EP_BACKEND"] = "low_latency"
    before = EngineArgs(model=".")
    register()
    assert from_command_line() == LOW_LATENCY
    assert chosen(before) == LOW_LATENCY
    assert chosen(EngineArgs(model=".")) == LOW_LATENCY
    assert ParallelConfig().all2all_backend == LOW_LATENCY
    assert not messages.texts


def flag_wins_over_environment() -> None:
    """An explicit flag wins, and the log says so."""
    os.environ["EFA_EP_BACKEND"] = "low_latency"
    register()
    for name in (VLLM_DEFAULT, HIGH_THROUGHPUT):
        messages.texts.clear()
        assert from_command_line("--all2all-backend", name) == name
        assert any(name in text and LOW_LATENCY in text for text in messages.texts)


def malformed_backend() -> None:
    """A value that is no backend is an error of the engine, not of the import."""
    os.environ["EFA_EP_BACKEND"] = "lowlatency"
    register()
    with pytest.raises(ConfigurationError, match=r"EFA_EP_BACKEND.*low_latency"):
        from_command_line()


def other_setting_malformed() -> None:
    """Somebody else's vLLM does not mind; ours does."""
    os.environ["EFA_EP_TIMEOUT_S"] = "soon"
    register()
    assert from_command_line() == VLLM_DEFAULT
    with pytest.raises(ConfigurationError, match="EFA_EP_TIMEOUT_S"):
        from_command_line("--all2all-backend", LOW_LATENCY)


def environment_selects_with_other_malformed() -> None:
    """Whoever asked for us by variable does not silently get something else."""
    os.environ.update(EFA_EP_BACKEND="low_latency", EFA_EP_TIMEOUT_S="soon")
    register()
    with pytest.raises(ConfigurationError, match="EFA_EP_TIMEOUT_S"):
        from_command_line()


def missing_seam() -> None:
    """A vLLM that looks different works as before, until somebody selects us."""
    os.environ["EFA_EP_BACKEND"] = "high_throughput"
    del ParallelConfig.use_batched_dp_moe
    register()
    with pytest.raises(VllmSeamError, match=r"use_batched_dp_moe does not exist.*0\.32 and 0\.33"):
        chosen(EngineArgs(model="."))
    assert any("use_batched_dp_moe" in text for text in messages.texts)


def missing_seam_unselected() -> None:
    """Whoever did not ask for us hears nothing."""
    del ParallelConfig.use_batched_dp_moe
    register()
    assert from_command_line() == VLLM_DEFAULT
    assert not messages.texts


def create_engine_config(self: Any) -> str:
    """Stand in for vLLM's, which would load a model's configuration."""
    backend: str = self.all2all_backend
    return backend


SCENARIOS = (
    nothing_set,
    environment_selects,
    flag_wins_over_environment,
    malformed_backend,
    other_setting_malformed,
    environment_selects_with_other_malformed,
    missing_seam,
    missing_seam_unselected,
)


def run_in_fork(scenario: Callable[[], None]) -> bool:
    """Return whether the scenario went as expected."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            scenario()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def main() -> int:
    """Run all scenarios."""
    EngineArgs.create_engine_config = create_engine_config
    failed = 0
    for scenario in SCENARIOS:
        as_expected = run_in_fork(scenario)
        failed += not as_expected
        print(f"{scenario.__name__}: {'as expected' if as_expected else 'FAILED'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
