"""Is this set of Hugging Face tensors the model? Names and shapes only, so it is answered before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from r1_megatron.checkpoint.naming import aliases, entries, fused_expert_name, hugging_face_shapes, ignored
from r1_megatron.config.schema import ModelConfig

# DeepSeek-V3's block quantisation: one scale for every 128 x 128 values, smaller blocks at the edges.
FP8_BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
_MOST_NAMES = 40

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """What a source turned out to hold.

    Attributes:
        fused: names of fused expert tensors; every other expert is on its own.
        aliases: those of `naming.aliases` that are there, with the tensor each repeats. Compare their bytes.
        scales: names of the FP8 block scales.
        ignored: tensors that carry nothing: see `naming.ignored`, and those without elements, such as Transformers
            writes for a shared expert of width 0.
        problems: everything that keeps it from being the model, each by name; empty if it is the model.
    """

    fused: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    scales: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()

    def check(self, where: str) -> None:
        """Raises ValueError that tells all problems; of very many the first ones, and how many there are."""
        if not self.problems:
            return
        shown = self.problems[:_MOST_NAMES]
        rest = len(self.problems) - len(shown)
        lines = [*shown, f"... and {rest} more"] if rest else shown
        raise ValueError(
            f"{where}: {len(self.problems)} tensors do not fit the model of its config.json:\n  " + "\n  ".join(lines)
        )


def match_tensors(shapes: Mapping[str, Shape], model: ModelConfig, float8: Collection[str] | None = None) -> Match:
    """Compare a source's tensors with the model's.

    A layer's experts may be fused (``gate_up_proj``, ``down_proj``) or one by one, each layer as it likes.

    Args:
        shapes: the shape of every tensor in the source, scales included.
        model: what the source should be.
        float8: the source's tensors of dtype float8_e4m3fn, each of which needs its block scales; ``None``: not known.
    """
    wanted = hugging_face_shapes(entries(model))
    known_aliases = aliases(model)
    stacked = _fused_shapes(wanted)
    # In the order of the model, as a reader looks for them.
    problems = [
        *_experts_twice(shapes, wanted),
        *_missing(shapes, wanted),
        *_misshaped(shapes, {**wanted, **stacked, **{name: wanted[same] for name, same in known_aliases.items()}}),
    ]
    scales, nothing, unknown = set(), set(), []
    for name in shapes:
        if name.endswith(SCALE_SUFFIX):
            scales.add(name)
        elif name in wanted or name in stacked or name in known_aliases:
            pass
        elif ignored(name) or 0 in shapes[name]:
            nothing.add(name)
        else:
            unknown.append(f"{name}: not a tensor of this model, shape {_text(shapes[name])}")
    problems += [*unknown, *_wrong_scales(shapes, scales, float8)]
    return Match(
        fused=frozenset(name for name in stacked if name in shapes),
        aliases={name: same for name, same in known_aliases.items() if name in shapes},
        scales=frozenset(scales),
        ignored=frozenset(nothing),
        problems=tuple(problems),
    )


def _fused_shapes(wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """``gate_up_proj [E, 2F, H]`` and ``down_proj [E, H, F]`` of every layer with experts."""
    shapes: dict[str, Shape] = {}
    for name, (height, width) in ((n, s) for n, s in wanted.items() if fused_expert_name(n)):
        fused, expert, part = fused_expert_name(name) or ("", 0, "")
        shapes[fused] = (expert + 1, height if part == "down" else 2 * height, width)
    return shapes


def _experts_twice(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    return [
        f"{name}: there, and in {fused[0]} as well; leave one of them out"
        for name in wanted
        if name in shapes and (fused := fused_expert_name(name)) and fused[0] in shapes
    ]


def _missing(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    problems = []
    for name, shape in wanted.items():
        fused = fused_expert_name(name)
        if name not in shapes and (fused is None or fused[0] not in shapes):
            problems.append(f"{name}: missing, expected shape {_text(shape)}")
    return problems


def _misshaped(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    return [
        f"{name}: shape {_text(shapes[name])}, expected {_text(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]


def _wrong_scales(shapes: Mapping[str, Shape], scales: Collection[str], float8: Collection[str] | None) -> list[str]:
    problems = []
    for name in sorted(scales):
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in shapes or (float8 is not None and weight not in float8):
            problems.append(f"{name}: block scales, but {weight} is no float8_e4m3fn tensor of the source")
        elif len(shapes[weight]) != 2:
            problems.append(
                f"{name}: block scales of {weight}, shape {_text(shapes[weight])}; only matrices have them here: "
                "save the experts one by one, or dequantise the source"
            )
        elif tuple(shapes[name]) != (blocks := scale_shape(shapes[weight])):
            problems.append(
                f"{name}: shape {_text(shapes[name])}, expected {_text(blocks)}: one for every {FP8_BLOCK} x "
                f"{FP8_BLOCK} block of {_text(shapes[weight])}"
            )
    for name in float8 or ():
        if name + SCALE_SUFFIX not in scales:
            problems.append(f"{name}: float8_e4m3fn without block scales ({name + SCALE_SUFFIX} is missing)")
    return problems


def scale_shape(shape: Shape) -> Shape:
    """The shape of a matrix's block scales."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
