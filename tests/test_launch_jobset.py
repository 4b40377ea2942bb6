"""The JobSet that launch/jobset.sh prints: its form, and what its policies make of exit codes.

`kubectl` is not needed. Unknown fields are found by a list of those that the script may print.
"""

import random
import subprocess

import pytest
import yaml
from helpers.scripts import LAUNCH, write_program

JOB = {"NAME": "run", "IMAGE": "i", "CLAIM": "disk", "CONFIG": "paper:125m,ttt_e2e,pretrain"}
JOB |= {"WORKDIR": "/shared/my runs/a"}
TPU = {"TPU": "tpu-v5p-slice", "TOPOLOGY": "2x4x4", "NUM_SLICES": "2"}


@pytest.fixture
def jobset(shell):
    """The JobSet of arguments and variables."""

    def run(*arguments, **variables):
        result = shell(str(LAUNCH / "jobset.sh"), *arguments, **(JOB | variables))
        assert result.returncode == 0, result.stderr
        return yaml.safe_load(result.stdout)

    return run


def parts(jobset):
    """(the replicated job, the Job's spec, its pod's spec, its container)."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    return replicated, job, pod, pod["containers"][0]


def test_gpu_hosts_find_the_first_one(jobset, tmp_path):
    printed = jobset("--config.data.sources=it's", HOSTS="4")
    assert (printed["apiVersion"], printed["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    replicated, job, pod, container = parts(printed)
    assert job["completions"] == job["parallelism"] == 4
    name = f"{printed['metadata']['name']}-{replicated['name']}-0-0"
    address = f"{name}.{printed['spec']['network']['subdomain']}"
    assert container["args"] == [
        f"--coordinator={address}:8476",
        "--process-count=4",
        "--process-id=$(JOB_COMPLETION_INDEX)",
        "--config=paper:125m,ttt_e2e,pretrain",
        "--workdir=/shared/my runs/a",
        "--config.data.sources=it's",
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} == {"memory", "shared"}
    assert container["env"] == [
        {"name": "TTTJAX_COMPILATION_CACHE", "value": "/shared/my runs/compiled"}
    ]
    # The command waits for the name, and its exit code is that of the program.
    write_program(tmp_path / "tttjax", "printf '[%s]' \"$@\"; exit 76")
    write_program(tmp_path / "getent", '[[ -e "$0.$2" ]] || { touch "$0.$2"; exit 2; }')
    result = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 76
    assert result.stdout.startswith(f"[train][--coordinator={address}:8476]")
    assert (tmp_path / f"getent.{address}").exists()


def test_programs_are_not_cached_in_a_bucket(jobset):
    container = parts(jobset(WORKDIR="gs://bucket/run"))[3]
    assert "--workdir=gs://bucket/run" in container["args"]
    assert container["env"][0]["value"] == "/tmp/tttjax/compiled"


def test_tpu_slices_are_asked_for_by_topology(jobset):
    printed = jobset(**TPU)
    replicated, job, pod, container = parts(printed)
    assert (replicated["replicas"], job["completions"], job["parallelism"]) == (2, 8, 8)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"][0] == "--distributed"
    topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert printed["metadata"]["annotations"] == {topology: "cloud.google.com/gke-nodepool"}
    assert parts(jobset(TPU="tpu-v6e-slice", TOPOLOGY="2x4", CHIPS="8"))[1]["completions"] == 1


# By their parents, the fields of v1alpha2, and of Jobs and pods, that the script uses. Checked
# against the schemas of JobSet's CustomResourceDefinition by hand.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"network", "failurePolicy", "replicatedJobs"},
    "spec.network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules.0": {"name", "action", "onJobFailureReasons"},
    "spec.replicatedJobs.0": {"name", "replicas", "template"},
    "spec.replicatedJobs.0.template": {"spec"},
    "spec.replicatedJobs.0.template.spec": {
        *("completions", "parallelism", "completionMode", "backoffLimit"),
        *("podFailurePolicy", "template"),
    },
    "spec.replicatedJobs.0.template.spec.template": {"spec"},
    "spec.replicatedJobs.0.template.spec.template.spec": {
        *("restartPolicy", "terminationGracePeriodSeconds", "tolerations", "containers"),
        *("volumes", "nodeSelector"),
    },
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0": {
        *("name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"),
    },
}


@pytest.mark.parametrize("variables", [{}, TPU])
def test_the_jobset_has_only_known_fields(jobset, variables):
    printed = jobset(**variables)
    for path, names in FIELDS.items():
        value = printed
        for key in filter(None, path.split(".")):
            value = value[int(key) if key.isdigit() else key]
        assert set(value) <= names, path
        assert names - set(value) <= {"nodeSelector"}, path


class Cluster:
    """The pods of a JobSet under the policies of its manifest. state: running, failed, complete."""

    def __init__(self, manifest):
        self.policy = manifest["spec"]["failurePolicy"]
        _, self.job, self.pod, self.container = parts(manifest)
        assert self.pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
        assert self.job["backoffLimit"] == 0  # a failed pod fails its Job
        self.restarts, self.state = 0, "running"

    def end(self, code):
        """A pod ends with an exit code."""
        assert self.state == "running"
        reason = next(
            ("PodFailurePolicy" for rule in self.rules_of(code) if rule["action"] == "FailJob"),
            "BackoffLimitExceeded",
        )
        action = next(
            (
                rule["action"]
                for rule in self.policy["rules"]
                if reason in rule["onJobFailureReasons"]
            ),
            "RestartJobSet",
        )
        if action == "RestartJobSet" and self.restarts < self.policy["maxRestarts"]:
            self.restarts += 1
        else:
            self.state = "failed"

    def rules_of(self, code):
        for rule in self.job["podFailurePolicy"]["rules"]:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == self.container["name"]
            if (code in codes["values"]) == (codes["operator"] == "In"):
                yield rule


@pytest.mark.parametrize("seed", range(3))
def test_sixteen_hosts_outlive_twenty_incidents(jobset, seed):
    """Each ends many pods, of which the first decides: the others belong to the start before."""
    cluster, incidents = Cluster(jobset(HOSTS="16")), random.Random(seed)
    for _ in range(20):
        cluster.end(incidents.choice([75, 76, 137]))
    assert (cluster.state, cluster.restarts) == ("running", 20)
    cluster.end(2)
    assert (cluster.state, cluster.restarts) == ("failed", 20)


@pytest.mark.parametrize("code", [1, 2, 75, 76, 134, 137, 143])
def test_only_code_2_ends_the_jobset_before_max_restarts(jobset, code):
    cluster = Cluster(jobset(MAX_RESTARTS="3"))
    ends = 0
    while cluster.state == "running":
        cluster.end(code)
        ends += 1
    assert ends == (1 if code == 2 else 4)
