"""Phase 2: cache -> student.

stream (which sequences, in which order, as tensors) -> head (student logits a chunk at a time) -> losses (a value a
position) -> trainer (one place reduces). Knows nothing of teachers.
"""
