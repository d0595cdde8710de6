"""Trains networks with PyTorch on a GPU, some hundred in minutes, for `versus.py`.

python benchmarks/versus.py ... --tasks_dir=FOLDER
python benchmarks/torch_trainings.py FOLDER --output=benchmarks/versus.jsonl

One network of 2M MACs keeps a GPU as good as idle. Here, each process trains a group of networks
side by side, each step of each a CUDA graph on a stream of its own. Network, initial weights, loss,
optimizer, schedule, random flip and crop are those of `fpnas train`: with equal weights and images
the losses of three steps agree with Keras' to 1e-5 (`--compare`, which needs Keras and no GPU). The
order of the images and the random numbers differ.

Needs torch, numpy and, of this project, `fpnas_keras.architecture` alone. TensorFlow is not needed.
"""

import argparse
import json
import multiprocessing
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fpnas_keras.architecture import Architecture, Block, attention_filters, expanded_filters

if TYPE_CHECKING:
    import keras

Task = dict[str, Any]
Images = dict[str, tuple[torch.Tensor, torch.Tensor]]

BN_EPSILON = 1e-3
ACTIVATIONS = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hard_silu": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": functional.hardsigmoid,
}


def pad_same(x: torch.Tensor, kernel_size: int, strides: int) -> torch.Tensor:
    """Padding as TensorFlow has it: one pixel more at the end than at the start, if odd."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // strides) - 1) * strides + kernel_size - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads) if any(pads) else x


class Conv(nn.Module):
    """A convolution, by default with a batch normalization and an activation behind it."""

    def __init__(
        self,
        filters_in,
        filters,
        kernel_size=1,
        strides=1,
        activation=None,
        depthwise=False,
        norm=True,
    ):
        super().__init__()
        self.strides, self.kernel_size = strides, kernel_size
        self.groups = filters_in if depthwise else 1
        shape = (filters, filters_in // self.groups, kernel_size, kernel_size)
        self.kernel = nn.Parameter(torch.empty(shape))
        # Keras counts one output channel in the fan_out of a depthwise kernel. Its normal
        # distribution is truncated at two standard deviations and has the variance 2 / fan_out.
        fan_out = kernel_size**2 * (1 if depthwise else filters)
        std = (2 / fan_out) ** 0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.kernel, 0.0, std, -2 * std, 2 * std)
        self.activation = ACTIVATIONS.get(activation)
        self.norm = norm
        self.bias = nn.Parameter(torch.zeros(filters))  # beta of the norm, if there is one
        if norm:
            self.gamma = nn.Parameter(torch.ones(filters))
            self.register_buffer("mean", torch.zeros(filters))
            self.register_buffer("var", torch.ones(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features to features; the network: pixels to logits."""
        pad = self.kernel_size // 2
        if self.strides > 1:
            x, pad = pad_same(x, self.kernel_size, self.strides), 0
        bias = None if self.norm else self.bias
        x = functional.conv2d(x, self.kernel, bias, self.strides, pad, 1, self.groups)
        if self.norm:
            x = functional.batch_norm(
                x, self.mean, self.var, self.gamma, self.bias, self.training, 0.1, BN_EPSILON
            )
        return self.activation(x) if self.activation else x


class BlockLayers(nn.Module):
    """A block of an architecture; see `NetworkBuilder.block`."""

    def __init__(self, filters_in: int, block: Block):
        super().__init__()
        self.shapes_agree = block.strides == 1 and filters_in == block.filters
        self.skip, self.block = block.skip, block
        layers = self.layers = nn.ModuleDict()
        if block.skip:
            if not self.shapes_agree:
                layers["skip"] = Conv(filters_in, block.filters, strides=block.strides)
            return
        expanded = expanded_filters(filters_in, block.expansion)
        if block.expansion != 1:
            layers["expand"] = Conv(filters_in, expanded, activation=block.activation)
        for split in range(max(1, block.splits)):
            layers[f"depthwise_{split}"] = Conv(
                expanded, expanded, block.kernel_size, block.strides, block.activation, True
            )
        if block.splits:
            reduced = attention_filters(expanded)
            layers["reduce"] = Conv(expanded, reduced, activation="relu", norm=False)
            for split in range(block.splits):
                layers[f"gate_{split}"] = Conv(reduced, expanded, norm=False)
        layers["project"] = Conv(expanded, block.filters)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features to features."""
        layers, x = self.layers, inputs
        if self.skip:
            return x if self.shapes_agree else layers["skip"](x)
        if "expand" in layers:
            x = layers["expand"](x)
        splits = self.block.splits
        parts = [layers[f"depthwise_{split}"](x) for split in range(max(1, splits))]
        x = parts[0]
        if splits:
            pooled = sum(part.mean((2, 3), keepdim=True) for part in parts)
            reduced = layers["reduce"](pooled)
            gates = [layers[f"gate_{split}"](reduced) for split in range(splits)]
            if splits == 1:
                x = x * functional.hardsigmoid(gates[0])
            else:
                weights = torch.softmax(torch.stack(gates), 0)
                x = sum(part * weight for part, weight in zip(parts, weights))
        x = layers["project"](x)
        return x + inputs if self.shapes_agree else x


class Network(nn.Module):
    """The network of an architecture: pixels 0..255, channels first, to logits."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        stem, head = architecture.stem, architecture.head
        self.stem = Conv(
            architecture.input_shape[2],
            stem.filters,
            stem.kernel_size,
            stem.strides,
            stem.activation,
        )
        blocks, filters = [], stem.filters
        for block in architecture.blocks:
            blocks.append(BlockLayers(filters, block))
            filters = block.filters
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(filters, head.filters, activation=head.activation)
        if head.dense_units:
            raise ValueError("networks with dense units are not supported")
        self.classes = nn.Linear(head.filters, architecture.num_classes)
        nn.init.xavier_uniform_(self.classes.weight)
        nn.init.zeros_(self.classes.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features to features; the network: pixels to logits."""
        x = self.head(self.blocks(self.stem(x / 127.5 - 1)))
        return self.classes(x.mean((2, 3)))


class Training:
    """One training, whose step is a CUDA graph.

    Args:
        task: The training, from `versus.py`.
        images: `{"train": (x, y), "test": (x, y)}` on the device: uint8 of shape `(n, channels,
            height, width)` and int64 labels.
        device: Where it runs.
    """

    def __init__(self, task: Task, images: Images, device: str = "cuda"):
        self.task, self.device = task, device
        torch.manual_seed(task["seed"])
        self.network = Network(Architecture.from_dict(task["architecture"])).to(device)
        x, y = images["train"]
        kept, self.test = np.arange(len(y)), images["test"]
        if task["held_out"]:
            order = np.random.default_rng(0).permutation(len(y))
            held, kept = np.split(order, [int(task["held_out"] * len(y))])
            self.test = (x[held], y[held])
        self.x, self.y = functional.pad(x, [task["random_crop"]] * 4), y
        self._draw(kept, x.shape[2], x.shape[1])
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss = torch.zeros(1, device=device)
        self.params = list(self.network.parameters())
        self.decayed = [each for each in self.params if each.ndim > 1]
        self.momenta = [torch.zeros_like(each) for each in self.params]

    def _draw(self, kept, size, channels):
        """Draws the images, shifts and flips of all steps, and computes their learning rates."""
        task, rng = self.task, np.random.default_rng(self.task["seed"])
        batch, crop = task["batch_size"], task["random_crop"]
        per_epoch = len(kept) // batch
        self.steps = steps = per_epoch * task["epochs"]
        epochs = [rng.permutation(kept)[: per_epoch * batch] for _ in range(task["epochs"])]
        self.order = self._put(np.stack(epochs).reshape(steps, batch))
        self.shifts = self._put(rng.integers(0, 2 * crop + 1, (steps, batch, 2)))
        self.flips = self._put(rng.random((steps, batch)) < 0.5)
        step = np.arange(steps)
        progress = np.maximum(step - per_epoch, 0) / (steps - per_epoch)
        rates = np.where(step < per_epoch, step / per_epoch, 0.5 * (1 + np.cos(np.pi * progress)))
        self.rates = self._put((task["learning_rate"] * rates).astype(np.float32))
        self.across = torch.arange(size, device=self.device)
        self.channels = torch.arange(channels, device=self.device)[None, :, None, None]

    def _put(self, values):
        return torch.tensor(values, device=self.device)

    def _batch(self):
        index, shifts, flips = (
            each.index_select(0, self.step)[0] for each in (self.order, self.shifts, self.flips)
        )
        rows = shifts[:, :1] + self.across
        columns = torch.where(flips[:, None], self.across.flip(0), self.across) + shifts[:, 1:]
        x = self.x[
            index[:, None, None, None],
            self.channels,
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        return x.float(), self.y[index]

    def make_step(self) -> None:
        """A step of SGD with Nesterov momentum and decoupled weight decay, as Keras has them."""
        x, y = self._batch()
        loss = functional.cross_entropy(self.network(x), y, label_smoothing=0.1)
        gradients = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            rate = self.rates.index_select(0, self.step)[0]
            torch._foreach_mul_(self.decayed, 1 - rate * 1e-3)
            scaled = torch._foreach_mul(gradients, rate)
            torch._foreach_mul_(self.momenta, 0.9)
            torch._foreach_sub_(self.momenta, scaled)
            torch._foreach_add_(self.params, self.momenta, alpha=0.9)
            torch._foreach_sub_(self.params, scaled)
            self.step += 1
            self.loss.copy_(loss)

    def capture(self) -> None:
        """Captures a step as a graph. What the steps before it have changed is undone."""
        self.network.train()
        self.stream = torch.cuda.Stream()
        state = [*self.params, *self.network.buffers(), *self.momenta, self.step]
        saved = [each.detach().clone() for each in state]
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self.make_step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.make_step()
        with torch.no_grad():
            for each, before in zip(state, saved):
                each.copy_(before)
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Starts the next step."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Accuracy on the test images, or on those held out."""
        self.network.eval()
        parts = zip(*(each.split(1000) for each in self.test))
        right = sum((self.network(x.float()).argmax(1) == y).sum().item() for x, y in parts)
        return right / len(self.test[1])


def train_group(tasks: list[Task], images: dict[str, Images]) -> Iterator[Task]:
    """Trains networks side by side, and yields their rows."""
    trainings = [Training(task, images[task["images"]]) for task in tasks]
    for each in trainings:
        each.capture()
    for step in range(max(each.steps for each in trainings)):
        for each in trainings:
            if step < each.steps:
                each.replay()
        if step % 20 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for each in trainings:
        measured = "val_accuracy" if each.task["held_out"] else "test_accuracy"
        yield each.task | {
            measured: each.accuracy(),
            "trainer": f"torch {torch.__version__}, {torch.cuda.get_device_name()}",
        }


def load_images(folder: str) -> dict[str, Images]:
    """The images of all jobs on the GPU, by job and part."""
    images = {}
    for file in pathlib.Path(folder).glob("*.npz"):
        arrays = np.load(file)
        images[file.stem] = {
            part: (
                torch.tensor(arrays[f"x_{part}"]).permute(0, 3, 1, 2).contiguous().cuda(),
                torch.tensor(arrays[f"y_{part}"]).long().cuda(),
            )
            for part in ("train", "test")
        }
    return images


def work(tasks: list[Task], arguments: argparse.Namespace, following: Any, lock: Any) -> None:
    """Takes one group of tasks after the other, until there is none or the time is over."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    images = load_images(arguments.folder)
    while time.time() < arguments.deadline:
        with lock:
            first = following.value
            following.value += arguments.group
        if first >= len(tasks):
            return
        for row in train_group(tasks[first : first + arguments.group], images):
            with lock, open(arguments.output, "a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{min(first + arguments.group, len(tasks))} of {len(tasks)}", flush=True)


def compare(file: str) -> None:
    """Largest differences from Keras, over three steps of a network of an architecture file."""
    import keras

    from fpnas_keras.runs.settings import make_schedule

    architecture = Architecture.load(file)
    model, rng = architecture.build(), np.random.default_rng(0)
    x = rng.integers(0, 256, (24, *architecture.input_shape), np.uint8)
    y = rng.integers(0, architecture.num_classes, 24)
    images = (torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y))
    task = {
        **{"architecture": architecture.to_dict(), "seed": 0, "held_out": 0, "random_crop": 2},
        **{"batch_size": 8, "epochs": 2, "learning_rate": 0.1},
    }
    training = Training(task, {"train": images, "test": images}, "cpu")
    give_weights(model, training.network)
    optimizer = keras.optimizers.SGD(
        make_schedule(0.1, 6, 3), momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(
        optimizer, keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    )
    for _ in range(3):
        batch, labels = training._batch()
        theirs = model.train_on_batch(
            batch.permute(0, 2, 3, 1).numpy(),
            keras.utils.to_categorical(labels.numpy(), architecture.num_classes),
        )
        training.make_step()
        print(f"loss: {theirs:.7f} with Keras, {training.loss.item():.7f} with torch")


def give_weights(model: "keras.Model", network: Network) -> None:
    """Gives a Keras network's weights to the one here."""

    def put(conv, name):
        layer = model.get_layer(name)
        kernel, *bias = layer.get_weights()
        axes = (2, 3, 0, 1) if conv.groups > 1 else (3, 2, 0, 1)
        conv.kernel.data = torch.tensor(kernel.transpose(axes)).contiguous()
        if not conv.norm:
            conv.bias.data = torch.tensor(bias[0])

    put(network.stem, "stem")
    put(network.head, "head")
    for index, block in enumerate(network.blocks):
        names = {"reduce": "attention_reduce"}
        if block.block.splits == 1:
            names["gate_0"] = "attention_expand"
        for name, conv in block.layers.items():
            name = names.get(name, name.replace("gate_", "attention_split_"))
            put(conv, f"block_{index}_{name}")
    kernel, bias = model.get_layer("classes").get_weights()
    network.classes.weight.data = torch.tensor(kernel.T.copy())
    network.classes.bias.data = torch.tensor(bias)


def main() -> None:
    """Trains all tasks of a folder, or compares with Keras."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what --tasks_dir wrote, or with --compare a network (JSON)")
    parser.add_argument("--output", default="benchmarks/versus.jsonl", help="file of rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--group", type=int, default=20, help="networks side by side in a process")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no group after these")
    parser.add_argument("--compare", action="store_true", help="compare three steps with Keras")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(arguments.folder)
        return
    arguments.deadline = time.time() + arguments.seconds
    tasks = json.loads((pathlib.Path(arguments.folder) / "tasks.json").read_text())
    context = multiprocessing.get_context("spawn")
    shared = (tasks, arguments, context.Value("i", 0), context.Lock())
    workers = [context.Process(target=work, args=shared) for _ in range(arguments.processes)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if any(each.exitcode for each in workers):
        raise SystemExit("a process failed: its networks have no rows")


if __name__ == "__main__":
    main()
