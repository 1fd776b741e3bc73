// Launchers of kernel.cu. They return a cudaError_t.
#pragma once

#include "swiglu/math.h"

extern "C" {
// h, da, a and dh are bfloat16 or float32, probs and dprobs likewise; bfloat16 probabilities only with bfloat16 h.
int r1_swiglu_cuda(const r1::SwigluTensors* tensors, bool is_bfloat16, bool is_prob_bfloat16, void* stream);
int r1_swiglu_backward_cuda(const r1::SwigluTensors* tensors, bool is_bfloat16, bool is_prob_bfloat16, void* stream);
}
