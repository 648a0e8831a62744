"""Compiles the FlashInfer kernels that the grid wants: bench_gpu --list | gpu_prebuild.py [NOT ...]

NOT is a kernel to leave out, by the name that is printed: "fa3 hd 256".

Run by gpu_pack; needs FlashInfer, its compilers, and no GPU. Kernels that are compiled
already are passed over.
"""

import json
import sys
import time

import torch
from flashinfer import jit
from flashinfer.jit.attention import modules
from flashinfer.jit.cascade import gen_cascade_module
from flashinfer.jit.xqa import gen_xqa_module

BF16, INT32 = torch.bfloat16, torch.int32
PLAIN = dict(pos_encoding_mode=0, use_sliding_window=False, use_logits_soft_cap=False)
XQA_PAGES = (16, 32, 64, 128)


def wanted(points):
    """(name, a function that makes its build), the quick ones to compile first."""
    kinds = {"prefill": set(), "decode": set()}
    xqa = set()
    for point in points:
        kinds["prefill" if point["kind"] == "prefill" else "decode"].add(point["d"])
        if point["kind"] != "prefill" and point["page"] in XQA_PAGES:
            xqa.add((point["page"], point["d"], point["q_heads"] // point["kv_heads"]))
    yield "cascade", gen_cascade_module
    for page, d, group in sorted(xqa):
        yield f"xqa page {page} hd {d} group {group}", lambda page=page, d=d, group=group: \
            gen_xqa_module(BF16, BF16, page, d, group, False, BF16, 1, False)
    for d in sorted(kinds["decode"]):
        yield f"decode hd {d}", lambda d=d: jit.gen_batch_decode_module(
            BF16, BF16, BF16, INT32, d, d, *PLAIN.values())
        yield f"BatchAttention hd {d}", lambda d=d: modules._gen_batch_attention_primary_module(
            BF16, BF16, BF16, INT32, d, d, 0, False, False)
    for d in sorted(kinds["decode"] | kinds["prefill"]):
        yield f"fa2 hd {d}", lambda d=d: modules._gen_batch_prefill_primary_module(
            "fa2", BF16, BF16, BF16, INT32, d, d, *PLAIN.values(), False)
    if 128 in kinds["prefill"]:
        yield "fmha_v2 hd 128", lambda: modules.gen_fmha_v2_module("q_paged_kv_nhd", BF16)
    for d in sorted(kinds["prefill"]):
        yield f"fa3 hd {d}", lambda d=d: jit.gen_batch_prefill_module(
            "fa3", BF16, BF16, BF16, INT32, d, d, *PLAIN.values(), False)


def main():
    points = [json.loads(line) for line in sys.stdin if line.strip()]
    failed = 0
    for name, make in wanted(points):
        if name in sys.argv[1:]:
            print(f"left out  {name}", flush=True)
            continue
        start = time.monotonic()
        try:
            make().build(False)
        except Exception as error:  # a kernel that does not compile is a peer that is absent
            print(f"gpu_prebuild: {name}: {str(error).splitlines()[-1][:300]}", flush=True)
            failed += 1
        else:
            print(f"{time.monotonic() - start:5.0f} s  {name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
