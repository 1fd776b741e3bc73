#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

// A choice is one of the `topk` experts of a token: choice c belongs to token c / topk.
struct Mixture {
  const void *x, *w1, *w2;  // [tokens, hidden], [experts, 2 width, hidden], [experts, hidden, width]
  const float* gates;       // [tokens, topk]
  const int64_t* experts;   // [tokens, topk]
  void* parts;              // [tokens, topk, hidden], float32 (float64 for float64): what each choice contributes
  void* out;                // [tokens, hidden]
  int64_t topk, hidden, width, first_expert, num_experts;
};

// Rows of one expert that are computed together: its weights are read once for them.
inline constexpr int64_t kExpertRows = 64;

// Of 64-byte aligned memory: the activations of kExpertRows rows, before and after SwiGLU.
inline int64_t mixture_scratch_bytes(const Mixture& mixture) { return kExpertRows * (3 * mixture.width + 64) * 8; }

// The parts of the choices `choices [count]`, all of local expert `expert`.
R1_DECLARE_CPU(void expert_parts(const Mixture& mixture, Element element, int64_t expert, const int64_t* choices,
                                 int64_t count, void* scratch))
// Sums the parts of the tokens [begin, end) over the choices whose experts are here, in the order of the choices.
R1_DECLARE_CPU(void sum_parts(const Mixture& mixture, Element element, int64_t begin, int64_t end))

}  // namespace r1
