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
  if (best == CpuCapability::avx512 && __builtin_cpu_supports("avx512bf16")) best = CpuCapability::avx512_bf16;
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const char* asked = std::getenv("R1_MEGATRON_CPU_CAPABILITY");
  for (int lower = 0; asked != nullptr && lower < static_cast<int>(best); ++lower)
    if (std::strcmp(asked, kNames[lower]) == 0) return static_cast<CpuCapability>(lower);
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
