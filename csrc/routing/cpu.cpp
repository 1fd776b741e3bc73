#include "routing/cpu.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

constexpr double kLowest = -__builtin_inf();

// The place of the largest of `values`, the first among equals; NaN is never larger. What it finds it takes out.
template <class Real>
int64_t take_best(Real* values, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) best = values[i] > values[best] ? i : best;
  values[best] = kLowest;
  return best;
}

// Groups that are not among the best fall out of the choice.
template <class Real>
void limit_to_best_groups(const Routing& routing, Real* choice, Real* worth) {
  const int64_t size = routing.num_experts / routing.num_groups;
  for (int64_t g = 0; g < routing.num_groups; ++g) {
    Real first = kLowest, second = kLowest;
    for (const Real *x = choice + g * size, *end = x + size; x < end; ++x) {
      const Real lower = *x > first ? first : *x;
      first = *x > first ? *x : first;
      second = lower > second ? lower : second;
    }
    worth[g] = first + second;
  }
  // The worst go, the last among equals first.
  for (int64_t left = routing.num_groups; left > routing.group_topk; --left) {
    int64_t worst = -1;
    for (int64_t g = 0; g < routing.num_groups; ++g)
      if (worth[g] < __builtin_inf() && (worst < 0 || worth[g] <= worth[worst])) worst = g;
    if (worst < 0) return;  // NaN
    worth[worst] = __builtin_inf();
    for (int64_t e = worst * size; e < (worst + 1) * size; ++e) choice[e] = kLowest;
  }
}

template <class Real>
void route(const Routing& routing, int64_t begin, int64_t end, void* scratch) {
  auto* choice = static_cast<Real*>(scratch);
  const auto* bias = static_cast<const Real*>(routing.bias);
  for (int64_t token = begin; token < end; ++token) {
    const Real* scores = static_cast<const Real*>(routing.scores) + token * routing.num_experts;
    for (int64_t e = 0; e < routing.num_experts; ++e) choice[e] = bias == nullptr ? scores[e] : scores[e] + bias[e];
    if (routing.group_topk < routing.num_groups) limit_to_best_groups(routing, choice, choice + routing.num_experts);
    Real* gates = static_cast<Real*>(routing.gates) + token * routing.topk;
    int64_t* experts = routing.experts + token * routing.topk;
    Real sum = 0;
    for (int64_t k = 0; k < routing.topk; ++k) {
      experts[k] = take_best(choice, routing.num_experts);
      gates[k] = scores[experts[k]];
      sum += gates[k];
    }
    sum += Real(1e-20);
    for (int64_t k = 0; k < routing.topk; ++k) gates[k] = gates[k] / sum * Real(routing.scaling);
  }
}

}  // namespace

void route_rows(const Routing& routing, Element element, int64_t begin, int64_t end, void* scratch) {
  element == Element::float64 ? route<double>(routing, begin, end, scratch)
                              : route<float>(routing, begin, end, scratch);
}

}  // namespace r1::R1_CPU_NAMESPACE
