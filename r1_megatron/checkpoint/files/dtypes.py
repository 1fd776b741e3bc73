"""Dtypes of stored tensors by the names that safetensors has for them. Files speak of bytes; torch is not needed."""

from __future__ import annotations

# Bytes per element of every dtype of the format.
ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
# What torch calls them.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
FROM_TORCH = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
FP8 = "F8_E4M3"
# What weights are made of; nothing else is converted.
WEIGHTS = ("F32", "F16", "BF16", FP8)


def item_size(dtype: str) -> int:
    """Bytes per element."""
    return ITEM_SIZES[dtype]
