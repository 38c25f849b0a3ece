"""A corpus through an SAE: its sparse codes on disk, written shard by shard, read feature by feature."""
