"""What the golden scripts share: command-line arguments, fixed seeds, and one way to write a file.

It holds no model code and no paths of any machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform

try:  # the metrics golden needs neither
    import torch
    from safetensors.torch import save_file
except ImportError:
    torch = None

HERE = os.path.dirname(os.path.abspath(__file__))


def arguments(description, **paths):
    """Parse `--out DIR` and one required option per keyword (name -> help).

    Each option may come from the environment instead, as GOLDEN_<NAME>.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", default=HERE, help="folder the files are written to")
    for name, text in paths.items():
        default = os.environ.get("GOLDEN_" + name.upper())
        parser.add_argument("--" + name.replace("_", "-"), default=default, required=default is None, help=text)
    args = parser.parse_args()
    if torch:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
    return args


def versions(*packages):
    """Exact versions of the packages that decide the numbers."""
    found = {name: importlib.metadata.version(name) for name in packages}
    found["python"] = platform.python_version()
    return found


def write_tensors(args, name, tensors, **metadata):
    """Write NAME.safetensors, the metadata as one JSON text named `golden` in its header.

    One text, as the order of several is left to chance and the file would differ each time.
    """
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    header = {"golden": json.dumps(metadata, sort_keys=True)}
    path = os.path.join(args.out, name + ".safetensors")
    save_file(tensors, path, metadata=header)
    print(f"{name}.safetensors: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


def compact(item):
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"))


def write_json(args, name, value):
    """Write NAME.json from a dict; the items of a top-level list stand one a line."""
    def text(item):
        if isinstance(item, list):
            return "[\n  " + ",\n  ".join(compact(i) for i in item) + "\n ]"
        return compact(item)

    path = os.path.join(args.out, name + ".json")
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n " + ",\n ".join(f"{json.dumps(key)}: {text(item)}" for key, item in value.items()) + "\n}\n")
    print(f"{name}.json: {os.path.getsize(path)} bytes")
