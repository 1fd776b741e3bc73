#include <cuda_runtime.h>

#include "common/cuda_errors.h"

extern "C" const char* r1_cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
