"""A vLLM plugin for tests: one EP rank sends itself a signal in the middle of a round, on command.

``FAULT_RANK`` and ``FAULT_SIGNAL`` say who and what; it happens between the dispatch and the combine of the
first round after the file ``FAULT_FILE`` has appeared.
"""

import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Wrap ``AllToAll.combine_send``; the entry point of the group ``vllm.general_plugins``."""
    from vllm_efa_ep.all_to_all import AllToAll

    rank = int(os.environ["FAULT_RANK"])
    signal_number = int(os.environ["FAULT_SIGNAL"])
    command = Path(os.environ["FAULT_FILE"])
    original = AllToAll.combine_send

    def combine_send(self: AllToAll, *args: Any, **kwargs: Any) -> None:
        if self.rank == rank and command.exists():
            os.kill(os.getpid(), signal_number)
        original(self, *args, **kwargs)

    AllToAll.combine_send = combine_send  # type: ignore[method-assign]


def install(directory: Path) -> str:
    """Write the metadata by which vLLM finds this plugin; return the ``PYTHONPATH`` for the server."""
    metadata = directory / "fault_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fault-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nfault = fault_plugin:register\n")
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return os.pathsep.join([str(Path(__file__).parent), str(directory), *inherited])
