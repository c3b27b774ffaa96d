"""Greedy tokens of models run by vLLM in this one process, without any parallelism or plugin.

python reference_run.py OUT.json MODEL_DIRECTORY...
"""

import json
import os
import sys
from pathlib import Path

from vllm_server import COMPILATION, ENVIRONMENT, MAX_MODEL_LEN, NEW_TOKENS, PROMPTS

# One process for everything, and no plugin: nothing of what is under test takes part.
os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")


def complete_all(model: Path) -> list[list[int]]:
    """Return the continuation of each prompt as token ids."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 * 2**20,
        enforce_eager=True,
        compilation_config=COMPILATION,
        distributed_executor_backend="uni",
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [list(request.outputs[0].token_ids) for request in llm.generate(list(PROMPTS), sampling)]


def main() -> None:
    """Run the models of the command line one after the other."""
    out, *models = map(Path, sys.argv[1:])
    out.write_text(json.dumps({model.name: complete_all(model) for model in models}))
    # vLLM keeps threads that would delay an ordinary exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
