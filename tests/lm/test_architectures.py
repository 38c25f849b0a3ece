"""The model's own hidden states for many architectures and wrappers, one sentence for the others."""

import pytest
import torch
from tiny_models import CONTEXT, LAYERS, VOCABULARY, D, transformers

from sampled_sae.lm import SpliceEvaluator, capture, harvest, replace, transformer_blocks

SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), D),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "ffn_hidden_size"), 24),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    "num_key_value_heads": 1,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "rotary_dim": 4,
    "state_size": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SMALL_HALF = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def config_of(kind, **given):
    known = kind().to_dict()
    there = {name for name, value in known.items() if value is not None or name == "vocab_size"}
    return kind(**{name: size for name, size in SIZES.items() if name in there} | given)


def make(name, **given):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(config_of(kind.config_class, **given)).eval()


# The list of hidden states of Mamba leaves the embedding out, so that entry i is block i.
CAUSAL = """
    Llama GPTNeoX Gemma Gemma2 Qwen2 Qwen3 Phi Phi3 Mistral Mixtral OPT Bloom Falcon Mpt GPTJ Olmo2 StableLm Cohere
    Starcoder2 BioGpt GPTBigCode XGLM Bart Roberta SmolLM3 Granite GptOss
"""
SUPPORTED = [
    *(f"{name}ForCausalLM" for name in CAUSAL.split()),
    "GPT2LMHeadModel",
    "OpenAIGPTLMHeadModel",
    "CTRLLMHeadModel",
    "LlamaModel",
    "GPT2Model",
    "BertLMHeadModel",
    *(f"{name}Model" for name in ["Bert", "Roberta", "DistilBert", "Electra", "MPNet", "DebertaV2", "ModernBert"]),
    *(f"{name}ForMaskedLM" for name in ["Bert", "Roberta", "DistilBert", "Electra", "ModernBert"]),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SUPPORTED)
def test_captured_layers_are_the_models_own_hidden_states(name, rows):
    model = make(name)
    own = model(input_ids=rows, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        with torch.no_grad(), capture(model, layer) as captured:
            model(input_ids=rows, use_cache=False)
        assert captured.value.shape == own[layer + 1].shape == (len(rows), CONTEXT, D)
        if layer < LAYERS - 1:  # the last of them has passed the final norm
            assert torch.equal(captured.value, own[layer + 1])


@pytest.mark.parametrize("name", ["MambaForCausalLM", "FalconMambaForCausalLM"])
def test_recurrent_blocks(name, rows):
    model = make(name)
    own = model(input_ids=rows, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        with torch.no_grad(), capture(model, layer) as captured:
            model(input_ids=rows, use_cache=False)
        assert torch.equal(captured.value, own[layer])


def gemma3_with_images():
    torch.manual_seed(0)
    text = config_of(transformers.Gemma3TextConfig)
    vision = config_of(transformers.SiglipVisionConfig, image_size=16, patch_size=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


class Wrapped(torch.nn.Module):
    """As PEFT and the like: the model two modules deep, everything else handed through."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


@pytest.mark.parametrize("build", [gemma3_with_images, lambda: Wrapped(make("LlamaForCausalLM"))])
def test_wrapped_models(build, rows, tmp_path):
    model = build()
    own = model(input_ids=rows, output_hidden_states=True).hidden_states
    with torch.no_grad(), capture(model, 1) as captured:
        model(input_ids=rows)
    assert torch.equal(captured.value, own[2])
    harvest(model, rows, 1, tmp_path, model_name="wrapped", progress=False)
    evaluator = SpliceEvaluator(model, rows, 1, scale=1.0)
    assert evaluator.evaluate(lambda x: x)["ce_spliced"] == pytest.approx(evaluator.ce_clean, abs=1e-6)


class Bare(torch.nn.Module):
    """A wrapper that hands nothing through."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager"), Bare])
@pytest.mark.parametrize("ran_before", [False, True])
def test_wrappers_store_what_the_model_does(small_llama, rows, tmp_path, wrap, ran_before):
    small_llama.config.bos_token_id = int(rows[0, 3])
    plain = harvest(small_llama, rows, 1, tmp_path / "plain", model_name="it", progress=False)
    wrapped = wrap(small_llama)
    if ran_before:
        wrapped(input_ids=rows)
    found = harvest(wrapped, rows, 1, tmp_path / "wrapped", model_name="it", progress=False)
    if wrap is Bare:
        found["settings"]["weights_sha256"] = plain["settings"]["weights_sha256"]
    assert found == plain
    assert found["dropped"]["special_token"] > 0
    with pytest.raises(ValueError, match=f"token ids from .* to {VOCABULARY}"):
        harvest(wrapped, rows + VOCABULARY - int(rows.max()), 1, tmp_path / "x", progress=False)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_splice_in_a_compiled_model(small_llama, rows, ran_before):
    want = SpliceEvaluator(small_llama, rows, 1).evaluate(torch.tanh)
    compiled = torch.compile(small_llama, backend="eager")
    if ran_before:
        compiled(input_ids=rows)
    assert SpliceEvaluator(compiled, rows, 1).evaluate(torch.tanh) == want


@pytest.mark.parametrize(
    ("name", "given", "shape"),
    [
        ("Gemma3nForCausalLM", "text", [4, 11, CONTEXT, D]),
        ("DeepseekV4ForCausalLM", {}, [11, CONTEXT, 4, D]),
        ("LongformerModel", {"attention_window": 16, "max_position_embeddings": 40}, [11, 16, D]),
    ],
)
def test_other_shapes_are_refused_with_the_shape(name, given, shape, rows, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    if given == "text":
        torch.manual_seed(0)
        model = getattr(transformers, name)(config_of(transformers.Gemma3nTextConfig)).eval()
    else:
        model = make(name, **given)
    said = f"block 1 of {name} returns {shape}, not the residual stream [B, T, d] = [11, {CONTEXT}, {D}]"
    said = said.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=said), capture(model, 1):
        model(input_ids=rows)
    with pytest.raises(ValueError, match=said), replace(model, 1, lambda x: x):
        model(input_ids=rows)
    with pytest.raises(ValueError, match="not the residual stream"):
        harvest(model, rows, 1, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    if "CausalLM" in name:
        with pytest.raises(ValueError, match="not the residual stream"):
            SpliceEvaluator(model, rows, 1, scale=1.0)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("T5ForConditionalGeneration", {}),
        ("BartModel", {}),
        ("WhisperModel", {}),
        ("ViTModel", {"image_size": 16, "patch_size": 8}),
        ("CLIPModel", {"text_config": SMALL_HALF, "vision_config": {**SMALL_HALF, "image_size": 16, "patch_size": 8}}),
        ("Wav2Vec2Model", {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}),
        ("AlbertModel", {}),
        ("XLMModel", {}),
        ("XLNetLMHeadModel", {}),
        ("SqueezeBertModel", {}),
    ],
)
def test_models_that_are_not_supported_say_so(name, given, rows, tmp_path):
    model = make(name, **given)
    for call in (
        lambda: harvest(model, rows, 0, tmp_path, progress=False),
        lambda: SpliceEvaluator(model, rows, 0, scale=1.0),
        lambda: captured_by_hand(model, rows),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    assert list(tmp_path.iterdir()) == []


def captured_by_hand(model, rows):
    with capture(model, 0):
        model(input_ids=rows)


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError])
def test_a_model_that_needs_more_than_token_ids_says_so(small_llama, rows, tmp_path, error):
    def fail(*args, **kwargs):
        raise error("pixel_values")

    small_llama.forward = fail
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not run on these token ids alone \(.*pixel_values"):
        harvest(small_llama, rows, 1, tmp_path, progress=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run on these token ids alone"):
        SpliceEvaluator(small_llama, rows, 1, scale=1.0)


def test_a_configuration_with_several_parts_of_text():
    encoder, decoder = (config_of(getattr(transformers, f"{name}Config")) for name in ("Bert", "GPT2"))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.EncoderDecoderModel(config)
    model.config.text_encoder = encoder
    with pytest.raises(ValueError, match="EncoderDecoderModel is an encoder-decoder"):
        transformer_blocks(model)


def test_a_block_that_is_left_out_says_so(small_llama, rows):
    small_llama.config.num_hidden_layers = LAYERS - 1  # the model runs so many of them
    small_llama.model.config.num_hidden_layers = LAYERS - 1
    with pytest.raises(ValueError, match="layer=3: LlamaForCausalLM ran without its block 3"), capture(small_llama, 3):
        small_llama(input_ids=rows)


def test_two_lists_of_blocks_are_told_apart_by_their_length(small_llama):
    small_llama.mtp = torch.nn.Module()
    small_llama.mtp.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert transformer_blocks(small_llama) is small_llama.model.layers
    small_llama.mtp.layers.extend(torch.nn.Linear(2, 2) for _ in range(LAYERS - 1))
    with pytest.raises(ValueError, match=r"found in LlamaForCausalLM, but model\.layers, mtp\.layers"):
        transformer_blocks(small_llama)


def test_an_error_in_the_replacement_stays_as_it_is(small_llama, rows):
    def fail(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), replace(small_llama, 1, fail):
        small_llama(input_ids=rows)
