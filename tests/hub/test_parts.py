"""Block-sparse models as parts of larger ones: the whole is saved, loads and can be taken apart again."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import tiny_config
from tests.hub.saved_models import OWN_KEYS, PIXELS, answer, assert_same, config_of, run, sparse_model

TOKENS = torch.tensor([[1, 4, 2]] * 3)


def body():
    """A block-sparse model without a head."""
    torch.manual_seed(0)
    model = ViTModel(tiny_config("vit"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return sparse_model(model)


def decoder():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True, is_decoder=True))


def captioner():
    return VisionEncoderDecoderModel(encoder=body(), decoder=decoder()).eval()


def dual_encoder():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return VisionTextDualEncoderModel(
        vision_model=body(), text_model=BertModel(BertConfig(**sizes, vocab_size=50))
    ).eval()


def clip():
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**text, **ids}, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    return sparse_model(CLIPModel(config), chosen=lambda name: "vision" in name)


def llava():
    tower = clip().vision_model
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=tower.config, text_config=LlamaConfig(**text, vocab_size=50), image_token_index=3
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower = tower
    return model


class WholeConfig(PreTrainedConfig):
    model_type = "whole"

    def __init__(self, body=None, **kwargs):
        self.body = body
        super().__init__(**kwargs)


class Whole(PreTrainedModel):
    """A model of one's own around a body that transformers makes."""

    config_class = WholeConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = AutoModel.from_config(ViTConfig(**config.body))
        self.head = nn.Linear(48, 4)
        self.post_init()

    def forward(self, pixel_values):
        return {"logits": self.head(self.body(pixel_values).last_hidden_state[:, 0])}


def own_model():
    part = body()
    whole = Whole(WholeConfig(part.config.to_dict()))
    whole.body = part
    return whole.eval()


WHOLES = {
    "captioner": (captioner, {"decoder_input_ids": TOKENS}),
    "dual encoder": (dual_encoder, {"input_ids": TOKENS}),
    "clip": (clip, {"input_ids": TOKENS}),
    "llava": (llava, {"input_ids": torch.tensor([[1, *[3] * 16, 5]] * 3)}),
    "own model": (own_model, {}),
}


@torch.no_grad()
def answer_with(model, inputs):
    output = model(pixel_values=PIXELS, **inputs)
    return output["logits"] if "logits" in output else output["logits_per_image"]


@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_with_a_block_sparse_part_saves_and_loads(name, tmp_path):
    make, inputs = WHOLES[name]
    whole = make()
    before = set(vars(whole))
    whole.save_pretrained(tmp_path / "one file")
    assert set(vars(whole)) == before
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for folder in ("one file", "shards"):
        again, info = type(whole).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert len(list(block_sparse_layers(again))) == 12
        assert_same(answer_with(again, inputs), answer_with(whole, inputs))
    again.half().float().save_pretrained(tmp_path / "again")
    assert len(list(block_sparse_layers(type(whole).from_pretrained(tmp_path / "again")))) == 12
    again = type(whole).from_pretrained(tmp_path / "one file")
    again.dequantize().save_pretrained(tmp_path / "dense")
    assert not OWN_KEYS & set(config_of(tmp_path / "dense"))
    assert_same(answer_with(type(whole).from_pretrained(tmp_path / "dense"), inputs), answer_with(whole, inputs))


def test_a_part_is_saved_alone(tmp_path):
    captioner().save_pretrained(tmp_path / "whole")
    whole = VisionEncoderDecoderModel.from_pretrained(tmp_path / "whole")
    whole.encoder.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part")
    assert len(list(block_sparse_layers(part))) == 12
    assert_same(answer(part), answer(whole.encoder))
    clip().save_pretrained(tmp_path / "clip")
    vision = CLIPVisionModel.from_pretrained(tmp_path / "clip")
    assert len(list(block_sparse_layers(vision))) == 12
    assert_same(answer(vision), answer(clip().vision_model))


def test_the_parts_can_come_from_folders(tmp_path):
    body().save_pretrained(tmp_path / "encoder")
    decoder().save_pretrained(tmp_path / "decoder")
    parts = str(tmp_path / "encoder"), str(tmp_path / "decoder")
    whole = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(*parts)
    whole.save_pretrained(tmp_path / "whole")
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path / "whole")
    inputs = {"decoder_input_ids": TOKENS}
    assert_same(answer_with(again, inputs), answer_with(whole, inputs))
    assert_same(answer(again.encoder), answer(body()))


def test_a_whole_built_from_the_configs_is_dense(tmp_path):
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(body().config, decoder().config)
    whole = VisionEncoderDecoderModel(config).eval()
    assert not any(block_sparse_layers(whole))
    whole.save_pretrained(tmp_path)
    assert not OWN_KEYS & (set(config_of(tmp_path)) | set(config_of(tmp_path)["encoder"]))
    inputs = {"decoder_input_ids": TOKENS}
    assert_same(answer_with(VisionEncoderDecoderModel.from_pretrained(tmp_path), inputs), answer_with(whole, inputs))


def test_tensors_of_a_plain_module_fit_one_around_the_same_model(tmp_path):
    body().save_pretrained(tmp_path / "body")

    def whole():
        return nn.Sequential(AutoModel.from_pretrained(tmp_path / "body"), nn.Flatten())

    trained = whole()
    for parameter in trained.parameters():
        parameter.data += 0.1
    torch.save(copy.deepcopy(trained).state_dict(), tmp_path / "whole.pt")
    again = whole()
    again.load_state_dict(torch.load(tmp_path / "whole.pt"))
    assert_same(answer(again[0]), answer(trained[0]))


LOAD = """
import sys
import torch
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(pixel_values=torch.load("pixels.pt"), decoder_input_ids=torch.load("tokens.pt")).logits
torch.save(logits, "logits.pt")
"""


@pytest.mark.slow
def test_a_whole_loads_without_the_package(tmp_path):
    whole = captioner()
    whole.save_pretrained(tmp_path / "whole")
    torch.save(PIXELS, tmp_path / "pixels.pt")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    done = run(LOAD, tmp_path, str(tmp_path / "whole"), package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "logits.pt"), answer_with(whole, {"decoder_input_ids": TOKENS}))


RANDOM = """
import sys
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel

for cls in (CLIPModel, CLIPVisionModel):
    try:
        cls.from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError(f"{cls.__name__} got weights")
CLIPTextModel.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_no_part_gets_random_weights_without_the_package(tmp_path):
    clip().save_pretrained(tmp_path / "clip")
    done = run(RANDOM, tmp_path, str(tmp_path / "clip"), package=False)
    assert done.returncode == 0, done.stderr[-3000:]
