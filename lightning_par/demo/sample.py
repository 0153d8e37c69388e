"""A callback that lets a byte-level language model write a few lines when its training ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch


class SampleText(pl.Callback):
    """Continue each prompt and print the text on rank zero.

    Every process draws the same bytes from its own seeded generator, so that all of them make the same calls of
    ``predict_step`` through the trainer's strategy, whatever that is.

    Args:
        prompts: texts to continue, as one batch.
        num_bytes: bytes to add to each.
        context: bytes the model sees; shorter texts are padded on the left with newlines, as a file starts.
        temperature: below 1 prefers likely bytes.
        seed: of the draws.
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("def ", "class ", "import ", "    if self."),
        num_bytes: int = 150,
        context: int = 128,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        self.prompts, self.num_bytes, self.context = tuple(prompts), num_bytes, context
        self.temperature, self.seed = temperature, seed

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the texts. Every rank runs this; `LightningModule.print` prints on rank zero only."""
        pl_module.eval()
        with torch.no_grad():
            texts = self.generate(trainer)
        pl_module.train()
        for prompt, text in zip(self.prompts, texts, strict=True):
            pl_module.print(f"\n--- what follows {prompt!r} ---\n{text}")

    def generate(self, trainer: pl.Trainer) -> list[str]:
        """The prompts with their continuations. Collective over all ranks: each must call it."""
        generator = torch.Generator().manual_seed(self.seed)
        lead = max(self.context, *(len(prompt.encode()) for prompt in self.prompts))
        text = torch.tensor([list(prompt.encode().rjust(lead, b"\n")) for prompt in self.prompts])  # [prompts, lead]
        for index in range(self.num_bytes):
            batch = trainer.strategy.batch_to_device({"tokens": text[:, -self.context :]})
            logits = trainer.strategy.predict_step(batch, index)  # [prompts, vocab_size]
            probabilities = torch.softmax(logits.float().cpu() / self.temperature, dim=-1)
            text = torch.cat((text, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
        return [bytes(row).decode(errors="replace").strip("\n ") for row in text.tolist()]
