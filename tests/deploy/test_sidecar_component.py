"""The kustomize component, laid over Deployments as other people write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

TOP: Final = Path(__file__).resolve().parents[2]
COMPONENT: Final = TOP / "deploy/k8s/components/sidecar"
KUBECTL: Final = Path(sys.executable).with_name("kubectl")


def deployment(name: str, *, labels: dict[str, str]) -> dict[str, Any]:
    """A service with an init container, a volume and a pod label of its own."""
    pod = {
        "terminationGracePeriodSeconds": 300,
        "initContainers": [{"name": "migrate", "image": "shop/migrate:1"}],
        "containers": [{"name": "shop", "image": "shop/shop:1", "volumeMounts": [{"name": "own", "mountPath": "/x"}]}],
        "volumes": [{"name": "own", "emptyDir": {}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
        },
    }


def render(folder: Path, *deployments: dict[str, Any], **fields: Any) -> dict[str, dict[str, Any]]:
    """What ``kubectl kustomize`` makes of the Deployments and the component, by name."""
    folder.mkdir(exist_ok=True)
    (folder / "deployments.yaml").write_text(yaml.safe_dump_all(deployments))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["deployments.yaml"],
        "components": [os.path.relpath(COMPONENT, folder.resolve())],
        **fields,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    run = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {resource["metadata"]["name"]: resource for resource in yaml.safe_load_all(run.stdout)}


def test_labelled_deployment_gets_the_sidecar_before_its_own_init_containers(tmp_path: Path) -> None:
    rendered = render(tmp_path / "app", deployment("shop", labels={"licet.dev/sidecar": "true"}))
    template = rendered["shop"]["spec"]["template"]
    assert [c["name"] for c in template["spec"]["initContainers"]] == ["licet-sidecar", "migrate"]
    assert template["spec"]["initContainers"][0]["restartPolicy"] == "Always"


def test_nothing_that_the_deployment_had_is_lost(tmp_path: Path) -> None:
    rendered = render(tmp_path / "app", deployment("shop", labels={"licet.dev/sidecar": "true"}))
    spec = rendered["shop"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"] == {"matchLabels": {"app": "shop"}}
    assert spec["template"]["metadata"]["labels"] == {"app": "shop", "licet.dev/sidecar": "true"}
    assert {volume["name"] for volume in pod["volumes"]} == {"own", "licet-state", "licet-public-key"}
    assert pod["containers"][0]["volumeMounts"] == [{"name": "own", "mountPath": "/x"}]
    assert pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("labels", [{}, {"licet.dev/sidecar": "false"}], ids=str)
def test_other_deployments_are_left_alone(tmp_path: Path, labels: dict[str, str]) -> None:
    labelled = deployment("shop", labels={"licet.dev/sidecar": "true"})
    other = deployment("other", labels=labels)
    rendered = render(tmp_path / "app", labelled, other)
    assert rendered["other"]["spec"] == other["spec"]


def test_a_setting_can_be_overridden_and_rolls_the_pods(tmp_path: Path) -> None:
    labelled = deployment("shop", labels={"licet.dev/sidecar": "true"})
    setting = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: licet-sidecar}\ndata: {LICET_LOG_LEVEL: debug}"
    names = []
    for folder, patches in (("plain", []), ("debug", [{"patch": setting}])):
        rendered = render(tmp_path / folder, labelled, patches=patches)
        sidecar = rendered["shop"]["spec"]["template"]["spec"]["initContainers"][0]
        names.append(sidecar["envFrom"][0]["configMapRef"]["name"])
    assert rendered[names[1]]["data"]["LICET_LOG_LEVEL"] == "debug"
    assert rendered[names[1]]["data"]["LICET_STALENESS_MAX"] == "300s"
    assert names[0] != names[1]


def test_the_image_can_come_from_another_registry(tmp_path: Path) -> None:
    labelled = deployment("shop", labels={"licet.dev/sidecar": "true"})
    images = [{"name": "licet/sidecar", "newName": "registry.example/licet/sidecar", "newTag": "9.9.9"}]
    rendered = render(tmp_path / "app", labelled, images=images)
    sidecar = rendered["shop"]["spec"]["template"]["spec"]["initContainers"][0]
    assert sidecar["image"] == "registry.example/licet/sidecar:9.9.9"
