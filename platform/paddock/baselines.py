"""Published results to stand beside one's own: PromptCBLUE's README, dev set of 16 tasks (v1), of 100 points."""

from __future__ import annotations

from collections.abc import Mapping

CHATGLM_LORA: Mapping[str, float] = {
    "CMeEE-V2": 67.25,
    "CMeIE": 45.55,
    "CHIP-CDN": 84.61,
    "CHIP-CDEE": 54.56,
    "CHIP-STS": 80.81,
    "CHIP-CTC": 80.86,
    "KUAKE-IR": 68.35,
    "KUAKE-QIC": 73.90,
    "KUAKE-QQR": 63.48,
    "KUAKE-QTR": 54.28,
    "CHIP-MDCFNPC": 73.66,
    "IMCS-V2-DAC": 76.39,
    "IMCS-V2-NER": 87.09,
    "IMCS-V2-SR": 63.30,
    "IMCS-V2-MRG": 46.63,
    "MedDG": 11.17,
    "Overall": 64.48,
}
"""ChatGLM-6B tuned with LoRA, task by task."""

OVERALL: Mapping[str, float] = {
    "ChatGPT, in-context": 42.08,
    "ChatGLM-6B, p-tuning": 60.95,
    "ChatGLM-6B, LoRA": 64.48,
    "ChatGLM-6B, AdaLoRA": 64.66,
}
