"""The model that is measured, and the three columns built from it: the limit, PEFT, ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import CASES, TARGETS

__all__ = ["COLUMNS", "DTYPES", "SIZES", "Column", "Size", "build", "llama"]

COLUMNS = ("limit", "peft", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A Llama-style model and its batch."""

    hidden: int = 512
    layers: int = 4
    heads: int = 8
    mlp: int = 1408
    vocab: int = 1000
    batch: int = 4
    tokens: int = 256


RUN_STEPS = 1000
"""Of the run that controllers are made for; only its first steps are measured."""

SIZES = {
    "tiny": Size(hidden=64, layers=2, heads=4, mlp=192, vocab=100, batch=2, tokens=16),
    "cpu": Size(),
    "cuda": Size(hidden=2048, layers=8, heads=16, mlp=5632, vocab=32000, batch=8, tokens=512),
}


def llama(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> nn.Module:
    """A randomly initialised causal language model, frozen, in training mode. Same seed, same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.mlp,
        vocab_size=size.vocab,
        max_position_embeddings=max(size.tokens, 2048),
        attn_implementation="sdpa",
        use_cache=False,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    if device == "meta":
        with torch.device("meta"):
            return LlamaForCausalLM(config).to(dtype).train().requires_grad_(False)
    return LlamaForCausalLM(config).to(device, dtype).train().requires_grad_(False)


class Column:
    """One way of running the training step.

    In the limit the embeddings' output asks for a gradient, so that the backward pass runs through every
    frozen layer; elsewhere only the adapters do, as in training. The limit therefore also pays for the input
    gradient of the first layer's projections, which an adapted model does not need (about 3 % of this step).
    """

    def __init__(self, name: str, model: nn.Module, ids: Tensor) -> None:
        self.name, self.model, self.ids = name, model, ids
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self.controllers: list[Any] = []

    def forward(self) -> Tensor:
        """The mean next-token loss."""
        embeddings = self.model.get_input_embeddings()(self.ids)
        if self.optimizer is None:
            embeddings.requires_grad_()
        return self.model(inputs_embeds=embeddings, labels=self.ids).loss

    def before_update(self) -> None:
        """What the method's controllers do to the gradients."""
        for controller in self.controllers:
            controller.before_step(self.model)

    def update(self) -> None:
        """One AdamW step; nothing in the limit."""
        if self.optimizer is not None:
            self.optimizer.step()

    def after_update(self) -> None:
        """What they do after it."""
        for controller in self.controllers:
            controller.after_step(self.model)

    def clear(self) -> None:
        """Drop the gradients, outside the timed part."""
        for p in self.trained:
            p.grad = None


def attach(column: str, method: str, model: nn.Module) -> Any:
    """Adapt `model` in place the way `column` does it. Returns PEFT's wrapper for "peft", else the model."""
    if column == "peft":
        import peft

        config = CASES[method].peft
        if config is None:
            raise ValueError(f"{method}: PEFT has no such method")
        return peft.get_peft_model(model, config(peft))
    if column == "ours":
        import slimtune as st

        st.adapt(model, CASES[method].ours(st), targets=TARGETS)
    return model


def token_ids(size: Size, device: str = "cpu") -> Tensor:
    """(batch, tokens), the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(size.vocab, (size.batch, size.tokens), generator=generator).to(device)


def build(column: str, method: str, size: Size, dtype: str = "fp32", device: str = "cpu") -> Column:
    """The model of `size` with `method` attached as `column` does it, and its batch."""
    model = llama(size, DTYPES[dtype], device)
    attach(column, method, model)
    made = Column(column, model, token_ids(size, device))
    if column == "ours":
        import slimtune as st

        made.controllers = st.controllers_of(CASES[method].ours(st), RUN_STEPS)
        for controller in made.controllers:
            st.attach(controller, model, made.optimizer).remove()  # ready, but called by hand, to be timed
    return made
