"""Run by torchrun: one step of a student that FSDP2 has cut over the ranks; rank 0 writes loss and gradients."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kdcache.cache.reader import open_cache
from kdcache.model_files import find_model
from kdcache.models import load_model
from kdcache.train.forward import extend_forward, run_objective
from kdcache.train.objective import Objective
from kdcache.train.stream import CacheDataset, TargetDecoder, collate


def main(cache: str, student: str, own_head: str, output: str) -> None:
    """``own_head`` "yes" wraps the head as a unit of its own, so that the root's forward does not gather it."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    model = load_model(find_model(student), dtype=torch.float32).train()
    reader = open_cache(cache)
    extend_forward(model, reader.vocab_size, None)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_head == "yes":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    data = CacheDataset(reader)
    batch = collate([data[i] for i in range(rank, 4, world_size)])
    decoders = [(1.0, TargetDecoder.for_cache(reader, 1.0, torch.device("cpu")))]
    count = torch.tensor(int(batch["target_mask"].sum()))
    dist.all_reduce(count)
    sums = run_objective(model, batch, Objective(0.7), decoders)
    loss = sums.loss / int(count) * world_size
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    total = loss.detach() / world_size
    dist.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total, "gradients": gradients}, output)
    dist.barrier()
    os._exit(
        0
    )  # what is measured is done; on a busy machine gloo's threads now and then abort while they are taken down


if __name__ == "__main__":
    main(*sys.argv[1:])
