"""``vllm-efa-ep bench``: dispatch and combine timed in any world, alone or against its alternatives."""
