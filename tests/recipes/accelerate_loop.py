"""Accelerate: a loop over rows by number, with the alignment as a layer of the model that is trained.

Run it where `text/` and `image/` hold embeddings with ids beside them, of which the first letter is what to learn; on
several processes by `accelerate launch`. Accelerate deals a data set to them; an `EmbeddingStream` does so by itself,
so its loader would stay out of `prepare`.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import realign_fast as rf

CLASSES = "abcde"


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    aligned = rf.nn.ReAlign(rf.fit("text", "image"))  # nothing in it is trained, all of it is saved
    model = torch.nn.Sequential(aligned, torch.nn.Linear(aligned.dim, len(CLASSES)))
    with accelerator.main_process_first():  # which makes the index
        dataset = rf.data.EmbeddingDataset("text", index="text.ids")
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(3):
        losses = []
        for batch in loader:
            labels = torch.tensor([CLASSES.index(each[0]) for each in batch["id"]], device=accelerator.device)
            loss = torch.nn.functional.cross_entropy(model(batch["embedding"]), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        aligned.raise_bad_rows()  # once an epoch: it waits for the device
        mean = accelerator.gather(torch.stack(losses).mean()).mean()
        accelerator.print(f"epoch {epoch}: loss {mean:.3f}")
    accelerator.save_state("state")
    accelerator.load_state("state")


if __name__ == "__main__":
    main()
