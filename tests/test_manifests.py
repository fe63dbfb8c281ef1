"""The manifests in k8s/ and the Dockerfile: valid to the last field, restricted, and with lines that our parsers take.

KubeRay and Kubernetes would say the same of them, but need a cluster; what they would do with them was not tried here.
"""

import copy
import functools
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distributed_inr.config import parse
from distributed_inr.experiment import Experiment
from distributed_inr.presets import PRESETS

ROOT = Path(__file__).parents[1]
SCHEMAS = json.loads((ROOT / "tests" / "fixtures" / "kuberay-1.7.0.json").read_text())
OVERLAYS = ("local", "gpu", "spot", "object-store")
SWEEP_FLAGS = ("--space", "--preset", "--num-samples", "--seeds", "--scheduler", "--search", "--max-concurrent")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
METADATA_SERVICE = ipaddress.ip_address("169.254.169.254")

Document = dict[str, Any]


@functools.cache
def documents(source: str) -> list[Document]:
    """Those of a rendered overlay, or of `base`, where jobs have no clusters yet."""
    files = sorted((ROOT / "k8s" / "base").glob("*.yaml")) if source == "base" else [rendered(source)]
    found = [one for file in files for one in yaml.safe_load_all(file.read_text())]
    return [one for one in found if one["kind"] != "Kustomization"]


def rendered(overlay: str) -> Path:
    return ROOT / "k8s" / "rendered" / f"{overlay}.yaml"


def of_kind(source: str, kind: str) -> list[Document]:
    return [one for one in documents(source) if one["kind"] == kind]


def called(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": SCHEMAS["kinds"][kind], "$defs": SCHEMAS["$defs"]})


def faults(document: Document) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in validator(document["kind"]).iter_errors(document)]


def clusters(source: str) -> Iterator[tuple[str, Document]]:
    """The long-lived cluster and those that jobs make, by name."""
    for one in documents(source):
        if one["kind"] == "RayCluster":
            yield called(one), one["spec"]
        elif one["kind"] == "RayJob" and source != "base":
            yield called(one), one["spec"]["rayClusterSpec"]


def pods(source: str) -> Iterator[tuple[str, Document]]:
    """What pods are made from, by name; a head's holds the autoscaler too, as KubeRay puts it there."""
    for name, spec in clusters(source):
        head = copy.deepcopy(spec["headGroupSpec"]["template"]["spec"])
        options = {key: spec["autoscalerOptions"].get(key) for key in ("resources", "securityContext", "volumeMounts")}
        head["containers"].append({"name": "autoscaler", **options})
        yield f"{name} head", head
        for group in spec["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]["spec"]
    for job in of_kind(source, "RayJob"):
        yield f"{called(job)} submitter", job["spec"]["submitterPodTemplate"]["spec"]


def refusals(pod: Document) -> list[str]:
    """Why the pod security standard `restricted` would refuse it; and roots that can be written, which it would not."""
    found = [f"{key}: {pod[key]}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    found += [f"volume {one['name']}" for one in pod["volumes"] if not set(one) - {"name"} <= kinds]
    outer = pod.get("securityContext", {})
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext") or {}
        context, capabilities = {**outer, **own}, own.get("capabilities", {})
        rules = {
            "runAsNonRoot": context.get("runAsNonRoot") is True and context.get("runAsUser") != 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "capabilities": "ALL" in capabilities.get("drop", []) and not capabilities.get("add"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        }
        found += [f"{container['name']}: {rule}" for rule, holds in rules.items() if not holds]
    return found


def quantity(text: str | int) -> float:
    """The number that a Kubernetes quantity means."""
    found = re.fullmatch(r"([0-9.]+)(m|[KMGTPE]i?|)", str(text))
    assert found, text
    number, unit = found.groups()
    powers = {"m": 1e-3, "": 1} | {f"{u}i": 1024**n for n, u in enumerate("KMGTPE", 1)}
    return float(number) * (powers | {u: 1000**n for n, u in enumerate("KMGTPE", 1)})[unit]


def experiment_of(job: Document) -> Experiment:
    """The experiment that a job's line means, read by our own parser; raises ValueError where the job would."""
    python, script, *flags = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script).is_file(), job["spec"]["entrypoint"]
    family = "ddmi" if "ddmi" in script else "chinr"
    if script.startswith("jobs/tune_"):
        sweep = dict(zip(flags[::2], flags[1::2], strict=True))
        flags = [sweep.get("--preset", "furniture-image")]
        flags += [word for pair in sweep.items() if pair[0] not in SWEEP_FLAGS for word in pair]
    return parse(flags, PRESETS[family], default="furniture-image", description="")


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_every_document_is_valid_and_unknown_fields_are_none(source: str) -> None:
    kinds = [one["kind"] for one in documents(source)]
    assert kinds.count("RayCluster") == 1 and kinds.count("RayJob") == 3, kinds
    for one in documents(source):
        assert not (found := faults(one)), (called(one), found)


@pytest.mark.parametrize(
    ("kind", "path", "change"),
    [
        ("RayCluster", "spec", {"workerGroupSpecs": "workerGroupSpec"}),
        ("RayCluster", "spec", {"authOptions": "authOption"}),
        ("RayCluster", "spec.authOptions", {"mode": None, "mod": "token"}),
        ("RayCluster", "spec.authOptions", {"mode": None, "secretName": 1}),
        ("RayCluster", "spec.autoscalerOptions", {"idleTimeoutSeconds": "idleTimeout"}),
        ("RayCluster", "spec.headGroupSpec", {"template": "templates"}),
        ("RayCluster", "spec.workerGroupSpecs.0", {"replicas": "replica"}),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0", {"securityContext": "securityContexts"}),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.volumes.0.emptyDir", {"sizeLimit": "sizelimit"}),
        ("RayJob", "spec", {"shutdownAfterJobFinishes": "shutdownAfterJobFinish"}),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0", {"maxReplicas": "maxReplica"}),
        ("RayJob", "spec.submitterPodTemplate.spec.containers.0.securityContext", {"capabilities": "capability"}),
        ("NetworkPolicy", "spec", {"podSelector": "podSelectors"}),
        ("ServiceAccount", "", {"automountServiceAccountToken": "automountToken"}),
        ("PersistentVolumeClaim", "spec", {"accessModes": "accessMode"}),
        ("ResourceQuota", "spec", {"hard": "hards"}),
        ("LimitRange", "spec.limits.0", {"defaultRequest": "defaultRequests"}),
        ("Namespace", "metadata", {"labels": "label"}),
    ],
)
def test_a_misspelt_field_is_refused(kind: str, path: str, change: dict[str, Any]) -> None:
    one = copy.deepcopy(of_kind("gpu", kind)[0])
    place = at(one, path)
    for old, new in change.items():
        value = place.pop(old, None)
        if isinstance(new, str) and value is not None:
            place[new] = value
        elif new is not None:
            place[old] = new
    assert faults(one), change


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.authOptions.mode", "tokens"),
        ("RayCluster", "spec.rayVersion", 2.6),
        ("RayCluster", "spec.enableInTreeAutoscaling", "true"),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas", "8"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "64GB"),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.env", {"A": "b"}),
        ("RayJob", "spec.submissionMode", "K8sJob"),
        ("RayJob", "spec.entrypoint", ["python", "jobs/train_ddmi.py"]),
        ("RayJob", "spec.backoffLimit", 1.5),
        ("NetworkPolicy", "spec.podSelector", None),
        ("NetworkPolicy", "spec.policyTypes", "Egress"),
        ("ResourceQuota", "spec.hard.pods", True),
    ],
)
def test_a_wrong_value_is_refused(kind: str, path: str, value: Any) -> None:
    one = copy.deepcopy(of_kind("gpu", kind)[0])
    *parents, name = path.split(".")
    at(one, ".".join(parents))[name] = value
    assert faults(one), (path, value)


def at(document: Document, path: str) -> Any:
    place: Any = document
    for name in path.split(".") if path else []:
        place = place[int(name) if name.isdigit() else name]
    return place


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_make_clusters_like_the_long_lived_one(overlay: str) -> None:
    (cluster,) = of_kind(overlay, "RayCluster")
    for name, spec in clusters(overlay):
        assert spec == cluster["spec"], f"{name}: the overlay copies the cluster before its patches"


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_clusters_run_the_pinned_ray_and_ask_for_a_token(source: str) -> None:
    for name, spec in clusters(source):
        assert spec["rayVersion"] == PINNED["ray"], (name, spec["rayVersion"], PINNED["ray"])
        assert spec["authOptions"] == {"mode": "token"}, (name, spec["authOptions"])
        assert spec["enableInTreeAutoscaling"] is True, name


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_every_pod_is_restricted(source: str) -> None:
    (namespace,) = of_kind(source, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods(source):
        assert not (found := refusals(pod)), (name, found)


@pytest.mark.parametrize(
    "rule", ["runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"]
)
def test_a_pod_that_is_not_restricted_is_found(rule: str) -> None:
    for name, pod in pods("gpu"):
        for number, container in enumerate(pod["containers"]):
            changed = copy.deepcopy(pod)
            changed["securityContext"].pop(rule, None)
            del changed["containers"][number]["securityContext"][rule]
            assert f"{container['name']}: {rule}" in refusals(changed), (name, container["name"])
        changed = pod | {"hostNetwork": True, "volumes": [*pod["volumes"], {"name": "host", "hostPath": {"path": "/"}}]}
        assert {"hostNetwork: True", "volume host"} <= set(refusals(changed)), name


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_mounts_name_volumes_and_what_is_written_to_is_mounted(source: str) -> None:
    home = re.findall(r"^ +HOME=(\S+)", DOCKERFILE, re.MULTILINE)[0]
    for name, pod in pods(source):
        volumes = {one["name"]: one for one in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= set(volumes), (name, container["name"], mounts)
            needed = {"autoscaler": {"/tmp"}, "submitter": {"/tmp", home}}
            always = {"/tmp", home, "/dev/shm", "/mnt/shared"}
            assert needed.get(container["name"], always) <= set(mounts), (name, container["name"], mounts)
            limit = quantity(container["resources"]["limits"]["memory"])
            held = [volumes[volume].get("emptyDir", {}) for volume in mounts.values()]
            memory = sum(quantity(one["sizeLimit"]) for one in held if one.get("medium") == "Memory")
            assert memory <= limit, f"{name} {container['name']}: {memory:.0f} bytes in memory, of {limit:.0f}"


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_only_the_autoscaler_holds_a_token_of_the_api_server(source: str) -> None:
    accounts = {one["metadata"]["name"]: one for one in of_kind(source, "ServiceAccount")}
    assert all(one["automountServiceAccountToken"] is False for one in accounts.values()), accounts
    for name, pod in pods(source):
        assert pod["serviceAccountName"] in accounts and pod["automountServiceAccountToken"] is False, name
        tokens = {one["name"] for one in pod["volumes"] if "projected" in one}
        for container in pod["containers"]:
            held = tokens & {mount["name"] for mount in container["volumeMounts"]}
            assert bool(held) == (container["name"] == "autoscaler"), (name, container["name"], held)


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_secrets_are_referred_to_and_never_written(source: str) -> None:
    assert not of_kind(source, "Secret")
    for name, pod in pods(source):
        for container in pod["containers"]:
            for variable in container.get("env", []):
                secret = re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", variable["name"])
                assert not (secret and "value" in variable), (name, variable["name"])
        if source == "object-store" and "submitter" not in name:
            assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "object-store"}}], name


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_what_no_policy_allows_is_denied(source: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(source, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert ("object-store" in policies) == (source == "object-store")
    for name, spec in policies.items():
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            peers = rule.get("from", rule.get("to"))
            assert peers and all(peers), f"{name}: a rule without peers is one for all: {rule}"
            assert name == "ray" or rule["ports"], f"{name}: all ports"
            for block in [peer["ipBlock"] for peer in peers if "ipBlock" in peer]:
                inside = [METADATA_SERVICE in ipaddress.ip_network(block["cidr"])]
                inside += [METADATA_SERVICE in ipaddress.ip_network(part) for part in block.get("except", [])]
                assert inside[0] == any(inside[1:]), f"{name}: {block} reaches the cloud's metadata service"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_quota_holds_a_job_at_its_largest(overlay: str) -> None:
    (quota,) = of_kind(overlay, "ResourceQuota")
    for job in of_kind(overlay, "RayJob"):
        needed: dict[str, float] = {"pods": 0}
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        for name, pod in pods(overlay):
            if name.startswith(f"{called(job)} "):
                count = group["maxReplicas"] if name.endswith(group["groupName"]) else 1
                needed["pods"] += count
                for container in pod["containers"]:
                    for side, amounts in container["resources"].items():
                        for what, amount in amounts.items():
                            needed[f"{side}.{what}"] = needed.get(f"{side}.{what}", 0) + count * quantity(amount)
        needed.pop("limits.nvidia.com/gpu", None)  # equal to the requests, and not what a quota names
        assert needed["pods"] == group["maxReplicas"] + 2, needed
        for what, amount in needed.items():
            hard = quota["spec"]["hard"][what]
            assert amount <= quantity(hard), f"{called(job)} needs {amount:.4g} of {what}, and the quota is {hard}"


@pytest.mark.parametrize("source", ["base", *OVERLAYS])
def test_jobs_run_lines_that_our_parsers_take(source: str) -> None:
    for job in of_kind(source, "RayJob"):
        experiment = experiment_of(job)
        assert job["metadata"]["labels"]["part"] == job["metadata"]["name"]
        assert experiment.output.startswith("/mnt/shared/"), experiment.output
        stored = source == "object-store"
        assert stored == str(experiment.checkpoints).startswith("s3://") == experiment.data.train.startswith("s3://")
        if source in ("spot", "object-store"):
            assert experiment.scale.max_failures >= 100 and job["spec"]["backoffLimit"] >= 10, called(job)
        if source != "base" and experiment.scale.num_workers is not None:
            (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            assert experiment.scale.num_workers <= group["maxReplicas"], (called(job), group["maxReplicas"])


def test_a_line_with_a_flag_that_we_do_not_know_is_refused() -> None:
    for job in of_kind("gpu", "RayJob"):
        changed = copy.deepcopy(job)
        changed["spec"]["entrypoint"] += " --scale.num-worker 8"
        with pytest.raises(ValueError, match="scale.num-worker"):
            experiment_of(changed)


def test_the_image_holds_what_is_pinned_and_runs_as_no_root() -> None:
    (base,) = re.findall(r"^ARG BASE=pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-runtime$", DOCKERFILE, re.MULTILINE)
    assert base == PINNED["torch"], (base, PINNED["torch"])
    assert "-c constraints.txt -e" in DOCKERFILE and "ray==" not in DOCKERFILE
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for copied in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists() and f"!{name}" in ignored, name
    for overlay in OVERLAYS:
        for name, pod in pods(overlay):
            context = pod["securityContext"]
            assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user, (name, context)
            images = {container.get("image") for container in pod["containers"]} - {None}
            assert len(images) == 1 and re.search(r"distributed-inr:[\w.-]+$", images.pop()), name


def test_the_guide_installs_the_operator_that_the_manifests_were_checked_against() -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text()
    assert re.findall(r"kuberay-operator --version (\S+)", guide) == [SCHEMAS["kuberay"]]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here to render with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rendered_files_are_those_of_the_overlays(overlay: str) -> None:
    place = ROOT / "k8s" / "overlays" / overlay
    made = subprocess.run(["kubectl", "kustomize", str(place)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    new = {called(one): one for one in yaml.safe_load_all(made.stdout)}
    old = {called(one): one for one in documents(overlay)}
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    assert not changed, f"{changed}: kubectl kustomize k8s/overlays/{overlay} > k8s/rendered/{overlay}.yaml"
