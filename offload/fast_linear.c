/* One token's matrix-vector products in bfloat16, at the speed of memory.

   y[r] = sum_c w[r][c] * x[c], w row-major [rows, columns], accumulated in float32, rounded to bfloat16 once.
   The order of the sum depends on `columns` alone, so results do not depend on threads or on what else is computed. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static inline float load_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
static float dot(const uint16_t *w, const uint16_t *x, int64_t columns) {
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 128 <= columns; i += 128) {
        _mm_prefetch((const char *)(w + i) + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2112, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2176, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2240, _MM_HINT_T0);
        a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_loadu_si512(w + i), (__m512bh)_mm512_loadu_si512(x + i));
        b = _mm512_dpbf16_ps(b, (__m512bh)_mm512_loadu_si512(w + i + 32), (__m512bh)_mm512_loadu_si512(x + i + 32));
        c = _mm512_dpbf16_ps(c, (__m512bh)_mm512_loadu_si512(w + i + 64), (__m512bh)_mm512_loadu_si512(x + i + 64));
        d = _mm512_dpbf16_ps(d, (__m512bh)_mm512_loadu_si512(w + i + 96), (__m512bh)_mm512_loadu_si512(x + i + 96));
    }
    for (; i < columns; i += 32) {
        __mmask32 mask = columns - i >= 32 ? 0xffffffffu : ((1u << (columns - i)) - 1);
        a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_maskz_loadu_epi16(mask, w + i),
                             (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
}
#else
static float dot(const uint16_t *w, const uint16_t *x, int64_t columns) {
    float lanes[32] = {0};
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32)
        for (int j = 0; j < 32; j++) lanes[j] += load_bf16(w[i + j]) * load_bf16(x[i + j]);
    for (int j = 0; i < columns; i++, j++) lanes[j] += load_bf16(w[i]) * load_bf16(x[i]);
    float total = 0;
    for (int j = 0; j < 32; j++) total += lanes[j];
    return total;
}
#endif

void expertier_matvec_bf16(const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) y[row] = round_bf16(dot(w + row * columns, x, columns));
}
