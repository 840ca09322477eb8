"""LLaVA: its records joined with text embeddings by id, and a projector trained on them before a frozen model.

Run it where `llava.json` has records with an `id` and `conversations` with one `<image>`, `text/` and `image/` hold
embeddings, those of text with the ids beside them, and `llm/` a causal language model and its tokenizer. It is what
`realign pretrain` does, for loops of your own.
"""

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import realign_fast as rf
from realign_fast.revision import ReVisionForCausalLM
from realign_fast.revision.data import Records, ReVisionCollator, ReVisionDataset, add_image_token


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("llm")
    embeddings = rf.data.EmbeddingDataset("text", index="text.ids")
    dataset = ReVisionDataset(Records("llava.json", embeddings=embeddings), tokenizer)
    collator = ReVisionCollator(tokenizer, rf.fit("text", "image"), num_visual_tokens=4, max_length=64)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collator)

    model = ReVisionForCausalLM.from_language_model(
        "llm", embedding_dim=embeddings.dim, image_token_id=add_image_token(tokenizer), num_visual_tokens=4
    )
    model.freeze_language_model()
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=3e-2)
    for epoch in range(3):
        dataset.set_epoch(epoch)  # which chooses the noise, where there is some
        losses = []
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
    model.save_projector("mm_projector.bin", style="llava")


if __name__ == "__main__":
    main()
