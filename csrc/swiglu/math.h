// What the CPU and the CUDA kernels share: the tensors and the arithmetic of one element, or of one vector of them.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace r1 {

// Contiguous. Only the backward pass has da, dh and dprobs.
struct SwigluTensors {
  const void *h, *probs, *da;  // [rows, 2 width]: gate, up; [rows] or null; [rows, width]
  void *a, *dh, *dprobs;       // [rows, width]; [rows, 2 width]; [rows], null without probs
  int64_t rows, width;
};

// e = exp(-|gate|): nothing overflows, and both tails keep their precision.
template <class Value>
R1_HOST_DEVICE Value sigmoid_of(Value gate, Value e) {
  const Value upper = 1 / (1 + e);
  return gate < 0 ? e * upper : upper;
}

template <class Value>
R1_HOST_DEVICE Value swiglu_activation(Value gate, Value up, Value prob, Value e) {
  return gate * sigmoid_of(gate, e) * up * prob;
}

template <class Value>
struct SwigluGradient {
  Value gate, up, activation, prob;  // that of prob is one element's share
};

template <class Value>
R1_HOST_DEVICE SwigluGradient<Value> swiglu_gradient(Value gate, Value up, Value da, Value prob, Value e) {
  const Value sigmoid = sigmoid_of(gate, e);
  const Value silu = gate * sigmoid;
  const Value d = da * prob;
  return {d * up * (sigmoid + silu * (1 - sigmoid)), d * silu, silu * up * prob, da * silu * up};
}

}  // namespace r1
