"""runs/demo/learning.png: the thumb-up rate, version by version."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

mpl.use("agg")


def plot_learning(report: dict[str, Any], path: Path) -> None:
    """Draw the policy's rate with its interval, and what users were shown, over thumbs given."""
    rows = [v for v in report["versions"] if v["policy_thumb_up_rate"] is not None]
    thumbs = [v["thumbs_so_far"] for v in rows]
    rates = [v["policy_thumb_up_rate"] for v in rows]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    low = [v["policy_thumb_up_rate_ci"][0] for v in rows]
    high = [v["policy_thumb_up_rate_ci"][1] for v in rows]
    axes.fill_between(thumbs, low, high, alpha=0.2, color="tab:blue", label="95 % interval")
    axes.plot(thumbs, rates, "o-", color="tab:blue", label="policy alone, held-out prompts")
    shown = [(t, v["served_thumb_up_rate"]) for t, v in zip(thumbs, rows, strict=True)]
    served = [(t, rate) for t, rate in shown if rate is not None]
    axes.plot(*zip(*served, strict=True), "s--", color="tab:orange", label="what users were shown")
    for x, y, row in zip(thumbs, rates, rows, strict=True):
        label = f"v{row['policy_version']}"
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, -14), ha="center")
    control = " (control: shuffled thumbs)" if report["shuffled_thumbs"] else ""
    axes.set(
        xlabel="thumbs given so far",
        ylabel="share of replies liked",
        ylim=(0, 1.02),
        title=f"Learning “{report['preference']}” while serving{control}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
