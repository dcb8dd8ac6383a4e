"""Conversion of the published DiT-MoE weight layouts to ours, which stacks a layer's experts.

`DiT.load_state_dict` converts too, so this file imports nothing of this repository.

Shape legend: E experts, H expert width, D width
"""

import re

import torch
from torch import Tensor

FLASH_ATTENTION_NAMES = {".attn.Wqkv.": ".attn.qkv.", ".attn.out_proj.": ".attn.proj."}
SIDES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}
EXPERT_KEY = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(SIDES)})\.(weight|bias)")


def to_stacked_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts published weights to our layout; weights in our layout are returned unchanged.

    A published file has one linear layer per expert and projection (`experts.I.gate_proj.weight`,
    or `experts.I.fc1.weight` for GELU experts), and the attention names of timm or of flash-attn
    (`attn.Wqkv`, `attn.out_proj`).
    """
    stacked, per_expert = {}, {}
    for key, value in state_dict.items():
        for theirs, ours in FLASH_ATTENTION_NAMES.items():
            key = key.replace(theirs, ours)
        if match := EXPERT_KEY.fullmatch(key):
            prefix, expert, projection, kind = match.groups()
            name = SIDES[projection] + ("_proj" if kind == "weight" else "_bias")
            per_expert.setdefault(prefix, {})[int(expert), name] = value
        else:
            stacked[key] = value
    for prefix, weights in per_expert.items():
        experts = range(1 + max(expert for expert, _ in weights))
        try:
            layer = {
                name: torch.stack([weights[expert, name] for expert in experts])
                for name in sorted({name for _, name in weights})
            }  # (E, H, D), (E, D, H), (E, H) or (E, D)
            for kind in ("proj", "bias"):
                if f"gate_{kind}" in layer:
                    halves = [layer.pop(f"gate_{kind}"), layer.pop(f"up_{kind}")]
                    layer[f"gate_up_{kind}"] = torch.cat(halves, dim=1)  # (E, 2H, D) or (E, 2H)
        except KeyError as missing:
            raise ValueError(f"{prefix}: expert weight {missing} is missing") from None
        stacked |= {f"{prefix}.{name}": value for name, value in layer.items()}
    return stacked
