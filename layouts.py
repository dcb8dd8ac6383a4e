"""The published layouts of a DiT-MoE's weights, and ours, which stacks the experts of a layer.

Shape legend: E experts, H expert width, D width
"""

import re

import torch
from torch import Tensor

FLASH_ATTENTION_NAMES = {".attn.Wqkv.": ".attn.qkv.", ".attn.out_proj.": ".attn.proj."}
EXPERT_KEY = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def to_stacked_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings the published layouts to ours; weights already in ours come back as they are.

    Published: one linear layer per expert and projection (`experts.I.gate_proj.weight`), and either
    timm's attention names or those of flash-attn (`attn.Wqkv`, `attn.out_proj`). Ours stacks the
    experts. Raises ValueError when an expert of a layer is missing.
    """
    stacked, per_expert = {}, {}
    for key, value in state_dict.items():
        for theirs, ours in FLASH_ATTENTION_NAMES.items():
            key = key.replace(theirs, ours)
        if match := EXPERT_KEY.fullmatch(key):
            prefix, expert, projection = match.groups()
            per_expert.setdefault(prefix, {})[int(expert), projection] = value
        else:
            stacked[key] = value
    for prefix, weights in per_expert.items():
        experts = range(1 + max(expert for expert, _ in weights))
        try:
            gate, up, down = (
                torch.stack([weights[expert, name] for expert in experts])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
        except KeyError as missing:
            raise ValueError(f"{prefix}: expert weight {missing} is missing") from None
        stacked[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)  # (E, 2H, D)
        stacked[f"{prefix}.down_proj"] = down  # (E, D, H)
    return stacked
