"""Adam whose two moments are kept as codes of 8 bits with a scale for each 128 elements, beside torch.optim.Adam.

It trains the digits network of train_digits.py in float32, half of the time with one optimizer and half with another
that has loaded its state, and prints the accuracy and the bytes that the moments take.

    python docs/examples/block_adam.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_digits import BATCH, LEARNING_RATE, Network, digits

from altgrad.quantization import E4M3, UE5M3, FP8Format, PerBlock, compute_scale, decode, encode

BLOCKS = PerBlock(128)


class BlockAdam(torch.optim.Optimizer):
    """Adam with its first moment in E4M3 and its second in UE5M3, whose range is the square of E4M3's.

    Where gradients are steady a step changes the second moment by less than a thousandth, far less than half the
    distance of two values: rounded to the nearest it would stay. Stochastic rounding moves it, right in the mean.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], **{key: group[key] for key in ("lr", "betas", "eps")})
        return loss

    def _update(self, p: Tensor, state: dict[str, Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        grad = p.grad.flatten().float()
        if not state:
            state["step"] = 0
            self._keep(state, "exp_avg", torch.zeros_like(grad), E4M3)
            self._keep(state, "exp_avg_sq", torch.zeros_like(grad), UE5M3)
        state["step"] += 1
        first, second = self._moment(state, "exp_avg", E4M3), self._moment(state, "exp_avg_sq", UE5M3)
        first.lerp_(grad, 1 - betas[0])
        second.lerp_(grad.square(), 1 - betas[1])
        corrections = [1 - beta ** state["step"] for beta in betas]
        p.sub_(lr * (first / corrections[0] / ((second / corrections[1]).sqrt() + eps)).view_as(p))
        self._keep(state, "exp_avg", first, E4M3)
        self._keep(state, "exp_avg_sq", second, UE5M3, rounding="stochastic")

    @staticmethod
    def _keep(state: dict[str, Any], name: str, moment: Tensor, format: FP8Format, **modes: str) -> None:
        scale = compute_scale(moment, format, granularity=BLOCKS, compact=True)
        state[name], state[f"{name}_scale"] = encode(moment, format, scale, granularity=BLOCKS, **modes), scale

    @staticmethod
    def _moment(state: dict[str, Any], name: str, format: FP8Format) -> Tensor:
        return decode(state[name], format, state[f"{name}_scale"], granularity=BLOCKS)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state as it was saved: torch's own would cast codes to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            self.state[p] = {key: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for key, v in saved.items()}


Make = Callable[[Any], torch.optim.Optimizer]


def train(make: Make, epochs: int, seed: int = 0, reloads: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network, and the optimizer that trained the second half of the epochs from the state of the first."""
    torch.manual_seed(seed)
    x, _, y, _ = digits()
    model = Network(None)
    optimizer = make(model.parameters())
    for epoch in range(epochs):
        if reloads and epoch == epochs // 2:
            state, optimizer = optimizer.state_dict(), make(model.parameters())
            optimizer.load_state_dict(state)
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model, optimizer


def bytes_a_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Of the tensors of its state, but for those of one element."""
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim]
    return sum(t.nbytes for t in tensors) / sum(p.numel() for p in optimizer.state)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    _, x, _, y = digits()
    return (model(x).argmax(1) == y).float().mean().item()


OPTIMIZERS: dict[str, Make] = {
    "torch.optim.Adam": lambda parameters: torch.optim.Adam(parameters, LEARNING_RATE),
    "BlockAdam": lambda parameters: BlockAdam(parameters, LEARNING_RATE),
}


def main(epochs: int = 30, seeds: int = 5) -> None:
    torch.set_num_threads(1)  # the network is too small to share
    print(f"| optimizer | test accuracy, mean of {seeds} | bytes of state a parameter |\n|---|---|---|")
    for name, make in OPTIMIZERS.items():
        trained = [train(make, epochs, seed) for seed in range(seeds)]
        mean = sum(accuracy(model) for model, _ in trained) / seeds
        print(f"| {name} | {mean:.2%} | {bytes_a_parameter(trained[0][1]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
