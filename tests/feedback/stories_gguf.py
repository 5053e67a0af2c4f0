"""`python stories_gguf.py HF_FOLDER tok512.bin OUT.gguf`: the stories260K model for llama.cpp.

It needs gguf and numpy only, so it runs in any interpreter that has llama-cpp-python."""

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

folder, tokens_file, out = map(Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())
data = (folder / "model.safetensors").read_bytes()
size = struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8 : 8 + size])


def tensor(name: str) -> np.ndarray:
    begin, end = header[name]["data_offsets"]
    return np.frombuffer(data[8 + size + begin : 8 + size + end], "<f4").reshape(header[name]["shape"]).copy()


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows from the half-split order of rotary positions to the interleaved one that llama.cpp wants."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


raw = tokens_file.read_bytes()[4:]
pieces, scores = [], []
while raw:
    score, length = struct.unpack("<fi", raw[:8])
    pieces.append(raw[8 : 8 + length])
    scores.append(score)
    raw = raw[8 + length :]
kinds = [gguf.TokenType.NORMAL] * len(pieces)
for i in range(3):
    pieces[i] = [b"<unk>", b"<s>", b"</s>"][i]
    kinds[i] = gguf.TokenType.UNKNOWN if i == 0 else gguf.TokenType.CONTROL
for i in range(3, 259):
    pieces[i], kinds[i] = f"<0x{i - 3:02X}>".encode(), gguf.TokenType.BYTE
pieces[259:] = [piece.replace(b" ", "▁".encode()) for piece in pieces[259:]]

heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
writer = gguf.GGUFWriter(out, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_rope_dimension_count(config["hidden_size"] // heads)
writer.add_rope_freq_base(config["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("llama")
writer.add_token_list(pieces)
writer.add_token_scores(scores)
writer.add_token_types(kinds)
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_unk_token_id(0)
writer.add_add_bos_token(True)
writer.add_tensor("token_embd.weight", tensor("model.embed_tokens.weight"))
writer.add_tensor("output_norm.weight", tensor("model.norm.weight"))
for i in range(config["num_hidden_layers"]):
    there, here = f"model.layers.{i}.", f"blk.{i}."
    writer.add_tensor(here + "attn_norm.weight", tensor(there + "input_layernorm.weight"))
    writer.add_tensor(here + "ffn_norm.weight", tensor(there + "post_attention_layernorm.weight"))
    writer.add_tensor(here + "attn_q.weight", interleaved(tensor(there + "self_attn.q_proj.weight"), heads))
    writer.add_tensor(here + "attn_k.weight", interleaved(tensor(there + "self_attn.k_proj.weight"), kv_heads))
    writer.add_tensor(here + "attn_v.weight", tensor(there + "self_attn.v_proj.weight"))
    writer.add_tensor(here + "attn_output.weight", tensor(there + "self_attn.o_proj.weight"))
    writer.add_tensor(here + "ffn_gate.weight", tensor(there + "mlp.gate_proj.weight"))
    writer.add_tensor(here + "ffn_up.weight", tensor(there + "mlp.up_proj.weight"))
    writer.add_tensor(here + "ffn_down.weight", tensor(there + "mlp.down_proj.weight"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
