"""The data's way: raw files -> shards -> order -> signals."""
