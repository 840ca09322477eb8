"""What the numbers of the settling experiment say: verdicts as its plan defines them, a table, words and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _intervals import deviation, interval
from _settle_seed import ATTRIBUTES

Claims = dict[str, tuple[str, tuple[tuple[str, str], ...]]]  # by title: the stage, and pairs of arms: more, less
STAGES, PARTS = ("zero-shot", "stage 2"), ("seen", "unseen")
DECIDES = "zero-shot seen mean"
_REST = {"unseen": "zero-shot unseen", "after stage 2": "stage 2 seen", "unseen after stage 2": "stage 2 unseen"}
COLUMNS = ["stage 1 on", "cosine to pair", "zero-shot: mean of six", "against paired (95%)", "it", *ATTRIBUTES]
COLUMNS += ["all right", *(f"{title}: {name}" for title in _REST for name in ("mean", "all right"))]


@dataclass
class Findings:
    """`figures[arm][figure]` holds one number a seed; a figure is "cosine" or "zero-shot seen mean" and so on."""

    figures: dict[str, dict[str, np.ndarray]]
    margin: float
    claims: Claims
    gap: float

    @classmethod
    def of(cls, results: list[dict[str, Any]], margin: float, claims: Claims) -> Findings:
        found: dict[str, dict[str, list[float]]] = {}
        for result in results:
            each = {"cosine": result["cosine"]}
            for stage in STAGES:
                for part in PARTS:
                    each |= {f"{stage} {part} {name}": value for name, value in result[stage][part].items()}
            for name, value in each.items():
                found.setdefault(result["arm"], {}).setdefault(name, []).append(value)
        arrays = {arm: {name: np.array(each) for name, each in figures.items()} for arm, figures in found.items()}
        gap = float(np.mean([result["figures"]["modality gap"] for result in results]))
        return cls(arrays, margin, claims, gap)

    @property
    def unpaired(self) -> list[str]:
        return [arm for arm in self.figures if not arm.startswith("paired") and arm != "no stage 1"]

    def mean(self, arm: str, figure: str = DECIDES) -> float:
        return float(self.figures[arm][figure].mean())

    def compared(self, more: str, less: str, figure: str = DECIDES) -> tuple[float, float, float]:
        return interval(self.figures[more][figure] - self.figures[less][figure])

    def deviations(self) -> float:
        """Return how many standard deviations `none` lies below `paired`; 0 where one seed has none."""
        spread = max(deviation(self.figures[arm][DECIDES]) for arm in ("paired", "none"))
        return (self.mean("paired") - self.mean("none")) / spread if spread else 0.0

    def informative(self) -> bool:
        return self.mean("paired") >= 0.8 and self.deviations() >= 3

    def verdict(self, arm: str) -> str:
        """Return whether it "substitutes" for pairs, "falls short" of them, or is "open"."""
        mean, low, high = self.compared(arm, "paired")
        if mean >= -self.margin and low > -2 * self.margin:
            return "substitutes"
        return "falls short" if high < -self.margin else "open"

    def orders(self, title: str) -> dict[str, list[str]]:
        """Return the claims of a title by what becomes of them."""
        found: dict[str, list[str]] = {"confirmed": [], "contradicted": [], "open": []}
        stage, pairs = self.claims[title]
        for more, less in pairs:
            if more in self.figures and less in self.figures:
                mean, low, high = self.compared(more, less, f"{stage} seen mean")
                kind = "confirmed" if low > 0 else "contradicted" if high < 0 else "open"
                found[kind].append(f"{more} over {less} ({mean:+.3f})")
        return found


def table(found: Findings) -> list[list[str]]:
    lines = []
    for arm, each in found.figures.items():
        mean, low, high = found.compared(arm, "paired")
        line = [
            arm,
            f"{each['cosine'].mean():.2f}" if arm in found.unpaired else "",
            f"{each[DECIDES].mean():.3f} ± {deviation(each[DECIDES]):.3f}",
            "" if arm == "paired" else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
            found.verdict(arm) if arm in found.unpaired else "",
        ]
        names = [f"zero-shot seen {name}" for name in (*ATTRIBUTES, "all")]
        names += [f"{stage} {name}" for stage in _REST.values() for name in ("mean", "all")]
        lines.append([*line, *(f"{each[name].mean():.2f}" for name in names)])
    return lines


def words(found: Findings) -> str:
    """Return what it shows and what it does not, in one paragraph."""
    paired, none, num_seeds = found.mean("paired"), found.mean("none"), len(found.figures["paired"][DECIDES])
    arms = [arm for arm in found.unpaired if arm != "none"]
    best = max(arms, key=found.mean)
    by = {kind: ", ".join(arm for arm in arms if found.verdict(arm) == kind) or "no arm" for kind in _KINDS}
    after = {arm: found.mean(arm, "stage 2 seen mean") for arm in found.figures}
    trained = [value for arm, value in after.items() if arm != "no stage 1"]
    parts = [
        f"Over {num_seeds} seeds, each with its own world, encoder (modality gap {found.gap:.2f}) and language model, "
        f"stage 1 on paired pictures gets {paired:.3f} of the attributes of held-out pictures right, zero-shot, and on "
        f"text as it is {none:.3f}, {found.deviations():.1f} standard deviations below: by its plan the experiment "
        f"{'can' if found.informative() else 'CANNOT'} tell.",
        f"Substitutes for pairs, within {found.margin}: **{by['substitutes']}**; falls short: {by['falls short']}; "
        f"open: {by['open']}.",
        f"The best is {best}, {found.mean(best):.3f}, {(found.mean(best) - none) / max(paired - none, 1e-9):.0%} of "
        f"the way from text as it is to pairs. Of combinations that nothing was trained on, it gets "
        f"{found.mean(best, 'zero-shot unseen mean'):.3f}, pairs {found.mean('paired', 'zero-shot unseen mean'):.3f}.",
        f"After stage 2 the arms lie between {min(trained):.3f} and {max(trained):.3f}"
        + (f", without stage 1 at {after['no stage 1']:.3f}." if "no stage 1" in after else "."),
    ]
    for title in found.claims:
        said = [f"{kind}: {', '.join(each)}" for kind, each in found.orders(title).items() if each]
        parts += [f"{title}, {'; '.join(said)}."] if said else []
    parts.append(
        "What it does not show is what models of billions of parameters make of photographs: here encoder and language "
        f"model have less than a million parameters, captions follow a grammar, and {num_seeds} seeds tell large "
        "differences only."
    )
    return " ".join(parts)


_KINDS = ("substitutes", "falls short", "open")


def plot(found: Findings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in found.figures if arm != "no stage 1"]  # which is far to the left
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.33 * len(arms) + 1.4), sharey=True, layout="constrained")
    for axis, stage, title in zip(axes, STAGES, ("zero-shot", "after stage 2"), strict=True):
        for part, shift, label in (("seen", -0.12, "trained combinations"), ("unseen", 0.12, "held-out ones")):
            each = [found.figures[arm][f"{stage} {part} mean"] for arm in arms]
            means, spreads = [one.mean() for one in each], [deviation(one) for one in each]
            axis.errorbar(means, np.arange(len(arms)) + shift, xerr=spreads, fmt="o", ms=4, capsize=2, label=label)
        axis.axvline(found.mean("paired", f"{stage} seen mean"), color="grey", lw=0.8, ls=":")
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.supxlabel(
        "right attributes of held-out pictures: mean of six, and standard deviation over seeds", fontsize=9
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
