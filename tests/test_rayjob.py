"""The manifest for KubeRay uses the fields that KubeRay documents, and starts a command that pmd has."""

import shlex
from pathlib import Path

from omegaconf import OmegaConf

from pmd.cli.sweep import make_sweep_parser

ROOT = Path(__file__).parents[1]
#: https://ray-project.github.io/kuberay/reference/api/ (ray.io/v1)
RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus", "entrypointNumGpus",
    "entrypointResources", "jobId", "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes",
    "submissionMode", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
RAY_CLUSTER = {"autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion", "workerGroupSpecs"}
GROUP = {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "serviceType", "template"}


def test_the_manifest_is_a_ray_job_of_the_documented_fields():
    manifest = OmegaConf.to_container(OmegaConf.load(ROOT / "docs" / "rayjob.yaml"))
    assert isinstance(manifest, dict)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert set(spec) <= RAY_JOB
    assert set(cluster) <= RAY_CLUSTER
    assert all(set(group) <= GROUP and "rayStartParams" in group for group in groups)
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert set(container) == {"name", "image", "resources", "volumeMounts"}
            assert all(isinstance(limit, str) for limit in container["resources"]["limits"].values())
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())

    shell = shlex.split(spec["entrypoint"])
    assert shell[:2] == ["bash", "-c"]
    command = shlex.split(shell[2].split("&&")[1])
    assert command[:4] == ["python", "-m", "pmd", "sweep"]
    options = make_sweep_parser().parse_args(command[4:])
    assert options.on == "ray"
    assert (ROOT / options.grid).is_file()
