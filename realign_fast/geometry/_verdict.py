"""The figures of a report in words."""

from __future__ import annotations

from typing import Any

# A gap no larger than so many noise floors, or of which so small a share is left, cannot matter to what is trained on
# the rows.
_FLOORS, _SHARE_LEFT = 1.5, 0.1
# How far the spectrum may change, and how many neighbours must stay, for a map to count as gentle.
_EXPONENT, _EFFECTIVE_RANK = 0.1, 0.1
_KEPT, _HALF_KEPT = 0.8, 0.5


def verdict(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return what is to be said of the first map of a report: the gap, the spectrum, the neighbours, what to do."""
    none, entry = report["methods"][:2]
    parts = [_aligned(none, entry), _anisotropy(none, entry), _neighbourhoods(entry)]
    return [*parts, _advice(report, none, entry, [part["level"] for part in parts])]


def _part(level: str, title: str, text: str) -> dict[str, str]:
    return {"level": level, "title": title, "text": text}


def _aligned(none: dict[str, Any], entry: dict[str, Any]) -> dict[str, str]:
    before, gap = none["gap"], entry["gap"]
    what = (
        f"The centroids of text and images lay {before['value']:.3g} apart and lie {gap['value']:.3g} apart after "
        f"{entry['name']}, on rows that were not used in the fit; samples of one distribution would lie "
        f"{gap['noise_floor']:.3g} apart."
    )
    if before["value"] <= _FLOORS * before["noise_floor"]:
        return _part("none", "There was no gap", what)
    if gap["value"] <= _FLOORS * gap["noise_floor"]:
        return _part("good", "Aligned", f"{what} What is left is noise.")
    if gap["value"] <= _SHARE_LEFT * before["value"]:
        share = 100 * gap["value"] / before["value"]
        return _part("warn", "Nearly aligned", f"{what} So {share:.2g} % of the gap is left, more than noise.")
    return _part("bad", "Not aligned", f"{what} That is more than noise, and more than a tenth of what there was.")


def _anisotropy(none: dict[str, Any], entry: dict[str, Any]) -> dict[str, str]:
    before, after = none["spectrum"]["exponent"], entry["spectrum"]["exponent"]
    rank, new_rank = none["effective_rank"], entry["effective_rank"]
    what = f"The effective rank of the text went from {rank:.0f} to {new_rank:.0f} by {entry['name']}"
    same_slope = True
    if before is not None and after is not None:
        same_slope = abs(after - before) <= _EXPONENT * abs(before)
        what += f", and its eigenvalues, which fell as rank to the power {-before:.2f}, fall as {-after:.2f}"
    what += "."
    if same_slope and abs(new_rank - rank) <= _EFFECTIVE_RANK * rank:
        return _part("good", "Anisotropy kept", what)
    if new_rank > rank:
        return _part("warn", "Anisotropy changed", f"{what} The text has become rounder than it was.")
    return _part("warn", "Anisotropy changed", f"{what} The text varies in fewer directions than it did.")


def _neighbourhoods(entry: dict[str, Any]) -> dict[str, str]:
    overlap, mixing = entry["overlap"], entry["mixing"]
    what = (
        f"Of the {overlap['k']} nearest texts of a text {100 * overlap['value']:.0f} % are still its nearest, and "
        f"{100 * mixing['value']:.0f} % of the {mixing['k']} nearest rows are of the other modality (50 % would be "
        "perfect)."
    )
    if overlap["value"] >= _KEPT:
        return _part("good", "Neighbourhoods kept", what)
    if overlap["value"] >= _HALF_KEPT:
        return _part("warn", "Neighbourhoods partly kept", what)
    return _part("bad", "Neighbourhoods lost", f"{what} What a text means has changed with its place.")


def _advice(report: dict[str, Any], none: dict[str, Any], entry: dict[str, Any], levels: list[str]) -> dict[str, str]:
    advice = []
    if levels[0] == "bad":
        advice.append(
            "Do not train on these rows. See whether text and images come from one encoder, and whether the rows that "
            "were measured come from where the fit's did."
        )
    elif levels[2] == "bad" and entry["name"].startswith(("anchor", "realign")):
        advice.append(
            "Neighbours change although this map only shifts and scales: the clouds are wide against their distance. "
            "See whether the embeddings were centred or whitened before."
        )
    elif levels[2] == "bad":
        advice.append(
            "The map is too strong: fit realign, or ot with its own choice of strength, which keep neighbours."
        )
    else:
        advice.append("The aligned text can stand in for image embeddings in training.")
    gap, curve = entry["gap"], report["sample_size"]["points"]
    if levels[0] == "warn" and curve and curve[-1]["mean"] < 0.8 * curve[max(0, len(curve) - 3)]["mean"]:
        advice.append("The gap still falls with the number of rows: fit on more of them.")
    elif levels[0] == "warn" and gap["in_sample"] is not None and gap["value"] > 3 * gap["in_sample"]:
        advice.append("On the rows of the fit the gap is far smaller: more rows would help.")
    if none["recall"] and entry["recall"]:
        before, after = (each["recall"]["text_to_image"]["1"] for each in (none, entry))
        if after < before - 0.02:
            advice.append(
                f"For search keep the embeddings as they are, or use center: the right image came first for "
                f"{100 * before:.0f} % of the texts, and for {100 * after:.0f} % of the mapped ones."
            )
    level = "bad" if "bad" in levels else "warn" if "warn" in levels else "good"
    return _part(level, "What to do", " ".join(advice))
