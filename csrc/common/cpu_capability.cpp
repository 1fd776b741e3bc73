#include <cstdlib>
#include <cstring>

#include "common/cpu.h"

namespace r1 {

static CpuCapability detect() {
#if defined(__x86_64__)
  auto best = CpuCapability::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = CpuCapability::avx2;
  if (best == CpuCapability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = CpuCapability::avx512;
  const char* asked = std::getenv("R1_MEGATRON_CPU_CAPABILITY");
  if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return CpuCapability::baseline;
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0 && best == CpuCapability::avx512) return CpuCapability::avx2;
  return best;
#else
  return CpuCapability::baseline;
#endif
}

CpuCapability cpu_capability() {
  static const CpuCapability found = detect();
  return found;
}

}  // namespace r1
