/* The order of summation of codes of few bits, where bits are free: sums of products of integers, scaled once for 16 columns.

   The 16 columns of a lane share a unit, a power of two, which makes their numbers of x integers below 2^14. Numbers from 1/64 of the
   largest on are exact, the others err by half a unit: 2^-14 of the largest at most. Units are 2^-126 or more. A lane with a number
   that is not finite has the unit NaN. Weights are not rounded to bfloat16: a weight is (code - zero) scale + sum of sign size.

   Sums of a lane are exact. In float32, and each rounded once, the sum of a lane is multiplied with its scale, those of planes are
   added with their sizes, and the total times the unit is added to sums of the lanes of all spans, from left to right. These sums
   begin with what zeros and signs take away, group g in sum g % 16 (of groups with more than 256 columns, all in the first), and are
   added as a tree. So bits do not depend on instruction sets. A row of x has the same sums however many others are multiplied with it. */

#pragma once

#include "../forms/few_integers.h"
#include "inputs.h"
#include "lanes.h"

/* Rows follow each other, so what is asked for CODES_AHEAD bytes before it is read may be of a later row. */
enum { LANE_COLUMNS = FEW_SPAN / LANE_COUNT, UNIT_BITS = 13, LEAST_EXPONENT = UNIT_BITS + 1, INTEGER_ROWS = 4, CODES_AHEAD = 2048 };

/* 256 columns of a row of x, as 256 high + low units, in the places of `few_integers`. */
struct integer_span {
    int8_t high[QUARTERS][QUARTER], low[QUARTERS][QUARTER];
    float unit[LANE_COUNT];
};

static inline int64_t num_spans(int64_t columns) { return (columns + FEW_SPAN - 1) / FEW_SPAN; }

static inline int64_t whole_lanes(int64_t count) { return (count + LANE_COUNT - 1) / LANE_COUNT * LANE_COUNT; }

static inline int64_t groups_across(int64_t columns, int64_t group) { return (columns + group - 1) / group; }

/* Whether lanes are of one group each, and groups of a span follow each other as in any other span. */
static inline int has_integers(const struct stored_matrix *m) {
    const int64_t group = m->parameter[GROUP_COLUMNS];
    return m->form == FEW_BITS && (m->across == 1 || group % FEW_SPAN == 0 || (group >= LANE_COLUMNS && FEW_SPAN % group == 0));
}

/* A row of x: spans, then the sum of each group of columns, negative. */
static inline int64_t integers_row_bytes(int64_t columns, int64_t group) {
    return num_spans(columns) * (int64_t)sizeof(struct integer_span) + whole_lanes(groups_across(columns, group)) * (int64_t)sizeof(float);
}

static inline const float *sums_of(const struct integer_span *spans, int64_t columns) { return (const float *)(spans + num_spans(columns)); }

/* --- sixteen sums ------------------------------------------------------------------------------------------------- */

/* a + w x, rounded once. */
static inline lanes16 add_once(lanes16 a, lanes16 w, lanes16 x) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || (defined(__ARM_NEON) && defined(__aarch64__))
    return add_product(a, w, x);
#else
    for (int j = 0; j < LANE_COUNT; j++) a.of[j] = fmaf(w.of[j], x.of[j], a.of[j]);
    return a;
#endif
}

/* Each lane's own of sixteen numbers. */
static inline lanes16 spread(lanes16 from, const int32_t place[LANE_COUNT]) {
#ifdef __AVX512F__
    return _mm512_permutexvar_ps(_mm512_load_si512(place), from);
#else
    float number[LANE_COUNT], found[LANE_COUNT];
    store_lanes(number, from);
    for (int j = 0; j < LANE_COUNT; j++) found[j] = number[place[j]];
    return load_lanes(found);
#endif
}

static inline lanes16 same_lanes(float value) {
#ifdef __AVX512F__
    return _mm512_set1_ps(value);
#else
    float found[LANE_COUNT];
    for (int j = 0; j < LANE_COUNT; j++) found[j] = value;
    return load_lanes(found);
#endif
}

/* Up to 16 numbers, with zeros after the last: of float32, and of bfloat16. */
static inline lanes16 some_lanes(const float *numbers, int64_t count) {
    if (count >= LANE_COUNT) return load_lanes(numbers);
    float found[LANE_COUNT] = {0};
    memcpy(found, numbers, (size_t)count * sizeof *found);
    return load_lanes(found);
}

static inline lanes16 some_halves(const uint8_t *numbers, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 is_there = count < LANE_COUNT ? (__mmask16)((1u << count) - 1) : 0xffff;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_there, numbers)), 16));
#else
    float found[LANE_COUNT] = {0};
    for (int64_t j = 0; j < LANE_COUNT && j < count; j++) found[j] = float_at(numbers, j);
    return load_lanes(found);
#endif
}

/* Sums of the lanes of a span, in units. */
static inline __attribute__((always_inline)) lanes16 sum_integers(const struct few_integers *w, const struct integer_span *x) {
#ifdef HAS_QUICK_INTEGERS
    __m512i high = _mm512_setzero_si512(), low = high;
#pragma GCC unroll 4
    for (int k = 0; k < QUARTERS; k++) {
        high = _mm512_dpbusd_epi32(high, w->quarter[k], _mm512_load_si512(x->high[k]));
        low = _mm512_dpbusd_epi32(low, w->quarter[k], _mm512_load_si512(x->low[k]));
    }
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
#else
    float found[LANE_COUNT];
    for (int lane = 0; lane < LANE_COUNT; lane++) {
        int32_t high = 0, low = 0;
        for (int k = 0; k < QUARTERS; k++)
            for (int j = 4 * lane; j < 4 * lane + 4; j++) high += w->quarter[k][j] * x->high[k][j], low += w->quarter[k][j] * x->low[k][j];
        found[lane] = (float)(256 * high + low);
    }
    return load_lanes(found);
#endif
}

/* Halves of the sums are added, until one is left. */
static inline float sum_tree(lanes16 sums) {
#ifdef __AVX512F__
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_castps512_ps256(_mm512_shuffle_f32x4(sums, sums, 0x0e)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float sum[LANE_COUNT];
    store_lanes(sum, sums);
    for (int half = LANE_COUNT / 2; half; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
#endif
}

/* --- x ------------------------------------------------------------------------------------------------------------ */

/* The largest size of a lane's numbers, as its bits. */
static inline int largest_size(const uint16_t number[LANE_COLUMNS]) {
#ifdef HAS_QUICK_INTEGERS
    const __m256i sizes = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)number), _mm256_set1_epi16(0x7fff));
    const __m128i larger = _mm_max_epu16(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(-1), larger)), 0);
#else
    int largest = 0;
    for (int c = 0; c < LANE_COLUMNS; c++) largest = (number[c] & 0x7fff) > largest ? number[c] & 0x7fff : largest;
    return largest;
#endif
}

/* The numbers of a lane as integers: times `per_unit`, a power of two. */
static inline void fill_lane(const uint16_t number[LANE_COLUMNS], float per_unit, int lane, struct integer_span *out) {
    enum { IN_QUARTER = LANE_COLUMNS / QUARTERS };
#ifdef HAS_QUICK_INTEGERS
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)number)), 16);
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(wide), _mm512_set1_ps(per_unit)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
    const __m128i turned = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    int32_t highs[QUARTERS], lows[QUARTERS];
    _mm_storeu_si128((__m128i *)highs, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(high), turned));
    _mm_storeu_si128((__m128i *)lows, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(value), turned));
    for (int k = 0; k < QUARTERS; k++) {
        memcpy(out->high[k] + IN_QUARTER * lane, highs + k, IN_QUARTER);
        memcpy(out->low[k] + IN_QUARTER * lane, lows + k, IN_QUARTER);
    }
#else
    for (int c = 0; c < LANE_COLUMNS; c++) {
        /* adding 1.5 2^23 rounds to an integer, which is what is then in the lowest bits */
        const float rounded = load_bf16(number[c]) * per_unit + 0x1.8p23f;
        int32_t value;
        memcpy(&value, &rounded, 4);
        value -= 0x4b400000;
        const int32_t high = (value + 128) >> 8;
        out->high[c % QUARTERS][IN_QUARTER * lane + c / QUARTERS] = (int8_t)high;
        out->low[c % QUARTERS][IN_QUARTER * lane + c / QUARTERS] = (int8_t)(value - 256 * high);
    }
#endif
}

static inline void pack_lane(const uint16_t number[LANE_COLUMNS], int lane, struct integer_span *out) {
    static const uint16_t nothing[LANE_COLUMNS];
    const int largest = largest_size(number), is_finite = largest < 0x7f80;
    const int exponent = largest >> 7 > LEAST_EXPONENT ? largest >> 7 : LEAST_EXPONENT;
    fill_lane(is_finite ? number : nothing, is_finite ? float_of_bits((uint32_t)(254 + UNIT_BITS - exponent) << 23) : 0, lane, out);
    out->unit[lane] = is_finite ? float_of_bits((uint32_t)(exponent - UNIT_BITS) << 23) : NAN;
}

static void pack_integer_row(const uint16_t *x, int64_t columns, int64_t group, struct integer_span *out) {
    float *of_group = (float *)(out + num_spans(columns));
    const struct few_integers ones = few_ones();
    memset(of_group, 0, (size_t)whole_lanes(groups_across(columns, group)) * sizeof *of_group);
    int64_t group_end = group;
    for (int64_t column = 0; column < columns; column += FEW_SPAN, out++) {
        const int64_t left = columns - column;
        uint16_t rest[FEW_SPAN] = {0};
        float sum[LANE_COUNT];
        if (left < FEW_SPAN) memcpy(rest, x + column, (size_t)left * sizeof *rest);
        const uint16_t *number = left < FEW_SPAN ? rest : x + column;
        for (int lane = 0; lane < LANE_COUNT; lane++) pack_lane(number + lane * LANE_COLUMNS, lane, out);
        store_lanes(sum, sum_integers(&ones, out));
        for (int64_t lane = 0; lane < LANE_COUNT && lane * LANE_COLUMNS < left; lane++) {
            if (column + lane * LANE_COLUMNS >= group_end) of_group++, group_end += group;
            *of_group -= out->unit[lane] * sum[lane];
        }
    }
}

static void pack_integers(const struct inputs *x, int64_t group, int64_t columns_of_group) {
    const int64_t end = (group + 1) * X_ROWS < x->rows ? (group + 1) * X_ROWS : x->rows;
    for (int64_t i = group * X_ROWS; i < end; i++)
        pack_integer_row(input_row(x, i), x->columns, columns_of_group, (struct integer_span *)((uint8_t *)x->packed + i * integers_row_bytes(x->columns, columns_of_group)));
}

/* --- rows of w ---------------------------------------------------------------------------------------------------- */

/* Which of sixteen groups each lane of a span belongs to, by the binary logarithm of the groups of a span and by the span. */
static int32_t group_places[5][LANE_COUNT][LANE_COUNT] __attribute__((aligned(64)));

static __attribute__((constructor)) void fill_group_places(void) {
    for (int log = 0; log < 5; log++)
        for (int span = 0; span < LANE_COUNT >> log; span++)
            for (int lane = 0; lane < LANE_COUNT; lane++) group_places[log][span][lane] = (span << log) + (lane << log) / LANE_COUNT;
}

/* A row of w from here on, and what is left over of it after whole spans. Its groups of columns are read some at a time: sixteen, or
   one if it has more columns than a span. */
struct integer_row {
    const uint8_t *codes, *signs[MOST_PLANES], *scales, *zeros, *sizes[MOST_PLANES];
    uint8_t last_codes[FEW_SPAN * 3 / 8], last_signs[MOST_PLANES][FEW_SPAN / 8];
    int64_t groups, spans;              /* that are read at a time */
    int64_t step;                       /* from a span to the next one in the table of places */
    const int32_t (*place)[LANE_COUNT]; /* of the lanes of the first of these spans */
};

static inline struct integer_row integer_row(const struct stored_matrix *m, const int planes, int64_t row) {
    const int64_t group = m->parameter[GROUP_COLUMNS], place = 2 * row * m->across;
    const int is_large = m->across == 1 || group > FEW_SPAN;
    struct integer_row of;
    of.codes = m->part[CODES] + row * m->row_bytes;
    of.scales = m->part[SCALES] + place;
    of.zeros = zero_kind(m) == ZERO_FLOATS ? m->part[ZEROS] + place : NULL;
    for (int plane = 0; plane < planes; plane++) {
        of.signs[plane] = m->part[PLANES + plane] + row * sign_bytes(m);
        of.sizes[plane] = plane_scales(m, plane) + place;
    }
    of.groups = is_large ? 1 : LANE_COUNT;
    of.spans = m->across == 1 ? num_spans(m->columns) : of.groups * group / FEW_SPAN;
    of.step = !is_large;
    of.place = group_places[is_large ? 0 : __builtin_ctzll((uint64_t)(FEW_SPAN / group))];
    return of;
}

static inline __attribute__((always_inline)) void next_row(const struct stored_matrix *m, const int planes, struct integer_row *of) {
    of->codes += m->row_bytes;
    of->scales += 2 * m->across;
    if (of->zeros) of->zeros += 2 * m->across;
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) of->signs[plane] += sign_bytes(m), of->sizes[plane] += 2 * m->across;
}

/* What does not lie in whole spans. */
static inline __attribute__((always_inline)) void read_last(const int bits, const int planes, int64_t columns, struct integer_row *of) {
    const int64_t whole = columns / FEW_SPAN * FEW_SPAN, left = columns - whole;
    if (!left) return;
    memcpy(of->last_codes, of->codes + whole * bits / 8, (size_t)(left * bits + 7) / 8);
    for (int plane = 0; plane < planes; plane++) memcpy(of->last_signs[plane], of->signs[plane] + whole / 8, (size_t)(left + 7) / 8);
}

static inline __attribute__((always_inline)) const struct integer_span *row_after(const struct integer_span *x, int64_t bytes) {
    return (const struct integer_span *)((const uint8_t *)x + bytes);
}

/* One span of a row of w times `n` rows of x, which are `x_bytes` apart. */
static inline __attribute__((always_inline)) void add_span(const int bits, const int planes, const int n, const uint8_t *codes,
                                                           const uint8_t *const signs[MOST_PLANES], lanes16 scales,
                                                           const lanes16 sizes[MOST_PLANES], const int32_t place[LANE_COUNT],
                                                           const struct integer_span *x, int64_t x_bytes, lanes16 sum[INTEGER_ROWS]) {
    __builtin_prefetch(codes + CODES_AHEAD, 0, 3);
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) __builtin_prefetch(signs[plane] + CODES_AHEAD / 2, 0, 3);
    const struct few_integers code = few_codes(bits, codes);
    const lanes16 scale = spread(scales, place);
    lanes16 total[INTEGER_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) total[i] = add_once(same_lanes(0), sum_integers(&code, row_after(x, i * x_bytes)), scale);
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) {
        const struct few_integers sign = few_signs(signs[plane]);
        const lanes16 size = spread(sizes[plane], place);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) total[i] = add_once(total[i], sum_integers(&sign, row_after(x, i * x_bytes)), size);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) sum[i] = add_once(sum[i], total[i], load_lanes(row_after(x, i * x_bytes)->unit));
}

/* Sums of one row of w times `n` rows of x. */
static inline __attribute__((always_inline)) void add_integers(const int bits, const int planes, const int n, const struct integer_row *of,
                                                               int64_t columns, int64_t across, const struct integer_span *x, int64_t x_bytes,
                                                               lanes16 sum[INTEGER_ROWS]) {
    const lanes16 one = same_lanes(1), half = same_lanes((float)(1 << (bits - 1)));
    const float *x_sums = sums_of(x, columns);
    const uint8_t *codes = of->codes, *signs[MOST_PLANES];
    int64_t spans = columns / FEW_SPAN;
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) signs[plane] = of->signs[plane];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) sum[i] = same_lanes(0);
    for (int64_t group = 0; group < across; group += of->groups) {
        const int64_t left = across - group < of->groups ? across - group : of->groups;
        const lanes16 scales = some_halves(of->scales + 2 * group, left);
        const lanes16 zeros = of->zeros ? add_once(half, some_halves(of->zeros + 2 * group, left), one) : half;
        lanes16 sizes[MOST_PLANES], excess = add_once(same_lanes(0), zeros, scales);
#pragma GCC unroll 3
        for (int plane = 0; plane < planes; plane++) {
            sizes[plane] = some_halves(of->sizes[plane] + 2 * group, left);
            excess = add_once(excess, sizes[plane], one);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
            sum[i] = add_once(sum[i], excess, some_lanes((const float *)((const uint8_t *)x_sums + i * x_bytes) + group, left));
        const int32_t (*place)[LANE_COUNT] = of->place;
        int64_t some = spans < of->spans ? spans : of->spans;
        spans -= some;
        for (; some; some--, place += of->step, x++, codes += FEW_SPAN * bits / 8) {
            add_span(bits, planes, n, codes, signs, scales, sizes, *place, x, x_bytes, sum);
#pragma GCC unroll 3
            for (int plane = 0; plane < planes; plane++) signs[plane] += FEW_SPAN / 8;
        }
        if (group + of->groups < across || columns % FEW_SPAN == 0) continue;
#pragma GCC unroll 3
        for (int plane = 0; plane < planes; plane++) signs[plane] = of->last_signs[plane];
        add_span(bits, planes, n, of->last_codes, signs, scales, sizes, *place, x, x_bytes, sum);
    }
}

/* y[i][row] for all rows i of x and the rows of one strip of w. */
static inline __attribute__((always_inline)) void integers_strip_of(const struct stored_matrix *m, const int bits, const int planes, int64_t first,
                                                                    const uint16_t *bias, const struct inputs *x, uint16_t *y,
                                                                    int64_t y_stride) {
    struct integer_row of = integer_row(m, planes, first);
    const int64_t columns = m->columns, across = m->across, group = m->parameter[GROUP_COLUMNS], x_bytes = integers_row_bytes(columns, group);
    const int64_t rows = m->rows - first < STRIP_ROWS ? m->rows - first : STRIP_ROWS;
    for (int64_t row = 0; row < rows; row++, next_row(m, planes, &of)) {
        read_last(bits, planes, columns, &of);
        for (int64_t i = 0, n; i < x->rows; i += n) {
            const struct integer_span *from = row_after(x->packed, i * x_bytes);
            const int64_t left = x->rows - i;
            lanes16 sum[INTEGER_ROWS];
            n = left >= INTEGER_ROWS ? INTEGER_ROWS : left >= 2 ? 2 : 1;
            if (n == INTEGER_ROWS)
                add_integers(bits, planes, INTEGER_ROWS, &of, columns, across, from, x_bytes, sum);
            else if (n == 2)
                add_integers(bits, planes, 2, &of, columns, across, from, x_bytes, sum);
            else
                add_integers(bits, planes, 1, &of, columns, across, from, x_bytes, sum);
            for (int64_t k = 0; k < n; k++) {
                const float total = sum_tree(sum[k]);
                y[(i + k) * y_stride + row] = round_bf16(bias ? total + load_bf16(bias[first + row]) : total);
            }
        }
    }
}

static void integers_strip(const struct stored_matrix *m, int64_t first, const uint16_t *bias, const struct inputs *x, uint16_t *y,
                           int64_t y_stride) {
    switch (kind_of(m)) {
    case FEW_KINDS: integers_strip_of(m, 2, 0, first, bias, x, y, y_stride); break;
    case FEW_KINDS + 1: integers_strip_of(m, 2, 1, first, bias, x, y, y_stride); break;
    case FEW_KINDS + 2: integers_strip_of(m, 2, 2, first, bias, x, y, y_stride); break;
    case FEW_KINDS + 3: integers_strip_of(m, 2, 3, first, bias, x, y, y_stride); break;
    default: integers_strip_of(m, 3, 0, first, bias, x, y, y_stride);
    }
}
