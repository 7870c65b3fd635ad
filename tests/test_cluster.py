"""The cluster files that Ray's launcher reads: cluster.yaml, and the one of machines of one's own in the README."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import ROOT

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_cluster_yaml_fits_rays_schema():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(cluster, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"min_workers": 1}, SCHEMA)
    validate_config(prepare_config(cluster))  # as ray up does
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["node_config"]["InstanceType"].startswith("m5")
    pinned = re.search(r"^ray(==.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert all(f"ray[default]{pinned}" in cluster[commands][-1] for commands in ("head_setup_commands", "worker_setup_commands"))
    for shipped in cluster["file_mounts"].values():
        assert shipped.startswith("~/") or (ROOT / shipped).exists()


def test_the_readmes_cluster_fits_rays_schema():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    clusters = [cluster for cluster in map(yaml.safe_load, blocks) if "cluster_name" in cluster]
    if not clusters:
        pytest.skip("the README has no cluster of one's own machines yet")
    for cluster in clusters:
        assert cluster["provider"]["type"] == "local"
        jsonschema.validate(cluster, SCHEMA)
        validate_config(prepare_config(cluster))
