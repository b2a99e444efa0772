"""Checks what is deployed, without a cluster and without a container engine: ``python deploy/check.py``.

Every kustomization under ``deploy/k8s`` is rendered by the real ``kubectl`` and each resource is validated strictly
against the schemas of the oldest and the newest Kubernetes we promise. Then come the promises no schema knows: no root,
no writable root file system, no capabilities, probes, a native sidecar, references that resolve. Dockerfiles and lock
files are held to the same: pinned, hashed, and naming only files that exist.

Reads the repository, writes nothing. Prints every finding, not only the first; exits 1 when there is one.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import yaml
from packaging.requirements import Requirement

TOP: Final = Path(__file__).resolve().parents[1]
K8S: Final = TOP / "deploy/k8s"
KUBECTL: Final = Path(sys.executable).with_name("kubectl")
KUBERNETES_OLDEST: Final = "1.29"  # the first that runs native sidecars without a feature gate
KUBERNETES_NEWEST: Final = kubernetes_validate.latest_version()
WORKLOADS: Final = frozenset({"Deployment", "StatefulSet", "DaemonSet", "Job"})
SIDECAR_LABEL: Final = "licet.dev/sidecar"
SIDECAR: Final = "licet-sidecar"
DRAIN_MARGIN_S: Final = 5
"""What a pod's grace period leaves beyond the sidecar's drain, for the service itself."""

Resource = dict[str, Any]


class Findings:
    """What is wrong, each with where it was seen."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def expect(self, holds: object, where: str, otherwise: str) -> None:
        """Note ``otherwise`` unless ``holds``. A repeat (the same resource in two overlays) is noted once."""
        line = f"{where}: {otherwise}"
        if not holds and line not in self.lines:
            self.lines.append(line)


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def kustomizations() -> Iterator[Path]:
    """Folders that ``kubectl apply -k`` takes. A Component only renders inside one of them."""
    for path in sorted(K8S.rglob("kustomization.yaml")):
        if yaml.safe_load(path.read_text())["kind"] == "Kustomization":
            yield path.parent


def render(folder: Path, findings: Findings) -> list[Resource]:
    """The resources of a kustomization; empty, with a finding, when it does not render."""
    run = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    where = str(folder.relative_to(TOP)) if folder.is_relative_to(TOP) else str(folder)
    findings.expect(run.returncode == 0, where, f"does not render: {run.stderr.strip()}")
    findings.expect("deprecated" not in run.stderr.lower(), where, f"renders with a warning: {run.stderr.strip()}")
    return [resource for resource in yaml.safe_load_all(run.stdout) if resource]


def name_of(resource: Resource) -> str:
    """``Kind/name``, as people say it."""
    return f"{resource['kind']}/{resource['metadata']['name']}"


def check_schema(resource: Resource, findings: Findings) -> None:
    """Validate strictly (an unknown field is an error) against both ends of the supported range."""
    for version in (KUBERNETES_OLDEST, KUBERNETES_NEWEST):
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            message = getattr(error, "message", str(error))
            findings.expect(False, name_of(resource), f"not valid on Kubernetes {version}: {message}")


def check_pod(resource: Resource, findings: Findings) -> None:
    """What holds for every pod we ship, the example's included."""
    pod = resource["spec"]["template"]["spec"]
    where = name_of(resource)
    ours = resource["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "licet"
    findings.expect(pod.get("automountServiceAccountToken") is False, where, "mounts a token that it has no use for")
    for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
        findings.expect(not pod.get(forbidden), where, f"uses {forbidden}")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in resource["spec"].get("volumeClaimTemplates", [])}
    for container in pod.get("initContainers", []) + pod["containers"]:
        check_container(container, pod, f"{where} {container['name']}", findings)
        for mount in container.get("volumeMounts", []):
            findings.expect(mount["name"] in volumes, where, f"mounts {mount['name']}, which no volume is called")
        if ours or container["name"] == SIDECAR:
            check_probes(container, f"{where} {container['name']}", findings)


def check_container(container: Resource, pod: Resource, where: str, findings: Findings) -> None:
    """Restricted, with bounded memory, from an image that says which one it is."""
    security = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    findings.expect(security.get("runAsNonRoot") is True, where, "may run as root: runAsNonRoot is not true")
    findings.expect(security.get("runAsUser", 0) > 0, where, "runs as user 0, or as whatever the image says")
    findings.expect(security.get("readOnlyRootFilesystem") is True, where, "can write its root file system")
    findings.expect(security.get("allowPrivilegeEscalation") is False, where, "may escalate privileges")
    findings.expect(not security.get("privileged"), where, "is privileged")
    findings.expect(security.get("capabilities") == {"drop": ["ALL"]}, where, "keeps capabilities")
    seccomp = security.get("seccompProfile", {}).get("type")
    findings.expect(seccomp == "RuntimeDefault", where, "has no seccomp profile")
    resources = container.get("resources", {})
    findings.expect({"cpu", "memory"} <= resources.get("requests", {}).keys(), where, "requests no CPU or memory")
    findings.expect("memory" in resources.get("limits", {}), where, "has no limit on memory")
    check_image(container["image"], where, findings)


def check_image(image: str, where: str, findings: Findings) -> None:
    """A tag other than ``latest``; and the version of this repository when it is our own image."""
    name, _, tag = image.partition(":")
    findings.expect(tag not in ("", "latest"), where, f"image {image} is not pinned: name a version")
    if name.startswith("licet/"):
        findings.expect(tag == project()["version"], where, f"image {image} is not version {project()['version']}")


def check_probes(container: Resource, where: str, findings: Findings) -> None:
    """All three, and on ports that the container has."""
    ports = {port.get("name") for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        findings.expect(probe in container, where, f"has no {probe}")
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        findings.expect(port is None or port in ports, where, f"{probe} asks port {port}, which it does not have")


def check_sidecar(resource: Resource, resources: list[Resource], findings: Findings) -> None:
    """A Deployment that asked for the sidecar has it, as a native one, with its state on a volume of the pod."""
    where = name_of(resource)
    template = resource["spec"]["template"]
    pod = template["spec"]
    found = [c for c in pod.get("initContainers", []) if c["name"] == SIDECAR]
    findings.expect(len(found) == 1, where, f"is labelled {SIDECAR_LABEL} but has no {SIDECAR}: add the component")
    if len(found) != 1:
        return
    sidecar = found[0]
    settings = settings_of(sidecar, resources)
    probes = {probe: sidecar.get(probe, {}).get("httpGet", {}).get("path") for probe in sidecar if "Probe" in probe}
    findings.expect(sidecar.get("restartPolicy") == "Always", where, "the sidecar is not native: restartPolicy Always")
    findings.expect(pod["initContainers"][0] is sidecar, where, "another init container starts before the sidecar")
    findings.expect(
        template["metadata"]["labels"].get(SIDECAR_LABEL) == "true", where, "Redis will not answer its pods"
    )
    # A startup probe on readiness would keep a pod from starting while Redis is down.
    expected = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    findings.expect(probes == expected, where, f"the sidecar's probes ask {probes}, not {expected}")
    findings.expect(settings.get("LICET_LISTEN", "").startswith(("127.0.0.1:", "unix:")), where, "decides off loopback")
    findings.expect(settings.get("LICET_HTTP_LISTEN") == "0.0.0.0:7421", where, "the kubelet cannot reach the probes")
    state = {v["name"]: v.get("emptyDir") for v in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in sidecar["volumeMounts"]}
    volume = state.get(mounts.get(settings.get("LICET_STATE_DIR", ""), ""))
    findings.expect(volume is not None, where, "LICET_STATE_DIR is not on an emptyDir: a restart would lose the log")
    size = bytes_of((volume or {}).get("sizeLimit", "0"))
    log = int(settings.get("LICET_LOG_BYTES_MAX", "0"))
    findings.expect(0 < 2 * log <= size, where, "LICET_LOG_BYTES_MAX is more than half of the state volume, or unset")
    drain = int(settings.get("LICET_DRAIN_GRACE", "0s").removesuffix("s"))
    grace = pod.get("terminationGracePeriodSeconds", 30)
    findings.expect(grace >= drain + DRAIN_MARGIN_S, where, f"{grace} s of grace do not cover a drain of {drain} s")


def settings_of(container: Resource, resources: list[Resource]) -> dict[str, str]:
    """The container's environment, as far as ConfigMaps and literals give it."""
    config_maps = {r["metadata"]["name"]: r.get("data", {}) for r in resources if r["kind"] == "ConfigMap"}
    settings: dict[str, str] = {}
    for source in container.get("envFrom", []):
        settings |= config_maps.get(source.get("configMapRef", {}).get("name"), {})
    return settings | {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity in bytes, for the suffixes that the manifests use."""
    number, suffix = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", quantity).groups()  # type: ignore[union-attr]  # else the check must fail
    return int(number) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[suffix]


def check_references(resources: list[Resource], secrets: set[str], findings: Findings) -> None:
    """Every ConfigMap and Secret that is named exists, and every selector selects a pod, on a port that it has."""
    config_maps = {r["metadata"]["name"] for r in resources if r["kind"] == "ConfigMap"}
    templates = [r["spec"]["template"] for r in resources if r["kind"] in WORKLOADS]
    for resource in resources:
        where = name_of(resource)
        for kind, name in references(resource):
            known = config_maps if kind == "ConfigMap" else secrets
            findings.expect(name in known, where, f"needs {kind} {name}, which nothing here makes or documents")
        selector = {
            "Service": lambda spec: spec.get("selector", {}),
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"].get("matchLabels", {}),
        }.get(resource["kind"])
        if selector is None:
            continue
        wanted = selector(resource["spec"]).items()
        chosen = [t for t in templates if wanted <= t["metadata"]["labels"].items()]
        findings.expect(chosen, where, f"selects no pod: {dict(wanted)}")
        ports = {p["name"] for t in chosen for c in all_containers(t) for p in c.get("ports", [])}
        for port in resource["spec"].get("ports", []) if resource["kind"] == "Service" else []:
            findings.expect(port["targetPort"] in ports, where, f"no pod it selects has a port {port['targetPort']}")


def all_containers(template: Resource) -> list[Resource]:
    """A pod's containers, init containers included."""
    pod = template["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def references(node: Any) -> Iterator[tuple[str, str]]:
    """Each (kind, name) of a ConfigMap or Secret that a resource mentions, at any depth."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("configMapRef", "configMapKeyRef", "configMap") and isinstance(value, dict):
            yield "ConfigMap", value["name"]
        elif key in ("secretRef", "secretKeyRef", "secret") and isinstance(value, dict):
            yield "Secret", value.get("secretName") or value["name"]
        else:
            yield from references(value)


def check_secrets(findings: Findings) -> set[str]:
    """The example Secrets: valid, without a real secret in them, with users that the access rules know."""
    examples = [s for path in sorted(K8S.rglob("secret.example.yaml")) for s in yaml.safe_load_all(path.read_text())]
    rules = "".join(s["stringData"].get("users.acl", "") for s in examples)
    users = set(re.findall(r"^user (\S+) on ", rules, re.MULTILINE))
    for secret in examples:
        check_schema(secret, findings)
        if url := secret["stringData"].get("LICET_REDIS_URL"):
            user, password = re.fullmatch(r"rediss?://([^:]+):([^@]+)@.*", url).groups()  # type: ignore[union-attr]  # else the check must fail
            findings.expect(user in users, name_of(secret), f"user {user} is not in users.acl")
            findings.expect(password.endswith("_PASSWORD"), name_of(secret), "holds what looks like a real password")
    return {secret["metadata"]["name"] for secret in examples}


def check_kubernetes(findings: Findings) -> int:
    """Everything under ``deploy/k8s``. Returns how many resources were looked at."""
    secrets = check_secrets(findings)
    seen = 0
    for folder in kustomizations():
        resources = render(folder, findings)
        whole = [r["metadata"]["name"] for r in resources if r["kind"] == "Namespace"]
        for resource in resources:
            seen += 1
            check_schema(resource, findings)
            findings.expect(resource["kind"] != "Secret", name_of(resource), "a Secret does not belong in git")
            if resource["kind"] in WORKLOADS:
                check_pod(resource, findings)
                if resource["metadata"].get("labels", {}).get(SIDECAR_LABEL) == "true":
                    check_sidecar(resource, resources, findings)
        if whole:  # a part of a base refers to what other parts make
            check_references(resources, secrets, findings)
    return seen


# --- Images -----------------------------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    return table


def instructions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """A Dockerfile's instructions in order: its word, and its arguments split as a shell would."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        yield word.upper(), shlex.split(rest)


def check_dockerfile(path: Path, findings: Findings) -> None:
    """Pinned base, hashed dependencies, existing sources, and a last stage that runs as nobody in particular."""
    where = str(path.relative_to(TOP))
    ignored = (TOP / ".dockerignore").read_text().split()
    arguments: dict[str, str] = {}
    user, entrypoint = "", [""]
    for word, rest in instructions(path):
        if word == "ARG":
            name, _, arguments[name] = rest[0].partition("=")
        elif word == "FROM":
            user = ""
            check_image(re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], rest[0]), where, findings)
        elif word == "COPY" and not rest[0].startswith("--from"):
            for source in rest[:-1]:
                findings.expect((TOP / source).exists(), where, f"copies {source}, which does not exist")
                allowed = any(source == p[1:] or source.startswith(f"{p[1:]}/") for p in ignored if p.startswith("!"))
                findings.expect(allowed, where, f"copies {source}, which .dockerignore keeps out")
        elif word == "RUN":
            for command in split_at(rest, "&&"):
                pinned = {"--require-hashes", "--no-deps"} & set(command)
                findings.expect(pinned or "pip" not in command, where, f"installs unpinned: {' '.join(command)}")
        elif word == "USER":
            user = rest[0]
        elif word == "ENTRYPOINT":
            entrypoint = [str(part) for part in yaml.safe_load(" ".join(rest))] if rest else [""]
    findings.expect(user == "65532:65532", where, f"runs as {user or 'root'}; Kubernetes can only check a numeric user")
    findings.expect(entrypoint[0] in project()["scripts"], where, f"{entrypoint[0]} is not a command of pyproject.toml")


def split_at(words: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Runs of words between separators."""
    for is_separator, run in itertools.groupby(words, separator.__eq__):
        if not is_separator:
            yield list(run)


def check_locks(findings: Findings) -> None:
    """A lock file pins, with hashes, what its extra asks for; and names no host, so that any mirror will do."""
    extras = project()["optional-dependencies"]
    for name, wanted in {"sidecar": extras["sidecar"], "server": extras["server"], "dev": extras["dev"]}.items():
        text = (TOP / f"requirements/{name}.lock").read_text()
        where = f"requirements/{name}.lock"
        pins = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))
        findings.expect("://" not in text, where, "names a host")
        unhashed = re.findall(r"^\S+==\S+.*\n(?!    --hash)", text, re.MULTILINE)
        findings.expect(not unhashed, where, f"has pins without hashes: {unhashed}")
        for requirement in map(Requirement, [*project()["dependencies"], *wanted]):
            if requirement.name == "licet":
                continue
            fits = requirement.specifier.contains(pins.get(requirement.name, "0"), prereleases=True)
            findings.expect(fits, where, f"does not satisfy {requirement}: run make lock")


def main() -> int:
    """Run every check. Returns the exit code."""
    findings = Findings()
    seen = check_kubernetes(findings)
    findings.expect(seen > 0, "deploy/k8s", "renders nothing at all")
    dockerfiles = [TOP / "sidecar/Dockerfile", TOP / "control_plane/Dockerfile"]
    for path in dockerfiles:
        check_dockerfile(path, findings)
    check_locks(findings)
    for line in findings.lines:
        print(line, file=sys.stderr)
    return 1 if findings.lines else 0


if __name__ == "__main__":
    sys.exit(main())
