"""Ours and PEFT compute the same thing: checked before anything is timed."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

from bench.cases import CASES
from bench.model import SIZES, attach, llama, token_ids

__all__ = ["TOLERANCE", "difference"]

TOLERANCE = 1e-4
"""Relative to the largest entry. fp32, several layers deep; a wrong scale or norm is off by 1e-2 or more."""


def difference(method: str, device: str = "cpu") -> float | None:
    """The largest relative difference between ours and PEFT, or None where PEFT has no such method.

    Both get the same random adapter, as files written by PEFT and read by `import_peft`. Compared are the
    logits, the gradient at the embeddings, and what one step of plain SGD does to the logits, which agrees
    only if every gradient does; the logits alone where PEFT's gradients are wrong. A tiny model in fp32; dropout is
    off, for the masks cannot be shared.

    Raises:
        RuntimeError: they differ by more than TOLERANCE.
    """
    if CASES[method].peft is None:
        return None
    import slimtune as st

    size = SIZES["tiny"]
    ids = token_ids(size, device)
    theirs, ours = llama(size, device=device), llama(size, device=device)
    wrapped = attach("peft", method, theirs)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad and not p.any():  # starts at zero
                p.normal_(std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        st.import_peft(ours, folder)
    pairs = list(zip(_footprint(theirs, ids), _footprint(ours, ids), strict=True))
    if not CASES[method].peft_gradients:
        pairs = pairs[:1]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{method}: ours and PEFT differ by {worst:.1e}, allowed is {TOLERANCE:.0e}")
    return worst


def _footprint(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    model.eval()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    before = model(inputs_embeds=embeddings).logits
    torch.nn.functional.cross_entropy(before[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= p.grad
        after = model(inputs_embeds=embeddings).logits
    return before.detach(), embeddings.grad, after - before.detach()
