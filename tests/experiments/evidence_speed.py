"""What the result files say of each claim about speed and whole programs; see `evidence`."""

from evidence import evidence
from kept import ranking, read


@evidence("Decoding on a CPU: beside unquantized weights, transformers, llama.cpp and before")
def _():
    found = read("bench_cpu.json")
    models = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}
    speeds = {model: found["decode"][model]["tokens_per_second"] for model in models}
    read_bytes = {model: found["decode"][model]["bytes_per_token"] for model in models}
    table = [["contender", *(
        f"{name}: {what}" for name in models.values()
        for what in ("over unquantized", "over llama.cpp Q4_0", "MB per token")
    )]]  # fmt: skip
    for name in speeds["smollm2"]:
        table.append([name.replace("ttq", "`ttq`").replace("fast", "`fast`")])
        for model, speed in speeds.items():
            over = (speed[name] / speed[other] for other in ("unquantized", "llama.cpp Q4_0")
                    if name in speed)  # fmt: skip
            size = read_bytes[model].get(name)
            table[-1] += [f"{ratio:.2f}" for ratio in over] or ["—", "—"]
            table[-1].append(f"{size / 1e6:.0f}" if size else "—")
    older = [["`ttq generate` by default", "tokens per second, before", "now", "ratio",
              "peak memory, before", "now"]]  # fmt: skip
    for model, name in models.items():
        both = [found["beside_older"][model][which] for which in ("before", "now")]
        older.append([
            name, *(f"{one['tokens_per_second']:.1f}" for one in both),
            f"{found['beside_older'][model]['faster']:.2f}",
            *(f"{one['peak_resident_mb'] / 1000:.2f} GB" for one in both),
        ])  # fmt: skip
    prefill = [["prefill: prompt tokens", *(
        f"{name}: {what}" for name in models.values()
        for what in ("4-bit quantization over plain", "plain over llama.cpp F16")
    )]]  # fmt: skip
    prefill += [[n, *(
        f"{found['prefill'][model][n][ratio]:.2f}" for model in models
        for ratio in ("ratio", "unquantized_over_llama_cpp")
    )] for n in found["prefill"]["smollm2"]]  # fmt: skip
    start = [["`ttq generate`", "first token, cold", "with a warm compilation cache"]]
    for model, name in models.items():
        both = (found["start_up"][model][f"first_token_{k}"] for k in ("cold", "warm"))
        start.append([name, *(f"{one['seconds']:.1f} s" for one in both)])
    return [table, older, prefill, start], []


@evidence("Decoding on a CPU is faster than with other quantizers")
def _():
    table = [["contender", "bits", "tokens per second over transformers", "perplexity"]]
    table += [
        [r["contender"], *(f"{r[k]:.2f}" for k in ("bits", "over_transformers", "perplexity"))]
        for r in read("compare_torch_speed.json")["rows"]
    ]
    return [table], []


@evidence("Whole programs compile at full size and fit the chip")
def _():
    table = [["model", "chip", "group", "bits", "peak memory", "of", "packed weights"]]
    for one in read("compiled_programs.json")["programs"]:
        memory = one["memory_gib"]
        table.append([one["model"], one["chip"], str(one["recipe"]["grid"]["group_size"]),
                      f"{one['effective_bits']:.2f}", f"{memory['peak']:.1f} GiB",
                      f"{memory['chip']:.0f} GiB", f"{one['packed_gib']:.1f} GiB"])  # fmt: skip
    return [table], []


@evidence("Agreement with the unquantized model ranks recipes in fewer windows than perplexity")
def _():
    return [ranking.cells(ranking.measured(read("ranking_smollm2/rows.jsonl")))], []


@evidence("Drafts and their verification take little memory of their own")
def _():
    parts = ("arguments", "temporaries")
    table = [["model", "chip", "drafts per pass", "peak memory", "of",
              *(f"more {part}" for part in parts)]]  # fmt: skip
    programs = read("compiled_speculation.json")["programs"]
    plain = {(one["model"], one["chip"]): one for one in programs if not one["drafts"]}
    for one in programs:
        memory, without = one["memory_gib"], plain[one["model"], one["chip"]]["memory_gib"]
        more = [f"{memory[part] - without[part]:.2f} GiB" for part in parts]
        table.append([one["model"], one["chip"], str(one["drafts"] or "none"),
                      f"{memory['peak']:.2f} GiB", f"{memory['chip']:.0f} GiB",
                      *(more if one["drafts"] else ("—", "—"))])  # fmt: skip
    return [table], []


@evidence("A long prompt that is read in parts needs much less memory beside its cache")
def _():
    programs, gib = read("compiled_prompts.json")["programs"], 2**30
    table = [["prompt", "read in parts of", "cache in", "cache", "temporaries", "all together",
              "of", "fits"]]  # fmt: skip
    table += [
        [
            f"{one['prompt_tokens']} tokens", str(one["prefill_chunk"] or "whole"),
            one["cache_dtype"],
            *(f"{one['device'][kind] / gib:.2f} GiB" for kind in ("cache", "temporaries")),
            f"{one['total'] / gib:.2f} GiB", f"{one['memory'] / gib:.0f} GiB",
            "yes" if one["fits"] else "no",
        ]
        for one in programs
    ]  # fmt: skip

    def per_token(chunk):
        short, long = (
            one for one in programs
            if (one["prefill_chunk"], one["cache_dtype"]) == (chunk, "bfloat16")
        )  # fmt: skip
        more = long["device"]["temporaries"] - short["device"]["temporaries"]
        return f"{more / (long['prompt_tokens'] - short['prompt_tokens']) / 1000:.1f} kB"

    return [table], [per_token(0), per_token(2048)]


@evidence("Keys and values in eight bits leave the perplexity where it was")
def _():
    rows = read("cache_dtypes_smollm2.json")["rows"]
    texts = list(rows[0]["perplexity"])
    table = [["recipe", "cache", *texts, "over a float32 cache", "95 %", "bytes per token of text"]]
    for row in rows:
        ends = row["interval_95"]
        table.append([
            f"`{row['recipe']}`", row["cache_dtype"],
            *(f"{one:.2f}" for one in row["perplexity"].values()), f"{row['over_float32']:.4f}",
            f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "—",
            str(row["bytes_per_token_of_text"]),
        ])  # fmt: skip
    return [table], []


@evidence("A model that outgrows a chip is streamed from the host")
def _():
    found, gib = read("plans.json"), 2**30
    head = ["model", "chip", "bits", "blocks", "of the chip's memory", "compiler: needs", "fits",
            "sum of sizes", "host"]  # fmt: skip
    table = [head]
    table += [
        [
            one["model"], one["chip"], str(one["bits"]), f"on the {one['dense_memory']}",
            f"{one['memory'] / gib:.0f} GiB", f"{one['total'] / gib:.1f} GiB",
            "yes" if one["fits"] else "no", f"{one['summed_total'] / gib:.1f} GiB",
            f"{one['host'] / gib:.1f} GiB" if one["host"] else "—",
        ]
        for one in found["compiled"]
    ]  # fmt: skip
    plans = {(one["model"], one["chip"], one["dense_memory"]): one for one in found["summed"]}
    chips = list(dict.fromkeys(chip for _, chip, _ in plans))
    sizes = {chip: f"{one['memory'] / gib:.0f} GiB" for (_, chip, _), one in plans.items()}
    each = {chip: " each" if plans[found["summed"][0]["model"], chip, "device"]["mesh"] else ""
            for chip in chips}  # fmt: skip
    fits = [["model", "blocks", *(f"{chip}, {sizes[chip]}{each[chip]}" for chip in chips)]]
    for model in dict.fromkeys(model for model, _, _ in plans):
        row = [model, f"{plans[model, chips[0], 'host']['host'] / gib:.1f}"]
        for chip in chips:
            device, host = (plans.get((model, chip, where)) for where in ("device", "host"))
            streamed = f"{host['total'] / gib:.1f} streamed" if host and host["fits"] else "no"
            row.append(f"{device['total'] / gib:.1f}" if device["fits"] else streamed)
        fits.append(row)
    return [table, fits], []


@evidence("A mesh of TPUs shares a model, and its devices sum twice per decoded layer")
def _():
    table = [["model", "slice", "mesh", "blocks", "peak memory of a device", "of",
              "sums per decoded layer"]]  # fmt: skip
    for one in read("compiled_slices.json")["programs"]:
        memory, said = one["memory_gib"], one["collectives"]
        assert not any("gather" in what for found in said.values() for what in found)
        assert all(what.endswith(" all-reduce") for what in said["token's layer"])
        blocks = f", {one['host_gib']:.1f} GiB each" if one["host_gib"] else ""
        table.append([one["model"], one["slice"], one["mesh"],
                      f"on the {one['dense_memory']}{blocks}", f"{memory['peak']:.2f} GiB",
                      f"{memory['chip']:.0f} GiB", str(len(said["token's layer"]))])  # fmt: skip
    return [table], []


@evidence("Models that nobody here wrote answer as the weights that the packed ones stand for")
def _():
    head = ["library", "model", "recipe", "packed", "bits", "equal", "difference", "as dense"]
    rows = [
        [library.replace("_", "-"), one["model"], f"`{one['recipe']}`", str(one["kernels"]),
         f"{one['effective_bits']:.2f}", "yes" if one["equal"] else "no",
         f"{one['difference']:.1e}", f"{one['tokens as dense']:.2f}"]
        for library in ("tunix", "gemma", "keras_hub")
        for one in read(f"foreign_{library}.json")["rows"]
    ]  # fmt: skip
    return [[head, *rows]], []


@evidence("In tunix's code SmolLM2 has our decoder's perplexity, and loses less than by qwix")
def _():
    head = ["side", "bits", "perplexity", "our decoder's", "tokens as ours", "as fake-quantized",
            "tokens per second", "over unquantized"]  # fmt: skip
    rows = [
        [f"`{one['side']}`" if one["side"] in ("ttq", "best") else one["side"],
         f"{one['bits']:.2f}", f"{one['perplexity']:.2f}",
         f"{one['own perplexity']:.2f}" if "own perplexity" in one else "—",
         str(one.get("tokens as own", "—")),
         {True: "yes", False: "no", None: "—"}[one.get("equal")],
         f"{one['tokens per second']:.2f}", f"{one['faster']:.2f}"]
        for one in read("tunix_smollm2.json")["rows"]
    ]  # fmt: skip
    return [[head, *rows]], []


@evidence("A user's unrolled model takes three times as long to compile packed as dense")
def _():
    found = read("compile_functions.json")["seconds"]
    names = ("dense prompt", "quantizing prompt", "dense step", "packed step")
    rows = [[n, f"{found[n]['trace']:.1f}", f"{found[n]['compile']:.1f}"] for n in names]
    ratios = [f"{found[f'{name} ratio']:.1f}" for name in ("prompt", "step", "whole")]
    return [[["program", "trace", "compile"], *rows]], ratios


CHIPS = ("v5e", "v5p", "v6e")


def cycles(chip, kernel, width, group, m):
    wanted = (kernel, width, group, m)
    (one,) = [r for r in read(f"kernels_{chip}.jsonl")
              if (r["kernel"], r["bits"], r["group_size"], r["m"]) == wanted]  # fmt: skip
    assert not one["symmetric"]
    return one


@evidence("What they reach")
def _():
    table = [["`packed_matmul`, M = 1 / 16", *CHIPS]]
    for width in (2, 3, 4, 5, 8):
        table.append([f"{width}-bit: of the floor; over the bf16 product"])
        for chip in CHIPS:
            one, many = (cycles(chip, "packed_matmul", width, 128, m) for m in (1, 16))
            table[-1].append(
                f"{one['fraction_of_floor']:.0%} / {many['fraction_of_floor']:.0%}; "
                f"{one['speedup_vs_bf16']:.1f} / {many['speedup_vs_bf16']:.1f}×".replace("%", " %")
            )
    table.append(["`prefill_quantize` over the plain product, 512 / 2048 tokens"] + [
        " / ".join(f"{cycles(c, 'prefill_quantize', 4, 128, m)['ratio_to_matmul']:.2f}"
                   for m in (512, 2048)) for c in CHIPS
    ])  # fmt: skip
    table.append(["`quantize_pack` of the floor, 4-bit"] + [
        f"{cycles(c, 'quantize_pack', 4, 128, 0)['fraction_of_floor']:.0%}".replace("%", " %")
        for c in CHIPS
    ])  # fmt: skip
    narrow = {c: cycles(c, "packed_matmul", 4, 32, 16)["fraction_of_floor"] for c in CHIPS}
    return [table], [f"{c} {100 * one:.0f} %" for c, one in narrow.items()]


@evidence("Coded scales")
def _():
    rows, facts = read("coded_scales_tpu.jsonl"), ("chip", "kernel", "m", "group_size", "scales")
    names = {"packed_matmul": "`packed_matmul`, M = {}", "quantize_pack": "`quantize_pack`",
             "prefill_quantize": "`prefill_quantize`, {} tokens"}  # fmt: skip

    def thousands(*wanted):
        (one,) = [r for r in rows if tuple(map(r.get, facts)) == wanted]
        return f"{max(one['cycles'], one['floor_cycles']) / 1000:.1f}"

    def line(kernel, m, group):
        both = lambda *of: " / ".join(thousands(*of, s) for s in ("float", "coded"))  # noqa: E731
        return [f"{names[kernel].format(m)}, group {group}", *(
            both(chip, kernel, m, group) for chip in CHIPS)]  # fmt: skip

    kernels = zip(names, [(1, 16), (0,), (512,)], strict=True)
    return [
        [["", *CHIPS], *(line(k, m, g) for k, ms in kernels for m in ms for g in (32, 64, 128))]
    ], []


@evidence("With `--speculate` the answer is the unquantized model's")
def _():
    table = [["drafts per pass", "batch", "answers", "different", "near-ties", "acceptance",
              "tokens per pass"]]  # fmt: skip
    for row in read("speculative_smollm2.json")["rows"]:
        whole = (row[key] for key in ("drafts", "batch", "answers", "different", "near_ties"))
        table.append([
            *map(str, whole),
            f"{row['acceptance']:.3f}",
            f"{row['tokens_per_pass']:.2f}",
        ])
    speed = [["decoding", "over unquantized", "acceptance", "tokens per pass"]]
    for row in read("speculative_times_smollm2.json")["rows"]:
        told = (row.get(k) for k in ("acceptance", "tokens_per_pass"))
        more = ["" if one is None else f"{one:.2f}" for one in told]
        speed.append([row["decoding"], f"{row['over_none']:.2f}", *more])
    return [table, speed], []


@evidence(
    "Where memory is the limit, drafts could make the unquantized answer nearly twice as fast"
)
def _():
    found = read("speculative_chips.json")
    drafts = list(dict.fromkeys(row["drafts"] for row in found["rows"]))
    table = [["model", "a draft over a pass", *(f"k = {n}" for n in drafts)]]
    for model in dict.fromkeys(row["model"] for row in found["rows"]):
        mine = [row for row in found["rows"] if row["model"] == model]
        gains = [f"{row['over_unquantized']:.2f}" for row in mine]
        table.append([model, f"{mine[0]['draft_over_unquantized']:.2f}", *gains])
    tokens = {(row["drafts"], row["tokens_per_pass"]) for row in found["rows"]}
    assert tokens <= {
        (row["drafts"], row["tokens_per_pass"]) for row in read("speculative_smollm2.json")["rows"]
    }
    return [table], []
