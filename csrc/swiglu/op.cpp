#include "swiglu/op.h"

#include "swiglu/cpu.h"
#ifdef R1_WITH_CUDA
#include "swiglu/cuda.h"
#endif

namespace r1 {

using torch::stable::new_empty;

// Elements that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 14;

static void check_inputs(const char* op, const Tensor& h, const std::optional<Tensor>& probs) {
  check_tensor(op, "h", h, h, {-1, -1});
  R1_CHECK(h.size(1) % 2 == 0, op, ": h must be [M, 2 F], gate and up side by side, got ", describe(h));
  if (!probs.has_value()) return;
  check_tensor(op, "probs", *probs, h, {h.size(0)});
  R1_CHECK(probs->scalar_type() == ScalarType::Float || probs->scalar_type() == h.scalar_type(), op,
           ": probs must be float32 or have the dtype of h (", name_of(h.scalar_type()), "), got ", describe(*probs));
}

static void check_gradient(const Tensor& da, const Tensor& h) {
  check_tensor("swiglu_backward", "da", da, h, {h.size(0), h.size(1) / 2});
  R1_CHECK(da.scalar_type() == h.scalar_type(), "swiglu_backward: da must have the dtype of h (",
           name_of(h.scalar_type()), "), got ", describe(da));
}

static SwigluTensors forward_tensors(const Tensor& h, const std::optional<Tensor>& probs, Tensor& a) {
  SwigluTensors tensors{};
  tensors.h = h.const_data_ptr();
  tensors.probs = probs.has_value() ? probs->const_data_ptr() : nullptr;
  tensors.a = a.mutable_data_ptr();
  tensors.rows = h.size(0);
  tensors.width = h.size(1) / 2;
  return tensors;
}

// The results of the backward pass, and all tensors of it.
struct Backward {
  Tensor dh, a, dprobs;
  SwigluTensors tensors;

  Backward(const Tensor& da, const Tensor& h, const std::optional<Tensor>& probs)
      : dh(torch::stable::empty_like(h)),
        a(torch::stable::empty_like(da)),
        dprobs(probs.has_value() ? torch::stable::empty_like(*probs) : new_empty(h, {0})),
        tensors(forward_tensors(h, probs, a)) {
    tensors.da = da.const_data_ptr();
    tensors.dh = dh.mutable_data_ptr();
    tensors.dprobs = probs.has_value() ? dprobs.mutable_data_ptr() : nullptr;
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {dh, a, dprobs}; }
};

Tensor swiglu_cpu(const Tensor& h, std::optional<Tensor> probs) {
  check_inputs("swiglu", h, probs);
  const Element element = element_of("swiglu", h), prob = element_of("swiglu", probs.value_or(h));
  Tensor a = new_empty(h, {h.size(0), h.size(1) / 2});
  const auto tensors = forward_tensors(h, probs, a);
  torch::stable::parallel_for(0, tensors.rows, kGrain / (tensors.width + 1) + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(swiglu_rows)(tensors, element, prob, begin, end);
  });
  return a;
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& da, const Tensor& h, std::optional<Tensor> probs) {
  check_inputs("swiglu_backward", h, probs);
  const Element element = element_of("swiglu_backward", h), prob = element_of("swiglu_backward", probs.value_or(h));
  check_gradient(da, h);
  Backward backward(da, h, probs);
  const auto& tensors = backward.tensors;
  torch::stable::parallel_for(0, tensors.rows, kGrain / (tensors.width + 1) + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(swiglu_backward_rows)(tensors, element, prob, begin, end);
  });
  return backward.results();
}

#ifdef R1_WITH_CUDA

static bool is_bfloat16_on_cuda(const char* op, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  R1_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
           ": float32 or bfloat16 expected on CUDA, got ", describe(tensor));
  return dtype == ScalarType::BFloat16;
}

Tensor swiglu_cuda(const Tensor& h, std::optional<Tensor> probs) {
  check_inputs("swiglu", h, probs);
  const bool is_bfloat16 = is_bfloat16_on_cuda("swiglu", h);
  const bool is_prob_bfloat16 = is_bfloat16_on_cuda("swiglu", probs.value_or(h));
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  Tensor a = new_empty(h, {h.size(0), h.size(1) / 2});
  const auto tensors = forward_tensors(h, probs, a);
  check_cuda("swiglu", r1_swiglu_cuda(&tensors, is_bfloat16, is_prob_bfloat16, cuda_stream(h)));
  return a;
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cuda(const Tensor& da, const Tensor& h,
                                                        std::optional<Tensor> probs) {
  check_inputs("swiglu_backward", h, probs);
  const bool is_bfloat16 = is_bfloat16_on_cuda("swiglu_backward", h);
  const bool is_prob_bfloat16 = is_bfloat16_on_cuda("swiglu_backward", probs.value_or(h));
  check_gradient(da, h);
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Backward backward(da, h, probs);
  check_cuda("swiglu_backward",
             r1_swiglu_backward_cuda(&backward.tensors, is_bfloat16, is_prob_bfloat16, cuda_stream(h)));
  return backward.results();
}

#endif

}  // namespace r1
