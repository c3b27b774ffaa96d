"""Examines every node of a Ray cluster, from any of them."""

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.ray_hosts import ray_cluster, ray_hosts, run_on_ray
from vllm_efa_ep.doctor.examination import Report, examine_cluster
from vllm_efa_ep.doctor.system import this_system

_MEETING_SECONDS = 120.0


def examine_ray(timeout_s: float, efa_required: bool) -> Report:
    """Examine each node of the cluster of RAY_ADDRESS, or of this host's, and each pair of them.

    Raises:
        ConfigurationError: There is no such cluster.
        EfaEpError: A node failed to examine itself; the message names it.

    """
    with ray_cluster():
        reports: list[Report] = run_on_ray(
            len(ray_hosts()),
            _examine_rank,
            (timeout_s, efa_required),
            start_timeout_s=_MEETING_SECONDS,
            compare_hosts=False,  # what differs is a finding, beside all others
        )
    return reports[0]


def _examine_rank(bootstrap: Bootstrap, timeout_s: float, efa_required: bool) -> Report:
    return examine_cluster(this_system(), bootstrap, timeout_s, efa_required, lambda _name: None)
