r"""Writes a tiny text-to-image pipeline of diffusers with random weights, to try scripts on.

    python -m tools.tiny_pipeline nucleus results/tiny-nucleus
    python expert_data.py --pipeline results/tiny-nucleus --output results/tiny-nucleus.npz \
        --prompts results/tiny-nucleus/prompts.txt --num-sampling-steps 2 --image-size 16

HiDream-I1 or Nucleus-Image with a few narrow blocks, and with their text encoders, which know the
words of prompts.txt. The images are noise.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from options.parts import option
from runtime.errors import reported_as, run_main
from runtime.files import atomic_folder, check_new_folder
from runtime.flags import parse_config

WORDS = ["a", "cat", "red", "dog", "on", "the", "moon"]
PROMPTS = "cat\ta red cat\nmoon\tthe moon\n\ncat\ta cat on the moon\n"


def word_tokenizer(special: list[str], **options: Any) -> Any:
    """Tokenizer with a token for each word."""
    import tokenizers
    import transformers

    words = ["<unk>", "<eos>", *special, *WORDS]
    vocabulary = {word: i for i, word in enumerate(words)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", **options
    )


def tiny_hidream(**fields: Any) -> Any:
    """Random HiDream-I1 of 8 x 8 patches: one double-stream and two single-stream blocks."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    pieces = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    clip = transformers.CLIPTokenizer({word: i for i, word in enumerate(pieces)}, [])
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in WORDS)]
    small = dict(vocab_size=16, num_hidden_layers=1, num_attention_heads=2)
    small |= dict(hidden_size=8, intermediate_size=8)
    llama = transformers.LlamaConfig(**small | {"num_hidden_layers": 2}, num_key_value_heads=2)
    t5 = transformers.T5Config(
        vocab_size=16, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    encoders = [
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                **small, projection_dim=8, max_position_embeddings=128, bos_token_id=0,
                eos_token_id=1, pad_token_id=1,
            )
        )
        for _ in range(2)
    ]  # fmt: skip
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[16, 8], text_emb_dim=16, axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128), llama_layers=[0, 1, 1], force_inference_output=True, **fields,
    )  # fmt: skip
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4,), latent_channels=4, norm_num_groups=4, shift_factor=0.1,
            mid_block_add_attention=False,
        ),
        text_encoder=encoders[0], tokenizer=clip, text_encoder_2=encoders[1], tokenizer_2=clip,
        text_encoder_3=transformers.T5EncoderModel(t5),
        tokenizer_3=transformers.T5Tokenizer(pieces, extra_ids=0),
        text_encoder_4=transformers.LlamaForCausalLM(llama), tokenizer_4=word_tokenizer([]),
        transformer=transformer,
    )  # fmt: skip
    return quiet(pipeline)


def tiny_nucleus(**fields: Any) -> Any:
    """Random Nucleus-Image with three dense and two sparse blocks."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = word_tokenizer(special, pad_token="<eos>", padding_side="left")
    template = "{% for m in messages %}{{ m.content[0].text or m.content }} {% endfor %}"
    small = dict(hidden_size=8, intermediate_size=8)
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            **small, vocab_size=16, num_hidden_layers=8, num_attention_heads=2, head_dim=4,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0]),
        ),
        vision_config=dict(
            **small, depth=1, num_heads=2, out_hidden_size=8, num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5,
    )  # fmt: skip
    options = dict(dense_moe_strategy="leave_first_three_blocks_dense", num_experts=8) | fields
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2), mlp_ratio=12, moe_intermediate_dim=16,
        capacity_factors=2.0, **options,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # diffusers leaves them to the checkpoint
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = diffusers.NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config),
        processor=transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(), words, transformers.Qwen3VLVideoProcessor(),
            chat_template=template,
        ),
    )  # fmt: skip
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    """In eval mode, as a loaded pipeline, and without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


PIPELINES = {"hidream": tiny_hidream, "nucleus": tiny_nucleus}


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    kind: str = option(positional=True, choices=tuple(PIPELINES), help="the pipeline")
    folder: Path = option(positional=True, help="new or empty folder to write")


def parse_args() -> TinyConfig:
    return parse_config(TinyConfig, __doc__)


def main(config: TinyConfig) -> None:
    check_new_folder("FOLDER", config.folder)
    needs = "tools.tiny_pipeline: needs transformers; run pip install -r requirements-extras.txt"
    with reported_as(needs, ImportError):
        pipeline = PIPELINES[config.kind]()
    with atomic_folder(config.folder) as folder:
        pipeline.save_pretrained(folder)
        (folder / "prompts.txt").write_text(PROMPTS)
    print(f"{config.folder}: a random {type(pipeline).__name__}, and prompts.txt")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
