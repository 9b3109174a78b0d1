"""Makes tests/data/compressed_tensors_group: a tiny Llama that compressed-tensors packed with `actorder="group"`.

    pip install compressed-tensors==0.14.0.1 transformers torch && python tests/peers/make_compressed_tensors.py

That release still has the order, and the layout of 3-bit codes before 0.18. `expected.safetensors` holds the weights
`[out, in]` that it makes of its own files.
"""

import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parents[1] / "data" / "compressed_tensors_group"
GROUP = {"type": "int", "strategy": "group", "group_size": 16, "actorder": "group"}
SCHEMES = {
    "attention": ([r"re:.*self_attn\..*"], {**GROUP, "num_bits": 4, "symmetric": True}),
    "gates": ([r"re:.*(gate|up)_proj"], {**GROUP, "num_bits": 3, "symmetric": False}),
    "down": ([r"re:.*down_proj"], {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "channel"}),
}


@torch.no_grad()
def find_scales(module):
    """Scales from the extremes of each group, where groups take the inputs in a random order."""
    args, weight = module.quantization_scheme.weights, module.weight
    if args.actorder is not None:
        order = torch.randperm(weight.shape[1])
        module.weight_g_idx[order] = torch.arange(weight.shape[1], dtype=torch.int32) // args.group_size
        weight = weight[:, order].unflatten(1, (-1, args.group_size))
    extremes = weight.amin(-1), weight.amax(-1)
    scale, zero = calculate_qparams(*(e.reshape(len(weight), -1) for e in extremes), args)
    module.weight_scale.copy_(scale)
    module.weight_zero_point.copy_(zero)


def main():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).to(torch.float16)
    groups = {name: {"targets": targets, "weights": weights} for name, (targets, weights) in SCHEMES.items()}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, config)
    modules = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None)}
    for module in modules.values():
        find_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    compressor.update_config(OUT)
    (OUT / "generation_config.json").unlink(missing_ok=True)
    compressor.decompress_model(model)
    save_file({f"{name}.weight": m.weight.detach().contiguous() for name, m in modules.items()},
              OUT / "expected.safetensors")  # fmt: skip


if __name__ == "__main__":
    main()
