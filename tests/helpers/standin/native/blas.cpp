// cuBLAS and cuBLASLt: matrix products do nothing and are recorded. `build.py` generates the other entry points.
//
// Declared without cuBLAS's headers, which need others that torch's own packages do not bring.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "record.h"

using namespace standin;

namespace {
struct Handle {
  const void* stream = nullptr;
};
constexpr int SUCCESS = 0, EXECUTION_FAILED = 13;

// cublasLtMatmulHeuristicResult_t
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

int allocate(void** out) {
  *out = calloc(1, 256);
  return SUCCESS;
}
int release(void* made) {
  free(made);
  return SUCCESS;
}
}  // namespace

namespace standin {
// Called by the generated entry points of products; `handle` is their first argument.
int product(const char* name, void* handle) {
  const void* stream = handle ? static_cast<Handle*>(handle)->stream : nullptr;
  int owner = stream_device(stream);
  count(GEMM, name, stream);
  return owner >= 0 && owner != device() ? EXECUTION_FAILED : SUCCESS;
}
}  // namespace standin

EXPORT int cublasCreate_v2(void** out) {
  *out = new Handle();
  return SUCCESS;
}
EXPORT int cublasLtCreate(void** out) { return cublasCreate_v2(out); }
EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  static_cast<Handle*>(handle)->stream = stream;
  return SUCCESS;
}
EXPORT int cublasGetMathMode(void*, int* out) { return *out = 0; }          // CUBLAS_DEFAULT_MATH
EXPORT int cublasGetPointerMode_v2(void*, int* out) { return *out = 0; }    // CUBLAS_POINTER_MODE_HOST
EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*,
                          void*, const void*, void*, size_t, void* stream) {
  Handle own{stream};
  return product("cublasLtMatmul", &own);
}
EXPORT int cublasLtMatmulDescCreate(void** out, int, int) { return allocate(out); }
EXPORT int cublasLtMatmulDescDestroy(void* made) { return release(made); }
EXPORT int cublasLtMatrixLayoutCreate(void** out, int, uint64_t, uint64_t, int64_t) { return allocate(out); }
EXPORT int cublasLtMatrixLayoutDestroy(void* made) { return release(made); }
EXPORT int cublasLtMatmulPreferenceCreate(void** out) { return allocate(out); }
EXPORT int cublasLtMatmulPreferenceDestroy(void* made) { return release(made); }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* out, int* number) {
  memset(out, 0, sizeof *out);
  *number = 1;
  return SUCCESS;
}
