/* See attend.h. The order is that of aten/src/ATen/native/cpu/FlashAttentionKernel.cpp of PyTorch for one query, and of the products
   of MKL that it calls where there is AVX512_BF16; those were found by adding numbers that absorb each other:

     query and key   pairs of columns in 16 sums, column c in sum c / 2 % 16; then sums 8 apart, neighbours, neighbours, and the
                     last two are added
     values          pairs of positions from left to right, a fresh sum every 8 positions

   Source of the exponential: Malossi et al. 2015, "Fast Exponential Computation on SIMD Architectures", as in ATen/cpu/vec. This file
   must be compiled without contraction of products and sums. */

#include "attend.h"

#include "../bfloat16.h"

#include <math.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

enum { BLOCK = 512, LANES = 16, COLUMNS = 32, ROWS = 8, MOST_WIDTH = 512 };
enum { MANY = 1 << 17 }; /* numbers of all heads' keys from which on all threads compute */
enum { AHEAD = 1024 };   /* numbers that are asked for ahead: 8 positions of 128 */

#define INLINED static inline __attribute__((always_inline))

INLINED __m512i load_columns(const uint16_t *from, int64_t left) {
    return left >= COLUMNS ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from);
}

INLINED __m256 dot_of_halves(const uint16_t *query, const uint16_t *key, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += COLUMNS) {
        __builtin_prefetch(key + c + AHEAD);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)load_columns(key + c, width - c), (__m512bh)load_columns(query + c, width - c));
    }
    return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
}

/* Scaled products of the query with `count` keys; the largest. There is room for three more. */
INLINED float scores(const uint16_t *query, const uint16_t *key, int64_t width, float scale, int64_t count, float *score) {
    int64_t last = count - 1;
    for (int64_t i = 0; i < count; i += 4) {
        __m256 sum[4];
        for (int64_t n = 0; n < 4; n++) sum[n] = dot_of_halves(query, key + (i + n < last ? i + n : last) * width, width);
        __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
        __m128 dots = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
        _mm_storeu_ps(score + i, _mm_mul_ps(dots, _mm_set1_ps(scale)));
    }
    float most = score[0];
    int64_t i = 1;
    if (count >= LANES) {
        __m512 lanes = _mm512_loadu_ps(score);
        for (i = LANES; i + LANES <= count; i += LANES) lanes = _mm512_max_ps(lanes, _mm512_loadu_ps(score + i));
        most = _mm512_reduce_max_ps(lanes);
    }
    for (; i < count; i++) most = score[i] > most ? score[i] : most;
    return most;
}

/* exp(x) to bfloat16, for x <= 0: the bits of a float from x as a power of 2, less a polynomial of degree 3. */
static inline __m512 coarse_exp(__m512 x) {
    __mmask16 is_least = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-0x1.5d58ap+6f), _CMP_LT_OS);
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f));
    __m512 rest = _mm512_sub_ps(power, _mm512_floor_ps(power));
    __m512 y = _mm512_fmadd_ps(rest, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
    y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.30354260500649682f));
    y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.00010703434948458272f));
    y = _mm512_fmadd_ps(_mm512_set1_ps(0x1p23f), _mm512_sub_ps(power, y), _mm512_set1_ps(0x1p23f * 127.0f));
    return _mm512_castsi512_ps(_mm512_maskz_cvttps_epi32(_knot_mask16(is_least), y));
}

static inline __m256i round_lanes(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
}

/* exp(score - most), rounded, with zeros up to the end of a group of rows; their sum, before they are rounded. */
static float weigh(const float *score, int64_t count, float most, uint16_t *weight) {
    __m512 sums = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __m512 y = coarse_exp(_mm512_sub_ps(_mm512_loadu_ps(score + i), _mm512_set1_ps(most)));
        sums = _mm512_add_ps(sums, y);
        _mm256_storeu_si256((__m256i *)(weight + i), round_lanes(y));
    }
    float lane[LANES];
    _mm512_storeu_ps(lane, sums);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    for (; i < count; i++) {
        float y = expf(score[i] - most);
        lane[0] += y;
        weight[i] = round_bf16(y);
    }
    memset(weight + count, 0, ROWS * sizeof *weight);
    return lane[0];
}

/* Adds up to 8 rows of 32 columns, weighted, to `sum`; a register has the columns that unpacking the rows gives it. */
INLINED void add_rows(const uint16_t *value, int64_t width, int64_t left, int64_t rows, const uint16_t *weight, __m512 sum[2]) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r += 2) {
        uint32_t pair;
        memcpy(&pair, weight + r, sizeof pair);
        for (int64_t n = r; n < r + 2; n++) __builtin_prefetch(value + n * width + AHEAD);
        __m512i first = load_columns(value + r * width, left);
        __m512i second = r + 1 < rows ? load_columns(value + (r + 1) * width, left) : _mm512_setzero_si512();
        __m512bh by = (__m512bh)_mm512_set1_epi32((int32_t)pair);
        low = _mm512_dpbf16_ps(low, (__m512bh)_mm512_unpacklo_epi16(first, second), by);
        high = _mm512_dpbf16_ps(high, (__m512bh)_mm512_unpackhi_epi16(first, second), by);
    }
    sum[0] = _mm512_add_ps(sum[0], low);
    sum[1] = _mm512_add_ps(sum[1], high);
}

static void finish(const __m512 sum[2], float scale, int64_t left, uint16_t *to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    float column[COLUMNS];
    _mm512_storeu_ps(column, _mm512_permutex2var_ps(sum[0], first, sum[1]));
    _mm512_storeu_ps(column + LANES, _mm512_permutex2var_ps(sum[0], second, sum[1]));
    for (int64_t i = 0; i < left && i < COLUMNS; i++) to[i] = round_bf16(column[i] * scale);
}

INLINED void attend_head(int64_t width, float scale, int64_t positions, const uint16_t *query, const uint16_t *key,
                         const uint16_t *value, uint16_t *attended) {
    float score[BLOCK + 4], most = -INFINITY, total = 0;
    uint16_t weight[BLOCK + ROWS];
    int64_t groups = (width + COLUMNS - 1) / COLUMNS;
    __m512 sum[groups][2];
    for (int64_t g = 0; g < groups; g++) sum[g][0] = sum[g][1] = _mm512_setzero_ps();
    for (int64_t at = 0; at < positions; at += BLOCK) {
        int64_t count = positions - at < BLOCK ? positions - at : BLOCK;
        float highest = scores(query, key + at * width, width, scale, count, score);
        highest = most > highest ? most : highest;
        float added = weigh(score, count, highest, weight), shrinks = expf(most - highest);
        total = added + shrinks * total;
        most = highest;
        for (int64_t g = 0; g < groups && at; g++)
            for (int half = 0; half < 2; half++) sum[g][half] = _mm512_mul_ps(sum[g][half], _mm512_set1_ps(shrinks));
        const uint16_t *first = value + at * width;
        for (int64_t row = 0; row < count; row += ROWS, first += ROWS * width)
            for (int64_t g = 0; g < groups; g++)
                if (count - row >= ROWS)
                    add_rows(first + g * COLUMNS, width, width - g * COLUMNS, ROWS, weight + row, sum[g]);
                else
                    add_rows(first + g * COLUMNS, width, width - g * COLUMNS, count - row, weight + row, sum[g]);
    }
    for (int64_t g = 0; g < groups; g++)
        finish(sum[g], 1.0f / total, width - g * COLUMNS, attended + g * COLUMNS);
}

/* softmax(scale query key^T) value for each head, [heads, width]; 0, and nothing is done, if it cannot be computed here so. */
int expertier_attend(const struct heads *of, int64_t positions, const uint16_t *query, const struct cached *keys,
                     const struct cached *values, uint16_t *attended) {
    if (of->width > MOST_WIDTH) return 0;
    int64_t width = of->width, shares = of->heads / of->shared_heads;
#pragma omp parallel for schedule(static) if (positions * of->heads * width >= MANY)
    for (int64_t head = 0; head < of->heads; head++) {
        const uint16_t *q = query + head * width, *k = keys->first + head / shares * keys->stride;
        const uint16_t *v = values->first + head / shares * values->stride;
        uint16_t *y = attended + head * width;
        if (width == 128) /* what compilers know they unroll */
            attend_head(128, of->scale, positions, q, k, v, y);
        else if (width == 64)
            attend_head(64, of->scale, positions, q, k, v, y);
        else
            attend_head(width, of->scale, positions, q, k, v, y);
    }
    return 1;
}

#else

int expertier_attend(const struct heads *of, int64_t positions, const uint16_t *query, const struct cached *keys,
                     const struct cached *values, uint16_t *attended) {
    (void)of, (void)positions, (void)query, (void)keys, (void)values, (void)attended;
    return 0;
}

#endif
