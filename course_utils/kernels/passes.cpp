// v = v/2 + 1/2, `together` times in one pass over memory, and `passes` passes. The arithmetic is
// together * passes, the trips are 2 * passes. A template makes one loop for each `together`.
#include <cstdint>

template <int Together>
void once(const float* in, float* out, int64_t n) {
  #pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float v = in[i];  // from here to the end of the body, v is in a register
    for (int k = 0; k < Together; ++k) v = v * 0.5f + 0.5f;
    out[i] = v;
  }
}

extern "C" void run(const float* x, float* y, int64_t n, int together, int passes) {
  for (int pass = 0; pass < passes; ++pass, x = y) {
    if (together == 1) once<1>(x, y, n);
    if (together == 2) once<2>(x, y, n);
    if (together == 4) once<4>(x, y, n);
    if (together == 8) once<8>(x, y, n);
    if (together == 16) once<16>(x, y, n);
  }
}
