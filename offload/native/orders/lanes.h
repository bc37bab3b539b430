/* The order of summation of every other processor: 16 sums for each output, column c in sum c % 16, from left to right; the sums
   are added from the first to the last. One source for AVX-512, AVX2, NEON and plain C: only `lanes16` differs.

   A row of x has the same sums however many others are multiplied with it. */

#pragma once

#include "inputs.h"
#include "../strips.h"

/* --- 16 float32 numbers ------------------------------------------------------------------------------------------ */

#if defined(__AVX512F__)
typedef __m512 lanes16;
static inline lanes16 load_lanes(const float *p) { return _mm512_loadu_ps(p); }
static inline void store_lanes(float *p, lanes16 a) { _mm512_storeu_ps(p, a); }
static inline lanes16 widen(const uint16_t *w) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16);
}
static inline lanes16 add_product(lanes16 a, lanes16 w, lanes16 x) { return _mm512_fmadd_ps(w, x, a); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef struct { __m256 low, high; } lanes16;
static inline lanes16 load_lanes(const float *p) { return (lanes16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store_lanes(float *p, lanes16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
static inline __m256 widen_half(const uint16_t *w) {
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)w)), 16);
}
static inline lanes16 widen(const uint16_t *w) { return (lanes16){widen_half(w), widen_half(w + 8)}; }
static inline lanes16 add_product(lanes16 a, lanes16 w, lanes16 x) {
    return (lanes16){_mm256_fmadd_ps(w.low, x.low, a.low), _mm256_fmadd_ps(w.high, x.high, a.high)};
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
typedef struct { float32x4_t of[4]; } lanes16;
static inline lanes16 load_lanes(const float *p) { return (lanes16){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
static inline void store_lanes(float *p, lanes16 a) {
    for (int j = 0; j < 4; j++) vst1q_f32(p + 4 * j, a.of[j]);
}
static inline lanes16 widen(const uint16_t *w) {
    lanes16 a;
    for (int j = 0; j < 4; j++) a.of[j] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w + 4 * j), 16));
    return a;
}
static inline lanes16 add_product(lanes16 a, lanes16 w, lanes16 x) {
    for (int j = 0; j < 4; j++) a.of[j] = vfmaq_f32(a.of[j], w.of[j], x.of[j]);
    return a;
}
#else
typedef struct { float of[16]; } lanes16;
static inline lanes16 load_lanes(const float *p) {
    lanes16 a;
    memcpy(a.of, p, sizeof a.of);
    return a;
}
static inline void store_lanes(float *p, lanes16 a) { memcpy(p, a.of, sizeof a.of); }
static inline lanes16 widen(const uint16_t *w) {
    lanes16 a;
    for (int j = 0; j < 16; j++) a.of[j] = load_bf16(w[j]);
    return a;
}
static inline lanes16 add_product(lanes16 a, lanes16 w, lanes16 x) {
    for (int j = 0; j < 16; j++) a.of[j] += w.of[j] * x.of[j];
    return a;
}
#endif

enum { LANE_COUNT = 16, ROWS_AT_ONCE = 4 };

/* Which of them this is. */
const char *expertier_lanes(void) {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return "neon";
#else
    return "c";
#endif
}

/* --- rows of w times rows of x ------------------------------------------------------------------------------------ */

/* `r` rows of w times `n` rows of x over `columns`, a multiple of 16; sums are [row of w][row of x][lane]. */
static inline __attribute__((always_inline)) void add_lanes(const int r, const int n, const uint16_t *w, int64_t stride, const float *x,
                                                            int64_t x_stride, int64_t columns, float *sums, int64_t sum_stride) {
    lanes16 a[ROWS_AT_ONCE];
#pragma GCC unroll 4
    for (int k = 0; k < r * n; k++) a[k] = load_lanes(sums + k / n * sum_stride + k % n * LANE_COUNT);
    for (int64_t c = 0; c < columns; c += LANE_COUNT) {
        lanes16 x_lanes[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) x_lanes[i] = load_lanes(x + i * x_stride + c);
#pragma GCC unroll 4
        for (int row = 0; row < r; row++) {
            lanes16 w_lanes = widen(w + row * stride + c);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) a[row * n + i] = add_product(a[row * n + i], w_lanes, x_lanes[i]);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < r * n; k++) store_lanes(sums + k / n * sum_stride + k % n * LANE_COUNT, a[k]);
}

/* All rows of a strip times up to 16 rows of x. */
static void add_strip(const uint16_t *w, int64_t stride, const float *x, int64_t x_stride, int64_t n, int64_t columns, float *sums) {
    int64_t sum_stride = n * LANE_COUNT;
    for (int64_t i = 0; i < n; i += ROWS_AT_ONCE) {
        const float *from = x + i * x_stride;
        float *to = sums + i * LANE_COUNT;
        int64_t left = n - i;
        for (int64_t row = 0; row < STRIP_ROWS; row += left == 1 ? 4 : left == 2 ? 2 : 1) {
            const uint16_t *some = w + row * stride;
            float *at = to + row * sum_stride;
            if (left == 1)
                add_lanes(4, 1, some, stride, from, x_stride, columns, at, sum_stride);
            else if (left == 2)
                add_lanes(2, 2, some, stride, from, x_stride, columns, at, sum_stride);
            else if (left == 3)
                add_lanes(1, 3, some, stride, from, x_stride, columns, at, sum_stride);
            else
                add_lanes(1, 4, some, stride, from, x_stride, columns, at, sum_stride);
        }
    }
}

static inline float sum_lanes(const float *lane) {
    float total = 0;
    for (int j = 0; j < LANE_COUNT; j++) total += lane[j];
    return total;
}

static inline size_t lanes_sums(void) { return STRIP_ROWS * X_ROWS * LANE_COUNT; }

/* y[i][row] for the rows i of one group of x and the rows of one strip. */
static void lanes_group(struct strip s, const struct inputs *x, int64_t group, struct room *room, uint16_t *y, int64_t y_stride) {
    int64_t first = group * X_ROWS, n = x->rows - first < X_ROWS ? x->rows - first : X_ROWS;
    int64_t stride, columns = x->columns, c = 0;
    float *sums = room->sums;
    memset(sums, 0, (size_t)(STRIP_ROWS * n * LANE_COUNT) * sizeof(float));
    if (s.m->form == PLAIN && s.rows == STRIP_ROWS) {
        c = columns / CHUNK * CHUNK; /* what is left begins where `read_chunk` reads */
        add_strip(plain_row(&s, 0), columns, lanes_of(x, first), padded(columns), n, c, sums);
    }
    for (; c < columns; c += CHUNK) {
        const uint16_t *w = read_chunk(&s, c, room, &stride);
        int64_t left = columns - c < CHUNK ? (columns - c + LANE_COUNT - 1) / LANE_COUNT * LANE_COUNT : CHUNK;
        add_strip(w, stride, lanes_of(x, first) + c, padded(columns), n, left, sums);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t row = 0; row < s.rows; row++) y[(first + i) * y_stride + row] = finish(&s, row, sum_lanes(sums + (row * n + i) * LANE_COUNT));
}

/* y[i][row] for all rows i of x and the rows of one strip, which is expanded anew for each group. */
static void lanes_strip(const struct strip *s, const struct inputs *x, struct room *room, uint16_t *y, int64_t y_stride) {
    for (int64_t group = 0; group < num_groups(x); group++) lanes_group(*s, x, group, room, y, y_stride);
}
