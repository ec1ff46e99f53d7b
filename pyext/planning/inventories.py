"""Parameter lists of published models, generated from the numbers of their architecture, and scaled to a memory budget.

Sources: GPT-2, Radford et al. 2019 (output head tied to the embedding); Llama 3 8B, Dubey et al. 2024; ResNet-50,
He et al. 2016, with the strides and names of torchvision, which do not matter here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

Shapes = dict[str, tuple[int, ...]]
FEWEST_LAYERS = 4  # rather narrower than shallower: the number of tensors is what an inventory is for


def gpt2(layers: int = 12, shrink: int = 1) -> Shapes:
    """GPT-2 small, biases everywhere, matrices as out x in: 124,439,808 parameters."""
    width, vocabulary, context = 768 // shrink, 50257 // shrink, 1024 // shrink
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for layer in range(layers):
        matrices = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (width,), f"h.{layer}.{name}.bias": (width,)}
        for name, (rows, columns) in matrices.items():
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (rows,)}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def llama3(layers: int = 32, shrink: int = 1) -> Shapes:
    """Llama 3 8B: 32 heads and 8 key-value heads of 128, no biases, untied head: 8,030,261,248 parameters."""
    width, hidden, vocabulary = 4096 // shrink, 14336 // shrink, 128256 // shrink
    keys = width // 4
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        block = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def resnet50(layers: int = 16, shrink: int = 1) -> Shapes:
    """ResNet-50: 16 bottleneck blocks in four stages, batch norms with weight and bias: 25,557,032 parameters.

    Its depth is fixed: `layers` must be 16.
    """
    if layers != 16:
        raise ValueError(f"resnet50: layers is {layers}, expected 16")
    shapes: Shapes = {}

    def convolution(name: str, norm: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.weight"] = (out, into, size, size)
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (out,)

    channels = 64 // shrink
    convolution("conv1", "bn1", channels, 3, 7)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 * 2 ** (stage - 1) // shrink
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", width, channels, 1)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            convolution(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    classes = 1000 // shrink
    return shapes | {"fc.weight": (classes, channels), "fc.bias": (classes,)}


@dataclass(frozen=True)
class Inventory:
    """A model's parameter shapes by name; `title` says how it was scaled."""

    title: str
    shapes: Shapes

    @property
    def elements(self) -> int:
        return elements(self.shapes)


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# name: (generator, its layers, the fewest that a scaled one may have)
MODELS: dict[str, tuple[Callable[..., Shapes], int, int]] = {
    "gpt-2": (gpt2, 12, FEWEST_LAYERS),
    "llama-3-8b": (llama3, 32, FEWEST_LAYERS),
    "resnet-50": (resnet50, 16, 16),
}


def inventory(name: str, budget: int | None = None, bytes_per_element: int = 16) -> Inventory:
    """The model, or as much of it as fits: at most `budget` bytes at `bytes_per_element` (AdamW in float32: 16).

    All widths (and the vocabulary) are divided by the smallest power of two with which at least FEWEST_LAYERS layers
    fit; of these as many are taken as fit.  Raises ValueError for an unknown name or a budget that nothing fits.
    """
    if name not in MODELS:
        raise ValueError(f"inventory: name is {name!r}, expected one of {', '.join(MODELS)}")
    generate, full, fewest = MODELS[name]
    for shrink in (1, 2, 4, 8, 16, 32, 64):
        for layers in range(full, fewest - 1, -1):
            shapes = generate(layers=layers, shrink=shrink)
            if budget is None or elements(shapes) * bytes_per_element <= budget:
                parts = [f"{layers} of {full} layers"] if layers < full else []
                parts += [f"widths / {shrink}"] if shrink > 1 else []
                return Inventory(", ".join([name, *parts]), shapes)
    raise ValueError(f"inventory: {name} does not fit into {budget} bytes at {bytes_per_element} bytes per element")
