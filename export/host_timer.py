"""Times `.tflite` files on this machine: the process of a `devices.Host`.

It reads the path of a file, as JSON, from each line of its input, and writes milliseconds. It
imports nothing of the project, so that it starts fast and from every folder.
"""

import functools
import json
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter

_UNTIMED_CALLS, _TIMED_CALLS = 1, 3


@functools.cache
def _load(path, threads):
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    (details,) = interpreter.get_input_details()
    values = np.random.default_rng(0).integers(0, 128, details["shape"])
    interpreter.set_tensor(details["index"], values.astype(details["dtype"]))
    return interpreter


def _milliseconds(interpreter):
    for _ in range(_UNTIMED_CALLS):
        interpreter.invoke()
    times = []
    for _ in range(_TIMED_CALLS):
        start = time.perf_counter()
        interpreter.invoke()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


if __name__ == "__main__":
    for line in sys.stdin:
        print(_milliseconds(_load(json.loads(line), int(sys.argv[1]))), flush=True)
