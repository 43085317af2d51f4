"""Phase 1: teacher -> cache.

engines (token ids -> what the teacher says) < select (logits -> SparseTargets) < worker (one shard, idempotent) < launch
(one process, several, torchrun, srun). Knows nothing of students.
"""
