"""A DeepSpeed job, for tests: one rank of it. `deepspeed_job.py RANK WORLD PORT STAGE JOB`, where JOB is JSON.

It may load a universal checkpoint, writes what the engine then holds, takes some steps, and may save.
"""

import json
import os
import sys

rank, world, port, stage = map(int, sys.argv[1:5])
job = json.loads(sys.argv[5])
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "RANK": str(rank),
    "LOCAL_RANK": str(rank),
    "WORLD_SIZE": str(world),
    "LOCAL_SIZE": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(port),
    "GLOO_SOCKET_IFNAME": "lo",
}

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: E402

from framework.model import Decoder  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes half a minute
torch.set_num_threads(1)
torch.manual_seed(0)
torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
model = Decoder(**job["model"])
groups = [
    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
]
config = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4 // world,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": stage},
    "checkpoint": {"load_universal": job.get("load") is not None},
    "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)


def held() -> dict[str, torch.Tensor]:
    found = {}
    if stage < 3 and job.get("load") is None:  # a new run links its moments before they exist; link them again
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        found[f"param/{name}"] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
    return found


out: dict[str, object] = {}
if job.get("load") is not None:
    path, client = engine.load_checkpoint(job["load"], load_lr_scheduler_states=False)
    assert path is not None
    out["loaded"], out["client"] = held(), {k: v for k, v in client.items() if k == "holdfast_extra"}
    out["groups"] = [(g["lr"], g["weight_decay"]) for g in engine.optimizer.optimizer.param_groups]
out["global_steps"] = engine.global_steps
losses = []
for step in range(job["steps"]):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(job["model"]["vocab_size"], (4, 17), generator=generator)
    mine = tokens[rank * 4 // world : (rank + 1) * 4 // world]
    logits = engine(mine[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    losses.append(total.item() / world)
out["losses"] = losses
if job.get("save") is not None:
    out["saved"] = held()
    engine.save_checkpoint(job["save"])
if rank == 0:
    torch.save(out, job["out"])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
