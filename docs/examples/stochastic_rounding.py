"""Training with no weights but those of an 8-bit format: nearest rounding loses small updates, stochastic keeps them.

A linear model learns by gradient descent. After each step its weights are rounded to E4M3, so an update below half an
ulp of its weight vanishes under rounding to nearest, while stochastic rounding keeps it in expectation.

    python docs/examples/stochastic_rounding.py            prints a table
    python docs/examples/stochastic_rounding.py --plot docs/stochastic_rounding.png
"""

import argparse

import torch

from altgrad.quantization import E4M3, quantize

ROUNDINGS = ["none (float32)", "nearest_ties_to_even", "nearest_ties_to_away", "toward_zero", "stochastic"]
SCALE = 2.0**-6


def train(rounding: str, steps: int) -> tuple[list[float], float]:
    """The loss of each step, and the share of the nonzero updates that left their weight as it was."""
    torch.manual_seed(0)
    inputs, truth = torch.randn(512, 64), torch.randn(64)
    targets = inputs @ truth
    weights = torch.zeros(64)
    losses, lost, updates = [], 0, 0
    for step in range(steps):
        error = inputs @ weights - targets
        losses.append((error**2).mean().item())
        update = -0.005 * (inputs.T @ error) / len(inputs)
        before = weights
        weights = weights + update
        if rounding in ROUNDINGS[1:]:
            weights = quantize(weights, E4M3, SCALE, rounding=rounding)
        lost += ((weights == before) & (update != 0)).sum().item()
        updates += (update != 0).sum().item()
        if step % (steps // 4) == 0:
            print(f"  {rounding}: step {step}, loss {losses[-1]:.4g}", flush=True)
    return losses, lost / updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plot", metavar="FILE", help="draw the loss curves into FILE (needs matplotlib)")
    options = parser.parse_args()
    results = {rounding: train(rounding, options.steps) for rounding in ROUNDINGS}
    print("\n| rounding of the weights | loss, mean of the last 100 steps | updates lost |\n|---|---|---|")
    for rounding, (losses, lost) in results.items():
        print(f"| {rounding} | {sum(losses[-100:]) / 100:.3g} | {lost:.0%} |")
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for rounding, (losses, _) in results.items():
            axes.semilogy(losses, label=rounding)
        axes.set(xlabel="step", ylabel="mean squared error", title="Weights kept in E4M3 alone")
        axes.legend()
        figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
