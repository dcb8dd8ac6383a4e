"""Features of captions from a pretrained text encoder of transformers, such as CLIP, T5 or Gemma.

    encoder = load_text_encoder("openai/clip-vit-large-patch14@77", "cuda")
    tokens = encoder.rows(["a large red circle", ""])    # (2, 77, 768) bf16

Shape legend: N captions, L tokens, F width of the encoder
"""

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from latents.autoencoder import weights_digest
from runtime.errors import UserError, reported_as

LONGEST = 256  # tokens of a caption, for encoders without a limit of their own


class TextEncoder(nn.Module):
    """The last hidden states of a frozen encoder, for the condition `tokens:LxF`.

    A caption without text has no token. Like `latents.words.Words`, it turns captions into rows.

    model: hub id or folder, with the tokenizer
    length: tokens of a caption, L; more are cut off. None: the limit of the tokenizer
    """

    condition = "tokens"

    def __init__(self, model: str, length: int | None = None):
        super().__init__()
        import transformers  # imported here: takes seconds

        config = transformers.AutoConfig.from_pretrained(model)
        self.revision = getattr(config, "_commit_hash", None)  # None for a folder
        config = getattr(config, "text_config", config)  # of a model of texts and images, as CLIP
        has_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        kind = transformers.AutoModelForTextEncoding if has_encoder else transformers.AutoModel
        if getattr(config, "is_encoder_decoder", False) and not has_encoder:
            raise ValueError(f"got {config.model_type} with a decoder, expected an encoder")
        logging = transformers.utils.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # or it lists the weights of a decoder or of images
        try:
            self.network, found = kind.from_pretrained(
                model, config=config, dtype=torch.float32, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
        if found["missing_keys"]:
            raise ValueError(f"it has no weights {min(found['missing_keys'])}")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        most = getattr(config, "max_position_embeddings", None)  # T5 has none
        if length is not None and not 0 < length <= (most or length):
            raise ValueError(f"got {length} tokens, expected 1 to {most or LONGEST}")
        self.length = length or min(self.tokenizer.model_max_length, most or LONGEST, LONGEST)
        self.name, self.width = f"{model}@{self.length}", config.hidden_size

    @cached_property
    def sha256(self) -> str:
        return weights_digest(self.network)

    @torch.no_grad()
    def rows(self, captions: Sequence[str]) -> Tensor:
        """Returns the features (N, L, F), bf16; a row of zeros is no token."""
        batch = self.tokenizer(
            list(captions), max_length=self.length, padding="max_length", truncation=True,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        device = next(self.network.parameters()).device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)  # (N, L)
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        mask = mask * torch.tensor([[bool(one.strip())] for one in captions], device=device)
        return (hidden * mask.unsqueeze(2)).bfloat16()  # (N, L, F)

    def unknown(self, caption: str) -> list[str]:
        """Returns the words without a meaning: none, a tokenizer splits them into parts."""
        return []


def load_text_encoder(
    name: str, device: torch.device | str, flag: str = "--text-encoder", sha256: str | None = None
) -> TextEncoder:
    """Loads MODEL[@LENGTH], frozen and in eval mode, in fp32.

    sha256: expected digest of the weights
    """
    model, length = re.fullmatch(r"(.+?)(?:@(\d+))?", name).groups()
    # transformers, its download client and torch raise many kinds of exceptions.
    expected = "a text encoder of transformers with its tokenizer: a hub id or a folder"
    with reported_as(f"{flag}: got {name}, expected {expected}", Exception):
        encoder = TextEncoder(model, None if length is None else int(length))
    if sha256 not in (None, encoder.sha256):
        raise UserError(f"{flag}: got {name} with other weights, expected those of the training")
    return encoder.to(device).eval().requires_grad_(False)
