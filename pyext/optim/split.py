"""Which parameters are hidden matrices (Muon's) and which are not (AdamW's), decided from names and shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

# Wrappers put these in front of the names that the model's author chose.
_WRAPPERS = re.compile(
    r"^((module|model|transformer|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
_EMBEDDING = re.compile(
    r"(^|[._])(emb|embed|embedding|embeddings|embedder|wte|wpe|\w*_emb|\w*_embed\w*|embed_\w*)(?=[._]|$)"
)
_HEAD_ANYWHERE = {"lm_head", "head", "unembed", "unembedding", "embed_out", "classifier"}
_HEAD_ON_TOP = _HEAD_ANYWHERE | {"output", "out", "score", "logits", "output_projection", "proj_out", "decoder_head"}


@dataclass(frozen=True)
class Assignment:
    """One parameter's place: which algorithm updates it, and why."""

    name: str
    shape: tuple[int, ...]
    algorithm: str  # "muon" or "adamw"
    reason: str

    def __str__(self) -> str:
        return f"{self.algorithm:6} {self.name} {self.shape}: {self.reason}"


def assign(name: str | None, param: Tensor, matrices: str = "whole") -> Assignment:
    """Muon for 2-D parameters that are not, by their name, an embedding or an output head; AdamW for all others.

    matrices: "flatten" or "stack" make a parameter of more dimensions one matrix (out, all others) or many.

    Embeddings and heads are matrices by storage only: each row belongs to one token or class and gets gradients of its
    own, so that orthogonalising across rows has no meaning (Jordan et al. 2024, "Muon").  Without a name (None) the
    shape alone decides.
    """
    shape = tuple(param.shape)
    label = "(unnamed)" if name is None else name
    asked = matrices != "whole" and param.ndim > 2
    if param.ndim != 2 and not asked:
        return Assignment(label, shape, "adamw", f"{param.ndim}-D, not a matrix")
    sides = (
        shape if not asked else (shape[0], param.numel() // max(shape[0], 1)) if matrices == "flatten" else shape[-2:]
    )
    if min(sides) <= 1:
        return Assignment(label, shape, "adamw", "a vector stored as a matrix")
    what = f"{param.ndim}-D, {'flattened' if matrices == 'flatten' else 'a stack of matrices'}" if asked else ""
    if name is None:
        return Assignment(label, shape, "muon", what or "2-D; no names were given to tell embeddings and heads")
    parts = _WRAPPERS.sub("", name).split(".")
    modules = parts[:-1] if len(parts) > 1 else parts
    if modules[0] in _HEAD_ON_TOP or modules[-1] in _HEAD_ANYWHERE:
        return Assignment(label, shape, "adamw", "output head, by its name")
    if _EMBEDDING.search(".".join(modules)):
        return Assignment(label, shape, "adamw", "embedding, by its name")
    return Assignment(label, shape, "muon", what or "hidden matrix")
