"""Which norm? A network, its training and a fair comparison, in one file to read from top to bottom.

Without arguments it takes scikit-learn's digits; ``--data mnist`` takes MNIST where it is, or downloads it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from layernorm import LayerNorm
from layernorm.baselines import BatchNorm
from layernorm.experiments.tasks import digits, mnist

NORMS = {"none": nn.Identity, "batch": BatchNorm, "layer": LayerNorm}


def network(norm: str, inputs: int, hidden: int = 128) -> nn.Module:
    """Make a network with a norm before each ReLU, and none on the logits."""
    first = [nn.Linear(inputs, hidden), NORMS[norm](hidden), nn.ReLU()]
    second = [nn.Linear(hidden, hidden), NORMS[norm](hidden), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Linear(hidden, 10))


def errors(net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the percentage of wrong answers; in evaluation batch norm has its running statistics."""
    with torch.no_grad():
        return 100 * (net.eval()(inputs).argmax(1) != targets).float().mean().item()


def train(data, norm: str, batch_size: int, rate: float, seed: int, epochs: int) -> tuple[float, float]:
    """Train a fresh network; return its errors on the validation and on the test cases at the end."""
    torch.manual_seed(seed)  # the same weights and the same order of the cases for every norm
    net = network(norm, data.train_inputs.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(epochs):
        net.train()
        for cases in torch.randperm(len(data.train_inputs)).split(batch_size)[:-1]:
            loss = cross_entropy(net(data.train_inputs[cases]), data.train_targets[cases])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return errors(net, data.valid_inputs, data.valid_targets), errors(
        net, data.test_inputs, data.test_targets
    )


def main() -> None:
    """Print the errors of every norm at both batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    options = parser.parse_args()
    data = digits.load() if options.data == "digits" else mnist.load(cases=5000, held_out=1000)
    print("batch  norm   rate   test error (%) of LayerNorm and others, at each one's best rate")
    for batch_size in (128, 8):
        without: list[float] = []
        for norm in NORMS:
            # Every rate with every seed; the validation cases choose the rate, the test cases tell the error.
            runs = {
                rate: [
                    train(data, norm, batch_size, rate, seed, options.epochs) for seed in range(options.seeds)
                ]
                for rate in options.rates
            }
            best = min(runs, key=lambda rate: statistics.mean(valid for valid, _ in runs[rate]))
            tests = [test for _, test in runs[best]]
            without = without or tests
            line = f"{batch_size:5}  {norm:5}  {best:<6g} {statistics.mean(tests):5.2f}"
            if norm != "none" and options.seeds > 1:  # paired by seed, with its interval by Student's t
                differences = [test - other for test, other in zip(tests, without, strict=True)]
                middle, half = statistics.mean(differences), stats.sem(differences)
                half *= stats.t.ppf(0.975, options.seeds - 1)
                line += f", {middle:+.2f} against none (95 %: {middle - half:+.2f} to {middle + half:+.2f})"
            print(line)


if __name__ == "__main__":
    main()
