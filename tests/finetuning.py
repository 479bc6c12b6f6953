"""Training runs in processes of their own: `python tests/finetuning.py JOBS.json`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from hf_blockprune import BlockPruner, FinetuneConfig
from hf_blockprune.data.batches import load_images
from hf_blockprune.finetune.gradual import masks_of
from hf_blockprune.finetune.student import Student
from hf_blockprune.finetune.training import Finetuning
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.runs.training_state import whole


def check_masks(model, masks):
    """Indices are as they were, and nothing lies outside of kept blocks, nor in the part of an edge block beyond."""
    for name, layer in block_sparse_layers(model):
        rows, cols = layer.block_shape
        weight = whole(layer.weight)
        assert torch.equal(layer.mask().cpu(), masks[name])
        blocks = masks[name].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        # What `to_dense` gives, with the padding of edge blocks.
        full = torch.zeros(masks[name].shape[0], masks[name].shape[1], rows, cols)
        full[masks[name]] = weight.cpu()
        full = full.transpose(1, 2).reshape(blocks.shape)
        assert not full[~blocks].any()
        assert not full[layer.out_features :].any()
        assert not full[:, layer.in_features :].any()


class Watched:
    """Checks the masks after every step of every student, while it is entered."""

    def __init__(self, masks):
        self.masks, self.steps, self.step = masks, 0, Student.step

    def __enter__(self):
        def step(student, *args, **kwargs):
            result = self.step(student, *args, **kwargs)
            check_masks(student.model, self.masks)
            self.steps += 1
            return result

        Student.step = step
        return self

    def __exit__(self, *_):
        Student.step = self.step


def train(pruned, dense, images, settings, *, accelerator, **options):
    """(the run, its steps); masks are watched where they are to stay."""
    pruner = BlockPruner.from_pretrained(pruned, accelerator=accelerator)
    teacher = BlockPruner.from_pretrained(dense, accelerator=accelerator)
    run = Finetuning(
        pruner.model,
        pruner.processor,
        load_images(images),
        settings,
        accelerator,
        teacher=pruner._in_same_order(teacher.model),
        **options,
    )
    if settings.gradual is not None:
        run.run()
        return run, run.history.step
    with Watched(masks_of(run.model)) as watched:
        run.run()
    check_masks(run.model, watched.masks)
    return run, watched.steps


def shard(accelerator):
    """Let an accelerator shard weights with FSDP2, which it does by itself on devices other than CPUs alone."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def main():
    accelerator = Accelerator()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["shard"]:
            shard(accelerator)
        settings = FinetuneConfig.from_dict(job["settings"])
        run, steps = train(job["pruned"], job["dense"], job["images"], settings, accelerator=accelerator)
        accelerator.free_memory()
        if accelerator.is_main_process:
            save_file({n: t.contiguous() for n, t in run.model.state_dict().items()}, job["output"])
            print(json.dumps({"steps": steps, "losses": run.history.losses, "kind": str(accelerator.distributed_type)}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
