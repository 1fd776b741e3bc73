// One source, several instruction sets: a file named cpu.cpp is compiled once for each CPU capability (setup.py), its
// functions in the namespace of that capability, and the fitting one is chosen at run time.
//
// Such a file includes no torch header and no standard container: an inline function of theirs, compiled with AVX-512,
// could be the copy that the linker keeps for everybody.
#pragma once

#define R1_CONCAT_(a, b) a##b
#define R1_CONCAT(a, b) R1_CONCAT_(a, b)

// namespace R1_CPU_NAMESPACE { ... } in cpu.cpp: r1::cpu_avx512_bf16, r1::cpu_avx512, r1::cpu_avx2 or r1::cpu_baseline.
#ifdef R1_CPU_CAPABILITY
#define R1_CPU_NAMESPACE R1_CONCAT(cpu_, R1_CPU_CAPABILITY)
#endif

// In an op's header: declares a function of its cpu.cpp for every capability.
#if defined(__x86_64__)
#define R1_DECLARE_CPU(declaration) \
  namespace cpu_baseline {          \
  declaration;                      \
  }                                 \
  namespace cpu_avx2 {              \
  declaration;                      \
  }                                 \
  namespace cpu_avx512 {            \
  declaration;                      \
  }                                 \
  namespace cpu_avx512_bf16 {       \
  declaration;                      \
  }
// In an op's op.cpp: R1_CPU(f) is f's implementation for this machine.
#define R1_CPU(function)                                                                  \
  (::r1::cpu_capability() == ::r1::CpuCapability::avx512_bf16 ? cpu_avx512_bf16::function \
   : ::r1::cpu_capability() == ::r1::CpuCapability::avx512    ? cpu_avx512::function      \
   : ::r1::cpu_capability() == ::r1::CpuCapability::avx2      ? cpu_avx2::function        \
                                                              : cpu_baseline::function)
#else
#define R1_DECLARE_CPU(declaration) \
  namespace cpu_baseline {          \
  declaration;                      \
  }
#define R1_CPU(function) cpu_baseline::function
#endif

namespace r1 {

enum class CpuCapability { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// What this machine has; the environment variable R1_MEGATRON_CPU_CAPABILITY, one of these names, can lower it.
CpuCapability cpu_capability();

}  // namespace r1
