"""How far apart two correct computations may be, by dtype, each with its reason. The one place for such
numbers."""

from __future__ import annotations

# Logits against the fp32 PyTorch reference: largest difference over max(1, largest logit). fp32: two
# summation orders. Random models: up to 7e-6. Trained models have sharp attention, which amplifies rounding
# on the random tokens used here: on the demo model PyTorch's fp32 is up to 5e-5 from its own fp64, and ONNX
# Runtime up to 2.4e-4 from PyTorch. Injected faults (a scale or RoPE base off by 2 to 5 %) give 1e-2 and
# more. fp16: queries, keys and values are rounded to 11 bits; 1.1e-2 was the largest seen (random weights
# amplify, trained do less). bf16: three bits less than fp16, eight times as far; used where engines are
# debugged (no CPU computes it).
LOGITS = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2.4e-1}

# Keys and values of a prefix pass against the reference: largest difference over max(1, largest value).
# Reasons as above.
CACHE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2.4e-1}

# A router's choice between two experts lies within rounding if their logits differ by less than this, over
# max(1, largest logit): LOGITS, which is the error at the end of the network.
ROUTER = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2.4e-1}

# The weight of an expert against the reference's, in rows with the same experts.
EXPERT_WEIGHTS = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2.4e-1}

# Prefix graph against refine graph at index 0: the same arithmetic but for the width of the attention's inner
# loops.
SAME_GRAPH = {"fp32": 1e-5, "fp16": 1e-2}

# A quantised artifact's graphs as a processor computes them, by target: largest difference over max(1,
# largest value). For the CPU against the graph spelled out in float arithmetic: w8a8 is equal bit for bit
# while sums stay below 2^24 (K up to 1,040); int4's operator multiplies scales in another order, and a number
# at the edge of a step may then take the next one: 0.02 on the demo model. A product that saturates gives 0.2
# and more. For TensorRT the prefix graph against the refine graph, in float arithmetic.
QUANTIZED_GRAPH = {"ort-cpu": 5e-2, "tensorrt": 5e-2}

# Of a quantised artifact with experts, the share of rows that must be within QUANTIZED_GRAPH: the last bit of
# a sum may choose another expert for a row, which then differs by more. A wrong kernel is wrong in all rows.
MOST_ROWS = 0.8

# A decision is AMBIGUOUS if moving confidences by this much turns it into the expected one. fp32: a relative
# logit error of 1e-5 on logits of 30. fp16: 3.6e-2 was the largest confidence error seen on random models.
CONFIDENCE = {"fp32": 1e-4, "fp16": 4e-2, "bf16": 2e-1}

# What quantising may cost (export/quantize/gate.py), against the model as it was. On the demo model, 200
# prompts, before 196 right: w8a8 has a KL of 1e-4, proposes 99.9 % of the tokens again, makes 99.0 % of the
# commits in the same forward, 196 right; 4 bits in blocks of 128 have 0.0033, 98.4 %, 95.8 %, 196 right; 3
# bits have 0.025, 96.0 %, 91.5 %, and 160 right. The bounds are between the last two.
QUANTIZED_KL = 0.015  # nats, mean over masked rows
QUANTIZED_TOKENS = 0.97
QUANTIZED_COMMITS = 0.935
QUANTIZED_DROP = 1.0  # points of right answers
