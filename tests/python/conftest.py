"""Set-up of all Python tests: reproducible random tests, and one thread per rank for torch's own work."""

import hypothesis
import torch

hypothesis.settings.register_profile(
    "vllm-efa-ep",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("vllm-efa-ep")
torch.set_num_threads(1)
