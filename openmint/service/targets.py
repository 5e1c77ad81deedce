"""What a `model` name means: one base and at most one revision, resolved once per request.

| form                                    | means                                            |
|-----------------------------------------|--------------------------------------------------|
| the name of a base                      | the base itself                                  |
| tenant/policy                           | alias `prod` when it is set, else `latest`       |
| tenant/policy@alias                     | the revision that the alias names now, or its    |
|                                         | canary, for requests with a key                  |
| tenant/policy@sha256:…                  | that revision                                    |
| tinker://<run>/sampler_weights/<name>   | that checkpoint                                  |
| <session>:sample:<n>                    | what that sampling session is bound to           |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from openmint.catalog.address import SCHEME, PolicyAddress
from openmint.catalog.catalog import Catalog
from openmint.cluster.worker_client import WorkerClient
from openmint.errors import InvalidRequest, NotFound
from openmint.service.resolve import readable_checkpoint
from openmint.service.sampling import Sampling
from openmint.service.workers import Workers
from openmint.types import BaseInfo, Digest, Tenant

MAX_LISTED_POLICIES = 1000
SAMPLER_ID = re.compile(r"[A-Za-z0-9_-]{1,128}:sample:[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Target:
    """A resident base with, or without, one immutable revision."""

    client: WorkerClient
    base: BaseInfo
    revision: Digest | None
    policy: str | None = None
    """`tenant/name`, where a policy was named."""
    alias: str | None = None
    """The alias that was followed, if one was."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One name that a request may put into `model`."""

    model: str
    owner: str
    created: int
    """Unix seconds; 0 where nothing was made here, as for a base."""
    base: str
    revision: Digest | None


@dataclass(frozen=True, slots=True)
class Targets:
    """Resolves model names, in the catalogue as it is at that moment."""

    catalog: Catalog
    workers: Workers
    sampling: Sampling

    def resolve(self, tenant: Tenant, model: str, split_key: str | None = None) -> Target:
        """What `model` means to the tenant now; `split_key` says whose request it is, where an
        alias has a canary.

        Raises NotFound for what is not there, or another tenant's; InvalidRequest for a malformed
        address.
        """
        if self._is_base(model):
            return self._bound(self.workers.by_name(model).base, None)
        if model.startswith(SCHEME):
            base, revision = self.sampling.bind(tenant, None, model)
            saved = readable_checkpoint(self.catalog, tenant, model)
            return self._bound(base, revision, f"{saved.tenant}/{saved.policy_name}")
        if SAMPLER_ID.fullmatch(model):
            sampler = self.sampling.get(tenant, model)
            return self._bound(sampler.base, sampler.revision)
        return self._policy_target(tenant, model, split_key)

    def list_models(self, tenant: Tenant) -> tuple[list[ModelCard], bool]:
        """The bases, and the tenant's policies under each alias; whether there are more."""
        cards = [_base_card(client.base) for client in self.workers.first()]
        page = self.catalog.policies(tenant, limit=MAX_LISTED_POLICIES)
        for policy in page.items:
            created = int(policy.created_at.timestamp())
            for alias in self.catalog.aliases(tenant, policy.name):
                model = f"{tenant}/{policy.name}@{alias.name}"
                cards.append(ModelCard(model, tenant, created, policy.base_name, alias.digest))
        return cards, page.next_cursor is not None

    def get_model(self, tenant: Tenant, model: str) -> ModelCard:
        """What `model` means now. Raises like `resolve`."""
        target = self.resolve(tenant, model)
        if target.revision is None:
            return _base_card(target.base)
        owner, created = tenant, 0
        if target.policy and target.policy.startswith(f"{tenant}/"):
            policy = self.catalog.policy(tenant, target.policy.partition("/")[2])
            created = int(policy.created_at.timestamp())
        return ModelCard(model, owner, created, target.base.name, target.revision)

    def _policy_target(self, tenant: Tenant, model: str, split_key: str | None) -> Target:
        try:
            address = PolicyAddress.parse(model)
        except InvalidRequest as error:
            bases = ", ".join(sorted(client.base.name for client in self.workers.first()))
            raise NotFound(f"no such model: {error.message}, nor a base ({bases})") from None
        resolved = self.catalog.resolve(tenant, str(address), split_key)
        revision = resolved.revision
        client = self.workers.to_sample(revision.base_digest, revision.digest)
        policy = f"{revision.tenant}/{revision.policy_name}"
        return Target(client, client.base, revision.digest, policy, resolved.alias)

    def _bound(self, base: BaseInfo, revision: Digest | None, policy: str | None = None) -> Target:
        client = self.workers.to_sample(base.digest, revision)
        return Target(client, base, revision, policy)

    def _is_base(self, model: str) -> bool:
        """Whether a resident base answers to the name; a base's name may look like a policy's."""
        try:
            self.workers.by_name(model)
        except NotFound:
            return False
        return True


def _base_card(base: BaseInfo) -> ModelCard:
    return ModelCard(base.name, "openmint", 0, base.name, None)
