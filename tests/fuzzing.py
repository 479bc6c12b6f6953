"""Checkpoints damaged or forged in many ways, and what must hold for all of them."""

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_blockprune import BlockPruneError, BlockSparseFormatError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.hub.blockprune_heads import PARTS
from hf_blockprune.hub.blockprune_layers import block_sparse_layers, is_int8
from hf_blockprune.hub.blockprune_names import stored_layer_names
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, forget_schedule, schedule_of, set_schedule
from hf_blockprune.model.loading import load_model

FIXTURES = [Path(__file__).parent / "fixtures" / name for name in ("format-5", "format-6")]  # floats, int8
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
# What transformers and safetensors say of files that they refuse by themselves.
THEIRS = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 40),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.integers(-2, 64), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(-2, 9), max_size=2),
)


@dataclass(frozen=True)
class Damage:
    """One change to a checkpoint: `place` says where, `value` what comes there."""

    kind: str
    place: Any
    value: Any


def _config_places(config: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [place for key, value in keys for place in ((*prefix, key), *_config_places(value, (*prefix, key)))]


CONFIGS = [json.loads((fixture / "config.json").read_text()) for fixture in FIXTURES]
WEIGHTS = [fixture / "model.safetensors" for fixture in FIXTURES]
PLACES = sorted({place for config in CONFIGS for place in _config_places(config)}, key=repr)
TENSORS = sorted({name for weights in WEIGHTS for name in load_file(weights)})
SIZE = max(weights.stat().st_size for weights in WEIGHTS)
HEADER = max(struct.unpack("<Q", weights.read_bytes()[:8])[0] + 8 for weights in WEIGHTS)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LAYERS = sorted(CONFIGS[0]["quantization_config"]["layers"])
HEADS = st.fixed_dictionaries(
    {part: st.sampled_from(LAYERS) for part in PARTS} | {key: st.integers(1, 9) for key in ("heads", "head_size")}
)
COUNTS = st.integers(-1, 17)
TOKENS = st.fixed_dictionaries(
    {
        "leave": st.one_of(st.lists(st.integers(0, 6), min_size=3, max_size=3), st.lists(COUNTS, max_size=5)),
        "patches": st.one_of(st.just(16), COUNTS, st.sampled_from([10**6, 2**31 - 1, 2**31, 2**63])),
    }
)
INDICES = sorted(name for name in TENSORS if name.endswith("_indices"))

damages = st.one_of(
    st.builds(Damage, st.just("config"), st.sampled_from(PLACES), JUNK),
    st.builds(
        Damage,
        st.just("config"),
        st.sampled_from([p for p in PLACES if p[0] == "quantization_config"]),
        JUNK,
    ),
    st.builds(Damage, st.just("config"), st.just(("quantization_config", "heads")), st.lists(HEADS, max_size=2)),
    st.builds(Damage, st.just("config"), st.just(("quantization_config", "tokens")), st.one_of(TOKENS, JUNK)),
    st.builds(
        Damage,
        st.just("config"),
        st.sampled_from([p for p in PLACES if p[:2] == ("quantization_config", "tokens")]),
        st.one_of(COUNTS, JUNK),
    ),
    st.builds(
        Damage,
        st.just("config"),
        st.sampled_from([("quantization_config", "cut", name) for name in LAYERS]),
        st.lists(st.sampled_from([1, 6, 8, 16, 32]), min_size=2, max_size=2),
    ),
    st.builds(Damage, st.just("new key"), st.just(("quantization_config", "dtype")), st.one_of(st.just("int8"), JUNK)),
    st.builds(Damage, st.just("missing key"), st.sampled_from(PLACES), st.none()),
    st.builds(
        Damage,
        st.just("index"),
        st.sampled_from(INDICES),
        st.tuples(st.integers(0, 63), st.integers(-(2**31), 2**31 - 1)),
    ),
    st.builds(Damage, st.just("index"), st.sampled_from(INDICES), st.tuples(st.integers(0, 63), st.integers(-2, 6))),
    st.builds(
        Damage,
        st.just("dtype"),
        st.sampled_from(TENSORS),
        st.sampled_from(["int64", "uint8", "int8", "float16", "float32", "bool"]),
    ),
    st.builds(Damage, st.just("shape"), st.sampled_from(TENSORS), st.integers(0, 5)),
    st.builds(Damage, st.just("missing tensor"), st.sampled_from(TENSORS), st.none()),
    st.builds(
        Damage,
        st.just("shard"),
        st.sampled_from(TENSORS),
        st.one_of(st.sampled_from([*SHARDS, "../model.safetensors", "/model.safetensors", "config.json", ""]), JUNK),
    ),
    st.builds(Damage, st.just("byte"), st.integers(0, HEADER - 1), st.integers(0, 255)),
    st.builds(Damage, st.just("cut off"), st.integers(0, SIZE - 1), st.none()),
)


def forge(folder: Path, changes: list[Damage], fixture: int = 0) -> None:
    """Write one of `FIXTURES` with changes, in two shards where one changes their list; those to bytes come last."""
    config, tensors = json.loads(json.dumps(CONFIGS[fixture])), load_file(WEIGHTS[fixture])
    for change in changes:
        if change.kind in ("config", "missing key", "new key"):
            _change_config(config, change)
        elif change.kind != "shard" and change.place in tensors:
            _change_tensor(tensors, change)
    shards = {change.place: change.value for change in changes if change.kind == "shard"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    weights = _write_shards(folder, tensors, shards) if shards else folder / "model.safetensors"
    if not shards:
        save_file(tensors, weights, metadata={"format": "pt"})
    data = bytearray(weights.read_bytes())
    for change in changes:
        if change.kind == "byte":
            data[change.place % len(data)] = change.value
        elif change.kind == "cut off":
            del data[change.place :]
        if not data:
            break
    weights.write_bytes(data)


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], changes: dict[str, Any]) -> Path:
    """Two files and the list of what lies where, changed; the first file."""
    places = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensors[name] for name in places if places[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {**places, **changes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / SHARDS[0]


def _change_config(config: Any, change: Damage) -> None:
    for key in change.place[:-1]:
        if not isinstance(config, (dict, list)) or (isinstance(config, dict) and key not in config):
            return
        if isinstance(config, list) and not (isinstance(key, int) and key < len(config)):
            return
        config = config[key]
    last = change.place[-1]
    if change.kind == "new key" and isinstance(config, dict):
        config[last] = change.value
    elif (isinstance(config, dict) and last in config) or (
        isinstance(config, list) and isinstance(last, int) and last < len(config)
    ):
        if change.kind == "config":
            config[last] = change.value
        else:
            del config[last]


def _change_tensor(tensors: dict[str, torch.Tensor], change: Damage) -> None:
    tensor = tensors[change.place]
    if change.kind == "index" and tensor.numel():
        position, value = change.value
        tensor[position % len(tensor)] = value
    elif change.kind == "dtype":
        tensors[change.place] = tensor.to(getattr(torch, change.value))
    elif change.kind == "shape" and tensor.dim():
        tensors[change.place] = tensor[: change.value].contiguous()
    elif change.kind == "missing tensor":
        del tensors[change.place]


def check(folder: Path) -> str:
    """Inspect and load a forged checkpoint.

    Returns:
        What became of it: "refused" by both, "refused on loading", or "loaded"; where inspection alone refused it, or
        it takes other pictures, with these words added.

    Raises:
        AssertionError: a loaded model holds or answers something else than what is stored.
        Exception: any error that is not a typed one.
    """
    refused = ""
    try:
        inspect_checkpoint(folder)
    except (BlockPruneError, BlockSparseFormatError):
        refused = ", refused by inspection"
    try:
        model = load_model(str(folder), {})[0].eval()
    except (BlockPruneError, BlockSparseFormatError):
        return "refused" if refused else "refused on loading"
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, module in block_sparse_layers(model):
        prefix = stored_layer_names(model, [name])[name]
        for tensor, have in module.packed()._asdict().items():
            want = stored[f"{prefix}.{tensor}"]
            assert torch.equal(have.to(want.dtype).nan_to_num(), want.nan_to_num())
        if is_int8(module):
            assert torch.equal(module.weight_scale, stored[f"{prefix}.weight_scale"])
    schedule = schedule_of(model)
    assert schedule == _stored_schedule(folder)
    with torch.no_grad():
        try:
            logits = model(PICTURE.to(model.dtype)).logits
        except THEIRS:
            return f"loaded{refused}, for other pictures"
        # Rounding must not decide which of two patches leaves.
        if any(map(is_int8, model.modules())):
            forget_schedule(model)
            logits = model(PICTURE.to(model.dtype)).logits
        elif schedule is not None:
            logits = model.double()(PICTURE.double()).logits
        expected = _dense(model)(PICTURE.to(model.dtype)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    return f"loaded{refused}"


def _stored_schedule(folder: Path) -> TokenSchedule | None:
    tokens = json.loads((folder / "config.json").read_text())["quantization_config"].get("tokens")
    return TokenSchedule(tuple(tokens["leave"]), tokens["patches"]) if tokens and any(tokens["leave"]) else None


def _dense(model: Any) -> Any:
    """The dense model, in which tokens merge as before."""
    schedule, names = schedule_of(model), [name for name, _ in block_sparse_layers(model)]
    dense = model.dequantize()
    if schedule is not None:
        set_schedule(dense, schedule, names)
    return dense
