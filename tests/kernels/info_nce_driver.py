"""One process of test_info_nce.py's group: its share of a batch, and the loss and gradients it got, to a file.

info_nce_driver.py RANK COUNTS RENDEZVOUS OUT          COUNTS: samples of each process, as 3,5
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from info_nce_samples import TERMS, samples

from prts_kernels.info_nce import Group, info_nce


def main(rank: int, counts: list[int], rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(rendezvous).as_uri(), rank=rank, world_size=len(counts)
    )
    phi, psi, log_scale, log_weight, task_id = samples(sum(counts), failed=0.3)
    begin = sum(counts[:rank])
    own = [x[begin : begin + counts[rank]].detach().requires_grad_() for x in (phi, psi)]
    processes = Group(counts, rank)
    assert torch.equal(processes.gather(task_id[begin : begin + counts[rank]]), task_id)
    result = info_nce(*own, log_scale, log_weight, task_id, terms=TERMS, logsumexp_weight=0.1, processes=processes)
    grads = torch.autograd.grad(2 * result.loss, (*own, log_scale))
    torch.save([[x.detach() for x in result], [g.detach() for g in grads]], out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(c) for c in sys.argv[2].split(",")], sys.argv[3], sys.argv[4])
