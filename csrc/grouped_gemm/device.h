// What the launches ask of the current device, asked once.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <utility>

namespace r1::grouped_gemm {

struct Device {
  int major = 0, minor = 0, multiprocessors = 0;
};

inline cudaError_t current_device(Device& device) {
  constexpr int kMaxDevices = 64;
  static Device known[kMaxDevices];
  static std::mutex mutex;
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& found = known[index];
  if (found.multiprocessors == 0) {
    Device asked;
    for (auto [value, attribute] : {std::pair{&asked.major, cudaDevAttrComputeCapabilityMajor},
                                    std::pair{&asked.minor, cudaDevAttrComputeCapabilityMinor},
                                    std::pair{&asked.multiprocessors, cudaDevAttrMultiProcessorCount}})
      if (cudaError_t error = cudaDeviceGetAttribute(value, attribute, index); error != cudaSuccess) return error;
    found = asked;
  }
  device = found;
  return cudaSuccess;
}

}  // namespace r1::grouped_gemm
