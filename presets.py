"""The published models: fields of `DiTConfig` by name.

    config = DiTConfig(**PRESETS["DiT-S/2"])

`models.DiT_models` makes the models.
"""

from typing import Any

# Depth, width and heads of the sizes S to G (arXiv 2407.11633, table 1). The paper has no Ti;
# scripts/demo.sh trains a DiT-Ti/2.
SIZES = {
    "Ti": dict(depth=6, hidden_size=128, num_heads=4, mlp_ratio=2.0),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "G": dict(depth=40, hidden_size=1408, num_heads=16),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch_size}": dict(patch_size=patch_size, **shape)
    for size, shape in SIZES.items()
    for patch_size in ((2,) if size in ("Ti", "G") else (2, 4, 8))
}

# JiT (Li and He 2025, arXiv 2511.13720), which is trained on pixels, and JiTMoE, its variant with
# experts in every second block (https://github.com/yhlleo/EfficientMoE).
JIT = dict(
    input_size=256, patch_size=16, in_channels=3, learn_sigma=False, norm="rms", qk_norm=True,
    rope=True, class_tokens=32, mlp_type="swiglu_bias",
)  # fmt: skip
JIT_SIZES = {
    "B": dict(hidden_size=768, num_heads=12, patch_bottleneck=128, class_tokens_start=4),
    "L": dict(hidden_size=1024, num_heads=16, patch_bottleneck=128, class_tokens_start=8),
    "H": dict(hidden_size=1280, num_heads=16, patch_bottleneck=256, class_tokens_start=10),
}
JIT_SPARSE = dict(
    num_experts=16, num_experts_per_tok=2, sparse_layers="every-second", dense_mlp_ratio=8 / 3,
    router="sigmoid:scale=2.5,bias_step=0",
)  # fmt: skip
JIT_DEPTHS = {"B": (12, 10, 2.0), "L": (24, 20, 2.0), "H": (32, 28, 1.6)}
for size, (depth, sparse_depth, ratio) in JIT_DEPTHS.items():
    both = JIT | JIT_SIZES[size]
    dense = dict(depth=depth, num_experts=0, mlp_ratio=8 / 3)
    sparse = dict(depth=sparse_depth, mlp_ratio=ratio, n_shared_experts=ratio) | JIT_SPARSE
    PRESETS[f"JiT-{size}/16"] = both | dense
    PRESETS[f"JiTMoE-{size}/16"] = both | sparse
