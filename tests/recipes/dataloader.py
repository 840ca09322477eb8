"""PyTorch: aligned batches from two workers, and an epoch that is stopped and goes on with the next batch.

Run it where `text/` and `image/` hold embeddings. torchdata's StatefulDataLoader is torch's DataLoader, but for being
able to say where its workers stand.
"""

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

import realign_fast as rf


def make_loader(alignment: rf.Alignment, epoch: int) -> StatefulDataLoader:
    stream = rf.data.EmbeddingStream("text", alignment, batch_size=64, shuffle=True, seed=1)
    stream.set_epoch(epoch)
    return StatefulDataLoader(stream, batch_size=None, num_workers=2)


def main() -> None:
    alignment = rf.fit("text", "image")
    for epoch in range(2):
        rows, total = 0, torch.zeros(alignment.dim)
        for batch in make_loader(alignment, epoch):
            rows += len(batch["id"])
            total += batch["embedding"].sum(0)
        gap = (total / rows - torch.tensor(alignment.target.mean)).norm()
        print(f"epoch {epoch}: {rows} rows, {gap:.4f} from the images")

    ids = []
    loader = make_loader(alignment, epoch=2)
    for number, batch in enumerate(loader):
        ids.append(batch["id"])
        if number == 4:
            torch.save(loader.state_dict(), "loader.pt")
            break

    loader = make_loader(alignment, epoch=2)  # in another process, on another day
    loader.load_state_dict(torch.load("loader.pt"))
    ids += [batch["id"] for batch in loader]
    seen = torch.cat(ids)
    print(f"epoch 2, in two parts: {len(seen)} rows, {len(seen.unique())} of them different")


if __name__ == "__main__":
    main()
