"""What is tried for real, each in a process of its own: ``python -m vllm_efa_ep.doctor.probes.NAME``.

A probe may load libraries that print, hang or crash; only its last line, a JSON object, is read. What does
not work is ``{"error": "why"}``.
"""
