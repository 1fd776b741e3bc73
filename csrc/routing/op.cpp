#include "routing/op.h"

#include <vector>

#include "routing/cpu.h"

namespace r1 {

static constexpr const char* kOp = "route_tokens";
// Experts that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 14;

std::tuple<Tensor, Tensor> route_tokens_cpu(const Tensor& scores, std::optional<Tensor> bias, int64_t topk,
                                            int64_t num_groups, int64_t group_topk, double scaling) {
  check_tensor(kOp, "scores", scores, scores, {-1, -1});
  const auto dtype = scores.scalar_type();
  R1_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, ": scores must be float32 or float64, got ",
           describe(scores));
  const int64_t tokens = scores.size(0), num_experts = scores.size(1);
  if (bias.has_value()) {
    check_tensor(kOp, "bias", *bias, scores, {num_experts});
    R1_CHECK(bias->scalar_type() == dtype, kOp, ": bias must have the dtype of scores (", name_of(dtype), "), got ",
             describe(*bias));
  }
  R1_CHECK(num_groups > 0 && num_experts % num_groups == 0, kOp, ": num_groups must divide the ", num_experts,
           " experts, got ", num_groups);
  R1_CHECK(group_topk > 0 && (group_topk >= num_groups || num_experts / num_groups > 1), kOp, ": group_topk ",
           group_topk, " of ", num_groups, " groups needs groups of at least 2 experts, got ", num_experts, " experts");
  const int64_t eligible = group_topk < num_groups ? num_experts / num_groups * group_topk : num_experts;
  R1_CHECK(topk > 0 && topk <= eligible, kOp, ": topk must be in [1, ", eligible,
           "], the experts that a token may choose from, got ", topk);

  Tensor gates = torch::stable::new_empty(scores, {tokens, topk});
  Tensor experts = torch::stable::new_empty(scores, {tokens, topk}, ScalarType::Long);
  const Routing routing{
      .scores = scores.const_data_ptr(),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .gates = gates.mutable_data_ptr(),
      .experts = static_cast<int64_t*>(experts.mutable_data_ptr()),
      .num_experts = num_experts,
      .topk = topk,
      .num_groups = num_groups,
      .group_topk = group_topk,
      .scaling = scaling,
  };
  const Element element = element_of(kOp, scores);
  torch::stable::parallel_for(0, tokens, kGrain / (num_experts + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(num_experts + num_groups);
    R1_CPU(route_rows)(routing, element, begin, end, scratch.data());
  });
  return {gates, experts};
}

}  // namespace r1
