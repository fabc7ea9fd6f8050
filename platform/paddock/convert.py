"""Meta's `.pth` layout -> a Hugging Face directory, and back; weights there and back are equal to the byte.

Every hyper-parameter comes from the files. What Meta's files do not say is how long a context the model was
trained on: `max_position_embeddings` takes it, else what an earlier conversion noted, else 2,048 for
float16, in which only LLaMA 1 was released, and 4,096 for what came after it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import LlamaConfig

from paddock import manifest, published, storage
from paddock.config import ConvertConfig
from paddock.errors import ModelError
from paddock.meta_llama import (
    EMBEDDING,
    HEAD,
    Params,
    is_buffer,
    llama_config,
    params_json,
    permute,
    read_params,
    unpermute,
)
from paddock.shard_tasks import write_shards
from paddock.shards import plan_shards, write_index
from paddock.weights import TensorInfo, Weights, one_line, open_model, read_object, write_object


def convert(config: ConvertConfig) -> str | Path:
    """Convert as configured; return where it stands. Raises ModelError where the input is not what it should be."""
    manifest.apart(config.output_dir, config.input_dir)
    source = storage.fetch(config.input_dir)
    if not source.is_dir():
        raise ModelError(f"input_dir: {source}: no such directory; check the path")
    to_meta = config.output_type == "pth"
    inputs = {"input_dir": manifest.look(config.input_dir)}
    tokenizer = None if to_meta else _tokenizer_model(source, storage.parent(config.input_dir))
    if tokenizer is not None and tokenizer.parent != source:
        inputs["tokenizer.model"] = manifest.look(tokenizer)
    with manifest.stage(
        config.output_dir,
        kind="meta" if to_meta else "model",
        config=config.hashed(),
        inputs={name: found.hash for name, found in inputs.items()},
        overwrite=config.overwrite,
        resume=True,
    ) as stage:
        if stage.finished:
            return stage.place
        sums = {name: {file: it.sha256 for file, it in found.files.items()} for name, found in inputs.items()}
        stage.extra["input_files"] = sums
        files = {file: sha256 for found in sums.values() for file, sha256 in found.items()}
        for line in published.recognised(source.name, files):
            print(f"convert: {line}", flush=True)
        if to_meta:
            stage.extra.update(write_meta(source, stage.directory, stage.notes / "rotary"))
        else:
            write_huggingface(source, tokenizer, config, stage)
    return stage.place


Whole = dict[str, tuple[tuple[int, ...], torch.dtype, int | None]]
"""Meta's name -> shape and dtype of the whole tensor, and the axis along which the shards hold it."""


@dataclass(frozen=True)
class MetaModel:
    """Meta's tensors under Hugging Face's names (a `paddock.shards.Source`)."""

    shares: list[Weights]
    """The model-parallel shards."""
    found: Whole
    params: Params
    origin: dict[str, str]
    """Hugging Face's name -> Meta's."""

    def pieces(self, name: str, said: dict[str, Any]) -> Iterator[torch.Tensor]:
        """One tensor, whole."""
        place = self.params.place(self.origin[name])
        tensor = _whole(self.shares, self.origin[name], self.found)
        yield tensor if place is None or place.heads is None else permute(tensor, place.heads)

    def memory(self, name: str) -> int:
        """The bytes that one tensor takes: put together, and with its rows in another order."""
        shape, dtype, _ = self.found[self.origin[name]]
        return 2 * TensorInfo(shape, dtype).bytes


def write_huggingface(source: Path, tokenizer: Path | None, config: ConvertConfig, stage: manifest.Stage) -> None:
    """Write Meta's weights as a Hugging Face directory."""
    target = stage.directory
    shares = _open_shares(source)
    buffers = list(filter(is_buffer, shares[0].infos))
    if buffers:
        also = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        print(f"convert: {buffers[0]}{also}: dropped; they follow from params.json", flush=True)
    found = _whole_shapes(shares, source)
    file = source / "params.json"
    if not file.is_file():
        raise ModelError(f"{source}: no params.json; get it with Meta's weights")
    params = read_params(read_object(file), file, rows=found[EMBEDDING][0][0])
    origin: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    for name, shape in params.shapes().items():
        if name not in found:
            raise ModelError(f"{source}: tensor {name}, which params.json asks for, is missing; get all shards")
        if found[name][0] != shape:
            raise ModelError(f"{source}: tensor {name} is {found[name][0]}, params.json asks for {shape}")
        place = params.place(name)
        assert place is not None
        origin[place.name] = name
        infos[place.name] = TensorInfo(shape, found[name][1])
    for name in found:
        if params.place(name) is None:
            raise ModelError(f"{source}: tensor {name} is none of LLaMA's; it would be lost")
    tied = torch.equal(_whole(shares, EMBEDDING, found), _whole(shares, HEAD, found))
    if tied:
        del infos["lm_head.weight"]

    shards = plan_shards(infos, config.max_shard_size)
    model = MetaModel(shares, found, params, origin)
    here = storage.is_uri(config.input_dir) or storage.is_uri(config.output_dir)
    written = write_shards(model, shards, infos, target, stage.notes, config, what="convert", here=here)
    stage.hashes.update({name: manifest.FileEntry(done.bytes, done.sha256) for name, done in written.items()})
    write_index(target, shards, infos)
    dtype = infos["model.embed_tokens.weight"].dtype
    noted = manifest.read(source)
    positions = (
        config.max_position_embeddings
        or params.max_seq_len
        or (noted.extra.get("max_position_embeddings") if noted else None)
        or (2048 if dtype == torch.float16 else 4096)
    )
    special = _write_tokenizer(tokenizer, target, params, positions)
    write_object(target / "config.json", llama_config(params, positions, dtype, special, tied=tied))
    write_object(target / "generation_config.json", {"do_sample": False, **special})
    (target / "README.md").write_text(
        f"# {source.name}\n\nLLaMA weights, converted from Meta's layout. `manifest.json` holds their hashes.\n",
        encoding="utf-8",
    )


def write_meta(source: Path, target: Path, scratch: Path) -> dict[str, Any]:
    """Write a Hugging Face LLaMA directory in Meta's layout, as one `consolidated.00.pth`.

    torch.save takes all tensors at once: those that are not in the source as they will be are kept in files in
    `scratch`, not in memory. Returns what the layout has no place for and the manifest keeps.
    """
    if not (source / "config.json").is_file():
        raise ModelError(f"{source}: no config.json; give a Hugging Face model directory")
    values = read_object(source / "config.json")
    try:
        config = LlamaConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{source / 'config.json'}: refused by transformers: {one_line(error)}") from None
    rope = dict(config.rope_parameters or {})
    refused = {
        "model_type": values.get("model_type") != "llama",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "head_dim": config.head_dim != config.hidden_size // config.num_attention_heads,
        "rope_scaling": rope.get("rope_type", "default") != "default",
    }
    for key, refuse in refused.items():
        if refuse:
            raise ModelError(f"{source / 'config.json'}: Meta's layout has no place for {key}={values.get(key)!r}")
    params = Params(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        ffn_dim=config.intermediate_size,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        max_seq_len=config.max_position_embeddings,
    )
    weights = open_model(source)
    tensors: dict[str, torch.Tensor] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for name, shape in params.shapes().items():
        place = params.place(name)
        assert place is not None
        tied = name == HEAD and config.tie_word_embeddings
        theirs = "model.embed_tokens.weight" if tied else place.name
        if theirs not in weights.infos or weights.infos[theirs].shape != shape:
            has = weights.infos[theirs].shape if theirs in weights.infos else "missing"
            raise ModelError(f"{source}: tensor {theirs} is {has}, its config.json asks for {shape}")
        used.add(theirs)
        tensor = weights.read(theirs)
        if place.heads is not None:
            tensor = unpermute(tensor, place.heads)
        tensors[name] = _in_file(tensor, scratch / name) if tied or place.heads is not None else tensor
    for name in weights.infos.keys() - used:
        if not name.endswith("rotary_emb.inv_freq") and not (config.tie_word_embeddings and name == "lm_head.weight"):
            raise ModelError(f"{source}: tensor {name} is none of LLaMA's; it would be lost")
    torch.save(tensors, target / "consolidated.00.pth")
    write_object(target / "params.json", params_json(params))
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    return {"max_position_embeddings": config.max_position_embeddings}


def _in_file(tensor: torch.Tensor, file: Path) -> torch.Tensor:
    """A copy whose memory is a file, which the system may write out and forget."""
    held = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return held.reshape(tensor.shape).copy_(tensor)


def _open_shares(source: Path) -> list[Weights]:
    """The model-parallel shards, in order."""
    files = sorted(source.glob("consolidated.*.pth"))
    numbers = [re.fullmatch(r"consolidated\.(\d\d)\.pth", file.name) for file in files]
    if not files:
        raise ModelError(f"{source}: no consolidated.*.pth; give the directory of Meta's weights")
    if [match and int(match[1]) for match in numbers] != list(range(len(files))):
        raise ModelError(f"{source}: shards {', '.join(f.name for f in files)}: some are missing; get all of them")
    shares = [Weights([file]) for file in files]
    for file, share in zip(files, shares, strict=True):
        if share.infos.keys() != shares[0].infos.keys():
            odd = sorted(share.infos.keys() ^ shares[0].infos.keys())[0]
            raise ModelError(f"{file}: tensor {odd} is not in every shard; the shards are of different models")
    return shares


def _whole_shapes(shares: Sequence[Weights], source: Path) -> Whole:
    file = source / "params.json"
    dim = read_object(file).get("dim") if file.is_file() else None
    if EMBEDDING not in shares[0].infos:
        raise ModelError(f"{source}: no {EMBEDDING}; these are not LLaMA's weights")
    any_layer = Params(0, 2**31, 1, 1, 0, 0, 0, 0, None)
    whole: Whole = {}
    for name, info in shares[0].infos.items():
        if is_buffer(name):
            continue
        place = any_layer.place(name)
        axis = None if place is None else place.axis
        if name == EMBEDDING and info.shape[-1] == dim:
            axis = 0
        shape = list(info.shape)
        if axis is not None:
            shape[axis] = sum(share.infos[name].shape[axis] for share in shares)
        if any(share.infos[name].shape != info.shape for share in shares):
            raise ModelError(
                f"{source}: tensor {name} has different shapes in the shards; they are of different models"
            )
        whole[name] = tuple(shape), info.dtype, axis
    return whole


def _whole(shares: Sequence[Weights], name: str, found: Whole) -> torch.Tensor:
    axis = found[name][2]
    if axis is None or len(shares) == 1:
        return shares[0].read(name)
    return torch.cat([share.read(name) for share in shares], dim=axis)


def _tokenizer_model(source: Path, above: str | Path) -> Path | None:
    """Meta keeps one tokenizer.model for all sizes, one directory up."""
    for directory in (source, above):
        file = storage.join(directory, "tokenizer.model")
        if storage.exists(file):
            return storage.fetch(file)
    return None


def _write_tokenizer(file: Path | None, target: Path, params: Params, positions: int) -> dict[str, int]:
    """Write the files of LlamaTokenizer; return its BOS and EOS ids."""
    if file is None:
        print("convert: no tokenizer.model beside the weights or one directory up: written without", flush=True)
        return {"bos_token_id": 1, "eos_token_id": 2}
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        raise ModelError(f"{file}: not a SentencePiece model, as LLaMA 1 and 2 have; get it again") from None
    if model.get_piece_size() > params.vocab_size:
        raise ModelError(f"{file}: has {model.get_piece_size()} tokens, the embedding {params.vocab_size} rows")
    bos, eos = model.bos_id(), model.eos_id()
    if bos < 0 or eos < 0:
        raise ModelError(f"{file}: has no BOS or no EOS token; this is not LLaMA's tokenizer")
    tokens = {
        "bos_token": model.id_to_piece(bos),
        "eos_token": model.id_to_piece(eos),
        "unk_token": model.id_to_piece(model.unk_id()),
    }
    shutil.copyfile(file, target / "tokenizer.model")
    write_object(target / "special_tokens_map.json", tokens)
    about: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": positions,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    write_object(target / "tokenizer_config.json", {**about, **tokens})
    return {"bos_token_id": bos, "eos_token_id": eos}
