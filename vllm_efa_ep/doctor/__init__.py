"""``vllm-efa-ep doctor``: what keeps this package from running well on a machine or a cluster, and the fix.

``check.py`` says what a check is, ``system.py`` is all that checks see of a machine, ``checks/`` has one
module per check, ``probes/`` what runs in a process of its own, and ``cluster/`` what takes several nodes.
"""
