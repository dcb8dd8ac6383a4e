"""Text: words of captions as a condition, in training, fine-tuning, sampling and export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import call_main, expect_error, only_run, relative_error
from PIL import Image

from checkpoints import read_checkpoint
from conditions import drop_conditions
from latents.cache import CachedLatents
from latents.captions import Captions
from latents.loading import BatchStream
from latents.sources import open_images
from latents.text_encoder import load_text_encoder
from latents.words import Words
from models import DiT
from sampling.pipeline import open_pipeline
from sampling.sampling_config import SamplingConfig

SIZES = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}


def model_of(*conditions: str, **fields) -> DiT:
    model = DiT(**SIZES, num_classes=5, num_experts=4, conditions=conditions, **fields)
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@pytest.fixture
def captioned(tmp_path):
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    (folder := tmp_path / "images").mkdir()
    for index in range(12):
        colour = [*colours][index % 3]
        Image.new("RGB", (16, 16), colours[colour]).save(folder / f"{index:02}.png")
        text = f"a {colour} picture" if index else ""
        (folder / f"{index:02}.txt").write_text(text)
    return folder


def test_an_unknown_word_is_no_word_and_a_word_of_one_image_is_unknown():
    words = Words.of(Captions.of(["a red circle", "a red square, lonely", "A circle"]), range(3))
    assert set(words.names) == {"a", "red", "circle"} and words.length == 3
    assert torch.equal(words.numbers("A flurble RED lonely circle"), words.numbers("a red circle"))


def test_padding_does_not_count_and_without_text_the_router_has_no_class():
    model, x, t = model_of("text:6x9"), torch.randn(2, 4, 8, 8), torch.rand(2)
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.update(inputs[2]))
    text = torch.tensor([[1, 2, 0, 0, 0, 0], [0] * 6])
    with torch.no_grad():
        first = model(x, t, {"text": text})[0]
        assert seen["no_class"].tolist() == [False, True]
        model.text_embedder.table.weight[0] += 9  # of padding
        model.text_embedder.positions[:, 2:] += 9
        assert torch.equal(model(x, t, {"text": text})[0], first)
        assert not torch.allclose(model(x, t, {"text": text.flip(0)})[0], first)


def test_text_and_label_are_dropped_together_and_alone():
    torch.manual_seed(0)
    y = {"label": torch.zeros(4000, dtype=torch.long), "text": torch.ones(4000, 6).long()}
    dropped = drop_conditions(model_of("label", "text:6x9").conditions, y, 0.1)
    no_label, no_text = dropped["label"] == 5, ~dropped["text"].any(1)
    for share in (no_label & no_text, no_label & ~no_text, ~no_label & no_text):
        assert 0.06 < share.float().mean() < 0.13
    words = dropped["text"][~no_text]
    assert 0.85 < words.float().mean() < 0.95 and (words.diff(dim=1) <= 0).all()


def test_one_of_several_captions_is_drawn_and_left_is_not_mirrored(tmp_path):
    pixels = Image.new("RGB", (16, 16))
    pixels.paste((255, 0, 0), (0, 0, 8, 16))
    for name, text in (("0", "red left\nred"), ("1", "red")):
        pixels.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    images = open_images(str(tmp_path), 16)
    images.use_words(Words(("red", "left"), 2))
    images.requested = ["text"]
    seen = {tuple(images[0, True, draw][0]["text"].tolist()) for draw in (0.0, 0.9)}
    assert seen == {(1, 2), (1, 0)}
    assert images[0, True, 0.0][0]["image"][0, 0, 0] == 255  # as stored
    assert images[0, True, 0.9][0]["image"][0, 0, 0] == 0
    first, again, other = (
        [*BatchStream(range(8), 4, end_step=2, seed=seed, draws=True)] for seed in (0, 0, 1)
    )
    resumed = [*BatchStream(range(8), 4, start_step=1, end_step=2, draws=True)]
    assert first == again != other and first[1:] == resumed


def test_a_class_model_takes_text_and_draws_from_prompts(captioned, train_flags, tmp_path, capsys):
    flags = {"data-path": captioned, "max-steps": 2, "rf": True, "num-sample": 2,
             "global-batch-size": 8}  # fmt: skip
    call_main("train.py", *train_flags(tmp_path / "classes", **flags))
    base = only_run(tmp_path / "classes")
    line = expect_error(capsys, "sample.py", "--ckpt", base, "--prompt", "a red picture")
    assert "--prompt: the model has no condition text" in line
    command = train_flags(tmp_path / "text", **{**flags, "model": None, "finetune": base})
    capsys.readouterr()
    call_main("train.py", *command, "--conditions", "label", "text", "--run-name", "text")
    assert "1 of 12 images have no caption" in capsys.readouterr().out
    run = tmp_path / "text" / "text"
    record = read_checkpoint(run).record
    assert record.config.conditions == ("label", "text:3x5")
    assert set(record.words) == {"a", "picture", "red", "green", "blue"}
    (captioned / "01.txt").write_text("another picture")
    call_main("train.py", "--resume", run, "--max-steps", 3)
    assert "the captions: was" in capsys.readouterr().out
    pipeline = open_pipeline(
        SamplingConfig(ckpt=str(run), num_sampling_steps=2, prompt=("red", "blue"), cfg_scale=2.0)
    )
    for weight in pipeline.model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    drawn = pipeline.latents([None, None], [0, 1])
    again = pipeline.prompted(["red", "flurble blue"]).latents([None, None], [0, 1])
    assert torch.equal(drawn, again)
    other = pipeline.prompted(["red", "red"]).latents([None, None], [0, 1])
    assert not torch.allclose(drawn[1], other[1])
    negative = pipeline.prompted(["red", "blue"], "green").latents([None, None], [0, 1])
    assert not torch.allclose(drawn, negative)
    (tmp_path / "prompts.txt").write_text("a red picture\nblue\n")
    call_main("sample.py", "--ckpt", run, "--num-sampling-steps", 1, "--prompts",
              tmp_path / "prompts.txt", "--images-per-class", 2,
              "--output", tmp_path / "grid.png")  # fmt: skip


def test_a_model_of_text_alone_is_not_drawn_without_a_prompt(
    captioned, train_flags, tmp_path, capsys
):
    flags = {"data-path": captioned, "max-steps": 1, "rf": True, "num-sample": 2,
             "global-batch-size": 4}  # fmt: skip
    call_main("train.py", *train_flags(tmp_path, **flags), "--conditions", "text",
              "--run-name", "text", "--router", "prototype")  # fmt: skip
    run = tmp_path / "text"
    line = expect_error(capsys, "sample.py", "--ckpt", run, "--num-sampling-steps", 1,
                        "--output", tmp_path / "grid.png")  # fmt: skip
    assert "pass --prompt TEXT" in line


WORDS = ("a", "picture", "red", "green", "blue")


def tiny_clip(folder: Path) -> None:
    """A random CLIP of texts and images, with its tokenizer."""
    import transformers

    pieces = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    text = {"vocab_size": 8, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**size, **text}, vision_config={**size, "image_size": 16, "patch_size": 8}
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(pieces)}
    transformers.CLIPTokenizer(vocabulary, [], model_max_length=6).save_pretrained(folder)


def tiny_t5(folder: Path) -> None:
    """A random T5, with its decoder, and its tokenizer."""
    import transformers

    config = transformers.T5Config(
        vocab_size=16, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in WORDS)]
    transformers.T5Tokenizer(pieces, extra_ids=0, model_max_length=6).save_pretrained(folder)


@pytest.mark.parametrize("make, width", [(tiny_clip, 8), (tiny_t5, 12)])
def test_a_text_encoder_fills_the_cache_and_reads_prompts(
    make, width, captioned, tiny_vae, train_flags, tmp_path, capsys, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = tmp_path / "encoder"
    make(encoder)
    command = ("--data-path", captioned, "--image-size", 16, "--vae-path", tiny_vae,
               "--output", tmp_path / "cache", "--text-encoder", encoder)  # fmt: skip
    call_main("cache_latents.py", *command)
    assert "1 of 12 images have no caption" in capsys.readouterr().out
    cache = CachedLatents(tmp_path / "cache")
    cache.requested = ["tokens"]
    assert cache.text_encoder == f"{encoder}@6"
    stored = torch.stack(
        [cache[index, flip][0]["tokens"] for index in range(12) for flip in (0, 1)]
    )
    assert stored.shape == (24, 6, width) and stored.dtype == torch.bfloat16
    assert torch.equal(stored[0::2], stored[1::2])
    rows = load_text_encoder(str(encoder), "cpu").rows
    every = [(captions or [""])[0] for captions in cache.captions]
    assert torch.equal(stored[0::2], rows(every))
    lengths = stored[0::2].ne(0).any(2).sum(1)
    assert [int(n) == 0 for n in lengths] == [not caption for caption in every]
    # As transformers computes them, one caption at a time, without padding.
    kind = transformers.CLIPTextModel if make is tiny_clip else transformers.T5EncoderModel
    network = kind.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    alone = tokenizer([every[1]], return_tensors="pt", truncation=True)
    with torch.no_grad():
        want = network(**alone).last_hidden_state[0]
    assert relative_error(stored[2, : len(want)].float(), want) < 1e-2
    assert not stored[2, len(want) :].any()

    flags = {"latents-path": tmp_path / "cache", "vae-path": tiny_vae, "data-path": None,
             "max-steps": 2, "rf": True, "num-sample": 0, "global-batch-size": 8}  # fmt: skip
    call_main("train.py", *train_flags(tmp_path / "runs", **flags),
              "--conditions", "label", "tokens", "--run-name", "run")  # fmt: skip
    run = tmp_path / "runs" / "run"
    assert read_checkpoint(run).config.conditions == ("label", f"tokens:6x{width}")
    config = SamplingConfig(ckpt=str(run), num_sampling_steps=2, prompt=("red", "blue"))
    pipeline = open_pipeline(config)
    for weight in pipeline.model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    drawn = pipeline.latents([None, None], [0, 1])
    own = pipeline.latents([None, None], [0, 1], conditions={"tokens": rows(["red", "blue"])})
    assert torch.equal(drawn, own)
    assert not torch.allclose(pipeline.prompted(["red", "red"]).latents([None] * 2, [0, 1]), drawn)
    call_main("sample.py", "--ckpt", run, "--num-sampling-steps", 1, "--prompt", "a red picture",
              "--output", tmp_path / "grid.png")  # fmt: skip
    call_main("export.py", "--ckpt", run, "--format", "safetensors", "--samples", 0,
              "--output", tmp_path / "out")  # fmt: skip
    assert read_checkpoint(tmp_path / "out").record.facts["text_encoder"] == "encoder@6"
    monkeypatch.chdir(tmp_path)  # where the folder of this name lies
    exported = open_pipeline(replace(config, ckpt=str(tmp_path / "out"), vae_path=str(tiny_vae)))
    assert torch.equal(exported.conditions["tokens"], pipeline.conditions["tokens"])
    assert exported.digests == {
        **exported.digests,
        "tokens_sha256": pipeline.digests["tokens_sha256"],
    }
    call_main("train.py", *train_flags(tmp_path / "runs", **flags),
              "--conditions", "label", "text", "tokens", "--run-name", "both")  # fmt: skip
    both = open_pipeline(replace(config, ckpt=str(tmp_path / "runs" / "both")))
    assert {*both.conditions} == {"text", "tokens"}
    network = kind.from_pretrained(encoder)
    torch.nn.init.normal_(next(network.parameters()))
    network.save_pretrained(encoder)
    line = expect_error(capsys, "sample.py", "--ckpt", run, "--prompt", "a red picture")
    assert "--prompt: got" in line and "with other weights" in line


def test_a_text_encoder_that_cannot_be_used_is_one_line(captioned, image_tree, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "encoder").mkdir()
    command = ("--image-size", 16, "--output", tmp_path / "cache", "--text-encoder",
               tmp_path / "encoder")  # fmt: skip
    line = expect_error(capsys, "cache_latents.py", "--data-path", captioned, *command)
    assert "--text-encoder: got" in line and "expected a text encoder of transformers" in line
    line = expect_error(capsys, "cache_latents.py", "--data-path", image_tree, *command)
    assert "--text-encoder: got images without captions" in line
    both = (*command, "--features", "efficientnet-lite0")
    line = expect_error(capsys, "cache_latents.py", "--data-path", captioned, *both)
    assert "--text-encoder: cannot be combined with --features" in line
    tiny_clip(tmp_path / "encoder")
    for length in (0, 7):
        longer = (*command[:-1], f"{tmp_path / 'encoder'}@{length}")
        line = expect_error(capsys, "cache_latents.py", "--data-path", captioned, *longer)
        assert f"got {length} tokens, expected 1 to 6" in line
    assert not (tmp_path / "cache").exists()
