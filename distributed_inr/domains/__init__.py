"""Domains: what the functions are about. `AnyDomain` is the registry: a new domain is one more member."""

from distributed_inr.domains.domain import Domain, Queries, Record, Signal, collate
from distributed_inr.domains.image import Image

AnyDomain = Image

__all__ = ["AnyDomain", "Domain", "Image", "Queries", "Record", "Signal", "collate"]
