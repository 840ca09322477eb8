"""Hugging Face datasets: the embeddings in a column mapped in place, all other columns kept, and saved.

Run it where `captions.parquet` has the columns `id`, `caption` and `embedding`, and `image/` holds embeddings.
"""

import datasets

import realign_fast as rf


def main() -> None:
    captions = datasets.load_dataset("parquet", data_files="captions.parquet", split="train")
    captions.save_to_disk("captions")
    alignment = rf.fit("captions", "image")  # reads what datasets has saved where it lies

    with_arrays = captions.with_format("numpy", columns=["embedding"], output_all_columns=True)
    aligned = with_arrays.map(rf.data.align(alignment), batched=True, batch_size=256)
    aligned.save_to_disk("aligned")

    before, after = rf.fit("captions", "image", method="anchor"), rf.fit("aligned", "image", method="anchor")
    gaps = [fitted.report["gap"]["before"] for fitted in (before, after)]
    print(f"{len(aligned)} rows with {', '.join(aligned.column_names)}: gap {gaps[0]:.3f}, now {gaps[1]:.3f}")

    training = aligned.with_format("torch").train_test_split(test_size=0.1, seed=0)["train"]
    for batch in training.iter(batch_size=64):
        assert batch["embedding"].shape[1] == alignment.dim


if __name__ == "__main__":
    main()
