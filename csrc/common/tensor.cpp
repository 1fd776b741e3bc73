#include "common/tensor.h"

#include <dlfcn.h>

#ifdef R1_WITH_CUDA
#include "common/cuda_errors.h"
#endif

namespace r1 {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

std::string describe(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "] " + name_of(tensor.scalar_type());
}

static void check_sizes(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        std::initializer_list<int64_t> sizes) {
  std::string expected = "[";
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    expected += (axis ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    if (fits && size >= 0 && tensor.size(axis) != size) fits = false;
    ++axis;
  }
  R1_CHECK(fits, op, ": ", name, " must be ", expected, "], got ", describe(tensor));
  R1_CHECK(tensor.device() == like.device(), op, ": ", name, " is not on the device of the other tensors");
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                  std::initializer_list<int64_t> sizes) {
  check_sizes(op, name, tensor, like, sizes);
  R1_CHECK(tensor.is_contiguous(), op, ": ", name, " ", describe(tensor), " must be contiguous");
}

void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                std::initializer_list<int64_t> sizes) {
  check_sizes(op, name, tensor, like, sizes);
  R1_CHECK(tensor.stride(1) == 1 || tensor.size(1) == 1, op, ": the rows of ", name, " ", describe(tensor),
           " must be contiguous");
}

Element element_of(const char* op, const Tensor& tensor) {
  Element element{};
  for_dtype(op, tensor.scalar_type(), [&](auto zero) { element = static_cast<Element>(sizeof(zero)); });
  return element;
}

#ifdef R1_WITH_CUDA
void* cuda_stream(const Tensor& tensor) {
  // It lives in libtorch_cuda, which a CPU-only torch does not have: looked up when it is first needed.
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const auto lookup = reinterpret_cast<Lookup>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  R1_CHECK(lookup != nullptr, "r1_megatron: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(tensor.get_device_index(), &stream));
  return stream;
}

void check_cuda(const char* op, int code) { R1_CHECK(code == 0, op, ": CUDA says: ", r1_cuda_error_text(code)); }
#endif

}  // namespace r1
