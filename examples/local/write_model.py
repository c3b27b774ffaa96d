"""Write a small mixture-of-experts model with seeded random weights, without downloading anything.

Saved weights matter: with vLLM's ``--load-format dummy`` every rank fills its own shard, so that the answers
of different parallel layouts cannot be compared.

    python examples/local/write_model.py --out build/models qwen3_moe mixtral
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2}
MAX_POSITIONS = 2048
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

# Hidden and intermediate sizes are multiples of 32, as vLLM's CPU kernels require.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS["<s>"],
    "eos_token_id": SPECIAL_TOKENS["</s>"],
    # Larger than the usual 0.02: it spreads the routing over the experts and the answers over the vocabulary.
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 32,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    # A shared expert beside the routed ones.
    "qwen2_moe": {
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    # Shared experts, a first dense layer, routing limited to expert groups, latent attention.
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        # The sizes vLLM's latent attention knows.
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


def build_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: one token per byte, no merges."""
    vocabulary = dict(SPECIAL_TOKENS)
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    for index in range(len(vocabulary), VOCABULARY_SIZE):
        vocabulary[f"<extra_{index}>"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    """Write the tokenizer and its configuration."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_model(family: str, directory: Path, seed: int = 0) -> int:
    """Write tokenizer, configuration and bfloat16 weights to ``directory``.

    Returns:
        The number of parameters.

    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", choices=sorted(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, required=True, help="parent of the directories FAMILY")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for family in arguments.families:
        directory = arguments.out / family
        parameters = write_model(family, directory, arguments.seed)
        print(f"{directory}: {parameters / 1e6:.1f} M parameters, seed {arguments.seed}")


if __name__ == "__main__":
    main()
