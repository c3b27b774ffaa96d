"""Every failure that the doctor knows, put into a machine without any, is found and named."""

from pathlib import Path

import pytest
from doctor_troubles import TROUBLES, Trouble, no_driver, uses
from recorded_machines import TYPES, Machine, good_machine, machine_without_efa

from vllm_efa_ep.doctor.check import Outcome, Status
from vllm_efa_ep.doctor.checks import CHECKS
from vllm_efa_ep.doctor.examination import Report, examine
from vllm_efa_ep.doctor.next_steps import next_steps

EFA_CHECKS = {"efa-devices", "provider"}


def found_on(machine: Machine, efa_required: bool = False) -> dict[str, Outcome]:
    """Examine a machine."""
    return {outcome.name: outcome for outcome in examine(machine.system, CHECKS, efa_required)}


@pytest.mark.parametrize("instance", TYPES)
def test_nothing_is_wrong_with_a_good_machine(instance: str, tmp_path: Path) -> None:
    """No false alarm; and what the tests below find is what they put there."""
    outcomes = found_on(good_machine(instance, tmp_path))
    assert {name: each.result for name, each in outcomes.items() if each.status is not Status.OK} == {}


def test_without_efa_it_says_what_would_be_used_and_what_to_do(tmp_path: Path) -> None:
    """A developer's machine: CPU device, TCP, no failure; but a failure where EFA is demanded."""
    outcomes = found_on(machine_without_efa(tmp_path))
    assert {name for name, each in outcomes.items() if each.status is Status.WARNING} == EFA_CHECKS
    assert not [name for name, each in outcomes.items() if each.status is Status.FAILED]
    assert "TCP" in outcomes["efa-devices"].result
    assert "provider net" in outcomes["provider"].result
    assert "the CPU device" in outcomes["device"].result
    steps = next_steps(Report(["here"], [list(outcomes.values())]))
    assert "make demo" in steps[0]
    assert "examples/eks" in steps[1]

    assert failing_where_efa_is_demanded(machine_without_efa(tmp_path / "again")) == EFA_CHECKS


def failing_where_efa_is_demanded(machine: Machine) -> set[str]:
    """Return the checks that fail with ``--require-efa``."""
    outcomes = found_on(machine, efa_required=True)
    return {name for name, each in outcomes.items() if each.status is Status.FAILED}


@pytest.mark.parametrize("provider", ["tcp", "net"])
def test_tcp_that_was_asked_for_is_nothing_to_warn_about(provider: str, tmp_path: Path) -> None:
    """The fix of both checks, but for where EFA is demanded, or is there."""
    machine = machine_without_efa(tmp_path / "without")
    machine.environment["EFA_EP_PROVIDER"] = provider
    outcomes = found_on(machine)
    for name in EFA_CHECKS:
        assert outcomes[name].status is Status.OK
        assert f"as EFA_EP_PROVIDER={provider} asks" in outcomes[name].result
    assert failing_where_efa_is_demanded(machine) == EFA_CHECKS

    machine = good_machine("p5en", tmp_path / "with")
    machine.environment["EFA_EP_PROVIDER"] = provider
    uses(machine, provider=provider, fabric="10.0.0.0/16", nics=["ens5"])
    assert found_on(machine)["provider"].status is Status.FAILED


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.what)
def test_trouble_is_found_and_named(trouble: Trouble, tmp_path: Path) -> None:
    """The right check finds it, says what it is and how to mend it; no other check is led astray."""
    machine = good_machine("p5en", tmp_path)
    trouble.cause(machine)
    outcomes = found_on(machine)
    finding = outcomes[trouble.check]
    assert (finding.status, trouble.says in finding.result) == (trouble.status, True), finding
    assert finding.fix
    troubled = {name for name, each in outcomes.items() if each.status in (Status.WARNING, Status.FAILED)}
    assert troubled == {trouble.check} | trouble.also


def test_every_check_is_seen_failing() -> None:
    """A new check without a trouble above would be untested."""
    assert {trouble.check for trouble in TROUBLES} == {check.name for check in CHECKS}


def test_a_limit_above_the_memory_is_none(tmp_path: Path) -> None:
    """The pods of examples/eks have such a one, and no capability."""
    machine = good_machine("p5en", tmp_path)
    machine.edit("/proc/self/limits", lambda text: text.replace("unlimited", str(1 << 50)))
    assert found_on(machine)["memlock"].status is Status.OK


def test_a_relative_secret_is_where_the_command_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is for the ranks, and not below the root directory."""
    machine = good_machine("p5en", tmp_path / "machine")
    machine.environment["EFA_EP_TOKEN_FILE"] = "secret.txt"
    monkeypatch.chdir(tmp_path)
    assert "secret.txt: No such file" in found_on(machine)["settings"].result
    (tmp_path / "secret.txt").write_text("s" * 64)
    assert found_on(machine)["settings"].status is Status.OK


def test_pinning_is_allowed_by_the_capability_alone(tmp_path: Path) -> None:
    """Root in a container with IPC_LOCK needs no limit lifted."""
    machine = good_machine("p5en", tmp_path)
    machine.edit("/proc/self/limits", lambda text: text.replace("unlimited", "8388608  "))
    machine.edit("/proc/self/status", lambda text: text.replace("00000000a80425fb", "0000000000004000"))
    assert found_on(machine)["memlock"].status is Status.OK


def test_the_switch_makes_forks_safe_on_an_old_kernel(tmp_path: Path) -> None:
    """There FI_EFA_FORK_SAFE is right, not wrong."""
    machine = good_machine("p5en", tmp_path)
    machine.write("/proc/sys/kernel/osrelease", "5.14.0-570.el9.x86_64")
    machine.environment["FI_EFA_FORK_SAFE"] = "1"
    assert found_on(machine)["fork-safety"].status is Status.OK


def test_failures_come_first_in_what_to_do(tmp_path: Path) -> None:
    """Somebody with two failures is told where to begin."""
    machine = good_machine("p5en", tmp_path)
    no_driver(machine)
    steps = next_steps(Report(["here"], [list(found_on(machine).values())]))
    assert steps[0].startswith("Mend efa-driver")
    assert "provider" in steps[0]
