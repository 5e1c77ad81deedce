"""What a `model` name means: one base and at most one revision, resolved once per request.

| form                                    | means                                            |
|-----------------------------------------|--------------------------------------------------|
| the name of a base                      | the base itself                                  |
| tenant/policy                           | alias `prod` when it is set, else `latest`       |
| tenant/policy@alias                     | the revision that the alias names now            |
| tenant/policy@sha256:…                  | that revision                                    |
| tinker://<run>/sampler_weights/<name>   | that checkpoint                                  |
| <session>:sample:<n>                    | what that sampling session is bound to           |
"""

from __future__ import annotations

from dataclasses import dataclass

from openmint.cluster.worker_client import WorkerClient
from openmint.types import BaseInfo, Digest


@dataclass(frozen=True, slots=True)
class Target:
    """A resident base with, or without, one immutable revision."""

    client: WorkerClient
    base: BaseInfo
    revision: Digest | None
    policy: str | None = None
    alias: str | None = None


class Targets:
    pass
