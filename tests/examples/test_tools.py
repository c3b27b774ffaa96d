"""Linters and AWS's own schemas over the examples, and proof that each of them can say no."""

from pathlib import Path

import pytest
from example_files import EXAMPLES, ROOT, RunTool
from manifests import image_file

SCRIPTS = [
    EXAMPLES / "serve.sh",
    EXAMPLES / "local" / "two_hosts.sh",
    EXAMPLES / "parallelcluster" / "install.sh",
    EXAMPLES / "parallelcluster" / "serve.sbatch",
]
NETWORK = EXAMPLES / "parallelcluster" / "network.yaml"
CLUSTER = EXAMPLES / "parallelcluster" / "cluster.yaml"
# In the tools' environment: ParallelCluster's package needs nothing of ours.
PCLUSTER = """
import os, sys, yaml
os.environ["AWS_DEFAULT_REGION"] = "us-west-2"
from pcluster.schemas.cluster_schema import ClusterSchema
ClusterSchema(cluster_name="moe").load(yaml.safe_load(open(sys.argv[1])))
"""


def damaged(path: Path, old: str, new: str, directory: Path) -> Path:
    """Return a copy of a file with something else in it."""
    text = path.read_text()
    assert old in text
    copy = directory / path.name
    copy.write_text(text.replace(old, new, 1))
    return copy


def test_no_script_is_forgotten() -> None:
    """What starts with a shell's name is in the list above."""
    found = [
        path
        for path in EXAMPLES.rglob("*")
        if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
    ]
    assert sorted(found) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path, run_tool: RunTool, tmp_path: Path) -> None:
    """Scripts are safe to run with any file name and any failure."""
    result = run_tool("shellcheck", script)
    assert result.returncode == 0, result.stdout
    assert "set -euo pipefail" in script.read_text()
    unsafe = damaged(script, "set -euo pipefail", "rm $1", tmp_path)
    assert "SC2086" in run_tool("shellcheck", unsafe).stdout


def test_hadolint(run_tool: RunTool, tmp_path: Path) -> None:
    """The image is built as it should be."""
    result = run_tool("hadolint", image_file())
    assert result.returncode == 0, result.stdout
    assert "DL3002" in run_tool("hadolint", damaged(image_file(), "USER 1000", "USER root", tmp_path)).stdout


def test_the_image_copies_what_exists() -> None:
    """A renamed file would only show when the image is built."""
    lines = [
        line
        for line in image_file().read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    assert lines
    for line in lines:
        assert (ROOT / line.split()[1]).exists(), line


def test_cfn_lint(run_tool: RunTool, tmp_path: Path) -> None:
    """The network is a CloudFormation template that AWS would take."""
    result = run_tool("cfn-lint", NETWORK)
    assert result.returncode == 0, result.stdout
    wrong = damaged(NETWORK, "Strategy: cluster", "Strategy: closely", tmp_path)
    assert "closely" in run_tool("cfn-lint", wrong).stdout


def test_parallelcluster(run_tool: RunTool, tmp_path: Path) -> None:
    """The cluster is what pcluster's own schema takes."""
    result = run_tool("python", "-c", PCLUSTER, CLUSTER)
    assert result.returncode == 0, result.stderr
    wrong = damaged(CLUSTER, "Efa:", "EFA:", tmp_path)
    assert "Unknown field" in run_tool("python", "-c", PCLUSTER, wrong).stderr
