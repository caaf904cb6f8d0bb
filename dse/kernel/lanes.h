// Vectors of floats as wide as the processor has them, by the compiler's own vector types: any processor will do.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

static inline quad folded(lanes v) {
    quad parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int width = LANES / 8; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return parts[0];
}

// The sums of four vectors, side by side: with thin matrices, adding lanes one by one takes as long as the products do.
static inline quad totals(quad a, quad b, quad c, quad d) {
    const quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// e^x for x <= 0, to 1.1 units in the last place where it was tried (every 1e-5 from -87 on); 0 where that is below the
// smallest normal number. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of the Cephes library (Moshier),
// 2^n as an exponent.
static inline lanes exponential(lanes x) {
    const lanes rounder = lanes{} + 12582912.0f;  // 1.5 x 2^23: what is added to it loses its fraction
    const lanes n = (x * 1.44269504088896341f + rounder) - rounder;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = lanes{} + 1.9875691500e-4f;
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + coefficient;
    const whole_lanes power = (__builtin_convertvector(n, whole_lanes) + 127) << 23;
    const whole_lanes found = (whole_lanes)((p * r * r + r + 1.0f) * (lanes)power);
    return (lanes)(found & ~(whole_lanes)(x < -87.0f));  // not-a-number stays what it is
}
