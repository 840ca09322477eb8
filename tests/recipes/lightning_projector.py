"""Lightning: a projector trained on aligned text embeddings, tried on those of images, which it has never seen.

Run it where `text/` and `image/` hold embeddings with ids beside them, of which the first letter is what to learn.
"""

import lightning as L  # noqa: N812 (as its own documentation has it)
import torch
from torch.utils.data import DataLoader

import realign_fast as rf

CLASSES = "abcde"


class Projector(L.LightningModule):
    def __init__(self, alignment: rf.Alignment) -> None:
        super().__init__()
        self.alignment = alignment
        self.images = rf.nn.ReAlign(alignment, side="target")
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(alignment.dim, 32), torch.nn.GELU(), torch.nn.Linear(32, len(CLASSES))
        )

    def setup(self, stage: str) -> None:
        # By now there is a process group: a stream deals its rows to the ranks by itself.
        self.stream = rf.data.EmbeddingStream("text", self.alignment, batch_size=64, shuffle=True, index="text.ids")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream, batch_size=None, num_workers=2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(rf.data.EmbeddingStream("image", batch_size=64, index="image.ids"), batch_size=None)

    def on_train_epoch_start(self) -> None:
        self.stream.set_epoch(self.current_epoch)

    def labels(self, ids: list[str]) -> torch.Tensor:
        return torch.tensor([CLASSES.index(each[0]) for each in ids], device=self.device)

    def training_step(self, batch: dict) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layers(batch["embedding"]), self.labels(batch["id"]))

    def validation_step(self, batch: dict) -> None:
        right = self.layers(self.images(batch["embedding"])).argmax(-1) == self.labels(batch["id"])
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.layers.parameters(), lr=1e-2)


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=4, logger=False, enable_progress_bar=False)
    trainer.fit(Projector(rf.fit("text", "image")))
    print(f"accuracy on images: {trainer.callback_metrics['accuracy']:.3f}")
    trainer.save_checkpoint("projector.ckpt")
