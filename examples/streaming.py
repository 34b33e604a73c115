"""Online inference: a `LayerNormLSTM` that takes one step at a time as samples arrive, in microseconds each.

It reads several channels of a signal sample by sample. Now and then a channel is interrupted and starts
over. At the end the network gets the same samples as one sequence: the outputs are the same, bit for bit
with the compiled kernels.

    python examples/streaming.py [--steps N] [--channels N] [--hidden H]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from layernorm import LayerNormLSTM


def signal(step: int, channels: int) -> Tensor:
    """Return the samples (channels, 1) of one step: a sine of a different frequency in each channel."""
    return torch.sin(0.1 * step * (1 + torch.arange(channels, dtype=torch.float32))).unsqueeze(-1)


def main() -> None:
    """Step through the signal, print the time per step, and compare with the whole sequence."""
    parser = argparse.ArgumentParser(description="A layer-normalized LSTM, one step at a time.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    lstm = LayerNormLSTM(1, options.hidden, num_layers=2)  # in real life: trained, its weights loaded
    stream = lstm.stream(batch_size=options.channels)
    samples, cuts, outputs, times = [], [], [], []
    for step in range(options.steps):
        sample, cut = signal(step, options.channels), torch.rand(options.channels) < 0.01
        if cut.any():
            stream.reset(cut)
        begin = time.perf_counter()
        outputs.append(stream.step(sample))
        times.append(time.perf_counter() - begin)
        samples.append(sample)
        cuts.append(cut)
    with torch.inference_mode():
        whole, _ = lstm(torch.stack(samples), resets=torch.stack(cuts))
    online = torch.stack(outputs)
    print(f"LayerNormLSTM, 2 layers of {options.hidden}, {options.channels} channels: {stream.kernel} kernel")
    print(f"a step takes {statistics.median(times) * 1e6:.1f} us (median of {options.steps})")
    print("same bits as the whole sequence:", torch.equal(online, whole))
    print(f"largest difference: {(online - whole).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
