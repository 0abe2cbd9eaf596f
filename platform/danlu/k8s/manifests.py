"""`danlu render`: everything a spec is on a cluster, as objects and as YAML for a Git repository. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from danlu.k8s.pods import Object
from danlu.k8s.rayjob import job_objects
from danlu.k8s.rayservice import ray_service
from danlu.spec import yaml12
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob


def render(spec: TrainJob | Service) -> list[Object]:
    """The objects of a job or a service, in the order in which they are made."""
    return job_objects(spec) if isinstance(spec, TrainJob) else [ray_service(spec)]


def text(objects: Sequence[Object]) -> str:
    """YAML documents as people write them: no anchors, and texts of several lines as such."""
    return "---\n".join(yaml.dump(one, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=140) for one in objects)


class _Writer(yaml12.Writer):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(writer: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return writer.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Writer.add_representer(str, _string)
