"""Makes tests/data/gptqmodel_*: tiny Llamas that GPTQModel quantized and packed.

    pip install gptqmodel==7.7.0 && GPTQMODEL_CPU_WORKERS=2 python tests/peers/make_gptqmodel.py

It runs on a CPU, with torch 2.13 too. `expected.safetensors` holds the weights `[out, in]` that it makes of its own
files.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parents[1] / "data"
CONFIGS = {
    "gptqmodel_act_order": {"bits": 4, "group_size": 16, "desc_act": True, "sym": True},
    "gptqmodel_v2": {"bits": 3, "group_size": 16, "desc_act": False, "sym": False, "format": "gptq_v2"},
    "gptqmodel_awq": {"bits": 4, "group_size": 16, "method": "awq", "format": "gemm", "sym": False},
}
BACKENDS = {"gptqmodel_awq": BACKEND.AWQ_TORCH}  # in which it reads its own files
KEPT = {"config.json", "quantize_config.json", "model.safetensors"}


def tiny_llama(directory, hidden_size):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).to(torch.float16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2").save_pretrained(directory)


@torch.no_grad()
def weight_of(layer):
    """What the layer multiplies with, by asking it for the product with each unit vector."""
    return layer(torch.eye(layer.in_features, dtype=torch.float16)).T.contiguous()


def main():
    for name, config in CONFIGS.items():
        out = DATA / name
        with tempfile.TemporaryDirectory() as floats:
            tiny_llama(floats, 64 if name == "gptqmodel_awq" else 32)  # its search takes 64 outputs at a time
            shutil.rmtree(out, ignore_errors=True)
            model = GPTQModel.load(floats, QuantizeConfig(**config))
            tokens = torch.randint(0, 32, (64, 64)).tolist()
            model.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in tokens], batch_size=8)
            model.save(str(out))
            backend = BACKENDS.get(name, BACKEND.GPTQ_TORCH)
            read = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
            layers = {n: m for n, m in read.model.named_modules() if isinstance(m, BaseQuantLinear)}
            weights = {f"{n}.weight": weight_of(m) for n, m in layers.items()}
            for file in out.iterdir():
                if file.name not in KEPT:
                    file.unlink()
            save_file(weights, out / "expected.safetensors")


if __name__ == "__main__":
    main()
