"""The bugs that `make mutation-test` plants in the kernels still fit the sources."""

from tests.simt.mutations import KINDS, read_mutations


def test_every_mutation_applies_exactly_once() -> None:
    """A kernel that has changed takes its mutations along, so that the score stays one of its own bugs."""
    mutations = read_mutations()
    assert len(mutations) >= 40
    assert {mutation.kind for mutation in mutations} == KINDS
    for mutation in mutations:
        assert mutation.mutant() != mutation.file.read_text(), mutation.name
