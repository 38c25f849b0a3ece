"""`StoredActivations`: the training shards of a store as the source of a corpus of codes."""

from __future__ import annotations

from typing import Any

from ..support.token_places import TokenShard
from .activation_store import ActivationStore
from .same_settings import identity


class StoredActivations:
    """What `encode_corpus` reads of an `ActivationStore`: its shards or the first n of them, not what is held out."""

    def __init__(self, store: ActivationStore, n_shards: int | None = None) -> None:
        self.store, self.d_in = store, store.d_in
        self.n_shards = len(store.tokens) if n_shards is None else n_shards

    @property
    def about(self) -> dict[str, Any]:
        """Model, layer, source and context as the store's manifest has them."""
        return {name: self.store.manifest.get(name) for name in ("model", "layer", "source", "context")}

    @property
    def settings(self) -> dict[str, Any]:
        """What the store is of, and its files by their checksums."""
        files = [shard.get("crc32") or shard["bytes"] for shard in self.store.manifest["shards"]]
        return {"activations": identity(self.store.manifest), "files": files, "has_places": self.store.has_places}

    def token_shard(self, i: int) -> TokenShard:
        return self.store.token_shard(i)
