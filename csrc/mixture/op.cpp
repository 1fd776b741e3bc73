#include "mixture/op.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "mixture/cpu.h"

namespace r1 {
namespace {

constexpr const char* kOp = "mixture_of_experts";
// Below this many multiply-adds, waking other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 20;
// Numbers to add up that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

// The choices of each local expert, in the order of tokens: those of expert e are [bounds[e], bounds[e + 1]).
struct Sorted {
  std::vector<int64_t> bounds, choices;

  Sorted(const int64_t* experts, int64_t count, int64_t first_expert, int64_t num_experts) : bounds(num_experts + 1) {
    const auto is_here = [=](int64_t expert) { return expert >= first_expert && expert < first_expert + num_experts; };
    for (int64_t c = 0; c < count; ++c)
      if (is_here(experts[c])) ++bounds[experts[c] - first_expert + 1];
    for (int64_t e = 0; e < num_experts; ++e) bounds[e + 1] += bounds[e];
    choices.resize(bounds.back());
    std::vector<int64_t> next(bounds.begin(), bounds.end());
    for (int64_t c = 0; c < count; ++c)
      if (is_here(experts[c])) choices[next[experts[c] - first_expert]++] = c;
  }
};

}  // namespace

Tensor mixture_of_experts_cpu(const Tensor& x, const Tensor& gates, const Tensor& experts, const Tensor& w1,
                              const Tensor& w2, int64_t first_expert) {
  check_tensor(kOp, "x", x, x, {-1, -1});
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_tensor(kOp, "gates", gates, x, {tokens, -1});
  const int64_t topk = gates.size(1);
  R1_CHECK(gates.scalar_type() == ScalarType::Float, kOp, ": gates must be float32, got ", describe(gates));
  check_tensor(kOp, "experts", experts, x, {tokens, topk});
  R1_CHECK(experts.scalar_type() == ScalarType::Long, kOp, ": experts must be int64, got ", describe(experts));
  check_tensor(kOp, "w2", w2, x, {-1, hidden, -1});
  const int64_t num_experts = w2.size(0), width = w2.size(2);
  check_tensor(kOp, "w1", w1, x, {num_experts, 2 * width, hidden});
  for (const Tensor* weight : {&w1, &w2})
    R1_CHECK(weight->scalar_type() == x.scalar_type(), kOp, ": w1 and w2 must have the dtype of x (",
             name_of(x.scalar_type()), "), got ", describe(*weight));

  const Element element = element_of(kOp, x);
  Tensor out = torch::stable::new_empty(x, {tokens, hidden});
  const std::unique_ptr<char[]> parts(new char[tokens * topk * hidden * (element == Element::float64 ? 8 : 4)]);
  const Mixture mixture{
      .x = x.const_data_ptr(),
      .w1 = w1.const_data_ptr(),
      .w2 = w2.const_data_ptr(),
      .gates = static_cast<const float*>(gates.const_data_ptr()),
      .experts = static_cast<const int64_t*>(experts.const_data_ptr()),
      .parts = parts.get(),
      .out = out.mutable_data_ptr(),
      .topk = topk,
      .hidden = hidden,
      .width = width,
      .first_expert = first_expert,
      .num_experts = num_experts,
  };
  const Sorted sorted(mixture.experts, tokens * topk, first_expert, num_experts);
  const int64_t work = sorted.bounds.back() * 3 * hidden * width;
  const int64_t num_threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(num_experts, num_threads), 1, [&](int64_t, int64_t) {
    constexpr std::align_val_t kAlignment{64};
    const auto release = [](void* memory) { ::operator delete(memory, kAlignment); };
    const std::unique_ptr<void, decltype(release)> scratch(::operator new(mixture_scratch_bytes(mixture), kAlignment),
                                                           release);
    for (int64_t e; (e = next++) < num_experts;)
      R1_CPU(expert_parts)(mixture, element, e, sorted.choices.data() + sorted.bounds[e],
                           sorted.bounds[e + 1] - sorted.bounds[e], scratch.get());
  });
  torch::stable::parallel_for(0, tokens, kGrain / (topk * hidden + 1) + 1,
                              [&](int64_t begin, int64_t end) { R1_CPU(sum_parts)(mixture, element, begin, end); });
  return out;
}

}  // namespace r1
