#pragma once

// The text of a cudaError_t.
extern "C" const char* r1_cuda_error_text(int code);
