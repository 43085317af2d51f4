"""The cache on disk: what phase 1 writes and phase 2 reads. numpy, Arrow and zstd; never torch.

frames (zstd) < codec (targets <-> columns) < shard (one Arrow file) < manifest (self-description) < store (put-if-absent)
< commit (plan, commits, leases, seal) < reader, verify. ``docs/format.md`` is the specification.
"""
